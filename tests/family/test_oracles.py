"""Each member against the float64 transcription of its paper, and against optax where it has the same maths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from helpers.runs import random_gradients, relative_error, trajectories

STEPS, SIZE = 1000, 64
GRADS = random_gradients(STEPS, SIZE)
PARAMS = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)


@pytest.mark.quick
def test_each_member_follows_its_paper_for_1000_steps() -> None:
    found = trajectories([case.make() for case in CASES], GRADS, PARAMS)
    for case, params, updates in zip(CASES, *found, strict=True):
        expected = case.oracle(np.float64(GRADS), np.float64(PARAMS), 1e-3, **case.options)
        # Float32 parameters round p + u at every step, and equal updates always the same way: the expected parameters
        # are those that the exact updates would give with this rounding.
        rounded = np.add.accumulate(np.vstack([PARAMS, np.float32(expected.updates)]), axis=0, dtype=np.float32)[-1]
        assert np.abs(params[-1] - rounded).max() <= 2e-6 * np.abs(PARAMS).max(), case.name
        # The updates are more accurate, although a decay sees the rounded parameters.
        for t in (1, 2, 3, 10, 100, 1000):
            assert relative_error(updates[t - 1], expected.updates[t - 1]) <= case.tolerance, (case.name, t)


def test_each_member_follows_its_paper_and_optax_in_float64() -> None:
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


def test_scheduled_betas_are_corrected_exactly() -> None:
    """Powers of the current beta would make the first hundred steps wrong by up to 0.69."""
    scheduled = {
        "adam": ("b1", "b2"),
        "nadam-momentum_decay": ("b2",),  # NAdam's μ is a schedule.
        "adamax": ("b1", "b2"),
        "amsgrad": ("b1", "b2"),
        "yogi": ("b1", "b2"),
        "ademamix": ("b3", "alpha"),
    }
    cases = [case for case in CASES if case.name in scheduled]
    values = {
        "b1": np.linspace(0.5, 0.9, STEPS),
        "b2": np.minimum(0.9 + 0.00099 * np.arange(STEPS), 0.999),
        "b3": np.linspace(0.9, 0.9999, STEPS),
        "alpha": np.linspace(0, 5, STEPS),
    }
    values = {key: np.float32(x) for key, x in values.items()}
    schedules = {key: functools.partial(jnp.take, jnp.asarray(x)) for key, x in values.items()}
    rate = optax.linear_schedule(1e-3, 1e-4, STEPS)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(STEPS)))
    txs = [case.make(rate, **{key: schedules[key] for key in scheduled[case.name]}) for case in cases]
    for case, updates in zip(cases, trajectories(txs, GRADS, PARAMS)[1], strict=True):
        given = {key: np.float64(values[key]) for key in scheduled[case.name]}
        expected = case.oracle(np.float64(GRADS), np.float64(PARAMS), np.float64(rates), **case.options, **given)
        for t in (1, 2, 10, 50, 100, 1000):
            assert relative_error(updates[t - 1], expected.updates[t - 1]) <= 2e-6, (case.name, t)
