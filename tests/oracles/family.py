"""The Adam family in float64 NumPy, written as the papers write it: one loop, powers of beta, no cleverness.

Nothing here is taken from the package, so that a test against it is a test against the papers.
Steps are counted from t = 1 as in the papers; a schedule is an array with one value a step, value t-1 at step t.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Hyper: TypeAlias = float | Array
"""A number, or one value for each step."""
Gradients: TypeAlias = Array | Callable[[int, Array], Array]
"""One row of gradients for each step, or the gradient at (t, parameters)."""
Decay: TypeAlias = Literal["scaled", "independent", "l2", "proximal"]
Directions: TypeAlias = Generator[Array, Array, None]
"""`send(gradients)` gives the direction of a step; `next`, before the first step, gives a value that is ignored."""


class Trajectory(NamedTuple):
    """The course of an optimizer: row t-1 belongs to step t."""

    params: Array
    """[T, n], the parameters after the step."""
    updates: Array
    """[T, n], what the step added to them."""


def at(x: Hyper, t: int) -> float:
    """The value of a hyperparameter at step t."""
    return float(x) if np.ndim(x) == 0 else float(np.asarray(x)[t - 1])


def power(beta: Hyper, t: int) -> float:
    """beta^t; for a schedule beta_1 beta_2 ... beta_t."""
    return float(beta) ** t if np.ndim(beta) == 0 else float(np.prod(np.asarray(beta, np.float64)[:t]))


def optimizer(directions: Callable[..., Directions]) -> Callable[..., Trajectory]:
    """Makes the optimizer theta_t = theta_{t-1} - alpha_t * direction_t of a generator of directions.

    The generator is given zeros of the parameters' shape, and the options. `decay` is one of four kinds of weight decay
    (1711.05101). "l2": lambda theta joins the gradient. "independent": the paper's decoupled decay, lambda theta is
    subtracted as it is. "scaled": the frameworks' decoupled decay, lambda theta is multiplied by the rate. "proximal":
    Adan's, what the step without decay arrives at is divided by 1 + alpha lambda (2208.06677).
    """

    @functools.wraps(directions)
    def descend(
        grads: Gradients,
        params0: Array,
        learning_rate: Hyper,
        *,
        weight_decay: Hyper = 0.0,
        decay: Decay = "scaled",
        steps: int = 0,
        **options: Any,
    ) -> Trajectory:
        theta = np.array(params0, np.float64)
        found = directions(np.zeros_like(theta), **options)
        next(found)
        params, updates = [], []
        for t in range(1, (steps if callable(grads) else len(grads)) + 1):
            alpha, wd = at(learning_rate, t), at(weight_decay, t)
            g = np.asarray(grads(t, theta) if callable(grads) else grads[t - 1], np.float64)
            step = -alpha * found.send(g + wd * theta if decay == "l2" else g)
            if decay == "independent":
                step = step - wd * theta
            elif decay == "proximal":
                step = (theta + step) / (1 + alpha * wd) - theta
            elif decay == "scaled":
                step = step - alpha * wd * theta
            theta = theta + step
            params.append(theta)
            updates.append(step)
        return Trajectory(np.stack(params), np.stack(updates))

    return descend


def _look_ahead(m: Array, g: Array, b1: Hyper, t: int, momentum_decay: float | None) -> Array:
    """NAdam's first moment (Dozat, ICLR 2016 workshop): what momentum will look like after the next step.

    mu_{t+1} m / (1 - mu_1 ... mu_{t+1}) + (1 - mu_t) g / (1 - mu_1 ... mu_t), with a constant mu = b1, or with the
    momentum schedule mu_t = b1 (1 - 0.96^(t psi) / 2) if psi (`momentum_decay`) is given. Either way m decays with b1.
    """
    mu = np.full(t + 1, b1)
    if momentum_decay is not None:
        mu = mu * (1 - 0.5 * 0.96 ** (np.arange(1, t + 2) * momentum_decay))
    return mu[t] * m / (1 - np.prod(mu)) + (1 - mu[t - 1]) * g / (1 - np.prod(mu[:t]))


def _over_root(top: Array, v: Array, correction: float, eps: float, eps_root: float, eps_hat: bool) -> Array:
    """The direction of a corrected first moment and a raw v; `eps_hat` adds eps to the raw root, without an eps_root.

    The end of section 2 of arXiv 1412.6980 has it: alpha sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).
    """
    if eps_hat:
        return np.sqrt(correction) * top / (np.sqrt(v) + eps)
    return top / (np.sqrt(v / correction + eps_root) + eps)


def adam_directions(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    nesterov: bool = False,
    momentum_decay: float | None = None,
    eps_hat: bool = False,
) -> Directions:
    """Adam, Algorithm 1 of arXiv 1412.6980: theta -= alpha m_hat / (sqrt(v_hat) + eps).

    `eps_root` is not in the paper: optax adds it to v_hat under the root.
    `nesterov` is NAdam: with m_hat looking one step ahead.
    """
    m = v = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = _look_ahead(m, g, b1, t, momentum_decay) if nesterov else m / (1 - power(b1, t))
        u = _over_root(m_hat, v, 1 - power(b2, t), at(eps, t), at(eps_root, t), eps_hat)


adam = optimizer(adam_directions)
#: Algorithm 2 of arXiv 1711.05101 with `decay="independent"`; the frameworks' form is "scaled", its other branch "l2".
adamw = adam
#: Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop. Constant momentum without `momentum_decay`
#: (optax); psi = 4e-3 is torch's schedule, psi = 1 that of Keras 3.
nadam = nadamw = functools.partial(adam, nesterov=True)


@optimizer
def adamax(zeros: Array, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, eps_hat: bool = False) -> Directions:
    """AdaMax, Algorithm 2 of arXiv 1412.6980: u = max(b2 u, |g|), theta -= alpha / (1 - b1^t) * m / u.

    The paper has no eps (`eps=0`): where u is still 0, m is 0 as well, and 0/0 is taken as no step. torch and optax put
    eps into the max, u = max(b2 u, |g| + eps); Keras adds it outside, m / (u + eps), here `eps_hat`: to the raw u.
    """
    m = u = direction = zeros
    for t in count(1):
        g = yield direction
        beta1, epsilon = at(b1, t), at(eps, t)
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(at(b2, t) * u, np.abs(g) + (0.0 if eps_hat else epsilon))
        bottom = u + epsilon if eps_hat else u
        direction = np.divide(m, bottom, out=np.zeros_like(m), where=bottom > 0) / (1 - power(b1, t))


adamaxw = adamax


@optimizer
def amsgrad(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    eps_hat: bool = False,
) -> Directions:
    """AMSGrad, Algorithm 2 of arXiv 1904.09237: v_max = max(v_max, v), theta -= alpha m / sqrt(v_max).

    The paper corrects neither moment (both flags False). torch and Keras take the maximum of the raw v and then
    correct it for the present step. (optax takes the maximum of the corrected v: other numbers, and not transcribed.)
    """
    m = v = v_max = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        v_max = np.maximum(v_max, v)
        top = m / (1 - power(b1, t)) if bias_correction_mu else m
        correction = 1 - power(b2, t) if bias_correction_nu else 1.0
        u = _over_root(top, v_max, correction, at(eps, t), at(eps_root, t), eps_hat)


@optimizer
def radam(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: float = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    threshold: float = 5.0,
    nesterov: bool = False,
    degenerated_to_sgd: bool = True,
    eps_hat: bool = False,
) -> Directions:
    """RAdam, Algorithm 2 of arXiv 1908.03265, with rho_inf = 2 / (1 - b2) - 1.

    rho_t = rho_inf - 2 t b2^t / (1 - b2^t). If rho_t reaches the threshold (5 in the official code, 4 in the paper),
    Adam's step times r_t = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t)); before that
    the un-rectified step m_hat (paper, optax, torch), or no step at all (the official code's default).
    `eps_hat`: the official code and torch add eps to sqrt(v) before they correct it; optax afterwards.
    """
    m = v = u = zeros
    rho_inf = 2 / (1 - b2) - 1
    for t in count(1):
        g = yield u
        beta1, b2_t = at(b1, t), power(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = _look_ahead(m, g, b1, t, None) if nesterov else m / (1 - power(b1, t))
        rho = rho_inf - 2 * t * b2_t / (1 - b2_t)
        if rho < threshold:
            u = m_hat if degenerated_to_sgd else zeros
            continue
        r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        u = r * _over_root(m_hat, v, 1 - b2_t, at(eps, t), at(eps_root, t), eps_hat)


@optimizer
def adabelief(
    zeros: Array,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-16,
    eps_root: Hyper = 1e-16,
    nesterov: bool = False,
) -> Directions:
    """AdaBelief, Algorithm 2 of arXiv 2010.07468: s = b2 s + (1 - b2)(g - m)^2 + eps with the m of this step.

    theta -= alpha m_hat / (sqrt(s / (1 - b2^t)) + eps). The paper's one eps stands in both places and what it adds to s
    stays in s (the official code adds it in place). optax 0.2.8 does the same with two numbers: `eps_root` is added
    into the stored s at each step, `eps` to the root; so the official form is optax's with eps = eps_root = eps.
    """
    m = s = u = zeros
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + at(eps_root, t)
        m_hat = _look_ahead(m, g, b1, t, None) if nesterov else m / (1 - power(b1, t))
        u = m_hat / (np.sqrt(s / (1 - power(b2, t))) + at(eps, t))


@optimizer
def yogi(zeros: Array, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-3) -> Directions:
    """Yogi (Zaheer et al., NeurIPS 2018): v = v - (1 - b2) sign(v - g^2) g^2, otherwise Adam.

    m_0 = v_0 = 1e-6 and the bias correction are what optax does; the paper's listing does not correct.
    """
    m = v = u = np.full_like(zeros, 1e-6)
    for t in count(1):
        g = yield u
        beta1, beta2 = at(b1, t), at(b2, t)
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * np.sign(v - g**2) * g**2
        u = m / (1 - power(b1, t)) / (np.sqrt(v / (1 - power(b2, t))) + at(eps, t))
