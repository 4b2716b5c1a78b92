"""Precision of gradients, parameters and state: finite, stable, and no narrower than asked for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case, name
from helpers.runs import relative_error, together
from helpers.states import slots_of

import adam_fn
from adam_fn.algebra.bias import BiasWeights

STORAGES = pytest.mark.parametrize("storage", [None, "bfloat16", "24bit", "16bit"])
MAGNITUDES = (0.0, 1e-8, 1e-4, 1.0, 300.0, 6e4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_gradients(dtype: Any) -> None:
    """Finite at every magnitude, and the float32 result to the dtype's rounding."""
    tx = together([case.make() for case in CASES])

    @jax.jit
    def run(params: jax.Array, grads: jax.Array) -> Any:
        def step(state: Any, g: jax.Array) -> Any:
            u, state = tx.update(g, state, params)
            return state, u

        return jax.lax.scan(step, tx.init(params), grads)[1]

    grads = jnp.tile(jnp.asarray(MAGNITUDES, dtype), (3, 1)) * jnp.asarray([[1], [-1], [1]], dtype)
    grads = jnp.stack([grads] * len(CASES), 1)
    params = jnp.stack([jnp.linspace(-1, 1, len(MAGNITUDES), dtype=dtype)] * len(CASES))
    low = run(params, grads)
    assert low.dtype == dtype
    expected = run(params.astype(jnp.float32), grads.astype(jnp.float32)).astype(dtype)
    for i, case in enumerate(CASES):
        found = np.asarray(low[:, i], np.float32)
        assert np.isfinite(found).all(), case.name
        np.testing.assert_array_equal(found, np.asarray(expected[:, i], np.float32), err_msg=case.name)


@pytest.mark.quick("bfloat16-16bit")
@STORAGES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_gradients_recover_at_any_magnitude_and_nan_shows_for_good(dtype: Any, storage: Any) -> None:
    """Any magnitude and spike gives finite updates and moments, which recover; what is not finite shows, for good."""
    txs = [case.make(storage=storage) for case in MEMBERS]
    tx: Any = together(txs)
    largest = float(jnp.finfo(jnp.bfloat16).max)
    every = [largest, -largest, 1e30, 1e20, 1e-30, float(jnp.finfo(dtype).tiny), 0.0]
    spike = [1.0, 1e30, *[1.0] * 58]
    columns = [*([x, -x, *[x] * 58] for x in every), spike, [1.0, np.nan, *spike[2:]], [1.0, np.inf, *spike[2:]]]
    params = jnp.ones((len(MEMBERS), len(columns)), dtype)

    @jax.jit
    def run(grads: jax.Array) -> Any:
        def step(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(jnp.broadcast_to(g, params.shape), state, params)
            return state, jnp.isfinite(updates)

        state, finite = jax.lax.scan(step, tx.init(params), grads)
        return finite, [each.update.decoded(own, params[0]) for each, own in zip(txs, state, strict=True)]

    finite, moments = run(jnp.asarray(columns, dtype).T[:, None])
    for i, case in enumerate(MEMBERS):
        assert finite[:, i, :-2].all(), case.name
        assert not finite[1:, i, -2].any(), case.name
        # Lion takes its sign and atan2 its angle; ADOPT clips it, and divides the later ones by it.
        assert not finite[2:, i, -1].any() or case.alias is adam_fn.adopt, case.name
        for slot in moments[i].values():
            assert jnp.isfinite(slot[:-2]).all(), case.name


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_state_is_float32_for_bfloat16_parameters(case: Case) -> None:
    """Under a constant gradient of 1 the second moment reaches 1 and does not stick at 0.5."""
    params = jnp.ones(4, jnp.bfloat16)
    tx = case.make(1e-3)
    state = tx.init(params)
    assert {slot.dtype for slot in jax.tree.leaves(slots_of(state))} == {jnp.dtype(jnp.float32)}
    if case.name != "adam":
        return
    ones = jnp.ones_like(params)
    after = jax.lax.fori_loop(0, 5000, lambda _, s: tx.update(ones, s, params)[1], state)
    np.testing.assert_allclose(slots_of(after)["nu"], 1 - 0.999**5000, rtol=1e-4)


@pytest.mark.quick("adam-")
@pytest.mark.parametrize("grads", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("params", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_state_types_are_stable(case: Case, params: Any, grads: Any) -> None:
    """Dtype and weak type of the state out equal those in, through `scan` and `cond`."""
    tx = case.make(optax.cosine_decay_schedule(1e-3, 10), storage="16bit", weight_decay=0.1)
    finite = optax.apply_if_finite(tx, 2)

    def run(p: Any, g: Any) -> Any:
        state = tx.init(p)
        updates, after = tx.update(g, state, p)
        jax.lax.scan(lambda s, _: (tx.update(g, s, p)[1], None), state, None, 2)
        jax.lax.cond(True, lambda s: tx.update(g, s, p)[1], lambda s: s, state)
        finite.update(g, finite.init(p), p)
        return updates, state, after

    p, g = ({"w": jax.ShapeDtypeStruct((2, 3), dtype)} for dtype in (params, grads))
    updates, state, after = jax.eval_shape(run, p, g)
    assert updates["w"].dtype == grads
    describe = [(x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(state)]
    assert [(x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(after)] == describe
    assert not any(weak for *_, weak in describe)


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_each_parameter_keeps_its_dtype_under_x64(case: Case) -> None:
    """float64 parameters keep float64; float32 ones stay float32, NumPy float64 hyperparameters or not."""
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            tx = case.make(np.float64(1e-3), b1=optax.constant_schedule(np.float64(0.9)), b2=jnp.asarray(0.99))
            params = {"w": jnp.ones(3, dtype)}
            state = tx.init(params)
            before = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
            updates, state = tx.update(params, state, params)
            assert jax.tree.map(lambda x: (x.dtype, x.weak_type), state) == before
            assert updates["w"].dtype == dtype
            floats = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jnp.integer)]
            assert {x.dtype for x in floats} == {jnp.dtype(dtype)}
            assert isinstance(state[-1], BiasWeights) == bool(case.member.betas)


def test_mixed_float32_and_float64() -> None:
    with jax.enable_x64(True):
        params = {"wide": jnp.ones(3, jnp.float64), "narrow": jnp.ones(3, jnp.float32)}
        for b1 in (0.9, optax.constant_schedule(0.9)):
            tx = adam_fn.adam(1e-3, b1=b1, weight_decay=0.1)
            updates, state = tx.update(params, tx.init(params), params)
            assert {key: x.dtype for key, x in updates.items()} == {"wide": jnp.float64, "narrow": jnp.float32}
            # A bias weight of float32 would show at 1e-8.
            np.testing.assert_allclose(updates["wide"], -1e-3 * (1 / (1 + 1e-8) + 0.1), rtol=1e-14)
        assert isinstance(state[-1], BiasWeights)
        assert {x.dtype for x in jax.tree.leaves(state[-1])} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_low_precision_moments_still_follow(case: Case) -> None:
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal(256), jnp.float32)
    plain, low = case.make(), case.make(**case.stored("bfloat16"))
    states = [plain.init(params), low.init(params)]
    updates = [params, params]
    for _ in range(5):
        g = jnp.asarray(rng.standard_normal(256), jnp.float32)
        for i, tx in enumerate((plain, low)):
            updates[i], states[i] = tx.update(g, states[i], params)
    for slot, x in slots_of(states[1]).items():
        low_precision = slot.split("_")[0] in ("mu", "nu", "m1")
        assert x.dtype == (jnp.bfloat16 if low_precision else jnp.float32)
        assert (x != slots_of(states[0])[slot]).any() == low_precision
    assert relative_error(np.asarray(updates[1]), np.asarray(updates[0], np.float64)) < 0.02


def test_meta_gradient_at_zero_is_finite() -> None:
    """The gradient through three steps at g = 0, with respect to parameters, rate and betas; one program for all."""

    def loss(case: Case, p: jax.Array, rate: jax.Array, b2: jax.Array) -> jax.Array:
        tx = case.make(rate, b2=b2)

        def step(carry: Any, _: None) -> Any:
            p, state = carry
            u, state = tx.update(2 * p, state, p)
            return (p + u, state), None

        (p, _), _ = jax.lax.scan(step, (p, tx.init(p)), None, length=3)
        return jnp.sum(p**2 + p)

    @jax.jit
    def gradients(p: jax.Array, rate: jax.Array, b2: jax.Array) -> dict[str, tuple[jax.Array, ...]]:
        return {case.name: jax.grad(loss, argnums=(1, 2, 3))(case, p, rate, b2) for case in CASES}

    for found, grads in gradients(jnp.asarray([0.0, 1.0]), jnp.asarray(1e-3), jnp.asarray(0.9)).items():
        assert all(jnp.isfinite(x).all() for x in grads), (found, grads)


def test_safe_sqrt_is_sqrt() -> None:
    from adam_fn.algebra.arithmetic import safe_sqrt

    x = jnp.asarray([0.0, 1e-30, 0.25, 3.0])
    np.testing.assert_array_equal(safe_sqrt(x), jnp.sqrt(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(safe_sqrt))(x), [0.0, 5e14, 1.0, 0.5 / np.sqrt(3)], rtol=1e-6)
    second = jax.grad(jax.grad(safe_sqrt))
    np.testing.assert_allclose([second(0.0), second(0.25)], [0.0, -2.0], rtol=1e-6)
