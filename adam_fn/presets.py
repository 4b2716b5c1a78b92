"""Each framework's Adam as that framework defines it: rate, betas, ε and where it is added, weight decay.

The arguments have the names of `adam_fn.adam` and the framework's defaults; what has no default there has none here.
Each docstring gives the update, the framework's names for the arguments where they differ ("There: ..."), and the
source file. In the formulas ``m`` and ``v`` are the raw moments, ``m̂ = m/(1-β₁ᵗ)``, ``v̂ = v/(1-β₂ᵗ)`` and ``α_t = α
√(1-β₂ᵗ)/(1-β₁ᵗ)``: an ε beside the raw ``√v`` is the paper's epsilon hat (arXiv 1412.6980, section 2). `weight_decay`
is off unless a number is given. Rates and other numbers may be schedules, as everywhere in adam_fn.

Not here, because no rule of adam_fn does the same: optax's ``amsgrad`` (it takes the maximum of the corrected v),
MXNet's ``AdamW`` (it multiplies the decay by α_t instead of α) and ``Nadam`` (its product of momenta advances once for
each parameter), and Chainer's ``AdaBound``. Clipping (``clipvalue``, ``clip_gradients``, ...) is optax's, chained
before the preset.
"""

import math
from typing import Literal, Unpack

from adam_fn.leaves import Mask
from adam_fn.options import MomentOptions, Options, alias
from adam_fn.rule import Hyper
from adam_fn.rules.adam import adam, adamw, nadam
from adam_fn.rules.adamax import adamax
from adam_fn.rules.amsgrad import amsgrad
from adam_fn.rules.variance import radam
from adam_fn.transform import Transformation


class Weights(MomentOptions, total=False):
    """`MomentOptions`, `weight_decay` as the framework means it, and `mask`: the leaves that decay."""

    weight_decay: Hyper | None
    mask: Mask | None


def _meaning(decay: Literal["scaled", "independent", "l2"], options: Weights) -> Options:
    """The options, with what their weight decay means if there is one."""
    return {**options} if options.get("weight_decay") is None else {**options, "decay": decay}


#: By `amsgrad`, which the frameworks have as a flag of Adam.
_ADAM = {False: adam, True: amsgrad}


@alias
def tensorflow1_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """TensorFlow 1's ``tf.train.AdamOptimizer``: ``p ← p - α_t m/(√v + ε)``.

    There: ``beta1``, ``beta2``, ``epsilon``. Its docstring puts the root over the whole fraction of α_t; its code does
    not. Source: ``tensorflow/python/training/adam.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
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
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def keras2_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[MomentOptions]
) -> Transformation:
    """Keras 2's ``Adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``. There and source: as in `keras2_adam`."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
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


@alias
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
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **_meaning("scaled", options))


@alias
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
    """Keras 3's ``AdamW``: `keras3_adam` with λ = 0.004, argument 2. Source: ``keras/src/optimizers/adamw.py``."""
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, weight_decay=weight_decay, mask=mask, **options)


@alias
def keras3_adamax(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[Weights]
) -> Transformation:
    """Keras 3's ``Adamax``: ``p ← p - α m̂/(u + ε) - αλp``, ``u ← max(β₂u, |g|)``; α was 0.002 in Keras 2.

    There: as in `keras3_adam`. Source: ``keras/src/optimizers/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **_meaning("scaled", options))


@alias
def keras3_nadam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-7, **options: Unpack[Weights]
) -> Transformation:
    """Keras 3's ``Nadam``: `adam_fn.nadam` with the momenta ``β₁(1 - 0.96ᵗ/2)``, ε beside ``√v̂``, and ``- αλp``.

    The exponent is t itself, without the 0.004 of the paper and of Keras 2: μ is near β₁ after 100 steps.
    There: as in `keras3_adam`. Source: ``keras/src/optimizers/nadam.py``.
    """
    return nadam(learning_rate, b1, b2, eps, momentum_decay=1.0, **_meaning("scaled", options))


@alias
def blocks_adam(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """Blocks' ``Adam``: ``p ← p - α_t m/(√v + ε)``.

    There: ``beta1``, ``beta2``, ``epsilon``, and ``decay_factor`` (1), which is not here: below 1 it decays β₁ and
    corrects by ``1 - β₁ₜᵗ`` of the present β₁ₜ; `adam_fn.schedules.beta1_decay` decays it with the exact correction.
    Source: ``blocks/algorithms/__init__.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def lasagne_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.adam``: ``p ← p - α_t m/(√v + ε)``. There: ``epsilon``. Source: ``lasagne/updates.py``."""
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def lasagne_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``. Source: ``lasagne/updates.py``."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def lasagne_amsgrad(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``lasagne.updates.amsgrad``: ``p ← p - α_t m/(√max v + ε)``, of the raw v. Source: ``lasagne/updates.py``."""
    return amsgrad(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def caffe_adam(
    learning_rate: Hyper, b1: Hyper, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """Caffe's solver ``Adam``: ``p ← p - α_t m/(√v + ε)``, with the moments of ``g + λp``.

    There: ``base_lr`` and ``momentum`` (α and β₁, which have no default), ``momentum2``, ``delta`` (ε),
    ``weight_decay`` (λ, with ``regularization_type: "L2"``; "L1" is not here). Its ``lr_policy`` is a schedule, its
    ``lr_mult`` and ``decay_mult`` are `optax.partition` and `mask`. Source: ``src/caffe/solvers/adam_solver.cpp``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **_meaning("l2", options))


@alias
def mxnet_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """MXNet's ``Adam``: ``p ← p - α_t m/(√v + ε)``, with the moments of ``g + λp``.

    There: ``beta1``, ``beta2``, ``epsilon``, ``wd`` (λ, 0; ``wd_mult`` is `mask`). Its ``lazy_update`` (off), for
    sparse rows, is not here. Source: ``python/mxnet/optimizer/adam.py``.
    """
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **_meaning("l2", options))


@alias
def mxnet_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, **options: Unpack[Weights]
) -> Transformation:
    """MXNet's ``Adamax``: ``p ← p - α m̂/u``, ``u ← max(β₂u, |g|)``, where g includes ``λp``; there is no ε.

    There: ``beta1``, ``beta2``, ``wd`` (λ, 0). Where all gradients were 0, MXNet divides 0 by 0; here nothing moves.
    Source: ``python/mxnet/optimizer/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, 0.0, **_meaning("l2", options))


@alias
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
    return adam(learning_rate, b1, b2, eps, eps_hat=True, **_meaning("l2", options))


@alias
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
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, eps_hat=True, **_meaning("independent", options))


@alias
def torch_adam(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    *,
    amsgrad: bool = False,
    **options: Unpack[Weights],
) -> Transformation:
    """``torch.optim.Adam``: ``p ← p - α m̂/(√v̂ + ε)``, with the moments of ``g + λp``.

    With `amsgrad` the maximum of all v so far replaces v. There: ``lr``, ``betas``, ``weight_decay`` (λ, 0).
    Source: ``torch/optim/adam.py``.
    """
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, **_meaning("l2", options))


@alias
def torch_adamw(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    *,
    amsgrad: bool = False,
    mask: Mask | None = None,
    **options: Unpack[MomentOptions],
) -> Transformation:
    """``torch.optim.AdamW``: ``p ← p - α(m̂/(√v̂ + ε) + λp)``, λ = 0.01; `amsgrad` and names as in `torch_adam`.

    Source: ``torch/optim/adamw.py``.
    """
    return _ADAM[amsgrad](learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask, **options)


@alias
def torch_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """``torch.optim.Adamax``: ``p ← p - α m̂/u``, ``u ← max(β₂u, |g| + ε)``, where g includes ``λp``.

    There: as in `torch_adam`. Source: ``torch/optim/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, eps, **_meaning("l2", options))


@alias
def torch_nadam(
    learning_rate: Hyper = 2e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    momentum_decay: Hyper = 4e-3,
    *,
    decoupled_weight_decay: bool = False,
    **options: Unpack[Weights],
) -> Transformation:
    """``torch.optim.NAdam``: `adam_fn.nadam` with the momenta ``β₁(1 - 0.96^(tψ)/2)``, ε beside ``√v̂``.

    ψ is `momentum_decay`. The moments are those of ``g + λp``, or with `decoupled_weight_decay` the step has ``- αλp``.
    There: as in `torch_adam`. Source: ``torch/optim/nadam.py``.
    """
    meaning = _meaning("scaled" if decoupled_weight_decay else "l2", options)
    return nadam(learning_rate, b1, b2, eps, momentum_decay=momentum_decay, **meaning)


@alias
def torch_radam(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    *,
    decoupled_weight_decay: bool = False,
    **options: Unpack[Weights],
) -> Transformation:
    """``torch.optim.RAdam``: ``p ← p - α_t r m/(√v + ε)`` where ``ρ > 5``, else ``p - α m̂`` (see `adam_fn.radam`).

    The only one of torch's optimizers with the epsilon hat. Weight decay and names as in `torch_nadam`. Source:
    ``torch/optim/radam.py``.
    """
    meaning = _meaning("scaled" if decoupled_weight_decay else "l2", options)
    return radam(learning_rate, b1, b2, eps, eps_hat=True, **meaning)


@alias
def jax_adam(
    learning_rate: Hyper, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``jax.example_libraries.optimizers.adam``: ``p ← p - α m̂/(√v̂ + ε)``.

    There: ``step_size`` (α, no default), whose schedules see the step from 0, as here.
    Source: ``jax/example_libraries/optimizers.py``.
    """
    return adam(learning_rate, b1, b2, eps, **options)


@alias
def jax_adamax(
    learning_rate: Hyper, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """``jax.example_libraries.optimizers.adamax``: ``p ← p - α m̂/(u + ε)``, ``u ← max(β₂u, |g|)``; see `jax_adam`."""
    return adamax(learning_rate, b1, b2, eps, eps_hat=True, **options)


@alias
def autograd_adam(
    learning_rate: Hyper = 1e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[MomentOptions]
) -> Transformation:
    """HIPS autograd's ``adam``: ``p ← p - α m̂/(√v̂ + ε)``, α ``step_size``. Source: ``autograd/misc/optimizers.py``."""
    return adam(learning_rate, b1, b2, eps, **options)


#: `optax.adam` and `optax.adamw` have adam_fn's own names, defaults and updates.
optax_adam = adam
optax_adamw = adamw
