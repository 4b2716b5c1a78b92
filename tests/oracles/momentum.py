"""The other momenta in float64 NumPy, as their papers write them. See `oracles.family` for the conventions."""

from __future__ import annotations

from itertools import count

import numpy as np
from oracles.family import Array, Directions, Hyper, at, optimizer, power


@optimizer
def laprop(zeros: Array, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: float = 1e-15) -> Directions:
    """LaProp, Algorithm 1 of arXiv 2002.04839: n = nu n + (1 - nu) g^2; m = mu m + (1 - mu) g / (sqrt(n/c_n) + eps);
    theta -= lambda m / c_m, with c = 1 - beta^t.
    """
    m = n = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        n = beta2 * n + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * g / (np.sqrt(n / (1 - power(b2, t))) + eps)
        u = m / (1 - power(b1, t))


@optimizer
def adopt(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: Hyper = 0.9999,
    eps: float = 1e-6,
    nesterov: bool = False,
    use_clipping: bool = True,
) -> Directions:
    """ADOPT, Algorithm 2 of arXiv 2411.02853: v_0 = g_0^2 and no step; then m = b1 m + (1 - b1) clip(g_t / max(
    sqrt(v_{t-1}), eps), t^(1/4)), theta -= alpha m, v = b2 v + (1 - b2) g_t^2. `nesterov` is optax's: one more b1.
    """
    first = yield zeros
    m, v, u = zeros, first**2, zeros
    for t in count(2):
        g = yield u
        n = g / np.maximum(np.sqrt(v), eps)
        if use_clipping:
            bound = (t - 1) ** 0.25
            n = np.clip(n, -bound, bound)
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * n
        v = beta2 * v + (1 - beta2) * g**2
        u = beta1 * m + (1 - beta1) * n if nesterov else m


@optimizer
def ademamix(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    b3: Hyper = 0.9999,
    alpha: Hyper = 5.0,
    eps: float = 1e-8,
) -> Directions:
    """AdEMAMix, Algorithm 1 of arXiv 2409.03137, m2 = b3 m2 + (1 - b3) g without correction:
    theta -= eta((m1_hat + alpha m2) / (sqrt(nu_hat) + eps) + lambda theta).
    """
    m1 = m2 = nu = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2, beta3 = at(b1, t), at(b2, t), at(b3, t)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        nu = beta2 * nu + (1 - beta2) * g**2
        m1_hat, nu_hat = m1 / (1 - power(b1, t)), nu / (1 - power(b2, t))
        u = (m1_hat + at(alpha, t) * m2) / (np.sqrt(nu_hat) + eps)


def ademamix_alpha(t: int, alpha: float, warmup: int) -> float:
    """The authors' linear warm-up of alpha, at their one-based step."""
    return t / warmup * alpha if t < warmup else alpha


def ademamix_b3(t: int, b3: float, b1: float, warmup: int) -> float:
    """The authors' warm-up of b3, linear in f(b) = ln(1/2)/ln(b) - 1, at their one-based step."""

    def f(beta: float) -> float:
        return float(np.log(0.5) / np.log(beta) - 1)

    x = t / warmup
    return float(0.5 ** (1 / ((1 - x) * f(b1) + x * f(b3) + 1))) if t < warmup else b3


@optimizer
def lion(zeros: Array, b1: Hyper = 0.9, b2: Hyper = 0.99) -> Directions:
    """Lion, Program 1 of arXiv 2302.06675: c = b1 m + (1 - b1) g; theta -= eta(sign(c) + lambda theta);
    m = b2 m + (1 - b2) g.
    """
    m = c = zeros
    for t in count(1):
        g = yield np.sign(c)
        c = at(b1, t) * m + (1 - at(b1, t)) * g
        m = at(b2, t) * m + (1 - at(b2, t)) * g


@optimizer
def adan(zeros: Array, b1: Hyper = 0.98, b2: Hyper = 0.92, b3: Hyper = 0.99, eps: float = 1e-8) -> Directions:
    """Adan, Algorithm 1 of arXiv 2208.06677, with b = 1 - (the paper's beta), as in the authors' code, and its
    bias corrections: n = b3 n + (1 - b3)(g + b2 (g - g_prev))^2; theta -= alpha (m_hat + b2 v_hat)/(sqrt(n_hat) + eps).
    """
    m = v = n = u = previous = zeros
    for t in count(1):
        g = yield u
        difference = g - previous if t > 1 else zeros
        previous = g
        beta1, beta2, beta3 = at(b1, t), at(b2, t), at(b3, t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * difference
        n = beta3 * n + (1 - beta3) * (g + beta2 * difference) ** 2
        m_hat, v_hat, n_hat = m / (1 - power(b1, t)), v / (1 - power(b2, t)), n / (1 - power(b3, t))
        u = (m_hat + beta2 * v_hat) / (np.sqrt(n_hat) + eps)


@optimizer
def adam_atan2(zeros: Array, b1: Hyper = 0.9, b2: Hyper = 0.99, a: float = 4 / np.pi, b: float = 1.0) -> Directions:
    """Adam-atan2, arXiv 2407.05872: theta -= alpha a atan2(m_hat, b sqrt(v_hat))."""
    m = v = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = a * np.arctan2(m / (1 - power(b1, t)), b * np.sqrt(v / (1 - power(b2, t))))
