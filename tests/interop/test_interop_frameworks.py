"""States of torch and Keras, recorded by `record_states.py`, converted to ours and back."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import by_name, scanned
from helpers.states import slots_of
from recorded.record_states import AFTER, BEFORE, FOLDER, KERAS, SHAPES, TORCH

import adam_fn
from adam_fn import masks, presets
from adam_fn.interop import from_keras, from_torch, to_keras, to_torch, torch_groups, torch_tensors

FLIP = {"*/kernel": (1, 0)}
OURS: Mapping[str, Any] = {
    "torch/adam": presets.torch_adam(),
    "torch/adam_amsgrad": presets.torch_adam(amsgrad=True),
    "torch/adamw_groups": presets.torch_adamw(2**-10, weight_decay=2**-3, mask=masks.path("*/kernel")),
    "torch/adamax": presets.torch_adamax(),
    "torch/nadam": presets.torch_nadam(),
    "torch/radam": presets.torch_radam(),
    "torch/complex_adam": presets.torch_adam(),
    "keras/adam": presets.keras3_adam(),
    "keras/adam_amsgrad": presets.keras3_adam(amsgrad=True),
    "keras/adamw_ema": presets.keras3_adamw(2**-10, 2**-3),
    "keras/adamax": presets.keras3_adamax(),
    "keras/nadam": presets.keras3_nadam(),
    "keras/lion": adam_fn.lion(1e-3, weight_decay=0.0),
}


def path(name: str) -> str:
    """Our name for a parameter of torch."""
    return name.replace(".", "/").replace("weight", "kernel")


PATHS = [path(name) for name in SHAPES]


@functools.cache
def record(framework: str) -> Mapping[str, Any]:
    with np.load(FOLDER / f"{framework}.npz") as file:
        return dict(file)


def tree(framework: str, prefix: str) -> dict[str, dict[str, Any]]:
    """Recorded arrays in our layout."""
    found: dict[str, dict[str, Any]] = {"dense": {}, "head": {}}
    for name in SHAPES:
        layer, leaf = path(name).split("/")
        x = record(framework)[f"{prefix}/{name}"]
        found[layer][leaf] = jnp.asarray(np.moveaxis(x, -1, -2) if framework == "torch" and leaf == "kernel" else x)
    return found


def torch_state(row: str) -> dict[str, Any]:
    """A recorded `state_dict`, of arrays."""
    state: dict[int, dict[str, Any]] = {}
    for key, x in record("torch").items():
        if key.startswith(f"{row}/state/"):
            number, name = key.removeprefix(f"{row}/state/").split("/")
            state.setdefault(int(number), {})[name] = x
    return {"state": state, "param_groups": json.loads(str(record("torch")[f"{row}/groups"]))}


@dataclasses.dataclass
class Variable:
    """The parts of a Keras variable that are used."""

    name: str
    value: Any

    def numpy(self) -> Any:
        return self.value


def keras_variables(row: str) -> list[Variable]:
    names = json.loads(str(record("keras")[f"{row}/names"]))
    return [Variable(name, record("keras")[f"{row}/variables/{i}"]) for i, name in enumerate(names)]


@functools.cache
def converted(row: str) -> tuple[Any, Any]:
    """The recorded parameters, and the recorded state converted to ours."""
    framework, name = row.split("/")
    params = tree(framework, f"{name}/params")
    if framework == "torch":
        return params, from_torch(OURS[row], params, torch_state(name), paths=path, transpose=FLIP)
    return params, from_keras(OURS[row], params, keras_variables(name), paths=PATHS)


@functools.cache
def ended() -> Mapping[str, Any]:
    """Our parameters after the further steps, of all rows, from one program."""
    params, states, grads = {}, {}, {}
    for row in OURS:
        params[row], states[row] = converted(row)
        factor = 1 + 0.5j if "complex" in row else 1
        framework = row.split("/")[0]
        grads[row] = jax.tree.map(lambda g, factor=factor: g[BEFORE:] * factor, tree(framework, "grads"))

    return scanned(by_name(OURS), params, grads, states)[0][0]


@pytest.mark.quick
def test_every_record_is_tested() -> None:
    assert {f"torch/{row}" for row in TORCH} | {f"keras/{row}" for row in KERAS} == set(OURS)
    assert len(tree("torch", "grads")["dense"]["bias"]) == BEFORE + AFTER


@pytest.mark.parametrize("row", OURS)
def test_training_goes_on_from_states_of_torch_and_keras(row: str) -> None:
    framework, name = row.split("/")
    start, expected = (tree(framework, f"{name}/{when}") for when in ("params", "after"))
    error = optax.tree.norm(optax.tree.sub(ended()[row], expected))
    assert error < 1e-6 * optax.tree.norm(expected)
    # The rounding of float32 parameters is the largest error; a wrong moment or count would show at 1e-2.
    assert error < 1e-4 * optax.tree.norm(optax.tree.sub(expected, start))


@pytest.mark.parametrize("row", [row for row in OURS if row.startswith("torch")])
def test_our_state_converts_back_to_torch(row: str) -> None:
    params, state = converted(row)
    saved = torch_state(row.split("/")[1])
    found = to_torch(OURS[row], params, state, {**saved, "state": {}}, paths=path, transpose=FLIP)
    assert found["param_groups"] == saved["param_groups"]
    chex.assert_trees_all_equal_shapes_and_dtypes(found["state"], saved["state"])
    for (keys, y), x in zip(jax.tree.leaves_with_path(saved["state"]), jax.tree.leaves(found["state"]), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6 if "mu_product" in str(keys) else 0)


@pytest.mark.parametrize("row", [row for row in OURS if row.startswith("keras")])
def test_our_state_converts_back_to_keras(row: str) -> None:
    params, state = converted(row)
    expected = keras_variables(row.split("/")[1])
    places = [i for i, x in enumerate(expected) if "average" not in x.name and x.name != "learning_rate"]
    blank = [Variable(x.name, 0 * x.value if i in places else x.value) for i, x in enumerate(expected)]
    found = to_keras(OURS[row], params, state, blank, paths=path, names=list(SHAPES))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.value.shape, y.value.dtype)
        np.testing.assert_allclose(x, y.value, rtol=2e-6 if y.name == "variable" else 0)


def test_all_ways_to_name_parameters_give_the_same_state() -> None:
    params, state = converted("torch/adam")
    saved, tx = torch_state("adam"), OURS["torch/adam"]
    without: dict[str, Any] = {**saved, "param_groups": [{"params": [0, 1, 2, 3]}]}
    texts = {**without, "state": {str(number): entry for number, entry in saved["state"].items()}}  # As JSON has it.
    ways: Any = (
        (saved, {"paths": PATHS}),
        (saved, {"paths": {name: path(name) for name in SHAPES}}),
        (without, {"paths": path, "names": list(SHAPES)}),
        (texts, {"paths": PATHS}),
    )
    for given, options in ways:
        chex.assert_trees_all_equal(from_torch(tx, params, given, transpose=FLIP, **options), state)


def test_parameters_without_a_counterpart_are_left_out() -> None:
    """Conversions in both directions leave them out."""
    params, state = converted("torch/adam")
    saved, tx = torch_state("adam"), OURS["torch/adam"]
    some = [None, None, "head/kernel", "head/bias"]
    head = {"head": params["head"]}
    found: Any = from_torch(tx, head, saved, paths=some, transpose=FLIP)
    chex.assert_trees_all_equal(slots_of(found)["nu"]["head"], slots_of(state)["nu"]["head"])
    adam, *rest = found
    later: Any = (adam._replace(count=adam.count + 1), *rest)
    back = to_torch(tx, head, later, saved, paths=some, transpose=FLIP)
    assert [int(back["state"][number]["step"]) for number in range(4)] == [BEFORE, BEFORE, BEFORE + 1, BEFORE + 1]


def test_parameter_groups_of_torch_are_read() -> None:
    saved = torch_state("adamw_groups")
    (first, decaying), (second, others) = torch_groups(saved, paths=path)
    assert (decaying, others) == (["dense/kernel", "head/kernel"], ["dense/bias", "head/bias"])
    assert (first["weight_decay"], second["weight_decay"], second["lr"]) == (2**-3, 0.0, 2**-10)


def test_kernels_of_convolutions_are_transposed() -> None:
    """Kernels change from [out, in, height, width] to [height, width, in, out]; the first matching pattern counts."""
    params = {"conv": {"kernel": jnp.zeros((5, 7, 2, 3))}, "dense": {"kernel": jnp.zeros((4, 6))}}
    moment = np.arange(3 * 2 * 5 * 7, dtype=np.float32).reshape(3, 2, 5, 7)
    dense = np.arange(24, dtype=np.float32).reshape(6, 4)
    state = {i: {"step": 1, "exp_avg": x, "exp_avg_sq": 2 * x} for i, x in enumerate((moment, dense))}
    saved: dict[str, Any] = {"state": state, "param_groups": [{"params": [0, 1]}]}
    transpose: Any = {"conv*": (2, 3, 1, 0), "*kernel": (1, 0)}
    options: dict[str, Any] = {"paths": ["conv/kernel", "dense/kernel"], "transpose": transpose}
    tx = presets.torch_adam()
    found: Any = from_torch(tx, params, saved, **options)
    np.testing.assert_array_equal(slots_of(found)["mu"]["conv"]["kernel"], moment.transpose(2, 3, 1, 0))
    back = to_torch(tx, params, found, saved, **options)
    np.testing.assert_array_equal(back["state"][0]["exp_avg_sq"], 2 * moment)
    np.testing.assert_array_equal(back["state"][1]["exp_avg"], dense)


def test_torch_errors_list_every_path() -> None:
    params, _ = converted("torch/adam")
    tx, saved, cut, stepped = OURS["torch/adam"], *(torch_state("adam") for _ in range(3))
    del cut["state"][0]["exp_avg"], cut["state"][3]
    stepped["state"][1]["step"] = np.float32(4)
    wrong = [PATHS[0], "dense/b", *PATHS[2:]]
    with pytest.raises(ValueError, match="does not fit") as error:
        from_torch(tx, params, cut, paths=wrong)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "dense/bias: no mu, nu",
        "dense/kernel: no mu",
        "dense/kernel: nu has shape (3, 5), the parameter (5, 3)",
        "head/bias: no mu, nu",
        "head/kernel: mu has shape (2, 3), the parameter (3, 2)",
        "head/kernel: nu has shape (2, 3), the parameter (3, 2)",
        "dense/b: is not a parameter",
    ]
    two: Any = {"dense.weight": "dense/kernel", "dense.bias": "dense/bias"}
    whole: Any = {"optimizer": saved}
    unnamed: Any = {**saved, "param_groups": [{"params": [0, 1, 2, 3]}]}
    for each, given, paths, transpose, message in (
        (tx, stepped, path, {}, r"(?s)dense/kernel: 10.*dense/bias: 4"),
        (tx, saved, path, {"*/weight": (1, 0)}, r"\*/weight: matches no path"),
        (tx, saved, path, {"*/kernel": (0, 2)}, "are not the axes of dense/kernel"),
        (tx, whole, path, {}, r"expected the state_dict.*\['optimizer'\]"),
        (tx, unnamed, path, {}, "needs the names of torch's parameters"),
        (tx, saved, two, {}, r"(?s)head\.weight: paths has no entry.*head\.bias: paths has no entry"),
        (tx, saved, PATHS[:3], {}, "has 4 parameters, but paths has 3"),
        (tx, saved, [*PATHS[:3], "dense/bias"], {}, "dense/bias: more than once"),
        (adam_fn.yogi(1e-3), saved, path, {}, "torch has no counterpart of Yogi"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            from_torch(each, params, given, paths=paths, transpose=transpose)
    with pytest.raises(ValueError, match=r"(?s)dense/b: is not a trained.*dense/bias: is not among paths"):
        to_torch(tx, params, tx.init(params), saved, paths=wrong)


def test_keras_variables_without_names_are_read_in_order_and_checked() -> None:
    params, state = converted("keras/adam_amsgrad")
    tx, plain, named = OURS["keras/adam_amsgrad"], OURS["keras/adam"], keras_variables("adam_amsgrad")
    arrays = [x.value for x in named]
    by_number, scheduled = {str(i): x for i, x in enumerate(arrays)}, [arrays[0], *arrays[2:]]
    for given in (arrays, by_number, scheduled):  # A scheduled rate is no variable.
        chex.assert_trees_all_equal(from_keras(tx, params, given, paths=PATHS), state)
    accumulated = keras_variables("adam")
    accumulated[2].name = "x_gradient_accumulator"
    crossed = r"(?s)dense/bias: mu has shape \(5, 3\).*dense/kernel: mu has shape \(3,\)"
    for each, given, paths, message in (
        (plain, arrays, PATHS, "there are 14 variables, expected 8 and 1 or 2"),
        (plain, named, PATHS, "variable 10 is dense_weight_velocity_hat, expected a momentum"),
        (plain, accumulated, PATHS, "gradients are accumulated"),
        (tx, arrays, [PATHS[1], PATHS[0], *PATHS[2:]], crossed),
    ):
        with pytest.raises(ValueError, match=message):
            from_keras(each, params, given, paths=paths)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_a_real_torch_optimizer_goes_on(tmp_path: Path) -> None:
    """Real tensors and a real file are read, and torch's own optimizer continues from our state."""
    import torch  # pyright: ignore[reportMissingImports]

    params, state = converted("torch/adamw_groups")
    tx = OURS["torch/adamw_groups"]
    tensors = torch_tensors(torch_state("adamw_groups"))
    chex.assert_trees_all_equal(from_torch(tx, params, tensors, paths=path, transpose=FLIP), state)
    torch.save(tensors, tmp_path / "optimizer.pt")
    chex.assert_trees_all_equal(from_torch(tx, params, tmp_path / "optimizer.pt", paths=path, transpose=FLIP), state)

    start = {name: torch.tensor(record("torch")[f"adamw_groups/params/{name}"]) for name in SHAPES}
    weights, biases = ([item for item in start.items() if item[0].endswith(kind)] for kind in ("weight", "bias"))
    optimizer = torch.optim.AdamW(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}], 2**-10, weight_decay=2**-3
    )
    found = to_torch(tx, params, state, optimizer.state_dict(), paths=path, transpose=FLIP)
    optimizer.load_state_dict(torch_tensors(found))
    for t in range(BEFORE, BEFORE + AFTER):
        for name, p in start.items():
            p.grad = torch.tensor(record("torch")[f"grads/{name}"][t])
        optimizer.step()
    for name, p in start.items():
        np.testing.assert_allclose(p.numpy(), record("torch")[f"adamw_groups/after/{name}"], rtol=1e-6)
