"""Updates accurate to float32 rounding, at any beta and step, measured by the benchmark's own code."""

import decimal
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import measure
from helpers.runs import full_jit

import adam_fn
from adam_fn.algebra.bias import Lagged, Weight, corrections_of, weigh

BETAS = (0.999, 0.9999, 0.99999, 0.999999)
#: The optimizer for a β₂ in some form, the type in which it is passed, and the type in which it is held.
GIVEN: dict[str, tuple[Callable[[Any], adam_fn.Transformation], type, type]] = {
    "number": (lambda b2: adam_fn.adam(1e-3, b2=b2), float, float),
    "schedule": (
        lambda b2: adam_fn.adam(lambda count: 1e-3, b2=lambda count: jnp.float32(b2) + 0.0 * count), float, np.float32,
    ),
    "array": (lambda b2: adam_fn.adam(jnp.float32(1e-3), b2=b2), jnp.float32, np.float32),
}  # fmt: skip


@pytest.mark.quick("number-0.9999")
@pytest.mark.parametrize("b2", BETAS)
@pytest.mark.parametrize("given", GIVEN)
def test_error_of_the_update_is_below_1e_6(given: str, b2: float) -> None:
    make, passed, held = GIVEN[given]
    errors = measure(make, passed(b2), float(held(b2)), coordinates=200)
    assert sorted(errors) == [1, 2, 10, 100, 1000, 10_000]
    assert max(errors.values()) <= 1e-6, errors


def test_the_measure_detects_an_inexact_optimizer() -> None:
    errors = measure(lambda beta: optax.adam(1e-3, b2=jnp.asarray(beta)), 0.99999, 0.99999, steps=100)
    assert max(errors.values()) > 1e-5


CONSTANT = (0.0, 1e-300, 1e-8, 0.1, 0.5, 0.6, 0.9, 0.98, 0.999, 0.99999, 1 - 1e-6, 1 - 1e-8, 1 - 1e-12, 1 - 2**-53)
#: The steps with the largest errors that were found: 1.6e-7 at the last one, for 1 - 1e-8.
LARGEST_ERRORS = (8, 35, 3667, 38_230, 394_894, 2**24 + 1, 18_541_443)


def exact_corrections(beta: float, t: int) -> tuple[Fraction, Fraction]:
    """``1/(1 - βᵗ)`` and ``1/(1 - βᵗ - (1-β) t βᵗ)`` to 60 digits."""
    with decimal.localcontext(prec=80):
        power = decimal.Decimal(beta) ** t
        return 1 / Fraction(1 - power), 1 / Fraction(1 - power - (1 - decimal.Decimal(beta)) * t * power)


def test_bias_correction_of_a_constant_beta_is_accurate() -> None:
    """The count alone gives it to a relative error of 1.8e-7 in float32 at any step, and RAdam's to 3.6e-7."""
    random = np.random.default_rng(0)
    many = np.exp(random.uniform(0, np.log(2**31 - 1), 120)).astype(np.int64)
    steps = np.unique(np.concatenate([np.arange(1, 60), many, np.array([*LARGEST_ERRORS, 2**31 - 1])])).astype(np.int32)
    dtype = jnp.dtype(jnp.float32)
    betas = [x for beta in CONSTANT for x in (beta, Lagged(beta))]
    run = full_jit(jax.vmap(lambda t: jnp.stack(corrections_of(betas, (), t, dtype)).reshape(-1, 2)))
    found = np.asarray(run(steps))
    for (i, t), (j, beta) in itertools.product(enumerate(steps), enumerate(CONSTANT)):
        for x, expected, units in zip(found[i, j], exact_corrections(beta, int(t)), (3, 6), strict=True):
            if expected < 1e37:
                assert abs(Fraction(float(x)) / expected - 1) <= Fraction(units, 2**24), (beta, t)


CHANGING = np.concatenate([np.linspace(0, 0.999, 500), np.full(500, 0.99999), np.linspace(0.999, 0.1, 100)])


@pytest.mark.parametrize(
    "betas", [np.full(100_000, 0.9), np.full(100_000, 0.999999), CHANGING], ids=["0.9", "0.999999", "changing"]
)
def test_a_kept_bias_weight_is_accurate(betas: np.ndarray) -> None:
    """The weight is ``1 - β₁ β₂ … βₜ`` to float32 rounding, and more exact with its remainder."""

    def step(weight: Weight, beta: jax.Array) -> Any:
        weight = weigh(beta, weight)
        return weight, weight

    betas = betas.astype(np.float32)
    found = jax.lax.scan(step, Weight(jnp.zeros(()), jnp.zeros(())), jnp.asarray(betas))[1]
    expected = 1 - np.cumprod(np.float64(betas))
    np.testing.assert_allclose(found.main, expected, rtol=2e-7)
    np.testing.assert_allclose(np.float64(found.main) + np.float64(found.rest), expected, rtol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_ema_forgets_a_far_larger_old_value(beta: float) -> None:
    """Computed from the far end, ``old + (1 - β)(new - old)``, `new` would be lost in the rounding of `old`."""
    old, new = jnp.asarray(1e8, jnp.float32), jnp.asarray(1.0, jnp.float32)
    expected = np.float64(np.float32(beta)) * 1e8 + (1 - np.float64(np.float32(beta)))
    for given in (beta, jnp.asarray(beta, jnp.float32)):
        np.testing.assert_allclose(adam_fn.ema(given, old, new), expected, rtol=1e-7)
        with pytest.raises(TypeError):  # Nothing is rounded in silence.
            adam_fn.ema(given, old, new.astype(jnp.bfloat16))


def test_the_count_stops_at_its_largest_value() -> None:
    tx = adam_fn.adam(1e-3)
    last = jnp.asarray(2**31 - 1, jnp.int32)
    adam, *rest = tx.init(jnp.ones(2))
    assert int(tx.update(jnp.ones(2), (adam._replace(count=last), *rest))[1][0].count) == last
