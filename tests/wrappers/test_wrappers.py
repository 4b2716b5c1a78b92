"""What is not elementwise in use: dtypes, Flax and optax around it, injected hyperparameters, zeros and nan."""

import pickle
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers.runs import compilations

import adam_fn
from adam_fn import schedules

WRAPPED: dict[str, Callable[..., Any]] = {
    "swats": adam_fn.swats,
    "lamb": lambda rate: adam_fn.lamb(rate, weight_decay=0.1, mask=adam_fn.masks.rank(2)),
    "cautious": lambda rate: adam_fn.cautious(adam_fn.adamw(rate)),
    "average": lambda rate: optax.chain(adam_fn.adam(rate), adam_fn.average_params()),
}
BY_VALUE = [name for name in WRAPPED if name != "average"]  # optax.chain is a closure


@pytest.mark.parametrize("name", BY_VALUE)
def test_wrapped_optimizers_are_equal_by_value(name: str) -> None:
    make = WRAPPED[name]
    rate = schedules.inverse_sqrt(1e-3)
    assert make(rate) == make(rate)
    assert hash(make(rate)) == hash(make(rate))
    assert make(rate) != make(1e-3)
    assert pickle.loads(pickle.dumps(make(rate))) == make(rate)
    assert adam_fn.average_params(0.5) == adam_fn.average_params(0.5) != adam_fn.average_params(None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_stable_and_nothing_recompiles(dtype: str) -> None:
    txs = {name: make(1e-2) for name, make in WRAPPED.items()}
    ones = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype)}
    params: Any = dict.fromkeys(txs, ones)
    state: Any = jax.jit(lambda params: {name: tx.init(params[name]) for name, tx in txs.items()})(params)
    before = jax.tree.map(lambda x: (x.dtype, x.weak_type, x.shape), (params, state))

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        done = {name: tx.update(grads, state[name], params[name]) for name, tx in txs.items()}
        after = {name: optax.apply_updates(params[name], updates) for name, (updates, _) in done.items()}
        return after, {name: state for name, (_, state) in done.items()}

    for scale in (1e-4, 0, 3e-4):
        params, state = step(params, state, jax.tree.map(lambda x: jnp.full_like(x, scale), ones))  # noqa: B023
    assert compilations(step) == 1
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type, x.shape), (params, state)) == before
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((params, state)))
    for name in txs:
        assert not (np.asarray(params[name]["w"], np.float32) == 1).any()


@pytest.mark.parametrize("name", WRAPPED)
def test_every_wrapper_works_inside_flax_and_optax(name: str) -> None:
    params = {"w": jnp.linspace(0.5, 1, 6).reshape(3, 2), "b": jnp.ones(2)}

    def trained(tx: Any, steps: int) -> Any:
        state = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
        for _ in range(steps):
            state = state.apply_gradients(grads=jax.tree.map(jnp.sin, params))
        return state.params

    tx = WRAPPED[name](1e-2)
    several = optax.MultiSteps(tx, 2).gradient_transformation()
    found, expected = jax.jit(lambda: (trained(several, 6), trained(tx, 3)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("name", ["swats", "cautious", "lamb", "average_params"])
def test_injected_hyperparameters(name: str) -> None:
    """Every number of the signature, as an array."""
    p = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}
    grads = jax.tree.map(jnp.sin, p)
    make: Any = getattr(adam_fn, name)
    options: dict[str, Any] = {"swats": {"tolerance": 1.0}, "lamb": {"learning_rate": 1e-2}}.get(name, {})
    options |= {"tx": adam_fn.adam(1e-2)} if name == "cautious" else {}
    found = []
    static = ("tx",) if name == "cautious" else ()
    for tx in (make(**options), optax.inject_hyperparams(make, static_args=static)(**options)):
        state, updates = tx.init(p), None
        for _ in range(4):
            updates, state = jax.jit(tx.update)(grads, state, p)
        found.append(cast(Any, updates))
    np.testing.assert_allclose(found[0]["w"], found[1]["w"], rtol=1e-6)


def test_frozen_leaves_of_swats() -> None:
    """Of any shape: their m is not there to be a momentum."""
    params = {"w": jnp.ones(3), "a": jnp.ones(3), "b": jnp.ones(1), "c": jnp.ones(())}
    tx: Any = adam_fn.swats(1e-2, tolerance=1e3, frozen=adam_fn.masks.path("a", "b", "c"))
    state, updates = tx.init(params), params
    for _ in range(4):
        updates, state = tx.update(params, state, params)
    assert state.switched
    for key in ("a", "b", "c"):
        np.testing.assert_array_equal(updates[key], jnp.zeros_like(params[key]), strict=True)
    assert (np.asarray(updates["w"]) < 0).all()


def test_swats_leaves_its_average_alone_where_the_rate_is_undefined() -> None:
    tx: Any = adam_fn.swats(1e-2, b1=0.5)
    p = jnp.ones(3)
    _, state = tx.update(p, tx.init(p), p)
    _, after = tx.update(0 * p, state, p)
    assert after.average == state.average > 0
    _, lost = tx.update(jnp.full(3, jnp.nan), state, p)
    assert lost.average == state.average


def test_cautious_of_zero_gradients_and_of_nan() -> None:
    tx: Any = adam_fn.cautious(adam_fn.adam(1e-2, eps=0.0))
    g = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    updates, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(updates, [-2e-2, -2e-2, 0, 0], rtol=1e-6)
    updates, _ = tx.update(g.at[0].set(jnp.nan), tx.init(g), g)
    assert np.isnan(updates[0]), "a nan must not pass for a dropped update"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lamb_rounds_once(dtype: Any) -> None:
    """Of low-precision parameters whose norm float16 could not hold, the updates are float32's, rounded."""
    p = jnp.asarray(np.random.default_rng(1).standard_normal((64, 64)) * 2e3, dtype)
    g = [jnp.asarray(np.random.default_rng(i).standard_normal((64, 64)), dtype) for i in range(5)]
    found = []
    for kind in (dtype, jnp.float32):
        tx: Any = adam_fn.lamb(1e-4, weight_decay=1e-4)
        state, updates = tx.init(p.astype(kind)), None
        for x in g:
            updates, state = tx.update(x.astype(kind), state, p.astype(kind))
        found.append(jnp.asarray(updates))
    assert found[0].dtype == dtype
    np.testing.assert_array_equal(found[0], found[1].astype(dtype))
    assert jnp.isfinite(found[0]).all()


@pytest.mark.parametrize("name", BY_VALUE)
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


def test_learning_rate_of_one_step() -> None:
    p = jnp.asarray([[1.0, -2.0]])
    for name in BY_VALUE:
        once, other = WRAPPED[name](1e-3), WRAPPED[name](1e-1)
        a, _ = once.update(p, once.init(p), p, learning_rate=1e-1)
        b, _ = other.update(p, other.init(p), p)
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.quick
def test_bad_options() -> None:
    p = jnp.ones(2)
    for name, state in (("swats", "its own state, .*"), ("lamb", r"the state that tx.init\(params\) makes")):
        tx: Any = WRAPPED[name](1e-3)
        with pytest.raises(TypeError, match=rf"{name} expected {state}, got a dict"):
            tx.update(p, {}, p)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        adam_fn.swats(tolerance=0)
    with pytest.raises(ValueError, match=r"b1 must be in \(0, 1\), because swats needs a momentum; got 0"):
        adam_fn.swats(b1=0.0)
    with pytest.raises(ValueError, match="lamb needs the parameters"):
        adam_fn.lamb(1e-3).update(jnp.ones(2), adam_fn.lamb(1e-3).init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        adam_fn.average_params(1.0)
