"""PyTorch."""

from typing import Unpack

from adam_fn.algebra.hyper import Hyper
from adam_fn.family.adam import nadam
from adam_fn.family.adamax import adamax
from adam_fn.family.radam import radam
from adam_fn.options import MomentOptions, lists_options
from adam_fn.presets.common import ADAM, Weights, with_decay_kind
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@lists_options
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
    return ADAM[amsgrad](learning_rate, b1, b2, eps, **with_decay_kind("l2", options))


@lists_options
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
    return ADAM[amsgrad](learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask, **options)


@lists_options
def torch_adamax(
    learning_rate: Hyper = 2e-3, b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[Weights]
) -> Transformation:
    """``torch.optim.Adamax``: ``p ← p - α m̂/u``, ``u ← max(β₂u, |g| + ε)``, where g includes ``λp``.

    There: as in `torch_adam`. Source: ``torch/optim/adamax.py``.
    """
    return adamax(learning_rate, b1, b2, eps, **with_decay_kind("l2", options))


@lists_options
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
    options_with_decay = with_decay_kind("scaled" if decoupled_weight_decay else "l2", options)
    return nadam(learning_rate, b1, b2, eps, momentum_decay=momentum_decay, **options_with_decay)


@lists_options
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

    It alone of torch's optimizers has the epsilon hat. Weight decay and names are as in `torch_nadam`. Source:
    ``torch/optim/radam.py``.
    """
    options_with_decay = with_decay_kind("scaled" if decoupled_weight_decay else "l2", options)
    return radam(learning_rate, b1, b2, eps, eps_hat=True, **options_with_decay)
