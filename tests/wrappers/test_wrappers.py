"""Optimizers that are not elementwise, in use: dtypes, optax around them, injected hyperparameters, zeros and nan."""

import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import scanned

import adam_fn
from adam_fn import schedules

WRAPPED: dict[str, Callable[..., Any]] = {
    "swats": adam_fn.swats,
    "lamb": lambda rate: adam_fn.lamb(rate, weight_decay=0.1, mask=adam_fn.masks.rank(2)),
    "cautious": lambda rate: adam_fn.cautious(adam_fn.adamw(rate)),
    "average": lambda rate: optax.chain(adam_fn.adam(rate), adam_fn.average_params()),
}
RATED = [name for name in WRAPPED if name != "average"]
BY_VALUE: dict[str, Callable[..., Any]] = {
    **{name: WRAPPED[name] for name in RATED},  # `optax.chain` is a closure.
    "average": adam_fn.average_params,
    "guard": lambda rate: adam_fn.skip_nonfinite(adam_fn.adam(rate), 3),
    "clip": adam_fn.clip_by_global_norm,
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_wrapped_optimizers_are_equal_by_value(name: str) -> None:
    make = BY_VALUE[name]
    value = 1e-3 if name == "clip" else schedules.inverse_sqrt(1e-3)
    assert make(value) == make(value)
    assert hash(make(value)) == hash(make(value))
    assert make(value) != make(2e-3)
    assert pickle.loads(pickle.dumps(make(value))) == make(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WRAPPED)
def test_parameters_and_state_stay_finite_and_of_their_dtype(name: str, dtype: str) -> None:
    params = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype)}
    grads = jax.tree.map(lambda x: jnp.stack([scale * x for scale in (1e-4, 0, 3e-4)]), params)
    (after, state), _ = scanned(WRAPPED[name](1e-2), params, grads)
    chex.assert_tree_all_finite((after, state))
    assert (after["w"] != 1).all()


@pytest.mark.parametrize("name", WRAPPED)
def test_every_wrapper_works_inside_multi_steps(name: str) -> None:
    params = {"w": jnp.linspace(0.5, 1, 6).reshape(3, 2), "b": jnp.ones(2)}
    tx, grads = WRAPPED[name](1e-2), jax.tree.map(lambda p: jnp.stack([jnp.sin(p)] * 3), params)
    several = optax.MultiSteps(tx, 2).gradient_transformation()
    (found, _), _ = scanned(several, params, jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads))
    (expected, _), _ = scanned(tx, params, grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "options", "static"),
    [
        (adam_fn.swats, {"tolerance": 1.0}, ()),
        (adam_fn.cautious, {"tx": adam_fn.adam(1e-2)}, "tx"),
        (adam_fn.lamb, {"learning_rate": 1e-2}, ()),
        (adam_fn.average_params, {}, ()),
    ],
)
def test_injected_hyperparameters_give_the_same_updates(make: Any, options: dict[str, Any], static: Any) -> None:
    """Every number of the signature is injected as an array."""
    p = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}
    grads = jax.tree.map(lambda x: jnp.stack([jnp.sin(x)] * 4), p)
    txs = make(**options), optax.inject_hyperparams(make, static_args=static)(**options)
    chex.assert_trees_all_close(*(scanned(tx, p, grads)[1] for tx in txs), rtol=1e-6)


def test_frozen_leaves_of_swats_stay_as_they_are() -> None:
    """They may have any shape; they have no m that could become a momentum."""
    params = {"w": jnp.ones(3), "a": jnp.ones(3), "b": jnp.ones(1), "c": jnp.ones(())}
    tx: Any = adam_fn.swats(1e-2, tolerance=1e3, frozen=adam_fn.masks.path("a", "b", "c"))
    (after, state), _ = scanned(tx, params, jax.tree.map(lambda x: jnp.stack([x] * 4), params))
    assert state.switched
    chex.assert_trees_all_equal({**after, "w": params["w"]}, params)
    assert (after["w"] < 1).all()


def test_swats_leaves_its_average_alone_where_the_rate_is_undefined() -> None:
    tx: Any = adam_fn.swats(1e-2, b1=0.5)
    p = jnp.ones(3)
    _, state = tx.update(p, tx.init(p), p)
    assert state.average > 0
    for undefined in (0 * p, jnp.full(3, jnp.nan)):
        assert tx.update(undefined, state, p)[1].average == state.average


TRACE, ADAM = optax.trace(1.0), adam_fn.adam(1e-2, eps=0.0)


@pytest.mark.parametrize(
    ("tx", "grads", "expected"),
    [
        (adam_fn.cautious(TRACE, floor=0.5), [[1, 1, 1, 1]], [0, 0, 0, 0]),  # Up the gradient: all of it is dropped.
        (  # Half of them left, so twice the size.
            adam_fn.cautious(optax.chain(TRACE, optax.scale(-1))),
            [[1, 1, 1, 1], [1, 1, -0.5, 0]],
            [-4, -4, 0, 0],
        ),
        (adam_fn.cautious(ADAM), [[1, 1, 0, 0]], [-2e-2, -2e-2, 0, 0]),
        (adam_fn.cautious(ADAM), [[np.nan, 1, 0, 0]], [np.nan, -4e-2, 0, 0]),  # A nan must not count as dropped.
        (adam_fn.cautious(ADAM), np.full((1, 4), 1e-7, np.float16), np.full(4, -1e-2)),  # Their squares are 0.
        (adam_fn.cautious(optax.sgd(1.0)), [[1 + 1j, 2 - 1j]], [-1 - 1j, -2 + 1j]),
    ],
    ids=["wrong sign", "half", "zero", "nan", "float16", "complex"],
)
def test_cautious_drops_updates_that_point_up_the_gradient(tx: Any, grads: Any, expected: Any) -> None:
    grads = jnp.asarray(grads)
    grads = grads.astype(jnp.float32) if jnp.issubdtype(grads.dtype, jnp.integer) else grads
    np.testing.assert_allclose(scanned(tx, grads[0], grads)[1][-1], expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lamb_rounds_once(dtype: Any) -> None:
    """Low-precision parameters, whose norm float16 could not hold, get the updates of float32, rounded."""
    p, *g = (jnp.asarray(x, dtype) for x in np.random.default_rng(1).standard_normal((6, 64, 64)))
    p = p * 2000
    tx: Any = adam_fn.lamb(1e-4, weight_decay=1e-4)

    def last(kind: Any) -> jax.Array:
        state, updates = tx.init(p.astype(kind)), p
        for x in g:
            updates, state = tx.update(x.astype(kind), state, p.astype(kind))
        return updates

    found, expected = last(dtype), last(jnp.float32)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected.astype(dtype))
    assert jnp.isfinite(found).all()


@pytest.mark.parametrize("name", RATED)
def test_gradient_through_an_update_at_zero_is_finite(name: str) -> None:
    def loss(rate: jax.Array, p: Any) -> jax.Array:
        tx = WRAPPED[name](rate)
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(lambda x: 0 * x, p), state, p)
            p = optax.apply_updates(p, updates)
        return sum((jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p)), jnp.zeros(()))

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(1e-2), {"a": jnp.ones((2, 2)), "b": jnp.zeros(3)})
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


def test_update_takes_a_learning_rate_for_one_step() -> None:
    p = jnp.asarray([[1.0, -2.0]])
    for name in RATED:
        once, other = WRAPPED[name](1e-3), WRAPPED[name](1e-1)
        a, _ = once.update(p, once.init(p), p, learning_rate=1e-1)
        b, _ = other.update(p, other.init(p), p)
        np.testing.assert_allclose(a, b, rtol=1e-6)


ONES: Any = jnp.ones(2)
INNER: Any = adam_fn.adam(0.1)
UNTYPED: Any = adam_fn  # For arguments that a type checker refuses too.


def update(tx: Any, state: Any = None, params: Any = ONES) -> Any:
    return tx.update(ONES, tx.init(ONES) if state is None else state, params)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: update(adam_fn.swats(1e-3), {}), "swats expected its own state, .*, got a dict"),
        (lambda: update(adam_fn.lamb(1e-3), {}), r"lamb expected the state that tx.init\(params\) makes, got a dict"),
        (
            lambda: update(adam_fn.skip_nonfinite(INNER), INNER.init(ONES)),
            "skip_nonfinite expected its own state, Guard",
        ),
        (lambda: adam_fn.swats(tolerance=0), "tolerance must be positive, got 0"),
        (lambda: adam_fn.swats(b1=0.0), r"b1 must be in \(0, 1\), because swats needs a momentum; got 0"),
        (lambda: adam_fn.lamb(1e-3).update(ONES, adam_fn.lamb(1e-3).init(ONES)), "lamb needs the parameters"),
        (lambda: adam_fn.cautious(INNER, 0), r"floor must be in \(0, 1\], got 0"),
        (lambda: adam_fn.average_params(1.0), r"decay must be in \[0, 1\), got 1"),
        (lambda: update(adam_fn.average_params(), params=None), "average_params needs the parameters"),
        (lambda: adam_fn.averaged_params(INNER.init(ONES), ONES), "exactly one average_params, found 0"),
        (lambda: adam_fn.averaged_params([adam_fn.average_params().init(ONES)] * 2, ONES), "exactly one .*, found 2"),
        (lambda: adam_fn.clip_by_global_norm(-1.0), "max_norm must be at least 0, got -1"),
        (lambda: adam_fn.clip_by_global_norm(float("nan")), "max_norm must be at least 0"),
        (lambda: adam_fn.clip_by_global_norm(ONES), "max_norm must be a scalar"),
        (lambda: UNTYPED.clip_by_global_norm(lambda count: 1.0), "a number or a 0-d array, not a schedule"),
        *(
            (lambda bad=bad: UNTYPED.skip_nonfinite(INNER, bad), "max_consecutive must be an integer of at least 0")
            for bad in (-1, 1.5, True)
        ),
    ],
)
def test_errors_of_wrappers_name_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
