"""Optimizers whose update of one element depends on the others, in float64 NumPy, as their papers write them.

Parameters are lists of arrays, one a leaf; the gradients are a function of the one-based step and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray
from oracles import family

Leaves: TypeAlias = list[NDArray[np.float64]]
Gradients: TypeAlias = Callable[[int, Leaves], Leaves]
Schedule: TypeAlias = Callable[[int], float]
each: Callable[..., Leaves] = jax.tree.map


def _adam(theta: Leaves, b1: float, b2: float, eps: float) -> Callable[[Leaves], Leaves]:
    """A function from the gradients of a step to its m_hat / (sqrt(v_hat) + eps)."""
    directions = [family.adam_directions(np.zeros_like(x), b1, b2, eps) for x in theta]
    for direction in directions:
        next(direction)
    return lambda g: [direction.send(x) for direction, x in zip(directions, g, strict=True)]


def _path(step: Callable[[Leaves, Leaves], Leaves], grads: Gradients, theta: Leaves, steps: int) -> list[Leaves]:
    """The parameters after every `step` of gradients and parameters."""
    path = []
    for t in range(1, steps + 1):
        theta = step(grads(t, theta), theta)
        path.append(theta)
    return path


def _dot(x: Leaves, y: Leaves) -> float:
    return float(sum(np.sum(a * b) for a, b in zip(x, y, strict=True)))


class Switch(NamedTuple):
    """The step at which SWATS switched (one-based; 0 for never) and the rate of SGD."""

    step: int
    rate: float


def swats(
    grads: Gradients, theta: Leaves, steps: int, alpha: Schedule, b1: float = 0.9, *, b2: float, tolerance: float
) -> tuple[list[Leaves], Switch]:
    """SWATS, Algorithm 1 of arXiv 1712.07628, with one phase and one lambda for all parameters, and k > 1.

    After the switch the schedule of the rate goes on: Lambda alpha_t / alpha_switch.
    """
    adam, momentum = _adam(theta, b1, b2, 1e-9), each(np.zeros_like, theta)
    lam, found, path = 0.0, Switch(0, 0.0), []
    for t in range(1, steps + 1):
        g = grads(t, theta)
        if found.step:
            momentum = each(lambda x, y: b1 * x + y, momentum, g)
            rate = (1 - b1) * found.rate * alpha(t) / alpha(found.step)
            theta = each(lambda x, y, rate=rate: x - rate * y, theta, momentum)
        else:
            p = [-alpha(t) * x for x in adam(g)]
            theta = each(np.add, theta, p)
            if (along := _dot(p, g)) != 0:
                gamma = _dot(p, p) / -along
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
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    outside: bool,
) -> list[Leaves]:
    """LAMB, Algorithm 2 of arXiv 1904.00962 with phi(z) = z; ratio 1 where a norm is 0. `outside`: Keras's decay."""

    def step(x: NDArray[np.float64], direction: NDArray[np.float64]) -> NDArray[np.float64]:
        r = direction if outside else direction + weight_decay * x
        norm_x, norm_r = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(r * r))
        ratio = norm_x / norm_r if norm_x > 0 and norm_r > 0 else 1.0
        return x - alpha * ratio * r - (weight_decay * x if outside else 0)

    adam = _adam(theta, b1, b2, eps)
    return _path(lambda g, theta: each(step, theta, adam(g)), grads, theta, steps)


def cautious_adamw(
    grads: Gradients, theta: Leaves, steps: int, alpha: float, b1: float, b2: float, weight_decay: float
) -> list[Leaves]:
    """C-AdamW of arXiv 2411.16085: the mask (u g > 0) over its mean, at least 0.001; decay outside of the mask."""

    def step(x: NDArray[np.float64], u: NDArray[np.float64], g: NDArray[np.float64]) -> NDArray[np.float64]:
        mask = (u * g > 0).astype(float)
        return x - alpha * u * mask / max(mask.mean(), 1e-3) - alpha * weight_decay * x

    adam = _adam(theta, b1, b2, 1e-8)
    return _path(lambda g, theta: each(step, theta, adam(g), g), grads, theta, steps)


def schedule_free_adamw(
    grads: Gradients, theta: Leaves, steps: int, alpha: float, *, b2: float, weight_decay: float, warmup: int
) -> tuple[list[Leaves], list[Leaves]]:
    """Schedule-Free AdamW, Algorithm 1 of arXiv 2405.15682 with the authors' weights: the paths of y and of x.

    b1 = 0.9; y = (1 - b1) z + b1 x; z -= a_t (g(y) / (sqrt(v_hat) + eps) + lambda y); x = (1 - c) x + c z with
    c_t = w_t / (w_1 + ... + w_t), w = (the largest rate so far)^2; the rate rises linearly, a_t = a t / warmup.
    """
    x = y = z = theta
    scaled, total, largest = _adam(theta, 0.0, b2, 1e-8), 0.0, 0.0
    ys, xs = [], []
    for t in range(1, steps + 1):
        rate = alpha * min(1.0, t / warmup) if warmup else alpha
        largest = max(largest, rate)
        total += largest**2
        c = largest**2 / total
        z = each(lambda z, u, y, rate=rate: z - rate * (u + weight_decay * y), z, scaled(grads(t, y)), y)
        x = each(lambda x, z, c=c: (1 - c) * x + c * z, x, z)
        y = each(lambda x, z: 0.1 * z + 0.9 * x, x, z)
        ys.append(y)
        xs.append(x)
    return ys, xs


def averages(path: list[Leaves], decay: float | None) -> list[Leaves]:
    """Section 7.2 of arXiv 1412.6980: bar = b bar + (1 - b) theta from 0, bar / (1 - b^t); None for the plain mean."""
    if decay is None:
        return [each(lambda *steps: np.mean(steps, axis=0), *path[:t]) for t in range(1, len(path) + 1)]
    found, bar = [], each(np.zeros_like, path[0])
    for t, theta in enumerate(path, start=1):
        bar = each(lambda x, y: decay * x + (1 - decay) * y, bar, theta)
        found.append(each(lambda x, t=t: x / (1 - decay**t), bar))
    return found
