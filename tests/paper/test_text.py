"""The claims of the Adam paper about its updates (arXiv 1412.6980, sections 2 to 5 and 7.1) and where they lead.

Each claim is checked with a formula or an independent implementation, and with a competitor for which it fails.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import figure4
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS
from helpers.runs import Array, random_gradients, relative_error, step_bound, together, trajectories, trajectory

import adam_fn
from adam_fn.schedules import beta1_decay, inverse_sqrt


def updates64(grads: Array, *txs: optax.GradientTransformation) -> Array:
    """The updates of each ``[len(txs), steps, size]`` in float64, by one program; the parameters are 0."""
    with jax.enable_x64(True):
        return trajectories(txs, grads, np.zeros(grads.shape[1]), jnp.float64)[1]


def uncorrected(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 0.0) -> adam_fn.Transformation:
    """`adam_fn.adam` without bias correction."""
    return adam_fn.transform(figure4.PerhapsCorrected(b1, b2, eps, corrected=0.0) >> adam_fn.Rate(learning_rate))


def mean_decay(count: jax.Array) -> jax.Array:
    """``β₂ = 1 - 1/t``: v is the plain mean of the squared gradients."""
    return 1 - 1 / (jnp.asarray(count, float) + 1)


SIZE = 64
GRADS = random_gradients(80, SIZE)
DIAGONAL = 10.0 ** np.linspace(-4, 4, SIZE)


def test_diagonal_rescaling_leaves_the_updates_unchanged() -> None:
    """With ε = 0, the gradients ``D g``, D diagonal from 1e-4 to 1e4, give the updates of ``g``.

    Powers of two commute with every rounding: for them the updates are equal to the last bit.
    """
    powers = np.exp2(np.round(np.log2(DIAGONAL)))
    grads = np.concatenate([GRADS, GRADS * powers, GRADS * DIAGONAL], axis=1)
    cases = [(case, case.scale_free) for case in MEMBERS if case.scale_free is not None]
    _, updates = trajectories([case.make(1.0, **options) for case, options in cases], grads, np.zeros(3 * SIZE))
    for (case, _), found in zip(cases, updates, strict=True):
        plain, exact, scaled = np.split(found, 3, axis=1)
        assert np.abs(plain[-1]).max() > 0.01, case.name
        np.testing.assert_array_equal(exact, plain, case.name)
        np.testing.assert_allclose(scaled, plain, rtol=2e-5, atol=2e-6, err_msg=case.name)


def test_rotated_gradients_do_not_rotate_the_updates() -> None:
    """Adam's updates are not rotated along with the gradients; SGD's are."""
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((SIZE, SIZE)))[0]
    grads = np.concatenate([GRADS, GRADS @ rotation.T], axis=1)
    _, updates = trajectories([adam_fn.adam(1.0), optax.sgd(1.0)], grads, np.zeros(2 * SIZE))
    for found, low, high in zip(updates, (0.3, 0.0), (2.0, 1e-5), strict=True):
        plain, rotated = np.split(found, 2, axis=1)
        assert low <= relative_error(rotated, plain @ rotation.T) <= high


BETAS = ((0.9, 0.999), (0.9, 0.99), (0.9, 0.95), (0.99, 0.999), (0.5, 0.9999))


def test_strict_step_bound_is_reached_at_every_step() -> None:
    """One sequence for each t that is extremal there, ``g_i = (β₁/β₂)^(t-i)``, and random, sparse and wild ones.

    Cauchy-Schwarz: ``|Σ a_i g_i| ≤ √(Σ a_i²/b_i) √(Σ b_i g_i²)``, a and b the weights of m̂ and v̂. The paper's bounds,
    ``(1-β₁)/√(1-β₂)`` where ``1-β₁ > √(1-β₂)`` and α elsewhere, are exceeded in all of its three cases.
    """
    steps = 120
    t = np.arange(1, steps + 1)
    rng = np.random.default_rng(4)
    lag = t[None, :] - t[:, None]  # [i, t]
    signs = rng.choice([-1, 1], steps)
    extremal = [np.where(lag >= 0, (b1 / b2) ** np.maximum(lag, 0), 0.0) * signs for b1, b2 in BETAS]
    random = rng.standard_normal((steps, 200)) * (rng.random((steps, 200)) < 0.5 ** rng.integers(0, 6, 200))
    wild = np.exp(8 * rng.standard_normal((steps, 50)))
    grads = np.concatenate([*extremal, random, wild], axis=1)
    updates = updates64(grads, *(adam_fn.adam(1.0, b1, b2, eps=0.0) for b1, b2 in BETAS))
    for i, ((b1, b2), found) in enumerate(zip(BETAS, np.abs(updates), strict=True)):
        bound = step_bound(b1, b2, steps)
        assert (found <= bound[:, None] * (1 + 1e-12)).all()
        np.testing.assert_allclose(np.diagonal(found, i * steps), bound, rtol=1e-9)
    for b1, b2 in BETAS[:3]:  # 1-β₁ above, equal to and below √(1-β₂).
        assert step_bound(b1, b2, 500)[-1] > 1.15 * max(1.0, (1 - b1) / math.sqrt(1 - b2))


def test_spike_after_zeros_approaches_the_papers_bound() -> None:
    """Gradient zero until step T: ``(1-β₁)/(1-β₁ᵀ) √((1-β₂ᵀ)/(1-β₂))`` → ``(1-β₁)/√(1-β₂)`` = 3.1623."""
    spikes = np.asarray([10, 100, 1000, 10_000])
    grads = np.zeros((10_000, 4))
    grads[spikes - 1, np.arange(4)] = [1e-3, -1.0, 1e3, -7.0]
    found = np.abs(updates64(grads, adam_fn.adam(1.0, eps=0.0)))[0, spikes - 1, np.arange(4)]
    expected = 0.1 / (1 - 0.9**spikes) * np.sqrt((1 - 0.999**spikes) / (1 - 0.999))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[-1] == pytest.approx(0.1 / math.sqrt(1 - 0.999), rel=1e-4)


def test_strict_bound_of_adamax_is_reached() -> None:
    """The bound ``|Δ| ≤ α (1-β₁)/(1-β₁ᵗ) (1-qᵗ)/(1-q)``, q = β₁/β₂; ``g_i = β₂^i`` reaches it, 1.009 α."""
    steps = 400
    t = np.arange(1, steps + 1)
    grads = np.concatenate([(0.999**t)[:, None] * [1.0, -1e-5], random_gradients(steps, 60), 0.9 ** t[:, None]], axis=1)
    found = np.abs(updates64(grads, adam_fn.adamax(1.0, eps=0.0)))[0]
    q = 0.9 / 0.999
    bound = 0.1 / (1 - 0.9**t) * (1 - q**t) / (1 - q)
    assert (found <= bound[:, None] * (1 + 1e-12)).all()
    np.testing.assert_allclose(found[:, :2], np.stack([bound, bound], axis=1), rtol=1e-9)
    assert found[-1, 0] == pytest.approx(1.00909, abs=1e-5)


def test_steps_follow_the_signal_to_noise_ratio() -> None:
    """Gradients N(μ, σ²): the mean step is ``α μ/√(μ²+σ²)``, its spread that of the first moment.

    So the mean size is that of a folded normal distribution. The sign of the gradient has size α whatever the noise.
    """
    ratios = np.asarray([0.0, 0.1, 0.5, 1.0, 3.0, 30.0])
    copies, steps, tail = 1500, 1500, 500
    rng = np.random.default_rng(5)
    signal = np.repeat(ratios, copies)
    scale = 10.0 ** rng.uniform(-4, 4, signal.size)  # The gradients' scale must not matter.
    grads = (signal + rng.standard_normal((steps, signal.size))) * scale
    _, updates = trajectory(adam_fn.adam(1.0, eps=0.0), grads, np.zeros(signal.size))
    steps_of = -updates[-tail:].reshape(tail, len(ratios), copies)

    norm = np.sqrt(1 + ratios**2)
    mean, spread = ratios / norm, np.sqrt(0.1 / 1.9) / norm
    phi = np.asarray([math.erf(m / (s * math.sqrt(2))) for m, s in zip(mean, spread, strict=True)])
    folded = spread * math.sqrt(2 / math.pi) * np.exp(-((mean / spread) ** 2) / 2) + mean * phi
    np.testing.assert_allclose(steps_of.mean((0, 2)), mean, atol=5e-3)
    np.testing.assert_allclose(np.abs(steps_of).mean((0, 2)), folded, atol=5e-3)
    assert (np.diff(folded) > 0).all()


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.99999])
def test_corrected_moments_are_weighted_means_of_the_gradients(beta: float) -> None:
    """The weights ``β^(t-i)``, made to sum to 1 from the first step on: unbiased if the gradients are stationary.

    The moments are read off the updates: with β₁ = 0 and ε = 0 these are ``g/√v̂``, with β₂ = 0 ``m̂/|g|``.
    """
    grads = 0.5 + np.random.default_rng(6).standard_normal((100, SIZE))
    lag = np.subtract.outer(np.arange(100.0), np.arange(100.0))  # [t, i]
    weights = np.where(lag >= 0, beta ** np.abs(lag), 0.0)
    weights /= weights.sum(1, keepdims=True)
    second, first = updates64(grads, adam_fn.adam(1.0, 0.0, beta, 0.0), adam_fn.adam(1.0, beta, 0.0, 0.0))
    np.testing.assert_allclose((grads / second) ** 2, weights @ grads**2, rtol=1e-9)
    np.testing.assert_allclose(-first * np.abs(grads), weights @ grads, rtol=0, atol=1e-9)


def test_without_correction_the_first_steps_are_too_large() -> None:
    """The factor is ``(1-β₁ᵗ)/√(1-β₂ᵗ)``: ``(1-β₁)/√(1-β₂)`` at the first step, and more in the steps after it."""
    steps, b1, firsts = 400, 0.9, {0.999: 3.1623, 0.9999: 10.0, 0.999999: 100.0}
    t = np.arange(1, steps + 1)
    corrected = [adam_fn.adam(1.0, b1, b2, eps=0.0) for b2 in firsts]
    updates = updates64(random_gradients(steps, 16), *corrected, *(uncorrected(1.0, b1, b2) for b2 in firsts))
    for (b2, first), corrected, raw in zip(firsts.items(), *np.split(updates, 2), strict=True):
        factor = (1 - b1**t) / np.sqrt(-np.expm1(t * math.log(b2)))
        np.testing.assert_allclose(raw, corrected * factor[:, None], rtol=1e-9)
        np.testing.assert_allclose(np.abs(raw[0]), first, rtol=1e-4)
        assert factor.max() > 1.8 * first


def test_adagrad_is_a_limit_of_adam() -> None:
    """β₁ = 0 and the rate ``α/√t`` give ``α g_t/√(Σ g_i²)`` if v is ``mean(g²)``; else the error is about 1 - β₂."""
    rng = np.random.default_rng(8)
    grads = np.float64(random_gradients(200, SIZE)) * (rng.random((200, SIZE)) < 0.3)
    rate, betas = inverse_sqrt(0.1), (mean_decay, 1 - 1e-2, 1 - 1e-4, 1 - 1e-6)
    ours = [adam_fn.adam(rate, 0.0, b2, eps=0.0) for b2 in betas]
    adagrad, exact, *limits = updates64(grads, optax.adagrad(0.1, 0.0, eps=0.0), *ours)
    total = np.sqrt(np.cumsum(grads**2, axis=0))
    for updates in (adagrad, exact):
        np.testing.assert_allclose(updates, -0.1 * grads / np.where(total == 0, 1, total), rtol=0, atol=1e-15)
    far, near, nearest = (relative_error(found, adagrad) for found in limits)
    assert far > 0.02
    assert near / nearest == pytest.approx(100, rel=0.02)
    assert nearest < 2e-5


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_rmsprop_is_adam_without_momentum(b2: float) -> None:
    """Adam with β₁ = 0 has a bias correction; RMSProp as published has none, and its first step is 1/√(1-β₂)."""
    options = {"decay": b2, "eps": 1e-3, "eps_in_sqrt": False}
    peers = [optax.rmsprop(0.1, **options, bias_correction=given) for given in (True, False)]
    ours = adam_fn.adam(0.1, 0.0, b2, eps=1e-3), uncorrected(0.1, 0.0, b2, eps=1e-3)
    corrected, raw, peer, raw_peer = updates64(GRADS, *ours, *peers)
    np.testing.assert_allclose(corrected, peer, rtol=1e-10)
    np.testing.assert_allclose(raw, raw_peer, rtol=1e-10)
    assert relative_error(corrected, raw_peer) > 0.25


# Where the updates lead: noisy and sparse objectives, and section 4.

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
    """With ``f_t(x) = ½(x - z_t)²``, z_t ~ N(0, σ²), ``α_t = α/√t``, ``β₁_t = β₁ λ^(t-1)``: ``R(T)/T → ασ/(2√T)``.

    The expected loss of a step is ``E[x²]/2 ≈ α_t σ/4`` above the best one's. At a constant rate R(T)/T stays.
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


def test_adam_fails_on_the_counter_example_of_amsgrad() -> None:
    """With ``f_t(x) = 3x`` at every third step and ``-x`` at the others, on [-1, 1], the best point is -1.

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
