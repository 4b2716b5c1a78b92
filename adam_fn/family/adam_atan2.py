"""Adam-atan2."""

import dataclasses
import math
from typing import Unpack

import jax
import jax.numpy as jnp

from adam_fn.algebra.arithmetic import safe_sqrt
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slots
from adam_fn.family.adam import Moments
from adam_fn.options import Options, lists_options, optimizer
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class AdamAtan2(Moments):
    """Adam-atan2 (arXiv 2407.05872): Adam without ε, invariant to the scale of the gradients.

    ::

        m, v, w₁, w₂ as in Adam;   u = a atan2(m/w₁, b √(v/w₂))

    With ``b = 1``, ``a = 4/π`` makes the step of a constant gradient α, as in Adam. No step exceeds ``aαπ/2``, here 2α;
    gradients below 1e-19, whose squares are 0 in float32, take that step.
    """

    b2: Beta = 0.99
    a: NonNegative = 4 / math.pi
    b: NonNegative = 1.0

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, stored = self.first_moment(slots, g)
        nu = self.second_moment(slots["nu"], g, mu)
        direction = mu * clock.corrections[0]
        scale = self.b * safe_sqrt(nu * clock.corrections[1])
        # The derivative of atan2 at a scale of 0 is not finite; its value there is ±π/2, or 0 at 0.
        angle = jnp.arctan2(direction, jnp.where(scale == 0, 1, scale))
        return self.a * jnp.where(scale == 0, math.pi / 2 * jnp.sign(direction), angle), {**stored, "nu": nu}


@lists_options
def adam_atan2(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.99,
    a: Hyper = 4 / math.pi,
    b: Hyper = 1.0,
    **options: Unpack[Options],
) -> Transformation:
    """Adam-atan2 (Everett et al., arXiv 2407.05872): ``p ← p - α a atan2(m̂, b√v̂)``; there is no ε.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the first moment, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      a: the scale of the step; with b = 1, 4/π gives a constant gradient the step α.
      b: the scale of √v̂; as it grows, the step becomes ``(a/b) m̂/√v̂``.
      **options: see `adam_fn.options.Options`.
    """
    return optimizer(AdamAtan2(b1, b2, a, b), learning_rate, **options)
