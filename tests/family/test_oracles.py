"""Each member against the float64 transcription of its paper, and against optax where it has the same maths."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from helpers.runs import random_gradients, relative_error, trajectories, trajectory
from oracles import momentum

import adam_fn

STEPS, SIZE = 1000, 64
GRADS = random_gradients(STEPS, SIZE)
PARAMS = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)


@pytest.mark.quick
def test_follows_its_paper_for_1000_steps() -> None:
    found = trajectories([case.make() for case in CASES], GRADS, PARAMS)
    for case, params, updates in zip(CASES, *found, strict=True):
        expected = case.oracle(np.float64(GRADS), np.float64(PARAMS), 1e-3, **case.options)
        # Float32 parameters round p + u at every step, those of equal updates the same way each time: what the exact
        # updates would do to them is what can be expected.
        rounded = np.add.accumulate(np.vstack([PARAMS, np.float32(expected.updates)]), axis=0, dtype=np.float32)[-1]
        assert np.abs(params[-1] - rounded).max() <= 2e-6 * np.abs(PARAMS).max(), case.name
        # The updates are not blurred so. The parameters that a decay sees are rounded.
        for t in (1, 2, 3, 10, 100, 1000):
            assert relative_error(updates[t - 1], expected.updates[t - 1]) <= case.tolerance, (case.name, t)


def test_follows_its_paper_in_float64() -> None:
    with jax.enable_x64(True):
        params, updates = trajectories([case.make() for case in CASES], GRADS[:100], PARAMS, jnp.float64)
    assert params.dtype == np.float64
    for case, found in zip(CASES, updates, strict=True):
        expected = case.oracle(np.float64(GRADS[:100]), np.float64(PARAMS), 1e-3, **case.options)
        np.testing.assert_allclose(found, expected.updates, rtol=1e-9, atol=1e-15, err_msg=case.name)


def test_agrees_with_optax() -> None:
    cases, rate = [case for case in CASES if case.peer], optax.warmup_cosine_decay_schedule(1e-5, 1e-3, 20, 80)
    ours, _ = trajectories([case.make(rate) for case in cases], GRADS[:100], PARAMS)
    theirs, _ = trajectories([case.make_peer(rate) for case in cases], GRADS[:100], PARAMS)
    for case, a, b in zip(cases, ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=case.name)


SCHEDULED = [case for case in CASES if case.name in ("adam", "nadam-momentum_decay", "adamax", "amsgrad", "yogi")]


def test_scheduled_betas_are_corrected_exactly() -> None:
    """With powers of the current beta the first hundred steps are wrong by up to 0.69."""
    b1 = np.linspace(0.5, 0.9, STEPS).astype(np.float32)
    b2 = np.minimum(0.9 + 0.00099 * np.arange(STEPS), 0.999).astype(np.float32)
    rate = optax.linear_schedule(1e-3, 1e-4, STEPS)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(STEPS)))
    both = {"b1": b1, "b2": b2}
    betas = [{"b2": b2} if "momentum_decay" in case.options else both for case in SCHEDULED]  # NAdam's μ is a schedule.
    schedules = [{key: functools.partial(jnp.take, jnp.asarray(x)) for key, x in each.items()} for each in betas]
    txs = [case.make(rate, **each) for case, each in zip(SCHEDULED, schedules, strict=True)]
    for case, each, updates in zip(SCHEDULED, betas, trajectories(txs, GRADS, PARAMS)[1], strict=True):
        values = {key: np.float64(x) for key, x in each.items()}
        expected = case.oracle(np.float64(GRADS), np.float64(PARAMS), np.float64(rates), **case.options, **values)
        for t in (1, 2, 10, 50, 100, 1000):
            assert relative_error(updates[t - 1], expected.updates[t - 1]) <= 2e-6, (case.name, t)


def test_ademamix_with_its_two_schedules() -> None:
    """As float32 numbers the decay rates near 1 are what limits a schedule: 1 - 0.9999 has four digits."""
    t = range(1, STEPS + 1)
    alphas = np.array([momentum.ademamix_alpha(i, 5.0, 600) for i in t])
    b3s = np.array([momentum.ademamix_b3(i, 0.9999, 0.9, 600) for i in t])
    expected = momentum.ademamix(GRADS.astype(np.float64), PARAMS.astype(np.float64), 1e-3, b3=b3s, alpha=alphas)

    def make() -> adam_fn.Transformation:
        alpha, b3 = adam_fn.schedules.ademamix_alpha(5.0, 600), adam_fn.schedules.ademamix_b3(0.9999, 600)
        return adam_fn.ademamix(1e-3, alpha=alpha, b3=b3)

    _, updates = trajectory(make(), GRADS, PARAMS)
    assert max(map(relative_error, updates, expected.updates)) < 2e-4
    with jax.enable_x64(True):
        _, updates = trajectory(make(), GRADS, PARAMS, jnp.float64)
        np.testing.assert_allclose(updates, expected.updates, rtol=1e-9, atol=1e-15)


def test_masked_decay_agrees_with_optax() -> None:
    params = {"kernel": PARAMS.reshape(8, 8), "bias": PARAMS[:8]}
    grads = {"kernel": GRADS[0].reshape(8, 8), "bias": GRADS[1, :8]}
    mask = {"kernel": True, "bias": False}
    txs = (
        adam_fn.adamw(1e-3, weight_decay=0.1, mask=mask),
        adam_fn.adamw(1e-3, weight_decay=0.1, mask=adam_fn.masks.rank(2)),
        adam_fn.adamw(1e-3, weight_decay=0.1, mask=adam_fn.masks.path("*bias", invert=True)),
        optax.adamw(1e-3, weight_decay=0.1, mask=mask),
    )

    def step(_: Any, carry: Any) -> Any:
        pairs = [(tx.update(grads, state, p), p) for tx, (p, state) in zip(txs, carry, strict=True)]
        return [(optax.apply_updates(p, updates), state) for (updates, state), p in pairs]

    start = [(params, tx.init(params)) for tx in txs]
    *found, (expected, _) = jax.jit(lambda: jax.lax.fori_loop(0, 100, step, start))()
    for p, _ in found:
        chex.assert_trees_all_close(p, expected, rtol=0, atol=1e-5)
