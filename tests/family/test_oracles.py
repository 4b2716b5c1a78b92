"""Each member against the float64 transcription of its paper, and against optax where it has the same maths."""

import functools

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


def test_follows_its_paper_and_optax_in_float64() -> None:
    peers = [case for case in CASES if case.peer]
    with jax.enable_x64(True):
        txs = *(case.make() for case in CASES), *(case.make_peer() for case in peers)
        _, updates = trajectories(txs, GRADS[:100], PARAMS, jnp.float64)
    assert updates.dtype == np.float64
    ours = dict(zip([case.name for case in CASES], updates, strict=False))
    for case in CASES:
        expected = case.oracle(np.float64(GRADS[:100]), np.float64(PARAMS), 1e-3, **case.options)
        np.testing.assert_allclose(ours[case.name], expected.updates, rtol=1e-9, atol=1e-15, err_msg=case.name)
    for case, theirs in zip(peers, updates[len(CASES) :], strict=True):
        np.testing.assert_allclose(ours[case.name], theirs, rtol=1e-9, atol=1e-15, err_msg=case.name)


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
    """In float64: as float32 numbers the decay rates near 1 have four digits of 1 - 0.9999."""
    t = range(1, STEPS + 1)
    alphas = np.array([momentum.ademamix_alpha(i, 5.0, 600) for i in t])
    b3s = np.array([momentum.ademamix_b3(i, 0.9999, 0.9, 600) for i in t])
    expected = momentum.ademamix(np.float64(GRADS), np.float64(PARAMS), 1e-3, b3=b3s, alpha=alphas)
    alpha, b3 = adam_fn.schedules.ademamix_alpha(5.0, 600), adam_fn.schedules.ademamix_b3(0.9999, 600)
    with jax.enable_x64(True):
        _, updates = trajectory(adam_fn.ademamix(1e-3, alpha=alpha, b3=b3), GRADS, PARAMS, jnp.float64)
    np.testing.assert_allclose(updates, expected.updates, rtol=1e-9, atol=1e-15)
