"""The frameworks' own updates in float64 NumPy, with their defaults and the names of `adam_fn.presets`.

Those of torch and Keras 3 are recorded instead (`recorded`). An oracle is a generator of parameters: `next` gives the
first ones, `send(gradients)` those after a step. Nothing here is taken from adam_fn, nor from a paper: a preset that
agrees has that framework's rate, betas, ε and decay. The sources are those that the docstrings of `adam_fn.presets`
name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from itertools import count
from typing import TypeAlias

import numpy as np
from numpy import sqrt
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Oracle: TypeAlias = Generator[Array, Array, None]


def run(oracle: Oracle, gradient: Callable[[int, Array], Array], steps: int) -> Array:
    """[steps, n]: the parameters after every step of the gradient at (t, parameters), t from 1."""
    p = next(oracle)
    return np.stack([p := oracle.send(gradient(t, p)) for t in range(1, steps + 1)])


def tensorflow1_adam(
    p: Array,
    learning_rate: float = 0.001,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    l2: bool = True,
    amsgrad: bool = False,
    rate_decay: float = 0.0,
) -> Oracle:
    """TensorFlow's kernel ApplyAdam: ε beside the root of the raw v, the corrections in the rate.

    Keras 2, Blocks (with its `decay_factor` of 1), Lasagne, Caffe (delta is its ε), MXNet and Chainer compute the same.
    Keras 2 has the decay of the rate; Caffe and MXNet add λp to the gradient, Chainer subtracts it from the parameter;
    Lasagne's `amsgrad` is a function of its own. Chainer's η multiplies both the rate and λ.
    """
    m, v, v_max = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t in count(1):
        g = yield p
        g = g + weight_decay * p if l2 else g
        rate = learning_rate / (1.0 + rate_decay * (t - 1)) * sqrt(1.0 - b2**t) / (1.0 - b1**t)
        m = b1 * m + (1.0 - b1) * g
        v = b2 * v + (1.0 - b2) * np.square(g)
        v_max = np.maximum(v_max, v)
        decay = 0.0 if l2 else weight_decay * p
        p = p - rate * m / (sqrt(v_max if amsgrad else v) + eps) - decay


keras2_adam = functools.partial(tensorflow1_adam, eps=1e-7)
blocks_adam = functools.partial(tensorflow1_adam, learning_rate=0.002)
lasagne_adam = caffe_adam = mxnet_adam = tensorflow1_adam
lasagne_amsgrad = functools.partial(tensorflow1_adam, amsgrad=True)
chainer_adam = functools.partial(tensorflow1_adam, l2=False)


def lasagne_adamax(
    p: Array,
    learning_rate: float = 0.002,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rate_decay: float = 0.0,
) -> Oracle:
    """Keras 2 and MXNet compute the same. MXNet adds λp to the gradient and has no ε: its 0/0 is nan, here no step."""
    m, u = np.zeros_like(p), np.zeros_like(p)
    for t in count(1):
        g = yield p
        g = g + weight_decay * p
        rate = learning_rate / (1.0 + rate_decay * (t - 1)) / (1.0 - b1**t)
        m = b1 * m + (1.0 - b1) * g
        u = np.maximum(b2 * u, np.abs(g))
        p = p - rate * m / np.where(u + eps == 0, 1.0, u + eps)


keras2_adamax = functools.partial(lasagne_adamax, eps=1e-7)
mxnet_adamax = functools.partial(lasagne_adamax, eps=0.0)


def keras2_nadam(
    p: Array,
    learning_rate: float = 0.002,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-7,
    momentum_decay: float = 0.004,
) -> Oracle:
    """`momentum_decay` is its `schedule_decay`."""
    m, v, m_schedule = np.zeros_like(p), np.zeros_like(p), 1.0
    for t in count(1):
        g = yield p
        momentum_cache_t = b1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
        momentum_cache_t_1 = b1 * (1.0 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        m_schedule = m_schedule * momentum_cache_t
        g_prime = g / (1.0 - m_schedule)
        m = b1 * m + (1.0 - b1) * g
        m_prime = m / (1.0 - m_schedule * momentum_cache_t_1)
        v = b2 * v + (1.0 - b2) * np.square(g)
        m_bar = (1.0 - momentum_cache_t) * g_prime + momentum_cache_t_1 * m_prime
        p = p - learning_rate * m_bar / (sqrt(v / (1.0 - b2**t)) + eps)


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
    """`LearnerBase::PreProcess`, `Matrix::AdamUpdate`, `CPUMatrix::Adam`, in CNTK's arguments.

    `variance_momentum` is a time constant. It is sent the mean gradient of a minibatch; CNTK's backward pass gives the
    learner the sum.
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


def autograd_adam(
    x: Array, learning_rate: float = 0.001, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Oracle:
    m, v = np.zeros_like(x), np.zeros_like(x)
    for i in count():
        g = yield x
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * np.square(g) + b2 * v
        mhat = m / (1 - b1 ** (i + 1))
        vhat = v / (1 - b2 ** (i + 1))
        x = x - learning_rate * mhat / (sqrt(vhat) + eps)
