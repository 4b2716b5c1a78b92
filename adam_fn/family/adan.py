"""Adan."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from adam_fn.algebra.arithmetic import beta_value, ema, largest_ratios_of_adan
from adam_fn.algebra.hyper import Beta, Hyper
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slot, Slots, Unit
from adam_fn.family.adam import Adam
from adam_fn.options import MuOptions, lists_options, optimizer
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class Adan(Adam):
    """Adan (arXiv 2208.06677): Nesterov's momentum by the difference of successive gradients.

    ::

        d = g - g₋  (0 at the first step)
        m ← β₁m + (1-β₁)g,   δ ← β₂δ + (1-β₂)d,   n ← β₃n + (1-β₃)(g + β₂d)²
        u = (m/w₁ + β₂ δ/w₂) / (√(n/w₃ + ε_root) + ε)

    The betas are those of the authors' code; the paper's are one minus these.
    """

    b1: Beta = 0.98
    b2: Beta = 0.92
    b3: Beta = 0.99

    squared_factor: ClassVar[float] = 3.0  # g + β₂(g - g₋)
    state_type: ClassVar[Any] = None  # optax's has the same form, but other moments.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov:
            raise ValueError("nesterov must be False: Adan has a Nesterov momentum of its own")

    @property
    def slots(self) -> Mapping[str, Slot]:
        betas = (self.b1, self.b2, self.b3)
        betas = betas if all(isinstance(beta, float) for beta in betas) else (0.98, 0.92, 0.99)
        bounds = dict(zip(("mu", "delta", "grad"), largest_ratios_of_adan(*betas), strict=True))
        names = [*super().slots, "delta", "grad"]
        return {
            name: Slot(bound=bounds[name], unit=Unit("nu")) if name in bounds else Slot(signed=False) for name in names
        }

    @property
    def betas(self) -> Sequence[Any]:
        return self.b1, self.b3, self.b2  # Of m and n, as `Adam.direction` and `Adam.scaled` expect, then of δ.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        difference = jnp.where(clock.count == 0, 0, g - slots["grad"])
        mu, stored = self.first_moment(slots, g)
        delta = ema(self.b2, slots["delta"], difference)
        nu = ema(self.b3, slots["nu"], self.square(g + beta_value(self.b2) * difference))
        ahead = self.direction(mu, g, clock) + beta_value(self.b2) * clock.corrections[2] * delta
        # Always g. Otherwise XLA for GPUs and v6e would make a separate pass for an array that is returned as it is.
        grad = jnp.where(clock.count < 0, slots["grad"], g)
        return self.scaled(ahead, nu, clock), {**stored, "nu": nu, "delta": delta, "grad": grad}


@lists_options
def adan(
    learning_rate: Hyper,
    b1: Hyper = 0.98,
    b2: Hyper = 0.92,
    b3: Hyper = 0.99,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    **options: Unpack[MuOptions],
) -> Transformation:
    """Adan (Xie et al., arXiv 2208.06677): ``p ← p - α(m̂ + β₂δ̂)/(√n̂ + ε)``, see the rule `Adan`.

    Four numbers are kept for each parameter: m, n, δ and the last gradient; `mu_dtype` and `nu_dtype` store m and n.

    The betas are written as in the authors' code and optax; `optax.adan` multiplies δ̂ and d by 1-β₂, where the paper
    and the authors' code have β₂, so its trajectories differ. The authors' weight decay is ``decay="proximal"``; with
    their `no_prox` it is ``"scaled"``, the default here. The authors have no `eps_root`; optax's is 1e-8.
    """
    rule = Adan(b1, b2, eps, eps_root, b3=b3)
    return optimizer(rule, learning_rate, weight_decay=weight_decay, mask=mask, **options)
