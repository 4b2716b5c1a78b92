"""The presets against their frameworks on the problem of `record_trajectories.py`: 1,000 steps whose gradients feed the
parameters back, so that a wrong rate, beta, ε, place of ε or decay cannot cancel.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.records import distance, follow, load, relative_error
from helpers.runs import random_gradients, together
from helpers.states import slots_of
from jax.example_libraries import optimizers as example_libraries
from jax.typing import DTypeLike
from oracles import frameworks
from recorded.record_trajectories import (
    FOLDER,
    KERAS,
    RECORDED,
    STEPS,
    TORCH,
    Array,
    Problem,
    Rows,
    fingerprint,
    gradient,
    listing,
    problem,
)

import adam_fn
from adam_fn import presets
from adam_fn.schedules import inverse_time

BETAS_EPS = {"b1": 0.8, "b2": 0.95, "eps": 1e-5}
OTHER = {"learning_rate": 3e-3, **BETAS_EPS}
FALLING = {**OTHER, "learning_rate": inverse_time(3e-3, 1e-2)}
KERAS_OTHER = {"lr": 3e-3, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}
THEANO_OTHER = {"learning_rate": 3e-3, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-5}
#: torch's and Keras's names of our arguments, where they differ.
NAMES = {"lr": "learning_rate", "beta_1": "b1", "beta_2": "b2", "epsilon": "eps"}


class Row(NamedTuple):
    """A preset with our arguments, and the framework's arguments for the transcription, or the name of the record."""

    preset: str
    ours: Mapping[str, Any] = {}
    theirs: Mapping[str, Any] | str = {}


def of_record(framework: str, name: str, kind: str, given: Mapping[str, Any]) -> Row:
    """The preset of a recorded row with its arguments, or without them if they are the framework's defaults."""
    ours = {NAMES.get(key, key): value for key, value in given.items() if key != "betas"}
    ours |= dict(zip(("b1", "b2"), given.get("betas", ()), strict=False))
    return Row(f"{framework}_{kind.lower()}", {} if name == kind.lower() else ours, name)


ROWS = (
    *(of_record("torch", name, *row) for name, row in TORCH.items() if "complex" not in name),
    *(of_record("keras3", name, *row) for name, row in KERAS.items()),
    Row("tensorflow1_adam"),
    Row("tensorflow1_adam", OTHER, THEANO_OTHER),
    Row("keras2_adam"),
    Row("keras2_adam", {"amsgrad": True}, {"amsgrad": True}),
    Row("keras2_adam", FALLING, {**KERAS_OTHER, "decay": 1e-2}),
    Row("keras2_adamax"),
    Row("keras2_adamax", FALLING, {**KERAS_OTHER, "decay": 1e-2}),
    Row("keras2_nadam"),
    Row("keras2_nadam", {**OTHER, "momentum_decay": 0.02}, {**KERAS_OTHER, "schedule_decay": 0.02}),
    Row("blocks_adam"),
    Row("blocks_adam", OTHER, THEANO_OTHER),
    Row("lasagne_adam"),
    Row("lasagne_adam", OTHER, THEANO_OTHER),
    Row("lasagne_adamax"),
    Row("lasagne_adamax", OTHER, THEANO_OTHER),
    Row("lasagne_amsgrad"),
    Row("lasagne_amsgrad", OTHER, THEANO_OTHER),
    Row("caffe_adam", {"learning_rate": 1e-3, "b1": 0.9}, {"base_lr": 1e-3, "momentum": 0.9}),
    Row("caffe_adam", {**OTHER, "weight_decay": 1e-2},
        {"base_lr": 3e-3, "momentum": 0.8, "momentum2": 0.95, "delta": 1e-5, "weight_decay": 1e-2}),
    Row("mxnet_adam"),
    Row("mxnet_adam", {**OTHER, "weight_decay": 1e-2}, {**THEANO_OTHER, "wd": 1e-2}),
    Row("mxnet_adamax"),
    # At this rate the parameter whose gradient is λp alone stays away from 0, where without an ε it is chaotic.
    Row("mxnet_adamax", {"learning_rate": 1e-4, "b1": 0.8, "b2": 0.95, "weight_decay": 1e-3},
        {"learning_rate": 1e-4, "beta1": 0.8, "beta2": 0.95, "wd": 1e-3}),
    Row("cntk_adam", {"learning_rate": 1e-3, "b1": 0.9, "minibatch_size": 128},
        {"lr": 1e-3, "momentum": 0.9, "minibatch_size": 128, "use_mean_gradient": True}),
    Row("cntk_adam",  # CNTK's default: the learner sees the sum over the minibatch.
        {"learning_rate": 1e-3, "b1": 0.9, "minibatch_size": 128, "eps": 1e-8 / 128, "weight_decay": 1e-2},
        {"lr": 1e-3, "momentum": 0.9, "minibatch_size": 128, "l2_regularization_weight": 1e-2}),
    Row("cntk_adam",
        {"learning_rate": 3e-4 / (1 - 0.8), "b1": 0.8, "minibatch_size": 32, "eps": 1e-5, "time_constant": 6400.0,
         "weight_decay": 1e-2},
        {"lr": 3e-4, "momentum": 0.8, "minibatch_size": 32, "epsilon": 1e-5, "variance_momentum": 6400.0,
         "l2_regularization_weight": 1e-2, "unit_gain": False, "use_mean_gradient": True}),
    Row("chainer_adam"),
    Row("chainer_adam", {"amsgrad": True}, {"amsgrad": True}),
    Row("chainer_adam", {"learning_rate": 0.5 * 3e-3, **BETAS_EPS, "weight_decay": 0.5 * 1e-3},
        {"alpha": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "eta": 0.5, "weight_decay_rate": 1e-3}),
    Row("autograd_adam"),
    Row("autograd_adam", OTHER, {"step_size": 3e-3, **BETAS_EPS}),
)  # fmt: skip


def _example_library(make: Callable[..., example_libraries.Optimizer]) -> Callable[..., optax.GradientTransformation]:
    """An optimizer of `jax.example_libraries` as a transformation."""

    def factory(step_size: float, **arguments: float) -> optax.GradientTransformation:
        init, step, get_params = make(step_size, **arguments)

        def update(g: Any, state: Any, p: Any) -> Any:
            after = step(state[0], g, state[1])
            return get_params(after) - p, (state[0] + 1, after)

        return optax.GradientTransformation(lambda p: (jnp.zeros([], int), init(p)), update)  # pyright: ignore[reportArgumentType]

    return factory


#: The frameworks that are installed with adam_fn, and arguments other than the defaults.
LIVE: Mapping[str, tuple[Callable[..., optax.GradientTransformation], Mapping[str, Any]]] = {
    "jax_adam": (_example_library(example_libraries.adam), BETAS_EPS),
    "jax_adamax": (_example_library(example_libraries.adamax), BETAS_EPS),
    "optax_adam": (optax.adam, {**BETAS_EPS, "eps_root": 1e-6, "nesterov": True}),
    "optax_adamw": (optax.adamw, {**BETAS_EPS, "eps_root": 1e-6, "weight_decay": 0.1}),
}
#: The arguments that must be given, since the framework has no default for them.
REQUIRED: Mapping[str, Mapping[str, float]] = {
    "caffe_adam": {"learning_rate": 1e-3, "b1": 0.9},
    "cntk_adam": {"learning_rate": 1e-3, "b1": 0.9, "minibatch_size": 128},
    **{name: {"learning_rate": 1e-3} for name in LIVE},
}
PRESETS = tuple(dict.fromkeys([row.preset for row in ROWS] + list(LIVE)))
DECAYING = {"keras3_adam", "keras3_adamw", "keras3_adamax", "keras3_nadam", "caffe_adam", "mxnet_adam", "mxnet_adamax",
            "cntk_adam", "chainer_adam", "torch_adam", "torch_adamw", "torch_adamax", "torch_nadam", "torch_radam",
            "optax_adam", "optax_adamw"}  # fmt: skip


def make(name: str, **arguments: Any) -> adam_fn.Transformation:
    return getattr(presets, name)(**REQUIRED.get(name, {}), **arguments)


def _id(row: Row) -> str:
    return "-".join([row.preset, *row.ours])


def of_the_framework(row: Row) -> Array:
    """The framework's parameters after the steps RECORDED, [5, 64]."""
    if isinstance(row.theirs, str):
        return load("torch" if row.preset.startswith("torch") else "keras").params[row.theirs]
    this = problem()
    oracle = getattr(frameworks, row.preset)(this.params, **row.theirs)
    return frameworks.run(oracle, lambda t, p: gradient(this, t, p), STEPS)[np.array(RECORDED) - 1]


@pytest.mark.quick
def test_every_preset_is_tested() -> None:
    assert {name for name, value in vars(presets).items() if isinstance(value, types.FunctionType)} == set(PRESETS)


def followed(txs: Sequence[optax.GradientTransformation], dtype: DTypeLike) -> Array:
    """The parameters of each after the steps RECORDED, [len(txs), 5, 64], from one program."""
    tiled = Problem(*(np.stack([x] * len(txs), axis=-2) for x in problem()))
    return np.swapaxes(follow(together(txs), tiled, dtype), 0, 1)


@functools.cache
def paths(dtype: DTypeLike) -> Array:
    with jax.enable_x64(dtype == np.float64):
        return followed([getattr(presets, row.preset)(**row.ours) for row in ROWS], dtype)


@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_a_preset_equals_its_framework(row: Row) -> None:
    expected, i = of_the_framework(row), ROWS.index(row)
    assert distance(paths(np.float64)[i], expected) < 1e-10
    assert relative_error(paths(np.float32)[i], expected) < 2e-6


@pytest.mark.parametrize("name", [name for name in TORCH if "complex" in name])
def test_a_preset_equals_its_framework_for_complex_parameters(name: str) -> None:
    row = of_record("torch", name, *TORCH[name])
    tx, expected = getattr(presets, row.preset)(**row.ours), of_the_framework(row)
    with jax.enable_x64(True):
        assert distance(follow(tx, problem(), np.float64, is_complex=True), expected) < 1e-10
    assert relative_error(follow(tx, problem(), np.float32, is_complex=True), expected) < 2e-6


@pytest.mark.parametrize(("framework", "rows"), [("torch", TORCH), ("keras", KERAS)])
def test_a_record_belongs_to_this_problem_and_these_rows(framework: str, rows: Rows) -> None:
    record = load(framework)
    assert record.text["problem"] == fingerprint(problem())
    assert record.text["rows"] == listing(rows)
    assert record.params.keys() == rows.keys()
    for numbers in problem():  # They are exact in float32.
        np.testing.assert_array_equal(numbers.astype(np.float32).astype(np.float64), numbers)
    assert (FOLDER / f"{framework}.npz").stat().st_size < 200_000


def test_adamw_of_keras_is_its_adam_with_a_decay() -> None:
    """No record has both `amsgrad` and a decay."""
    assert presets.keras3_adamw(amsgrad=True) == presets.keras3_adam(amsgrad=True, weight_decay=4e-3)


def test_presets_equal_the_installed_frameworks() -> None:
    rows = [(name, arguments) for name, (_, some) in LIVE.items() for arguments in ({}, some)]
    with jax.enable_x64(True):
        theirs = followed([LIVE[name][0](3e-3, **arguments) for name, arguments in rows], np.float64)
        ours = followed([getattr(presets, name)(3e-3, **arguments) for name, arguments in rows], np.float64)
    for row, x, y in zip(rows, ours, theirs, strict=True):
        assert distance(x, y) < 1e-10, row


@functools.cache
def decayed() -> dict[str, Any]:
    """The first update of each preset that has a decay, here of w alone, in one program."""
    mask = {"w": True, "b": False, "fixed": False}
    txs = {name: make(name, weight_decay=0.5, mask=mask) for name in sorted(DECAYING)}
    grads = dict.fromkeys(LEAVES, np.array([-0.5, 0.5, 2.0], np.float32))
    return jax.jit(lambda g, p: {name: tx.update(g, tx.init(p), p)[0] for name, tx in txs.items()})(grads, LEAVES)


LEAVES = dict.fromkeys(("w", "b", "fixed"), np.ones(3, np.float32))
STORED = {"frozen": {"w": False, "b": False, "fixed": True}, "mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_arguments_and_help(name: str) -> None:
    preset, required = getattr(presets, name), REQUIRED.get(name, {})
    parameters = inspect.signature(preset).parameters
    assert [p.name for p in parameters.values() if p.default is p.empty] == list(required)
    for argument in required:
        with pytest.raises(TypeError, match=rf"missing a required argument: '{argument}'"):
            preset(**{key: value for key, value in required.items() if key != argument})
    assert any(word in preset.__doc__ for word in ("←", "`adam_fn.nadam`", "`keras3_adam`"))

    stored = make(name, **STORED)
    assert make(name) == make(name) != stored
    slots: Any = slots_of(jax.eval_shape(stored.init, LEAVES))
    assert {slot["w"].dtype for slot in slots.values()} == {jnp.dtype("bfloat16")}
    assert all(isinstance(slot["fixed"], optax.MaskedNode) for slot in slots.values())
    assert STORED.keys() <= parameters.keys()
    assert ({"weight_decay", "mask"} <= parameters.keys()) == (name in DECAYING)
    if name in DECAYING:
        updates = decayed()[name]
        assert np.any(updates["w"] != updates["b"])
        np.testing.assert_array_equal(updates["b"], updates["fixed"])
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument 'weight_decay'"):
            make(name, weight_decay=0.5)


@pytest.mark.parametrize("name", ["caffe_adam", "cntk_adam", "chainer_adam", "keras3_adamw"])
def test_presets_work_with_inject_hyperparams(name: str) -> None:
    static = ("minibatch_size", "time_constant") if name == "cntk_adam" else ()
    tx: Any = optax.inject_hyperparams(getattr(presets, name), static_args=static)(**REQUIRED.get(name, {}))
    p = random_gradients(1, 8, seed=1)[0]
    assert {"learning_rate", "b1"} <= set(tx.init(p).hyperparams)
    (found, _), (expected, _) = (one.update(p, one.init(p), p) for one in (tx, make(name)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
