"""Optimizers whose update of one element depends on the others, in float64 NumPy, as their papers write them.

Parameters are lists of arrays, one a leaf; the gradients are a list of them for each step, or a function of the
one-based step and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Leaves: TypeAlias = list[NDArray[np.float64]]
Gradients: TypeAlias = list[Leaves] | Callable[[int, Leaves], Leaves]


def _at(grads: Gradients, t: int, theta: Leaves) -> Leaves:
    return grads(t, theta) if callable(grads) else grads[t - 1]


def _adam(m: Leaves, v: Leaves, g: Leaves, t: int, b1: float, b2: float, eps: float) -> tuple[Leaves, Leaves, Leaves]:
    """The new moments and m_hat / (sqrt(v_hat) + eps)."""
    m = [b1 * x + (1 - b1) * y for x, y in zip(m, g, strict=True)]
    v = [b2 * x + (1 - b2) * y**2 for x, y in zip(v, g, strict=True)]
    u = [x / (1 - b1**t) / (np.sqrt(y / (1 - b2**t)) + eps) for x, y in zip(m, v, strict=True)]
    return m, v, u


def _zeros(theta: Leaves) -> Leaves:
    return [np.zeros_like(x) for x in theta]


class Switch(NamedTuple):
    """When SWATS switched (the one-based step; 0 for never) and to which rate."""

    step: int
    rate: float


def swats(
    grads: Gradients,
    theta: Leaves,
    steps: int,
    alpha: Callable[[int], float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-9,
    tolerance: float = 1e-9,
) -> tuple[list[Leaves], Switch]:
    """SWATS, Algorithm 1 of arXiv 1712.07628, with one phase and one lambda for all parameters, and k > 1.

    After the switch the schedule of the rate goes on: Lambda alpha_t / alpha_switch.
    """
    m, v = _zeros(theta), _zeros(theta)
    momentum = _zeros(theta)
    lam, found, path = 0.0, Switch(0, 0.0), []
    for t in range(1, steps + 1):
        g = _at(grads, t, theta)
        if found.step:
            momentum = [b1 * x + y for x, y in zip(momentum, g, strict=True)]
            rate = found.rate * alpha(t) / alpha(found.step)
            theta = [x - (1 - b1) * rate * y for x, y in zip(theta, momentum, strict=True)]
        else:
            m, v, u = _adam(m, v, g, t, b1, b2, eps)
            p = [-alpha(t) * x for x in u]
            theta = [x + y for x, y in zip(theta, p, strict=True)]
            along = sum(float(np.sum(x * y)) for x, y in zip(p, g, strict=True))
            if along != 0:
                gamma = sum(float(np.sum(x * x)) for x in p) / -along
                lam = b2 * lam + (1 - b2) * gamma
                corrected = lam / (1 - b2**t)
                if t > 1 and abs(corrected - gamma) < tolerance and corrected > 0:
                    found = Switch(t, corrected)
        path.append(theta)
    return path, found


def lamb(
    grads: Gradients,
    theta: Leaves,
    steps: int,
    alpha: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    outside: bool = False,
) -> list[Leaves]:
    """LAMB, Algorithm 2 of arXiv 1904.00962 with phi(z) = z; ratio 1 where a norm is 0. `outside`: Keras's decay."""
    m, v = _zeros(theta), _zeros(theta)
    path = []
    for t in range(1, steps + 1):
        m, v, u = _adam(m, v, _at(grads, t, theta), t, b1, b2, eps)
        new = []
        for x, direction in zip(theta, u, strict=True):
            r = direction if outside else direction + weight_decay * x
            norm_x, norm_r = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(r * r))
            ratio = norm_x / norm_r if norm_x > 0 and norm_r > 0 else 1.0
            new.append(x - alpha * ratio * r - (weight_decay * x if outside else 0))
        theta = new
        path.append(theta)
    return path


def cautious_adamw(
    grads: Gradients,
    theta: Leaves,
    steps: int,
    alpha: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    floor: float = 1e-3,
) -> list[Leaves]:
    """C-AdamW of arXiv 2411.16085: the mask (u g > 0) over its mean, at least `floor`; decay outside of the mask."""
    m, v = _zeros(theta), _zeros(theta)
    path = []
    for t in range(1, steps + 1):
        g = _at(grads, t, theta)
        m, v, u = _adam(m, v, g, t, b1, b2, eps)
        masks = [(x * y > 0).astype(float) for x, y in zip(u, g, strict=True)]
        masked = [x * mask / max(mask.mean(), floor) for x, mask in zip(u, masks, strict=True)]
        theta = [x - alpha * y - alpha * weight_decay * x for x, y in zip(theta, masked, strict=True)]
        path.append(theta)
    return path


def schedule_free_adamw(
    grads: Gradients,
    theta: Leaves,
    steps: int,
    alpha: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup: int = 0,
) -> tuple[list[Leaves], list[Leaves]]:
    """Schedule-Free AdamW, Algorithm 1 of arXiv 2405.15682 with the authors' weights: the paths of y and of x.

    y = (1 - b1) z + b1 x; z -= a_t (g(y) / (sqrt(v_hat) + eps) + lambda y); x = (1 - c) x + c z with
    c_t = w_t / (w_1 + ... + w_t), w = (the largest rate so far)^2; the rate rises linearly, a_t = a t / warmup.
    """
    z, x, v = theta, theta, _zeros(theta)
    total = largest = 0.0
    ys, xs = [], []
    y = theta
    for t in range(1, steps + 1):
        rate = alpha * min(1.0, t / warmup) if warmup else alpha
        g = _at(grads, t, y)
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        z = [
            a - rate * (b / (np.sqrt(c / (1 - b2**t)) + eps) + weight_decay * d)
            for a, b, c, d in zip(z, g, v, y, strict=True)
        ]
        largest = max(largest, rate)
        total += largest**2
        c = largest**2 / total
        x = [(1 - c) * a + c * b for a, b in zip(x, z, strict=True)]
        y = [(1 - b1) * a + b1 * b for a, b in zip(z, x, strict=True)]
        ys.append(y)
        xs.append(x)
    return ys, xs


def averages(path: list[Leaves], decay: float | None) -> list[Leaves]:
    """Section 7.2 of arXiv 1412.6980: bar = b bar + (1 - b) theta from 0, bar / (1 - b^t); None for the plain mean."""
    found, bar = [], _zeros(path[0])
    for t, theta in enumerate(path, start=1):
        if decay is None:
            found.append([np.mean([step[i] for step in path[:t]], axis=0) for i in range(len(theta))])
            continue
        bar = [decay * x + (1 - decay) * y for x, y in zip(bar, theta, strict=True)]
        found.append([x / (1 - decay**t) for x in bar])
    return found
