"""The benchmark of precisions, small: the model against JAX's layers, how the rows differ, and what the file keeps."""

import dataclasses
import pathlib
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
from loaders import mnist, shakespeare
from measure import scripts
from training import tasks

TEXT = shakespeare.Text(np.random.default_rng(0).integers(0, 10, 4000, np.int32), 10)
MODEL = dataclasses.replace(tasks.TINY, vocabulary=TEXT.vocabulary)


def expected_logits(params: tasks.Params, tokens: jax.Array) -> jax.Array:
    """The logits of the same network, built from JAX's own layers."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, epsilon=1e-5) * scale[None, None]

    x = params["embedding"][tokens] + params["positions"][None, : tokens.shape[1]]
    for block in range(MODEL.blocks):
        own = {name: params[f"block{block}.{name}"] for name in ("norm1", "qkv", "out", "norm2", "up", "down")}
        parts = jnp.split(norm(x, own["norm1"]) @ own["qkv"], 3, -1)
        q, k, v = (part.reshape(*tokens.shape, MODEL.heads, -1) for part in parts)
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ own["out"]
        x = x + jax.nn.gelu(norm(x, own["norm2"]) @ own["up"]) @ own["down"]
    return norm(x, params["norm"]) @ params["head"].T


def test_the_transformer_equals_one_of_jax_layers() -> None:
    random = np.random.default_rng(1)
    params = {name: leaf + 0.2 * random.standard_normal(leaf.shape) for name, leaf in MODEL.init(0).items()}
    tokens = tasks.sample(jnp.array(TEXT.codes), 0, 0, 3, MODEL.context)[:, :-1]
    expected = jax.jit(expected_logits)(params, tokens).reshape(-1, TEXT.vocabulary)
    np.testing.assert_allclose(jax.jit(MODEL.logits)(params, tokens), expected, rtol=1e-4, atol=1e-4)
    assert tasks.Model().parameters == 1_017_472
    assert MODEL.parameters == sum(leaf.size for leaf in params.values())


def test_text_is_split_and_cut_into_windows() -> None:
    data = tasks.characters(quick=True, text=TEXT).data
    assert data["train"].tolist() == TEXT.codes[:3600].tolist()
    assert data["validation"].ravel()[:5].tolist() == TEXT.codes[3600:3605].tolist()
    text = jnp.arange(1000)
    windows = np.asarray(tasks.sample(text, 3, 5, 64, 20))
    assert windows.shape == (64, 21) and (np.diff(windows) == 1).all() and len(set(windows[:, 0])) > 32
    for seed, step, same in ((3, 5, True), (3, 6, False), (4, 5, False)):
        assert np.array_equal(windows, tasks.sample(text, seed, step, 64, 20)) == same
    found = tasks.spread(text, 40, 20)
    assert found[0, 0] == 0 and found[-1, -1] == 999 and (jnp.diff(found[:, 0]) >= 20).all()


def test_recorded_gradients_are_those_of_the_chosen_elements() -> None:
    workload = tasks.characters(quick=True, text=TEXT)
    found = tasks.recorded(workload, 2, 16, seed=7)
    windows = tasks.sample(workload.data["train"], 7, 0, tasks.BATCH, MODEL.context)
    grads = jax.jit(jax.grad(MODEL.loss))(params := MODEL.init(7), windows)
    assert found.shape == (2, 16, 256)
    chosen = tasks.groups(params, 16)
    expected = np.concatenate([np.asarray(grads[name]).reshape(-1)[own] for name, own in chosen.items()])
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-6)
    assert len(chosen) == 8 and (found[1] != found[0]).mean() > 0.9


def test_the_character_workload_has_scalar_losses() -> None:
    workload = precision.characters(quick=True, text=TEXT)
    params = jax.eval_shape(lambda: workload.init(0))
    batch = jax.eval_shape(workload.batch, workload.data, jnp.int32(0), jnp.int32(0))
    assert jax.eval_shape(workload.loss, params, batch).shape == ()
    assert [x.shape for x in jax.eval_shape(workload.evaluate, params, workload.data)] == [(), ()]


MASTERS = "bfloat16, 24-bit masters"
LABELS = [precision.BASE, MASTERS]


def test_finished_runs_are_kept_and_not_repeated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digits = tmp_path / "new" / "precision.json", precision.images(quick=True, dataset=mnist.digits())
    precision.measure(digits, LABELS, 1, path)
    found = scripts.read(path)
    runs = {run["label"]: run for run in found["runs"]}
    assert list(runs) == LABELS and found["settings"]["digits"]["steps"] == 96
    base = runs[precision.BASE]
    assert [step for step, _ in base["curve"]] == list(range(8, 104, 8))
    for run in runs.values():
        assert run["curve"][-1][1] == run["loss"] < 0.7 * run["curve"][0][1] and run["accuracy"] > 0.6
    # With masters, only what the network sees is rounded.
    assert 0 < abs(runs[MASTERS]["loss"] - base["loss"]) < 0.02
    for label, size, state in zip(LABELS, (4, 2), (8, 9), strict=True):
        assert runs[label]["bytes"] == {"parameter": size, "gradient": size, "state": pytest.approx(state, abs=0.01)}
    precision.plot(path)
    assert path.with_suffix(".png").stat().st_size > 10_000

    program = unittest.mock.Mock()
    program.return_value.run.return_value = None, {"loss": 0.0}
    monkeypatch.setattr(precision, "Program", program)
    for seeds, new, kept in ((1, 0, 2), (2, 2, 4)):
        program.reset_mock()
        precision.measure(digits, LABELS, seeds, path)
        assert (program.call_count, len(scripts.read(path)["runs"])) == (new, kept)
    fewer = dataclasses.replace(digits, settings=dataclasses.replace(digits.settings, steps=24))
    precision.measure(fewer, LABELS[:1], 1, path)
    assert len(scripts.read(path)["runs"]) == 1


def test_labels_are_selected_by_name_or_by_a_part_of_it() -> None:
    labels = list(precision.CONFIGURATIONS)
    assert scripts.selected(labels, ["bfloat16"]) == ["bfloat16"]
    both = [label for label in labels if "24-bit" in label or "6-bit s" in label]
    assert scripts.selected(labels, ["24-bit", "6-bit s"]) == both
    assert scripts.selected(labels, []) == labels
    with pytest.raises(SystemExit, match="nothing is named nowhere"):
        scripts.selected(labels, ["nowhere"])
