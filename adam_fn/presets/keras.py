"""TensorFlow 1, Keras 2 and Keras 3."""

from typing import Unpack

from adam_fn.algebra.hyper import Hyper
from adam_fn.family.adam import adam, nadam
from adam_fn.family.adamax import adamax
from adam_fn.options import MomentOptions, lists_options
from adam_fn.presets.common import ADAM, Weights, with_decay_kind
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@lists_options
def tensorflow1_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """TensorFlow 1's ``tf.train.AdamOptimizer``: ``p ← p - α_t m/(√v + ε)``.

    There: ``beta1``, ``beta2``, ``epsilon``. Its docstring puts the root over the whole fraction of ``α_t``; its code
    does not. Source: ``tensorflow/python/training/adam.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def keras2_adam(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-7,
    *,
    amsgrad: bool = False,
    **options: Unpack[MomentOptions],
) -> Transformation:
    """Keras 2's ``Adam``: ``p ← p - α_t m/(√v + ε)``; with `amsgrad` the maximum of all v so far replaces v.

    There: ``lr``, ``beta_1``, ``beta_2``, ``epsilon`` (None is ``K.epsilon()``, 1e-7; in 2017 the default was 1e-8).
    Its ``decay`` (0), of the rate and not of the weights, is ``learning_rate=schedules.inverse_time(1e-3, decay)``.
    Source: ``keras/optimizers.py``.
    """
    return ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def keras2_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[MomentOptions]
) -> Transformation:
    """Keras 2's ``Adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``. Names and source as in `keras2_adam`."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@lists_options
def keras2_nadam(
    learning_rate: Hyper = 2e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-7,
    momentum_decay: Hyper = 4e-3,
    **options: Unpack[MomentOptions],
) -> Transformation:
    """Keras 2's ``Nadam``: `adam_fn.nadam` with the momenta ``β₁(1 - 0.96^(tψ)/2)``, ε beside ``√v̂``.

    There: as in `keras2_adam`, and ``schedule_decay``, ψ = `momentum_decay`. Source: ``keras/optimizers.py``.
    """
    return nadam(learning_rate, b1, b2, eps, momentum_decay=momentum_decay, **options)


@lists_options
def keras3_adam(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-7,
    *,
    amsgrad: bool = False,
    **options: Unpack[Weights],
) -> Transformation:
    """Keras 3's ``Adam``: ``p ← p - α_t m/(√v + ε) - αλp``; with `amsgrad` the maximum of all v so far replaces v.

    There: ``beta_1``, ``beta_2``, ``epsilon``, ``weight_decay`` (λ, None; ``exclude_from_weight_decay`` is `mask`).
    Source: ``keras/src/optimizers/adam.py``.
    """
    return ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("scaled", options))


@lists_options
def keras3_adamw(
    learning_rate: Hyper = 1e-3,
    weight_decay: Hyper = 4e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-7,
    *,
    amsgrad: bool = False,
    mask: Mask | None = None,
    **options: Unpack[MomentOptions],
) -> Transformation:
    """Keras 3's ``AdamW``: `keras3_adam` with ``weight_decay`` (λ, the second positional argument) = 0.004.

    Source: ``keras/src/optimizers/adamw.py``.
    """
    return ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, weight_decay=weight_decay, mask=mask, **options)


@lists_options
def keras3_adamax(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[Weights]
) -> Transformation:
    """Keras 3's ``Adamax``: ``p ← p - α m̂/(u + ε) - αλp``, ``u ← max(β₂u, |g|)``; α was 0.002 in Keras 2.

    There: as in `keras3_adam`. Source: ``keras/src/optimizers/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **with_decay_kind("scaled", options))


@lists_options
def keras3_nadam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[Weights]
) -> Transformation:
    """Keras 3's ``Nadam``: `adam_fn.nadam` with the momenta ``β₁(1 - 0.96ᵗ/2)``, ε beside ``√v̂``, and ``- αλp``.

    The exponent is t itself, without the 0.004 of the paper and of Keras 2: μ is near β₁ after 100 steps.
    There: as in `keras3_adam`. Source: ``keras/src/optimizers/nadam.py``.
    """
    return nadam(learning_rate, b1, b2, eps, momentum_decay=1.0, **with_decay_kind("scaled", options))
