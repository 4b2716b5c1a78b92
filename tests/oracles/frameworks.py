"""The frameworks' own updates in float64 NumPy, each with its framework's arguments and defaults.

Those of torch and Keras 3 are recorded instead (`recorded`). An oracle is a generator of parameters: `next` gives the
first ones, `send(gradients)` those after a step. Nothing here is taken from adam_fn, nor from a paper: a preset that
agrees has that framework's rate, betas, ε and decay. The sources are those that the docstrings of `adam_fn.presets`
name. What several of them compute is written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, TypeAlias

import numpy as np
from numpy import sqrt
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Oracle: TypeAlias = Generator[Array, Array, None]


def run(oracle: Oracle, gradient: Callable[[int, Array], Array], steps: int) -> Array:
    """[steps, n]: the parameters after every step of the gradient at (t, parameters), t from 1."""
    p = next(oracle)
    return np.stack([p := oracle.send(gradient(t, p)) for t in range(1, steps + 1)])


def named(update: Callable[..., Oracle], **defaults: float) -> Callable[..., Oracle]:
    """The update under a framework's names for its first arguments, with their defaults; the others keep their names.

    An argument without a default in the framework has the default nan.
    """

    def oracle(p: Array, **given: Any) -> Oracle:
        first = [given.pop(name, default) for name, default in defaults.items()]
        return update(p, *first, **given)

    return oracle


def raw_adam(
    p: Array,
    rate: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float = 0.0,
    *,
    amsgrad: bool = False,
    decay: float = 0.0,
    eta: float = 1.0,
    weight_decay_rate: float = 0.0,
) -> Oracle:
    """Adds ε to the root of the raw v. `wd` is L2 (Caffe, MXNet), `decay` that of the rate (Keras 2), η Chainer's."""
    m = v = v_max = np.zeros_like(p)
    for t in count(1):
        g = yield p
        g = g + wd * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_max = np.maximum(v_max, v)
        rate_t = rate / (1 + decay * (t - 1)) * sqrt(1 - b2**t) / (1 - b1**t)
        p = p - eta * (rate_t * m / (sqrt(v_max if amsgrad else v) + eps) + weight_decay_rate * p)


def raw_adamax(
    p: Array, rate: float, b1: float, b2: float, eps: float = 0.0, *, wd: float = 0.0, decay: float = 0.0
) -> Oracle:
    """Adds ε to the raw u. MXNet has none: its 0/0 is nan; here it is no step."""
    m = u = np.zeros_like(p)
    for t in count(1):
        g = yield p
        g = g + wd * p
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, abs(g))
        bottom = u + eps
        p = p - rate / (1 + decay * (t - 1)) / (1 - b1**t) * m / np.where(bottom == 0, 1, bottom)


def keras2_nadam(
    p: Array,
    lr: float = 0.002,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    schedule_decay: float = 0.004,
) -> Oracle:
    m, v, m_schedule = np.zeros_like(p), np.zeros_like(p), 1.0
    for t in count(1):
        g = yield p
        momentum_cache_t = beta_1 * (1.0 - 0.5 * 0.96 ** (t * schedule_decay))
        momentum_cache_t_1 = beta_1 * (1.0 - 0.5 * 0.96 ** ((t + 1) * schedule_decay))
        m_schedule = m_schedule * momentum_cache_t
        g_prime = g / (1.0 - m_schedule)
        m = beta_1 * m + (1.0 - beta_1) * g
        m_prime = m / (1.0 - m_schedule * momentum_cache_t_1)
        v = beta_2 * v + (1.0 - beta_2) * np.square(g)
        m_bar = (1.0 - momentum_cache_t) * g_prime + momentum_cache_t_1 * m_prime
        p = p - lr * m_bar / (sqrt(v / (1.0 - beta_2**t)) + epsilon)


def cntk_adam(
    val: Array,
    lr: float,
    momentum: float,
    minibatch_size: int,
    unit_gain: bool = True,
    variance_momentum: float = 720000.0,
    epsilon: float = 1e-8,
    l2_regularization_weight: float = 0.0,
    use_mean_gradient: bool = False,
) -> Oracle:
    """`LearnerBase::PreProcess`, `Matrix::AdamUpdate`, `CPUMatrix::Adam`; `variance_momentum` is a time constant.

    It is sent the mean gradient of a minibatch; CNTK's backward pass gives the learner the sum.
    """
    ada_weight = np.exp(-1.0 / variance_momentum) ** minibatch_size
    samples = 1 if use_mean_gradient else minibatch_size
    smooth_ada, smooth_mom = np.zeros_like(val), np.zeros_like(val)
    for smoothed_count in count(1):
        g = yield val
        g = samples * g + l2_regularization_weight * samples * val
        ada_mul = sqrt(1 - ada_weight**smoothed_count) / (1 - momentum**smoothed_count)
        smooth_ada = ada_weight * smooth_ada + (1.0 - ada_weight) * g * g
        smooth_mom = momentum * smooth_mom + (1.0 - momentum if unit_gain else 1.0) * g
        val = val - smooth_mom * (ada_mul / (sqrt(smooth_ada) + epsilon)) * lr


def autograd_adam(x: Array, step_size: float = 0.001, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Oracle:
    m, v = np.zeros_like(x), np.zeros_like(x)
    for i in count():
        g = yield x
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * np.square(g) + b2 * v
        mhat = m / (1 - b1 ** (i + 1))
        vhat = v / (1 - b2 ** (i + 1))
        x = x - step_size * mhat / (sqrt(vhat) + eps)


tensorflow1_adam = named(raw_adam, learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8)
keras2_adam = named(raw_adam, lr=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7)
keras2_adamax = named(raw_adamax, lr=0.002, beta_1=0.9, beta_2=0.999, epsilon=1e-7)
blocks_adam = named(raw_adam, learning_rate=0.002, beta1=0.9, beta2=0.999, epsilon=1e-8)
lasagne_adam = named(raw_adam, learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8)
lasagne_amsgrad = functools.partial(lasagne_adam, amsgrad=True)
lasagne_adamax = named(raw_adamax, learning_rate=0.002, beta1=0.9, beta2=0.999, epsilon=1e-8)
caffe_adam = named(raw_adam, base_lr=math.nan, momentum=math.nan, momentum2=0.999, delta=1e-8, weight_decay=0.0)
mxnet_adam = named(raw_adam, learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8)
mxnet_adamax = named(raw_adamax, learning_rate=0.002, beta1=0.9, beta2=0.999)
chainer_adam = named(raw_adam, alpha=0.001, beta1=0.9, beta2=0.999, eps=1e-8)
