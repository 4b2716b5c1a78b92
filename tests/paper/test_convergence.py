"""Where Adam goes (arXiv 1412.6980; AMSGrad, arXiv 1904.09237): small problems whose outcome has a formula.

Each stands beside a method or a setting that fails on it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import Array, together
from helpers.uncorrected import mean_decay

import adam_fn
from adam_fn.schedules import beta1_decay, inverse_sqrt

Gradient = Callable[[jax.Array, Any], jax.Array]


def descend(
    txs: Sequence[optax.GradientTransformation], gradient: Gradient, start: Array, inputs: Any, bound: float = math.inf
) -> Array:
    """The parameters of each ``[len(txs), steps + 1, size]``, the start included, by one program.

    `inputs` holds what the gradient sees at each step, on its first axis; each step is projected to
    ``[-bound, bound]``.
    """
    tx = together(txs)

    @jax.jit
    def run(start: jax.Array, inputs: Any) -> jax.Array:
        def step(carry: tuple[jax.Array, optax.OptState], now: Any) -> Any:
            x, state = carry
            u, state = tx.update(jax.vmap(gradient, (0, None))(x, now), state, x)
            x = jnp.clip(x + jnp.asarray(u), -bound, bound)
            return (x, state), x

        return jax.lax.scan(step, (start, tx.init(start)), inputs)[1]

    begin = np.stack([np.asarray(start, np.float32)] * len(txs))
    return np.concatenate([begin[:, None], np.swapaxes(run(begin, inputs), 0, 1)], axis=1)


def _normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_sparse_features_are_learned_faster_than_by_sgd() -> None:
    """Linear regression on 50 features that are 1 half of the time, and 50 that are 1 in 0.2% of the examples.

    The frequent ones limit the rate of SGD to 2/12.75 (their largest curvature), with which the weights of the rare
    ones converge like ``(1 - 0.002 α)^t``: after 300 steps of 128 examples 90% of their error is left, half of it with
    Nesterov momentum at its largest stable rate. Adam has 4% left.
    """
    dim, frequency, batch, steps = 50, 0.002, 128, 300
    rng = np.random.default_rng(3)
    x = (rng.random((steps, batch, 2 * dim)) < np.repeat([0.5, frequency], dim)).astype(np.float32)
    truth = rng.standard_normal(2 * dim).astype(np.float32)
    y = x @ truth + 0.1 * rng.standard_normal((steps, batch)).astype(np.float32)
    rates = np.array([0.03, 0.06, 0.12, 0.14])
    sgd = [optax.sgd(rate) for rate in (*rates, 0.18)]
    nesterov = [optax.sgd(rate, 0.9, nesterov=True) for rate in (0.03, 0.06, 0.1, 0.12)]
    adam = [adam_fn.adam(rate) for rate in (0.05, 0.07, 0.1)]
    txs = [*sgd, *nesterov, *adam]
    paths = descend(txs, lambda w, now: (now[0] @ w - now[1]) @ now[0] / batch, np.zeros(2 * dim), (x, y))
    error = np.float64(paths[:, -1, dim:]) - truth[dim:]
    left = np.linalg.norm(error, axis=1) / np.linalg.norm(truth[dim:])
    np.testing.assert_allclose(left[:4], (1 - frequency * rates) ** steps, rtol=0.03)
    assert not (left[[4, 8]] < 1e3).any(), "the next larger rates diverge"
    assert left[:4].min() > 0.85
    assert left[5:8].min() > 0.5
    assert left[9:].max() < 0.06


def test_average_regret_falls_like_one_over_root_t() -> None:
    """``f_t(x) = ½(x - z_t)²``, z_t ~ N(0, σ²), ``α_t = α/√t``, ``β₁_t = β₁ λ^(t-1)``: ``R(T)/T → ασ/(2√T)``.

    For the expected loss of a step is ``E[x²]/2 ≈ α_t σ/4`` above the best one's. At a constant rate R(T)/T stays.
    R(T) is against the best fixed point in hindsight, the mean of the z_t.
    """
    steps, size = 16_000, 400
    z = _normal(steps, size, seed=4)
    txs = [adam_fn.adam(rate, beta1_decay(0.9, 1 - 1e-3)) for rate in (inverse_sqrt(0.5), 0.05)]
    paths = descend(txs, lambda x, z: x - z, np.zeros(size), z)

    def average_regret(path: Array, steps: int) -> float:
        costs = np.mean((path[:steps] - z[:steps]) ** 2, dtype=np.float64)
        return float(costs - np.var(z[:steps], axis=0, dtype=np.float64).mean()) / 2

    decayed, constant = ([average_regret(path, count) for count in (1000, 4000, steps)] for path in paths)
    assert decayed[-1] == pytest.approx(0.25 / math.sqrt(steps), rel=0.1)
    slopes = np.diff(np.log(decayed)) / math.log(4)
    assert ((slopes < -0.5) & (slopes > -0.6)).all(), slopes
    assert constant[-1] == pytest.approx(0.05 / 4, rel=0.1)
    assert constant[-1] > 0.9 * constant[-2]


def test_counter_example_of_amsgrad() -> None:
    """``f_t(x) = 3x`` at every third step and ``-x`` at the others, on [-1, 1]; the best point is -1.

    With β₁ = 0 and β₂ = 1/(1+C²) Adam ends at +1, the worst point, from every start: its average regret is 2/3. AMSGrad
    (the paper's form, without bias corrections) and AdaGrad end at -1, and so does Adam where its memory of v, here
    1,000 steps, is long against the period of 3.
    """
    steps, large = 30_000, 3.0
    t = np.arange(1, steps + 1)
    slopes = np.where(t % 3 == 1, large, -1.0).astype(np.float32)
    rate, short = inverse_sqrt(0.1), 1 / (1 + large**2)

    plain: Any = {"bias_correction_mu": False, "bias_correction_nu": False}
    txs = (
        adam_fn.adam(rate, 0.0, short),
        adam_fn.amsgrad(rate, 0.0, short, **plain),
        adam_fn.amsgrad(rate, 0.0, short),
        adam_fn.adam(rate, 0.0, 0.999),
        adam_fn.adam(rate, 0.0, mean_decay),
    )
    paths = descend(txs, lambda x, slope: slope + 0 * x, np.asarray([-1.0, 0.0, 1.0]), slopes, bound=1.0)
    regrets = slopes[:, None] * (np.float64(paths[:, :-1]) + 1)
    (bad, *good), (bad_regret, *regret) = paths[:, -1], regrets[:, steps // 2 :].mean(1)
    np.testing.assert_allclose(bad, 1, atol=1e-3)
    np.testing.assert_allclose(bad_regret, 2 / 3, atol=2e-3)
    np.testing.assert_allclose(good, -1, atol=1e-3)
    np.testing.assert_allclose(regret, 0, atol=1e-3)
