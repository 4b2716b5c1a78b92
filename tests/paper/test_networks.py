"""The surfaces and the networks: their arithmetic against NumPy, and what they write."""

import math
from pathlib import Path

import cnn
import figure3
import figure4
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surface
from flax import nnx
from helpers.runs import Array, random_gradients, relative_error, trajectories
from helpers.scripts import assert_png, quick_figure, read_json, script
from loaders import mnist

import adam_fn


class TestSurface:
    def test_paths_descend_within_the_window_and_are_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = surface.main(("--out", str(tmp_path)))
        said = capsys.readouterr().out
        for each in surface.SURFACES:
            assert each.value(*each.minimum) == 0
            assert_png(tmp_path / f"surface_{each.name}.png")
            written = read_json(tmp_path / f"surface_{each.name}.json")
            assert written["steps"] == each.steps
            assert {end["rate"] for end in written["ends"]} == set(each.rates.values())
            for optimizer, end, path in zip(surface.OPTIMIZERS, written["ends"], found[each.name], strict=True):
                assert optimizer == end["optimizer"] == path.optimizer
                assert optimizer in said
                assert path.points.shape == (each.steps + 1, 2)
                np.testing.assert_allclose(path.points[0], each.start)
                value = each.value(*path.points.astype(np.float64).T)
                np.testing.assert_allclose(path.values, value, rtol=1e-3, atol=1e-6)
                assert path.values[-1] < 0.01 * path.values[0]
                for along, (low, high) in zip(path.points.T, (each.x, each.y), strict=True):
                    assert (low <= along.min()) and (along.max() <= high)

    def test_in_the_valley_adam_first_moves_by_its_rate(self) -> None:
        valley = surface.SURFACES[1]
        path = surface.descend(valley, "Adam", 1)
        x, y = valley.start
        downhill = -np.sign([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])
        np.testing.assert_allclose(path.points[1] - path.points[0], valley.rates["Adam"] * downhill, rtol=1e-5)


class TestCnn:
    def test_all_optimizers_learn_from_one_initialisation_and_are_written(self, tmp_path: Path) -> None:
        runs = cnn.main(("--data", "digits", "--quick", "--epochs", "6", "--out", str(tmp_path)))
        assert [run.label for run in runs] == list(cnn.OPTIMIZERS)
        for run in runs:
            assert run.step_costs[0] == pytest.approx(runs[0].step_costs[0], rel=1e-5)
            assert len(run.step_costs) == 6 * 10
            assert run.epochs[-1].train_cost < 0.7 * math.log(10)
            assert run.epochs[-1].test_accuracy > 0.7
            hits = 360 * run.epochs[-1].test_accuracy  # every test image is evaluated
            assert hits == pytest.approx(round(hits), abs=1e-3)
        assert_png(tmp_path / "cnn.png")
        assert [run["label"] for run in read_json(tmp_path / "cnn.json")["runs"]] == list(cnn.OPTIMIZERS)

    def test_the_forward_pass_equals_that_of_numpy(self) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2, 16), np.uint8)
        model = cnn.CNN(16, 3, 5, rngs=nnx.Rngs(0))
        weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        kernel = weights["convolution"]["kernel"][:, :, 0]
        x = np.pad(images.reshape(2, 4, 4) / 255, ((0, 0), (1, 1), (1, 1)))
        maps = np.zeros((2, 4, 4, 3))
        for i, j in np.ndindex(4, 4):
            maps[:, i, j] = np.einsum("nab,abf->nf", x[:, i : i + 3, j : j + 3], kernel)
        pooled = np.stack([maps[:, i : i + 2, j : j + 2].max((1, 2)) for i in (0, 2) for j in (0, 2)], 1)
        hidden = np.maximum(pooled, 0).reshape(2, -1) @ weights["dense"]["kernel"]  # biases start at 0
        expected = np.maximum(hidden, 0) @ weights["out"]["kernel"]
        np.testing.assert_allclose(nnx.jit(cnn.CNN.__call__)(model, jnp.asarray(images)), expected, atol=1e-5)

    def test_batches_of_different_sizes_count_by_their_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        digits = mnist.digits()
        model = cnn.CNN(64, 2, 4, rngs=nnx.Rngs(1))
        images, labels = jnp.asarray(digits.test_images[:36]), jnp.asarray(digits.test_labels[:36])
        whole = cnn.test(model, images, labels)
        monkeypatch.setattr(cnn, "TEST_BATCH", 25)
        np.testing.assert_allclose(cnn.test(model, images, labels), whole, rtol=1e-5)


class TestFigure3:
    def test_a_quick_run_writes_figure_3(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        written = quick_figure(figure3, tmp_path)
        assert capsys.readouterr().out.count("not decided") == 4
        assert len(written["claims"]) == 4
        for kind in ("without dropout", "with dropout"):
            assert set(written[kind]) == set(figure3.OPTIMIZERS)
        assert written["with dropout"]["Adam"]["costs"] != written["without dropout"]["Adam"]["costs"]
        assert written["without dropout"]["AdaGrad"]["costs"][0][0] == pytest.approx(math.log(10), abs=0.3)

    @pytest.mark.parametrize("count", [5, 40])
    def test_whitening_decorrelates_without_another_rotation(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(figure3, "ZCA", 1e-6)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, 2, 2, 3), np.uint8)
        found = figure3.whitened(images).reshape(count, -1).astype(np.float64)
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-3)
        # Decorrelated: the covariance is 1 in the directions in which the images vary, count - 1 or all 12.
        rank = min(count - 1, 12)
        values = np.linalg.eigvalsh(found.T @ found / count)
        np.testing.assert_allclose(values[-rank:], 1, atol=1e-3)
        np.testing.assert_allclose(values[:-rank], 0, atol=1e-3)
        # ZCA, not another rotation of it: the map from image to whitened image is symmetric and positive.
        x = images.reshape(count, -1) / 255.0
        x -= x.mean(0)
        product = x.T @ found
        np.testing.assert_allclose(product, product.T, atol=1e-3)
        assert np.linalg.eigvalsh(product).min() > -1e-3

    def test_pooling_equals_that_of_flax(self) -> None:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6, 3)), jnp.float32)
        expected = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        np.testing.assert_array_equal(np.asarray(figure3.max_pool(x)), np.asarray(expected))

    @pytest.mark.parametrize("label", figure3.OPTIMIZERS)
    def test_training_equals_that_of_the_harness(self, label: str) -> None:
        rng = np.random.default_rng(0)
        data = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32), jnp.asarray(rng.standard_normal(20), jnp.float32)

        def cost(params: figure3.Parameters, data: figure3.Data, rows: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.mean((data[0][rows] @ params["layer"]["kernel"] - data[1][rows] - jax.random.normal(key)) ** 2)

        def evaluate(params: figure3.Parameters, state: optax.OptState, data: figure3.Data) -> dict[str, jax.Array]:
            return {"first": params["layer"]["kernel"][0]}

        problem = harness.Problem({"layer": {"kernel": jnp.ones(3)}}, data, cost, 20, batch=6, evaluate=evaluate)
        tx = figure3.OPTIMIZERS[label][0]
        expected = harness.sweep(label, lambda point: tx, {"rate": (0.1,)}, problem, epochs=3, seed=5)
        found = figure3.train(label, 0.1, problem, 3, 5)
        np.testing.assert_allclose(found.costs, expected.costs, rtol=1e-5)
        np.testing.assert_allclose(found.metrics["first"], expected.metrics["first"], rtol=1e-5)
        assert (found.label, found.grid["rate"].tolist()) == (label, [0.1])

    def test_second_moments_are_compared_with_eps(self) -> None:
        tx = figure3.OPTIMIZERS["Adam"][0]  # Its β₂ determines the bias weight.
        params = {"full": {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}}
        grads = {"full": {"kernel": jnp.array([[1e-9], [1e-6], [2.0]]), "bias": jnp.array([3.0])}}
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        found = jax.jit(figure3.second_moments)(params, state, (jnp.zeros(0), jnp.zeros(0)))
        assert found["median full"].item() == pytest.approx(1e-6, rel=1e-4)
        assert found["root below eps"].item() == pytest.approx(1 / 4)
        assert found["below eps"].item() == pytest.approx(2 / 4)


class TestFigure4:
    def test_the_script_writes_figure_4(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        script("paper/figure4.py", "--quick", "--data", "standin", "--out", str(tmp_path))
        assert capsys.readouterr().out.count("not decided") == 4
        assert_png(tmp_path / "figure4.png")
        (written,) = read_json(tmp_path / "figure4.json")["runs"]
        assert np.shape(written["costs"]) == (60, 2)

    def test_uncorrected_moments_lack_the_bias_corrections(self) -> None:
        b1, b2, t = 0.9, 0.999, np.arange(1.0, 21)[:, None]
        points = ({"b1": jnp.float32(b1), "b2": jnp.float32(b2), "corrected": jnp.float32(x)} for x in (0, 1))
        txs = *map(figure4.optimizer, points), adam_fn.adam(1.0, b1, b2)
        raw, corrected, adam = trajectories(txs, random_gradients(20, 7), np.zeros(7))[1]
        assert relative_error(raw, adam * (1 - b1**t) / np.sqrt(1 - b2**t)) < 1e-5
        assert relative_error(corrected, adam) < 1e-5

    def test_the_negative_bound_equals_that_of_numpy(self) -> None:
        rng = np.random.default_rng(0)
        images, noise = rng.integers(0, 256, (3, 6), np.uint8), rng.standard_normal((3, 2))
        model = figure4.Autoencoder(6, 4, 2, rngs=nnx.Rngs(0))
        weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

        def layer(name: str, x: Array) -> Array:
            return x @ weights[name]["kernel"] + weights[name]["bias"]

        x = images / 255
        hidden = np.log1p(np.exp(layer("encoder", x)))
        mean, deviation = layer("mean", hidden), np.exp(layer("log_variance", hidden) / 2)
        decoded = layer("logits", np.log1p(np.exp(layer("decoder", mean + deviation * noise))))
        p = 1 / (1 + np.exp(-decoded))
        likelihood = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum(1)
        # KL of two Gaussians: log(σ₂/σ₁) + (σ₁² + (μ₁ - μ₂)²)/(2σ₂²) - 1/2
        divergence = (-np.log(deviation) + (deviation**2 + mean**2) / 2 - 0.5).sum(1)
        found = nnx.jit(figure4.negative_bound)(model, jnp.asarray(images), jnp.asarray(noise, jnp.float32))
        assert found.item() == pytest.approx((divergence - likelihood).mean(), rel=1e-5)

    def test_losses_have_the_places_of_their_points_in_the_grid(self) -> None:
        weights = {"b1": 1.0, "b2": 1e2, "corrected": 1e4, "rate": 1e6}
        first = sum(weight * np.array(figure4.GRID[name]) for name, weight in weights.items())
        costs = np.stack([first] * 3, 1)
        costs[17, 1] = np.nan
        sweep = harness.Sweep("", {}, costs, {})
        b1, b2, corrected, rate = np.ix_(figure4.B1, figure4.B2, figure4.CORRECTED, figure4.RATES)
        np.testing.assert_allclose(figure4.losses(sweep, 1), b1 + 1e2 * b2 + 1e4 * corrected + 1e6 * rate)
        assert np.isinf(figure4.losses(sweep, 3).ravel()[17]), "what diverged once stays diverged"
        assert np.isfinite(figure4.losses(sweep, 3)).sum() == 59
