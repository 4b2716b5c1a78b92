"""Gradients of any finite magnitude: those whose square would overflow count as the largest whose square does not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from helpers.runs import random_gradients, relative_error, step_bound, together, trajectories, trajectory
from oracles import family

import adam_fn
from adam_fn.algebra.rule import Clock

SQUARING = [case for case in CASES if case.member.squared_factor]
LINEAR = [case for case in CASES if not case.member.squared_factor]
STEPS, LARGEST = 12, float(np.finfo(np.float32).max)
PARAMS = np.linspace(-0.7, 0.7, 6).astype(np.float32)


def _gradients(magnitudes: list[float]) -> np.ndarray[Any, Any]:
    """Rows ``[steps, 6]``: constant, changing sign, growing, falling, one large among small, one small among large."""
    sign = np.where(np.arange(STEPS) % 3 == 1, -1, 1)
    among = np.resize(magnitudes, STEPS)
    spike = np.where(np.arange(STEPS) == 4, -magnitudes[0], 1.0)
    rows = [np.full(STEPS, magnitudes[0]), sign * magnitudes[0], among[::-1], sign * among, spike, -1 / spike]
    return np.stack(rows, 1).astype(np.float32)


HUGE = _gradients([3e38, 1e30, 1e20, 3.0])


def test_gradients_are_clipped_before_they_are_squared() -> None:
    """The transcription has gradients clipped to 2⁶³ (AdaBelief: 2⁶², Adan: 2⁶³/3); smaller ones are not clipped."""
    _, found = trajectories([case.make() for case in SQUARING], HUGE, PARAMS)
    for case, updates in zip(SQUARING, found, strict=True):
        bound = 2.0**63 / {"AdaBelief": 2, "Adan": 3}.get(type(case.member).__name__, 1)
        grads = np.clip(HUGE.astype(np.float64), -bound, bound)
        expected = case.oracle(grads, PARAMS.astype(np.float64), 1e-3, **case.options).updates
        assert np.isfinite(updates).all(), case.name
        for i in range(len(PARAMS)):
            assert relative_error(updates[:, i], expected[:, i]) < 10 * case.tolerance, (case.name, i)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_growing_gradients_reach_the_step_bound_and_none_exceed_it(dtype: str) -> None:
    """Law 6 holds at any magnitude."""
    steps, largest, betas = 60, float(np.finfo(dtype).max), [(0.9, 0.999), (0.5, 0.9), (0.9, 0.99)]
    sign = np.where(np.arange(steps) % 3 == 1, -1.0, 1.0)
    huge = [np.full(steps, largest), largest * sign, largest * sign * 10.0 ** np.linspace(-30, 0, steps)]
    others = np.stack([*huge, largest**0.5 * sign, np.eye(steps)[-1], *random_gradients(steps, 59).T], axis=1)
    grown = [np.outer((b1 / b2) ** -np.arange(1.0, steps + 1), [1, -1, 1e-3, 1e3]) for b1, b2 in betas]
    grads = np.stack([np.concatenate([x, others], axis=1) for x in grown], axis=1)
    with jax.enable_x64(True):
        tx = together([adam_fn.adam(1.0, b1, b2, eps=0.0) for b1, b2 in betas])
        _, updates = trajectory(tx, grads, np.zeros(grads.shape[1:]), jnp.dtype(dtype))
        assert updates.dtype == dtype
    for i, (b1, b2) in enumerate(betas):
        bound = step_bound(b1, b2, steps)
        assert (np.abs(updates[:, i]).max(axis=1) <= bound * (1 + 1e-5)).all()
        np.testing.assert_allclose(np.abs(updates[-1, i, :4]), bound[-1], rtol=1e-5)
        assert np.abs(updates[-1, i, 4]) == pytest.approx(1, rel=1e-5)  # A constant gradient, however large.


def test_huge_float32_gradients_are_not_clipped_in_float64() -> None:
    grads, params = HUGE.astype(np.float64), PARAMS.astype(np.float64)
    with jax.enable_x64(True):
        _, found = trajectory(adam_fn.adam(1e-3), grads, params, jnp.float64)
    np.testing.assert_allclose(found, family.adam(grads, params, 1e-3).updates, rtol=1e-9, atol=1e-15)


def test_linear_rules_do_not_clip() -> None:
    grads = _gradients([8e37, 1e30, 1e20, 3.0])
    _, found = trajectories([case.make() for case in LINEAR], grads, PARAMS)
    for case, updates in zip(LINEAR, found, strict=True):
        expected = case.oracle(grads.astype(np.float64), PARAMS.astype(np.float64), 1e-3, **case.options).updates
        assert relative_error(updates, expected) < case.tolerance, case.name
    largest = jnp.asarray([LARGEST, -LARGEST, 1e30])
    rate, decay = adam_fn.transform(adam_fn.Rate(0.5)), adam_fn.transform(adam_fn.Decay(0.5))
    np.testing.assert_array_equal(rate.update(largest, rate.init(largest))[0], -0.5 * largest)
    np.testing.assert_array_equal(decay.update(largest, decay.init(largest), jnp.ones(3))[0], largest)
    held = np.where(np.arange(40) < 39, LARGEST, -LARGEST)[:, None].astype(np.float32)  # m becomes as large as g.
    assert np.isfinite(trajectory(adam_fn.transform(Momentum()), held, PARAMS[:1])[1]).all()


@dataclasses.dataclass(frozen=True)
class Momentum(adam_fn.Rule):
    """A user's rule: linear, with a memory."""

    @property
    def slots(self) -> Any:
        return {"mu": adam_fn.Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: adam_fn.Slots, clock: Clock) -> Any:
        mu = adam_fn.ema(0.5, slots["mu"], g)
        return mu, {"mu": mu}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rule_of_a_chain_has_its_own_bound(dtype: str) -> None:
    rules = [Momentum(), Momentum() >> adam_fn.Adam(), adam_fn.Decay(1.0) >> adam_fn.Adam() >> Momentum()]
    txs: list[optax.GradientTransformation] = [adam_fn.transform(rule) for rule in rules]
    txs += [optax.chain(*map(adam_fn.transform, rule.parts())) for rule in rules]
    grads = jnp.asarray(_gradients([1e30, 1e20, 3.0]), dtype)
    found = [jnp.asarray(x, jnp.float32) for x in trajectories(txs, np.asarray(grads), PARAMS, jnp.dtype(dtype))[1]]
    wide, mu = np.asarray(grads, np.float64), np.zeros(len(PARAMS))
    for g, u in zip(wide, found[0], strict=True):
        mu = 0.5 * mu + 0.5 * g
        np.testing.assert_allclose(u, mu, rtol=1e-6 if dtype == "float32" else 4e-3)
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6 if dtype == "float32" else 2e-2, atol=1e-6)


def test_converted_states_that_are_not_finite_become_nan_in_every_moment() -> None:
    """The code of m takes its nan from v, even if only one of the two was not finite before."""
    params, plain = jnp.ones(4), adam_fn.adam(1e-3)
    state: Any = plain.init(params)
    adam = state[0]._replace(mu=jnp.asarray([jnp.nan, 0.5, 0.5, 0.5]), nu=jnp.asarray([1.0, jnp.inf, 1.0, 1.0]))
    for storage in ("24bit", "16bit"):
        tx = adam_fn.adam(1e-3, storage=storage)
        found = adam_fn.interop.change_storage(plain, tx, params, (adam, *state[1:]))
        for x in tx.update.decoded(found, params).values():
            np.testing.assert_array_equal(np.isnan(x), [True, True, False, False])
