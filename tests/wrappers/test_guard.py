"""Skipped steps leave no trace, whatever is stored; clipping by the norm at every magnitude."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import random_gradients
from helpers.states import slots_of

import adam_fn

STEPS, SIZE = 40, 64
PARAMS = {"w": jnp.linspace(-1, 1, SIZE).reshape(2, -1), "b": jnp.asarray([1.0, -0.0]), "n": jnp.arange(3), "z": None}


def _grads(steps: int) -> dict[str, Any]:
    """The gradients of the floating leaves."""
    grads = random_gradients(steps, SIZE + 2)
    return {"w": grads[:, :SIZE].reshape(steps, 2, -1), "b": grads[:, SIZE:]}


def _low(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


KINDS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "float32": lambda: adam_fn.adamw(lambda count: 0.1 / (count + 1)),
    "24bit": lambda: adam_fn.adan(0.1, storage="24bit"),
    "masters": lambda: adam_fn.master_weights(adam_fn.adam(0.1)),
    "rounding": lambda: adam_fn.stochastic_rounding(adam_fn.adam(0.1, storage="16bit"), 1),
    "average": lambda: optax.chain(adam_fn.lamb(0.1), adam_fn.average_params(0.9)),
    "swats": lambda: adam_fn.swats(0.1, tolerance=1e-2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_faults_leave_no_trace(kind: str) -> None:
    """In many trainings, a quarter of all steps is faulty in one element: each ends as it would without those steps."""
    members, good, rng = 128, 30, np.random.default_rng(0)
    tx: Any = adam_fn.skip_nonfinite(KINDS[kind](), max_consecutive=STEPS)
    # The faulty steps, and the gradient of each step: the good steps take them in their order.
    faulty = rng.permuted(np.broadcast_to(np.arange(STEPS) >= good, (members, STEPS)), axis=1)
    place = np.where(faulty, 0, np.cumsum(~faulty, axis=1) - 1)
    clean = _grads(STEPS)
    grads = {k: v[place] for k, v in clean.items()}
    for i, t in np.argwhere(faulty):
        leaf = grads["w" if rng.random() < 0.7 else "b"][i, t]
        leaf[tuple(rng.integers(leaf.shape))] = rng.choice([np.nan, np.inf, -np.inf])
    # The same number of members, so that the sums of `lamb` and `swats` are rounded alike.
    alike = jax.tree.map(lambda x: np.broadcast_to(x[:good], (members, good, *x.shape[1:])), clean)
    params = PARAMS
    if kind in ("masters", "rounding"):
        params, grads, alike = map(_low, (params, grads, alike))

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        grads = {**grads, "n": np.zeros(3, jax.dtypes.float0), "z": None}
        if kind in ("24bit", "masters", "average"):
            return tx.update.write(grads, state, params), None
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(jax.vmap(lambda grads: jax.lax.scan(step, (params, tx.init(params)), grads)[0]))
    (after, state), (expected, untouched) = run(grads), run(alike)
    np.testing.assert_array_equal(state.skipped, STEPS - good)
    np.testing.assert_array_equal(state.consecutive, np.argmin(faulty[:, ::-1], axis=1))
    assert not untouched.skipped.any()
    chex.assert_tree_all_finite((after, state))
    chex.assert_trees_all_equal((after, state.inner), (expected, untouched.inner))


def test_a_skipped_step_changes_no_bit() -> None:
    """Updates and steps in place leave parameters as they are, even one of -0."""
    tx: Any = adam_fn.skip_nonfinite(adam_fn.adan(0.1, storage="24bit"))
    step: Any = adam_fn.make_step(tx)
    grads: Any = {**jax.tree.map(lambda x: jnp.asarray(x[0]), _grads(1)), "n": jnp.zeros(3, int), "z": None}
    params, state = step(jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS), grads)
    params["b"] = params["b"].at[1].set(-0.0)
    before = jax.device_get((params, state.inner))
    grads["w"] = grads["w"].at[1, 3].set(jnp.nan)
    updates, other = tx.update(grads, state, params)
    by_updates: Any = optax.apply_updates(params, updates)
    params, state = step(params, state, grads)
    for found in ((by_updates, other.inner), (params, state.inner)):
        chex.assert_trees_all_equal(jax.device_get(found), before)
        assert np.signbit(found[0]["b"])[1]
    assert (int(state.skipped), int(state.consecutive)) == (1, 1)


@pytest.mark.quick
def test_past_the_limit_the_failure_shows_as_in_optax() -> None:
    tx: Any = adam_fn.skip_nonfinite(adam_fn.adam(0.1), 2)
    peer: Any = optax.apply_if_finite(adam_fn.adam(0.1), 2)
    params = jnp.ones(3)
    ours, theirs = tx.init(params), peer.init(params)
    for i, bad in enumerate([0, 1, 0, 1, 1, 0, 1, 1, 1, 1]):
        g = jnp.asarray([1.0, 2.0, jnp.nan if bad else 3.0])
        found, ours = tx.update(g, ours, params)
        expected, theirs = peer.update(g, theirs, params)
        np.testing.assert_array_equal(found, expected)
        chex.assert_trees_all_equal(ours.inner, theirs.inner_state)
        assert np.isnan(found[2]) == (i >= 8)
        assert int(ours.consecutive) == int(theirs.notfinite_count)
    assert int(ours.skipped) == 5  # Seven were faulty; optax counts those.
    assert np.isnan(jnp.asarray(slots_of(ours.inner)["mu"])[2])


def _clip(tree: Any, max_norm: float = 1.0) -> Any:
    tx: Any = adam_fn.clip_by_global_norm(max_norm)
    return jax.jit(tx.update)(tree, tx.init(tree))[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_clipping_is_accurate_at_every_magnitude(dtype: str) -> None:
    rng, info = np.random.default_rng(0), jnp.finfo(dtype)
    exponents = [-6, -2, 0, 2, 4] if dtype == "float16" else [-36, -28, -21, -18, -10, -9, -8, 0, 8, 18, 19, 20, 36]
    scales, n = 10.0 ** np.asarray(exponents), len(exponents)
    values = rng.standard_normal((n, 7, 5)) * scales[:, None, None], rng.uniform(-1, 1, n) * scales
    a, c = (x.astype(jnp.dtype(dtype)) for x in values)
    integers = np.broadcast_to(np.arange(2), (n, 2))
    tree = {"a": a, "b": {"c": c, "none": None, "int": integers}}
    exact = [np.asarray(x, np.complex128 if dtype == "complex64" else float) for x in (a, c)]
    norms = np.sqrt(sum((np.abs(x) ** 2).reshape(n, -1).sum(1) for x in exact))
    max_norms = (1.0, 1e-20, 1e20)
    clipped = jax.jit(lambda tree: [jax.vmap(functools.partial(_clip, max_norm=x))(tree) for x in max_norms])(tree)
    for max_norm, found in zip(max_norms, clipped, strict=True):
        assert found["b"]["none"] is None
        np.testing.assert_array_equal(found["b"]["int"], integers)
        for x, y in zip(exact, (found["a"], found["b"]["c"]), strict=True):
            assert y.dtype == dtype
            expected = x * np.minimum(1.0, max_norm / norms).reshape(n, *[1] * (x.ndim - 1))
            tiny = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
            error = np.abs(np.asarray(y, x.dtype) - expected)
            np.testing.assert_array_less(error, np.abs(expected) * (float(info.eps) + 1e-6) + tiny)


SMALL = {"a": jnp.linspace(-3, 3, 8), "b": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("tree", "max_norm", "expected"),
    [
        ({"a": jnp.zeros(3, jnp.float16)}, 1.0, {"a": np.zeros(3)}),
        ({"a": jnp.ones(3)}, 0.0, {"a": np.zeros(3)}),
        (
            {"a": jnp.asarray([jnp.inf, 1.0, 3e38]), "b": jnp.asarray([-jnp.inf, 0.0], jnp.float16)},
            2.0,
            {"a": np.asarray([2**0.5, 0, 0]), "b": np.asarray([-(2**0.5), 0])},
        ),
        (
            {"a": jnp.asarray([jnp.inf, 1]), "b": jnp.asarray([jnp.nan, 1])},
            1.0,
            dict.fromkeys("ab", np.full(2, np.nan)),
        ),
        ({"a": jnp.full((4, 4), 3e38)}, 1.0, {"a": np.full((4, 4), 0.25)}),  # The norm itself is beyond float32.
        ({"none": None}, 1.0, {"none": None}),
        (SMALL, 100.0, SMALL),
    ],
    ids=["zero", "to zero", "infinity", "nan", "huge", "empty", "small"],
)
def test_clipping_handles_zero_infinity_and_nan(tree: Any, max_norm: float, expected: Any) -> None:
    found = jax.tree.map(lambda x: np.asarray(x, float), _clip(tree, max_norm))
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: np.asarray(x, float), expected), rtol=1e-3)


def test_clipping_has_a_derivative_and_takes_an_injected_norm() -> None:
    slope: Any = jax.grad(lambda c: _clip({"a": c * jnp.zeros(2), "b": c * jnp.ones(1)}, 0.5)["b"].sum())(2.0)
    assert abs(slope) < 1e-6
    injected: Any = optax.inject_hyperparams(adam_fn.clip_by_global_norm)(0.5)
    found, _ = injected.update(SMALL, injected.init(SMALL), SMALL)
    expected, _ = optax.clip_by_global_norm(0.5).update(SMALL, optax.EmptyState())
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
