"""Each schedule against its formula, written out in float64."""

import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import scanned
from helpers.states import bias_weights, kept_weights, slots_of
from numpy.typing import NDArray
from oracles import momentum

import adam_fn
from adam_fn import schedules

COUNTS = np.arange(0, 2000)


def _warm_restarts(first: int, factor: float, low: float, high: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """η and T_i by walking from restart to restart, as the paper describes it."""
    lengths = [first]
    while sum(lengths) < len(COUNTS):
        lengths.append(round(first * factor ** len(lengths)))
    done = np.concatenate([np.arange(n) / n for n in lengths])[: len(COUNTS)]
    return low + (high - low) / 2 * (1 + np.cos(np.pi * done)), np.repeat(lengths, lengths)[: len(COUNTS)]


RESTARTS = schedules.warm_restarts(100, 2.0, 0.1, 0.9)
RATES, PERIODS = _warm_restarts(100, 2.0, 0.1, 0.9)
FORMULAS: dict[str, tuple[Any, Any]] = {
    "inverse_sqrt": (schedules.inverse_sqrt(0.3), 0.3 / np.sqrt(COUNTS + 1)),
    "inverse_sqrt-warmup": (
        schedules.inverse_sqrt(0.3, 100),
        0.3 * np.minimum(1 / np.sqrt(COUNTS + 1), (COUNTS + 1) / 100**1.5),
    ),
    "inverse_time": (schedules.inverse_time(0.3, 0.01), 0.3 / (1 + 0.01 * COUNTS)),
    "beta1_decay": (schedules.beta1_decay(0.9, 0.999), 0.9 * 0.999**COUNTS),
    "beta1_decay-paper": (schedules.beta1_decay(), 0.9 * (1 - 1e-8) ** COUNTS),
    "nadam_momentum": (schedules.nadam_momentum(), 0.9 * (1 - 0.5 * 0.96 ** ((COUNTS + 1) * 0.004))),
    "nadam_momentum-keras": (schedules.nadam_momentum(0.8, 1.0), 0.8 * (1 - 0.5 * 0.96 ** (COUNTS + 1.0))),
    "warmup_stable_decay": (
        schedules.warmup_stable_decay(0.5, 100, 300, 200, 0.1),
        np.interp(COUNTS, [0, 99, 400, 600], [0.005, 0.5, 0.5, 0.1]),
    ),
    "warmup_stable_decay-sqrt": (
        schedules.warmup_stable_decay(0.5, 0, 400, 1000, shape="sqrt"),
        0.5 * (1 - np.sqrt(np.clip((COUNTS - 400) / 1000, 0, 1))),
    ),
    "warmup_stable_decay-cliff": (schedules.warmup_stable_decay(0.5, 0, 4, 0), np.where(COUNTS < 4, 0.5, 0.0)),
    "ademamix_alpha": (
        schedules.ademamix_alpha(5.0, 700),
        [momentum.ademamix_alpha(t + 1, 5.0, 700) for t in range(len(COUNTS))],
    ),
    "ademamix_b3": (
        schedules.ademamix_b3(0.9999, 700, 0.8),
        [momentum.ademamix_b3(t + 1, 0.9999, 0.8, 700) for t in range(len(COUNTS))],
    ),
    "warm_restarts": (RESTARTS, RATES),
    "warm_restarts-constant": (schedules.warm_restarts(130, 1), _warm_restarts(130, 1, 0, 1)[0]),
    "normalized_weight_decay": (RESTARTS.weight_decay(0.05), RATES * 0.05 / np.sqrt(PERIODS)),
}


@functools.cache
def values(wide: bool) -> dict[str, jax.Array]:
    """The values of all schedules, in float64 or float32, from one program."""
    read = jax.jit(lambda counts: {key: jax.vmap(schedule)(counts) for key, (schedule, _) in FORMULAS.items()})
    with jax.enable_x64(wide):
        return read(COUNTS)


@pytest.mark.parametrize("key", FORMULAS)
def test_schedules_follow_their_formulas(key: str) -> None:
    schedule, expected = FORMULAS[key]
    assert values(False)[key].dtype == jnp.float32
    np.testing.assert_allclose(values(False)[key], expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(values(True)[key], expected, rtol=1e-12, atol=1e-14)
    assert jax.eval_shape(lambda: schedule(0)).shape == ()  # One step, as a Python number.


@pytest.mark.quick
@pytest.mark.parametrize("key", FORMULAS)
def test_schedules_compare_hash_and_pickle_by_value(key: str) -> None:
    schedule, _ = FORMULAS[key]
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert adam_fn.adam(copy) == adam_fn.adam(schedule)


@pytest.mark.parametrize("factor", [1.1, 1.5, 2, 3, 10])
@pytest.mark.parametrize("first", [1, 7, 1000])
def test_restarts_fall_on_whole_steps(first: int, factor: float) -> None:
    """The float32 logarithm must not put a restart a step too early or late, wherever it falls."""
    counts = np.arange(100_000)
    current, length = (np.asarray(x) for x in jax.jit(jax.vmap(schedules.warm_restarts(first, factor).period))(counts))
    # Rounded lengths may differ by one from the gap that they stand for.
    assert ((current >= 0) & (current < length + 1)).all()
    assert ((np.diff(current) == 1) | (current[1:] == 0)).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.inverse_sqrt(0.1, -1), "warmup_steps must not be negative, got -1"),
        (lambda: schedules.inverse_time(0.1, -1.0), "decay must not be negative"),
        (lambda: schedules.beta1_decay(1.0), r"b1 must be in \[0, 1\)"),
        (lambda: schedules.beta1_decay(0.9, 1.5), r"decay must be in \(0, 1\]"),
        (lambda: schedules.warmup_stable_decay(0.1, -1, 0, 0), "warmup_steps must not be negative"),
        (lambda: schedules.warmup_stable_decay(0.1, 1, 0, 0, shape="cosine"), "shape must be 'linear' or 'sqrt'"),
        (lambda: schedules.warm_restarts(0), "first_period must be at least 1 step"),
        (lambda: schedules.warm_restarts(10, 0.5), "factor must be at least 1"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_papers_beta1_decay_is_corrected_exactly() -> None:
    """The paper has β₁,t = β₁λ^(t-1); for other schedules see `family/test_oracles.py`."""
    tx = adam_fn.adam(schedules.inverse_sqrt(0.1), b1=schedules.beta1_decay(0.9, 0.5))
    state = tx.init(jnp.zeros(()))
    for t in range(1, 5):
        updates, state = tx.update(jnp.ones(()), state)
        np.testing.assert_allclose(updates, -0.1 / math.sqrt(t), rtol=1e-6)
    np.testing.assert_allclose(kept_weights(state)[0].sum(), 1 - 0.9**4 * 0.5**6, rtol=1e-6)


def test_a_decay_rate_given_by_its_distance_from_one_keeps_its_digits() -> None:
    """The slow moment after many steps against float64, where a float32 β would be off by one part in a hundred."""
    steps, schedule = 300, schedules.ademamix_b3(0.999999, 100)
    grads = np.random.default_rng(0).standard_normal(steps).astype(np.float32) + 1

    def final(*txs: Any) -> list[Any]:
        return jax.jit(lambda *args: [scanned(tx, *args)[0][1] for tx in txs])(np.float32(0), grads)

    slow = 0.0
    for t, g in enumerate(grads.astype(float), 1):
        slow += (1 - momentum.ademamix_b3(t, 0.999999, 0.9, 100)) * (g - slow)
    exact, short = final(*(adam_fn.ademamix(1e-3, b3=b3) for b3 in (schedule, schedule.__call__)))
    np.testing.assert_allclose(slots_of(exact)["m2"], slow, rtol=2e-6)
    assert abs(float(slots_of(short)["m2"]) / slow - 1) > 1e-4

    def tiny(count: Any) -> float:
        return 1e-5

    # It acts like the number in every member that has the argument, and is equal by value.
    makes = (adam_fn.adam, adam_fn.nadam, adam_fn.adan, adam_fn.radam, adam_fn.adamax, adam_fn.lion)
    numbers, others = ([make(1e-3, b2=b2) for make in makes] for b2 in (0.99999, schedules.by_complement(tiny)))
    assert others == [make(1e-3, b2=schedules.by_complement(tiny)) for make in makes]
    for number, by, other, one in zip(numbers, others, final(*numbers), final(*others), strict=True):
        for found, expected in zip(*map(jax.tree.leaves, (slots_of(one), slots_of(other))), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)
        np.testing.assert_allclose(bias_weights(by, one), bias_weights(number, other), rtol=2e-6)
