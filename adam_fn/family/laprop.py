"""LaProp."""

import dataclasses
import math
from typing import Any, ClassVar, Unpack

import jax
from jax.typing import DTypeLike

from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.family.adam import Adam
from adam_fn.options import DecayOptions, lists_options, optimizer
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class LaProp(Adam):
    """LaProp (arXiv 2002.04839): the momentum of normalised gradients.

    ::

        v, w₁, w₂ as in Adam;   m ← β₁m + (1-β₁) g/(√(v/w₂ + ε_root) + ε)
        u = m/w₁
    """

    eps: NonNegative = 1e-15

    state_type: ClassVar[Any] = None  # Its m is not Adam's.

    def first_moment_slot(self, b1: Beta) -> Slot:
        b2 = self.b2 if isinstance(self.b2, float) else 0.999
        return Slot(bound=1 / math.sqrt(1 - b2))  # The bound of normalised gradients and of their average.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        nu = self.second_moment(slots["nu"], g, g)
        normalised = self.scaled(g, nu, clock)
        mu, stored = self.first_moment(slots, normalised)
        return self.direction(mu, normalised, clock), {**stored, "nu": nu}

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        return slots["mu"] * clock.corrections[0] if "mu" in slots else None  # m averages ratios already.


@lists_options
def laprop(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-15,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """LaProp (Ziyin, Wang and Ueda, arXiv 2002.04839): ``p ← p - α m̂``, m the momentum of ``g/(√v̂ + ε)``.

    The authors' α is 4e-4. Their code keeps α inside m, which is the same while α is constant. The arguments are those
    of `adam`.
    """
    return optimizer(LaProp(b1, b2, eps, eps_root, nesterov), learning_rate, mu_dtype=mu_dtype, **options)
