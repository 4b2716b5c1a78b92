"""Blocks, Lasagne, Caffe, MXNet, CNTK, Chainer, JAX's example library, autograd and optax."""

import math
from typing import Unpack

from adam_fn.algebra.hyper import Hyper
from adam_fn.family.adam import adam, adamw
from adam_fn.family.adamax import adamax
from adam_fn.family.amsgrad import amsgrad
from adam_fn.options import MomentOptions, lists_options
from adam_fn.presets.common import ADAM, Weights, with_decay_kind
from adam_fn.trees.transform import Transformation


@lists_options
def blocks_adam(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """Blocks' ``Adam``: ``p ← p - α_t m/(√v + ε)``.

    There: ``beta1``, ``beta2``, ``epsilon``, and ``decay_factor`` (1), which is not here: below 1 it decays β₁ and
    corrects by ``1 - β₁ₜᵗ`` of the present β₁ₜ; `adam_fn.schedules.beta1_decay` decays it with the exact correction.
    Source: ``blocks/algorithms/__init__.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def lasagne_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.adam``: ``p ← p - α_t m/(√v + ε)``. There: ``epsilon``. Source: ``lasagne/updates.py``."""
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def lasagne_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``. Source: ``lasagne/updates.py``."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def lasagne_amsgrad(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.amsgrad``: ``p ← p - α_t m/(√max v + ε)``, of the raw v. Source: ``lasagne/updates.py``."""
    return amsgrad(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def caffe_adam(
    learning_rate: Hyper, b1: Hyper, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """Caffe's solver ``Adam``: ``p ← p - α_t m/(√v + ε)``, with the moments of ``g + λp``.

    There: ``base_lr`` and ``momentum`` (α and β₁, which have no default), ``momentum2``, ``delta`` (ε),
    ``weight_decay`` (λ, with ``regularization_type: "L2"``; "L1" is not here). Its ``lr_policy`` is a schedule, its
    ``lr_mult`` and ``decay_mult`` are `optax.partition` and `mask`. Source: ``src/caffe/solvers/adam_solver.cpp``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("l2", options))


@lists_options
def mxnet_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """MXNet's ``Adam``: ``p ← p - α_t m/(√v + ε)``, with the moments of ``g + λp``.

    There: ``beta1``, ``beta2``, ``epsilon``, ``wd`` (λ, 0; ``wd_mult`` is `mask`). Its ``lazy_update`` (off), for
    sparse rows, is not here. Source: ``python/mxnet/optimizer/adam.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("l2", options))


@lists_options
def mxnet_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, **options: Unpack[Weights]
) -> Transformation:
    """MXNet's ``Adamax``: ``p ← p - α m̂/u``, ``u ← max(β₂u, |g|)``, where g includes ``λp``; there is no ε.

    There: ``beta1``, ``beta2``, ``wd`` (λ, 0). Where all gradients were 0, MXNet divides 0 by 0; here nothing moves.
    Source: ``python/mxnet/optimizer/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, 0.0, **with_decay_kind("l2", options))


@lists_options
def cntk_adam(
    learning_rate: Hyper,
    b1: Hyper,
    minibatch_size: float,
    eps: Hyper = 1e-8,
    *,
    time_constant: float = 720_000.0,
    **options: Unpack[Weights],
) -> Transformation:
    """CNTK's ``adam``: ``p ← p - α_t m/(√v + ε)``, with the moments of ``g + λp``, ``β₂ = exp(-minibatch/720000)``.

    There: ``lr`` (per sample) and ``momentum`` (β₁, per minibatch), which have no default; ``variance_momentum``, by
    default a time constant of 720000 samples, so that β₂ depends on the minibatch (0.99982 at 128); ``epsilon``;
    ``l2_regularization_weight`` (λ). Its ``unit_gain=False``, ``m ← β₁m + g``, is the rate ``learning_rate/(1 - b1)``.
    The gradients here are means, as with ``use_mean_gradient=True``. By default CNTK's are sums over the minibatch: for
    the same steps with means, pass ``eps/minibatch_size``. With `optax.inject_hyperparams`, `minibatch_size` and
    `time_constant` are static arguments. Source: ``bindings/python/cntk/learners/__init__.py`` and ``Source/Math``.
    """
    b2 = math.exp(-minibatch_size / time_constant)
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("l2", options))


@lists_options
def chainer_adam(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    *,
    amsgrad: bool = False,
    **options: Unpack[Weights],
) -> Transformation:
    """Chainer's ``Adam`` and ``AdamW``: ``p ← p - α_t m/(√v + ε) - λp``; with `amsgrad` max v replaces v.

    There: ``alpha``, ``beta1``, ``beta2``, ``weight_decay_rate`` (λ, 0), which is not multiplied by α, as in the AdamW
    paper. Its ``eta`` (1), η in ``p - η(α_t m/(√v + ε) + λp)``, is `learning_rate` and `weight_decay` times η; both may
    be schedules. (From version 6 on, its CPU code leaves η out of the decay.) Source: ``chainer/optimizers/adam.py``.
    """
    return ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("independent", options))


@lists_options
def jax_adam(
    learning_rate: Hyper, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``jax.example_libraries.optimizers.adam``: ``p ← p - α m̂/(√v̂ + ε)``.

    There: ``step_size`` (α, no default), whose schedules see the step from 0, as here.
    Source: ``jax/example_libraries/optimizers.py``.
    """
    return adam(learning_rate, b1, b2, eps, **options)


@lists_options
def jax_adamax(
    learning_rate: Hyper, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``jax.example_libraries.optimizers.adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``; see `jax_adam`."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def autograd_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """HIPS autograd's ``adam``: ``p ← p - α m̂/(√v̂ + ε)``, α ``step_size``. Source: ``autograd/misc/optimizers.py``."""
    return adam(learning_rate, b1, b2, eps, **options)


#: `optax.adam` and `optax.adamw` have adam_fn's own names, defaults and updates.
optax_adam = adam
optax_adamw = adamw
