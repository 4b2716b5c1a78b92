"""The frameworks' own updates in float64 NumPy, each in its framework's arguments, defaults and order of operations.

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
    var: Array, learning_rate: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Oracle:
    """The kernel ApplyAdam; the powers of beta are variables that `_finish` multiplies."""
    m, v, beta1_power, beta2_power = np.zeros_like(var), np.zeros_like(var), beta1, beta2
    while True:
        grad = yield var
        lr = learning_rate * sqrt(1 - beta2_power) / (1 - beta1_power)
        m = m + (grad - m) * (1 - beta1)
        v = v + (grad * grad - v) * (1 - beta2)
        var = var - lr * m / (sqrt(v) + epsilon)
        beta1_power, beta2_power = beta1_power * beta1, beta2_power * beta2


def keras2_adam(
    p: Array,
    lr: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    decay: float = 0.0,
    amsgrad: bool = False,
) -> Oracle:
    """`get_updates`: `iterations` is the number of steps before this one."""
    m, v, vhat = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for iterations in count():
        g = yield p
        t = iterations + 1
        lr_t = lr * (1.0 / (1.0 + decay * iterations)) * (sqrt(1.0 - beta_2**t) / (1.0 - beta_1**t))
        m = beta_1 * m + (1.0 - beta_1) * g
        v = beta_2 * v + (1.0 - beta_2) * np.square(g)
        vhat = np.maximum(vhat, v)
        p = p - lr_t * m / (sqrt(vhat if amsgrad else v) + epsilon)


def keras2_adamax(
    p: Array, lr: float = 0.002, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-7, decay: float = 0.0
) -> Oracle:
    m, u = np.zeros_like(p), np.zeros_like(p)
    for iterations in count():
        g = yield p
        lr_t = lr * (1.0 / (1.0 + decay * iterations)) / (1.0 - beta_1 ** (iterations + 1))
        m = beta_1 * m + (1.0 - beta_1) * g
        u = np.maximum(beta_2 * u, np.abs(g))
        p = p - lr_t * m / (u + epsilon)


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


def blocks_adam(
    parameter: Array, learning_rate: float = 0.002, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Oracle:
    """With `decay_factor` = 1, its default."""
    mean, variance = np.zeros_like(parameter), np.zeros_like(parameter)
    for t1 in count(1):
        previous_step = yield parameter
        rate = learning_rate * sqrt(1.0 - beta2**t1) / (1.0 - beta1**t1)
        mean = beta1 * mean + (1.0 - beta1) * previous_step
        variance = beta2 * variance + (1.0 - beta2) * np.square(previous_step)
        parameter = parameter - rate * mean / (sqrt(variance) + epsilon)


def lasagne_adam(
    param: Array,
    learning_rate: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    amsgrad: bool = False,
) -> Oracle:
    m, v, v_hat = np.zeros_like(param), np.zeros_like(param), np.zeros_like(param)
    for t in count(1):
        g_t = yield param
        a_t = learning_rate * sqrt(1 - beta2**t) / (1 - beta1**t)
        m = beta1 * m + (1 - beta1) * g_t
        v = beta2 * v + (1 - beta2) * g_t**2
        v_hat = np.maximum(v_hat, v)
        param = param - a_t * m / (sqrt(v_hat if amsgrad else v) + epsilon)


lasagne_amsgrad = functools.partial(lasagne_adam, amsgrad=True)


def lasagne_adamax(
    param: Array, learning_rate: float = 0.002, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Oracle:
    m, u = np.zeros_like(param), np.zeros_like(param)
    for t in count(1):
        g_t = yield param
        a_t = learning_rate / (1 - beta1**t)
        m = beta1 * m + (1 - beta1) * g_t
        u = np.maximum(beta2 * u, abs(g_t))
        param = param - a_t * m / (u + epsilon)


def caffe_adam(
    data: Array,
    base_lr: float,
    momentum: float,
    momentum2: float = 0.999,
    delta: float = 1e-8,
    weight_decay: float = 0.0,
) -> Oracle:
    """`SGDSolver::Regularize` (L2), then `AdamSolver::ComputeUpdateValue`; delta is its eps_hat."""
    val_m, val_v = np.zeros_like(data), np.zeros_like(data)
    for t in count(1):
        diff = yield data
        diff = diff + weight_decay * data
        correction = sqrt(1 - momentum2**t) / (1 - momentum**t)
        val_m = (1 - momentum) * diff + momentum * val_m
        val_v = (1 - momentum2) * (diff * diff) + momentum2 * val_v
        data = data - base_lr * correction * (val_m / (val_v**0.5 + delta))


def mxnet_adam(
    weight: Array,
    learning_rate: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    wd: float = 0.0,
) -> Oracle:
    mean, var = np.zeros_like(weight), np.zeros_like(weight)
    for t in count(1):
        grad = yield weight
        grad = grad + wd * weight
        lr = learning_rate * sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
        mean = mean * beta1 + (1.0 - beta1) * grad
        var = var * beta2 + (1.0 - beta2) * np.square(grad)
        weight = weight - lr * (mean / (sqrt(var) + epsilon))


def mxnet_adamax(
    weight: Array, learning_rate: float = 0.002, beta1: float = 0.9, beta2: float = 0.999, wd: float = 0.0
) -> Oracle:
    """MXNet's 0/0 is nan; here no step."""
    mean, var = np.zeros_like(weight), np.zeros_like(weight)
    for t in count(1):
        grad = yield weight
        grad = grad + wd * weight
        mean = mean * beta1 + (1.0 - beta1) * grad
        var = np.maximum(beta2 * var, abs(grad))
        weight = weight - learning_rate / (1.0 - beta1**t) * (mean / np.where(var == 0, 1.0, var))


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


def chainer_adam(
    param: Array,
    alpha: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    eta: float = 1.0,
    weight_decay_rate: float = 0.0,
    amsgrad: bool = False,
) -> Oracle:
    """The GPU kernel."""
    m, v, vhat = np.zeros_like(param), np.zeros_like(param), np.zeros_like(param)
    for t in count(1):
        grad = yield param
        alpha_t = alpha * sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
        m = m + (1 - beta1) * (grad - m)
        v = v + (1 - beta2) * (grad * grad - v)
        vhat = np.maximum(vhat, v)
        param = param - eta * (alpha_t * m / (sqrt(vhat if amsgrad else v) + eps) + weight_decay_rate * param)


def autograd_adam(x: Array, step_size: float = 0.001, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Oracle:
    m, v = np.zeros_like(x), np.zeros_like(x)
    for i in count():
        g = yield x
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * np.square(g) + b2 * v
        mhat = m / (1 - b1 ** (i + 1))
        vhat = v / (1 - b2 ** (i + 1))
        x = x - step_size * mhat / (sqrt(vhat) + eps)
