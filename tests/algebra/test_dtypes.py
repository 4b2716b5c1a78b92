"""Precision of gradients, parameters and state: finite, stable, and no narrower than asked for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case, name
from helpers.runs import together
from helpers.states import slots_of

import adam_fn
from adam_fn.algebra.bias import BiasWeights

MAGNITUDES = (0.0, 1e-8, 1e-4, 1.0, 300.0, 6e4)
#: Cases that may divide by 0: one row per rule, and every row with another ε.
EPSILONS = (*MEMBERS, *(x for x in CASES if x not in MEMBERS and any(key.startswith("eps") for key in x.options)))


def test_low_precision_gradients_give_the_float32_updates_rounded() -> None:
    """Updates are finite at every magnitude, and equal those of float32 rounded to the dtype."""
    tx = together([case.make() for case in EPSILONS])

    @jax.jit
    def run(params: jax.Array, grads: jax.Array) -> Any:
        def step(state: Any, g: jax.Array) -> Any:
            u, state = tx.update(jnp.broadcast_to(g, params.shape), state, params)
            return state, u

        return jax.lax.scan(step, tx.init(params), grads)[1]

    rows = np.asarray([[MAGNITUDES], [MAGNITUDES], [MAGNITUDES]]) * np.asarray([1, -1, 1])[:, None, None]
    for dtype in (jnp.float16, jnp.bfloat16):
        grads = rows.astype(dtype)
        params = np.stack([np.linspace(-1, 1, len(MAGNITUDES))] * len(EPSILONS)).astype(dtype)
        low = run(params, grads)
        assert low.dtype == dtype
        expected = np.asarray(run(params.astype(np.float32), grads.astype(np.float32))).astype(dtype)
        for i, case in enumerate(EPSILONS):
            found = np.asarray(low[:, i], np.float32)
            assert np.isfinite(found).all(), case.name
            np.testing.assert_array_equal(found, expected[:, i].astype(np.float32), err_msg=case.name)


@pytest.mark.quick("bfloat16-16bit")
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        *((jnp.float32, storage) for storage in (None, "bfloat16", "24bit", "16bit")),
        *((jnp.bfloat16, storage) for storage in (None, "16bit")),
    ],
)
def test_any_finite_gradient_keeps_updates_finite_and_nan_shows_for_good(dtype: Any, storage: Any) -> None:
    """Finite gradients of any size, spikes included, give finite updates and moments; nan or inf shows, for good."""
    txs = [case.make(storage=storage) for case in MEMBERS]
    tx: Any = together(txs)
    largest = float(jnp.finfo(dtype).max)
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
        # Lion takes the sign of inf and atan2 its angle: only later steps show it. ADOPT clips it and divides by it.
        assert not finite[2:, i, -1].any() or case.alias is adam_fn.adopt, case.name
        for slot, x in case.member.slots.items():
            assert jnp.isfinite(moments[i][slot][:-2]).all(), case.name
            assert not jnp.isinf(moments[i][slot]).any(), case.name
            if x.unit is not None:  # Codes take their nan from their unit.
                assert jnp.isnan(moments[i][x.unit.slot][-2:]).all(), case.name


def test_state_is_float32_for_bfloat16_parameters() -> None:
    """A narrower dtype must be asked for. Under a constant gradient of 1, v reaches 1 and does not stick at 0.5."""
    ones = jnp.ones(4, jnp.bfloat16)
    for case in MEMBERS:
        wide, narrow = (case.make(**options) for options in ({}, case.stored("bfloat16")))
        assert {x.dtype for x in slots_of(jax.eval_shape(wide.init, ones)).values()} == {jnp.dtype("float32")}
        for slot, x in slots_of(jax.eval_shape(narrow.init, ones)).items():
            assert (x.dtype == jnp.bfloat16) == (slot.split("_")[0] in ("mu", "nu", "m1")), (case.name, slot)
    tx = adam_fn.adam(1e-3)
    after = jax.lax.fori_loop(0, 5000, lambda _, s: tx.update(ones, s, ones)[1], tx.init(ones))
    np.testing.assert_allclose(slots_of(after)["nu"], 1 - 0.999**5000, rtol=1e-4)


NUMPY: Any = {"learning_rate": np.float64(1e-3), "b1": optax.constant_schedule(np.float64(0.9)), "b2": np.asarray(0.99)}
NARROW: Any = {"learning_rate": optax.cosine_decay_schedule(1e-3, 10), "storage": "16bit", "weight_decay": 0.1}


@pytest.mark.quick("adam-")
@pytest.mark.parametrize(
    ("params", "grads", "options"),
    [
        *((p, g, NARROW) for p in ("float32", "bfloat16") for g in ("float32", "bfloat16")),
        *((dtype, dtype, NUMPY) for dtype in ("float32", "float64")),
    ],
    ids=["float32", "float32-bfloat16", "bfloat16-float32", "bfloat16", "x64-float32", "x64-float64"],
)
@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_state_types_are_stable(case: Case, params: str, grads: str, options: Any) -> None:
    """A step keeps the dtypes and weak types of the state, through `scan` and `cond`; float64 stays float64."""
    tx = case.make(**options)

    def run(p: Any, g: Any) -> Any:
        state = tx.init(p)
        updates, after = tx.update(g, state, p)
        jax.lax.scan(lambda s, _: (tx.update(g, s, p)[1], None), state, None, 2)
        jax.lax.cond(True, lambda s: tx.update(g, s, p)[1], lambda s: s, state)
        return updates, state, after

    with jax.enable_x64(options is NUMPY):
        updates, state, after = jax.eval_shape(run, *(jax.ShapeDtypeStruct((2, 3), dtype) for dtype in (params, grads)))
    assert updates.dtype == grads
    assert after == state
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    if options is NUMPY:
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"int32", params}
        assert isinstance(state[-1], BiasWeights) == bool(case.member.betas)


def test_float32_and_float64_leaves_are_each_stepped_in_their_own_dtype() -> None:
    with jax.enable_x64(True):
        params = {"wide": jnp.ones(3, jnp.float64), "narrow": jnp.ones(3, jnp.float32)}
        for b1 in (0.9, optax.constant_schedule(0.9)):
            tx = adam_fn.adam(1e-3, b1=b1, weight_decay=0.1)
            updates, state = tx.update(params, tx.init(params), params)
            assert {key: x.dtype for key, x in updates.items()} == {"wide": jnp.float64, "narrow": jnp.float32}
            # A float32 bias weight would make an error of 1e-8.
            np.testing.assert_allclose(updates["wide"], -1e-3 * (1 / (1 + 1e-8) + 0.1), rtol=1e-14)
        assert isinstance(state[-1], BiasWeights)
        assert {x.dtype for x in jax.tree.leaves(state[-1])} == {jnp.dtype(jnp.float64)}


def test_meta_gradient_at_zero_is_finite() -> None:
    """The gradient through three steps at g = 0, with respect to parameters, rates and betas; one program for all."""

    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(params: jax.Array, rates: jax.Array, betas: jax.Array) -> jax.Array:
        variants = zip(EPSILONS[len(MEMBERS) :], rates[len(MEMBERS) :], strict=True)
        txs = [case.make(rate, b2=b2) for case, rate, b2 in zip(MEMBERS, rates, betas, strict=False)]
        tx = together([*txs, *(case.make(rate) for case, rate in variants)])

        def step(carry: Any, _: None) -> Any:
            p, state = carry
            updates, state = tx.update(2 * p, state, p)
            return (p + updates, state), None

        (p, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=3)
        return jnp.sum(p**2 + p)

    n = len(EPSILONS)
    found = jax.jit(gradients)(np.tile([0.0, 1.0], (n, 1)), np.full(n, 1e-3), np.full(len(MEMBERS), 0.9))
    for i, case in enumerate(EPSILONS):
        assert all(np.isfinite(x[i : i + 1]).all() for x in found), case.name


def test_safe_sqrt_is_sqrt() -> None:
    from adam_fn.algebra.arithmetic import safe_sqrt

    x = jnp.asarray([0.0, 1e-30, 0.25, 3.0])
    np.testing.assert_array_equal(safe_sqrt(x), jnp.sqrt(x))
    slope = jax.grad(safe_sqrt)
    np.testing.assert_allclose(jax.jit(jax.vmap(slope))(x), [0.0, 5e14, 1.0, 0.5 / np.sqrt(3)], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(slope)))(x)[::2], [0.0, -2.0], rtol=1e-6)
