"""Where Adam goes (arXiv 1412.6980, sections 2 to 4; AMSGrad, arXiv 1904.09237): noisy, drifting and sparse objectives.

Small problems whose outcome has a formula, each beside a method or a setting that fails on it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import Array, together
from helpers.uncorrected import mean_decay, uncorrected

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


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.float64(x) ** 2)))


# Section 2.1.


def test_badly_scaled_quadratic_is_solved_like_a_well_scaled_one() -> None:
    """``f(x) = ½ Σ (d_i x_i)²``, d from 2⁻⁷ to 2⁷: with ε = 0 all elements take one path, to the last bit.

    SGD at the rate 1/max(d²), half of where it diverges, has hardly moved along the flat half of the directions.
    """
    d = jnp.exp2(jnp.arange(-7.0, 8.0))
    gradient: Gradient = lambda x, _: d**2 * x  # noqa: E731
    txs = adam_fn.adam(inverse_sqrt(0.1), eps=0.0), optax.sgd(2.0**-14)
    paths, sgd = descend(txs, gradient, np.ones(15), np.zeros(500, np.float32))
    np.testing.assert_array_equal(paths, np.repeat(paths[:, 7:8], 15, axis=1))
    assert np.abs(paths[-1]).max() < 1e-6
    assert (sgd[-1, :8] > 0.95).all()


def test_annealing_near_the_optimum() -> None:
    """At a constant rate, on ``½x²`` with noise of σ = 1, the steps shrink as the optimum nears.

    Far away the signal dominates and ``|Δ|`` is a little below α, for v̂ lags behind the falling gradients. At the
    optimum only the noise is left: ``|Δ| ≈ α √(2/π) √((1-β₁)/(1+β₁)) = 0.183 α``. The sign of the gradient keeps α.
    """
    rate, noise = 0.01, _normal(6000, 256)
    gradient: Gradient = lambda x, n: x + n  # noqa: E731
    paths = descend([adam_fn.adam(rate, b2=0.99), optax.sign_sgd(rate)], gradient, np.full(256, 20.0), noise)
    steps = np.abs(np.diff(paths, axis=1)) / rate
    (far, sign_far), (near, sign_near) = (part.mean((1, 2)) for part in (steps[:, :500], steps[:, -1000:]))
    assert 0.95 < far < 1
    assert near == pytest.approx(math.sqrt(2 / math.pi * 0.1 / 1.9), rel=0.03)
    assert (sign_far, sign_near) == pytest.approx((1, 1), abs=1e-3)


# Noisy, drifting and sparse objectives.


def test_noisy_quadratic_converges_as_the_rate_does() -> None:
    """``½x²`` with noise of σ = 1: ``E[x²] ≈ α_t σ/2``, which goes to 0 with ``α_t = α/√t`` and not with a constant.

    Near the optimum v̂ is σ², so that the steps are those of SGD at the rate α_t/σ.
    """
    steps, noise = 20_000, _normal(20_000, 400, seed=1)
    gradient: Gradient = lambda x, n: x + n  # noqa: E731
    txs = adam_fn.adam(0.02), adam_fn.adam(inverse_sqrt(0.2))
    constant, falling = descend(txs, gradient, np.full(400, 2.0), noise)
    assert _rms(constant[-2000:]) ** 2 == pytest.approx(0.02 / 2, rel=0.1)
    assert _rms(falling[-2000:]) ** 2 == pytest.approx(0.2 / math.sqrt(steps) / 2, rel=0.1)


def test_tracks_a_drifting_optimum() -> None:
    """The optimum moves by s = 0.005 a step, under noise of σ = 1: Adam's lag is constant, AdaGrad's grows.

    Adam moves by ``α L/√(L²+σ²)`` on average where it lags by L, which equals s at ``L = σ/√((α/s)² - 1)`` = 0.577.
    AdaGrad's rate falls: its lag grows like √t at the least, and at Adam's rate it is left behind at once.
    """
    steps, speed = 16_000, 0.005
    centre = speed * np.arange(1, steps + 1, dtype=np.float32)
    inputs = (centre, _normal(steps, 64, seed=2))
    txs = adam_fn.adam(2 * speed), *(optax.adagrad(rate) for rate in (0.1, 1.0, 10.0, 2 * speed))
    paths = descend(txs, lambda x, now: x - now[0] + now[1], np.zeros(64), inputs)
    lag = (centre[:, None] - paths[:, 1:]).mean(-1)
    early, late = lag[:, 3000:4000].mean(1), lag[:, 15_000:].mean(1)
    assert (early[0], late[0]) == pytest.approx((1 / math.sqrt(3), 1 / math.sqrt(3)), rel=0.04)
    assert (late[1:4] > 1.9 * early[1:4]).all()  # √(16,000/4,000) = 2.
    assert late[4] > 70  # Of the 80 that the optimum moved.


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

    def left(make: Callable[[Any], optax.GradientTransformation], rates: list[float]) -> Array:
        """The error of the rare weights that is left, a value a rate."""

        @jax.jit
        @partial(jax.vmap, in_axes=(0, None, None))
        def train(rate: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            tx, start = make(rate), jnp.zeros(2 * dim)

            def step(carry: tuple[jax.Array, optax.OptState], example: tuple[jax.Array, jax.Array]) -> Any:
                w, state = carry
                features, target = example
                u, state = tx.update((features @ w - target) @ features / batch, state, w)
                return (w + jnp.asarray(u), state), None

            return jax.lax.scan(step, (start, tx.init(start)), (x, y))[0][0]

        error = np.asarray(train(np.array(rates, np.float32), x, y), np.float64)[:, dim:] - truth[dim:]
        return np.linalg.norm(error, axis=1) / np.linalg.norm(truth[dim:])

    rates = [0.03, 0.06, 0.12, 0.14]
    *sgd, diverged = left(optax.sgd, [*rates, 0.18])
    np.testing.assert_allclose(sgd, [(1 - frequency * rate) ** steps for rate in rates], rtol=0.03)
    assert not diverged < 1e3
    *nesterov, diverged = left(lambda rate: optax.sgd(rate, 0.9, nesterov=True), [0.03, 0.06, 0.1, 0.12])
    assert not diverged < 1e3
    assert min(sgd) > 0.85
    assert min(nesterov) > 0.5
    assert left(adam_fn.adam, [0.05, 0.07, 0.1]).max() < 0.06


# Section 4: online convex optimization.


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


# Sections 3 and 6.4: without bias correction.


def test_without_correction_training_spikes() -> None:
    """A small network's loss, over its initial value: with β₂ near 1 the first uncorrected steps throw it far off.

    Corrected, the same runs never rise above where they began.
    """
    settings = np.array([(0.01, 0.0, 0.999), (0.01, 0.0, 0.9999), (0.03, 0.9, 0.9999)], np.float32)
    spikes = 5, 100, 5

    def network(seed: int) -> dict[str, Array]:
        first, last = _normal(8, 32, seed=seed), _normal(32, seed=seed + 1)
        return {"first": first / np.float32(math.sqrt(8)), "last": last / np.float32(math.sqrt(32))}

    @jax.jit
    def highest(settings: jax.Array, start: Any, truth: Any, x: Array) -> list[jax.Array]:
        """The highest loss of 300 steps over the first ``[settings]``, with and without correction."""
        forward = lambda w: jnp.tanh(x @ w["first"]) @ w["last"]  # noqa: E731

        def train(make: Callable[..., optax.GradientTransformation], setting: jax.Array) -> jax.Array:
            tx = make(*setting, 1e-8)

            def step(carry: tuple[Any, optax.OptState], _: None) -> Any:
                w, state = carry
                loss, grads = jax.value_and_grad(lambda w: jnp.mean((forward(w) - forward(truth)) ** 2))(w)
                updates, state = tx.update(grads, state, w)
                return (optax.apply_updates(w, updates), state), loss

            losses = jax.lax.scan(step, (start, tx.init(start)), None, 300)[1]
            return losses.max() / losses[0]

        return [jax.vmap(partial(train, make))(settings) for make in (adam_fn.adam, uncorrected)]

    corrected, raw = highest(jnp.asarray(settings), network(5), network(7), _normal(128, 8, seed=9))
    np.testing.assert_array_equal(corrected, 1)
    assert (np.asarray(raw) > spikes).all()
