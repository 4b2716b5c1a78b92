"""ADOPT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import ema, safe_sqrt
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.options import DecayOptions, lists_options, optimizer
from adam_fn.trees.transform import Transformation


def fourth_root(count: jax.Array) -> jax.Array:
    """``t^(1/4)``: ADOPT's bound."""
    return jnp.sqrt(jnp.sqrt(count.astype(float)))


@dataclasses.dataclass(frozen=True)
class ADOPT(Rule):
    """ADOPT (arXiv 2411.02853): the gradient is divided by the root of the second moment of the gradients before it.

    ::

        t = 0:  v ← g²,  u = 0
        t > 0:  n = clip(g / max(√v, ε), ±c(t)),   m ← β₁m + (1-β₁)n,   v ← β₂v + (1-β₂)g²
                u = m,  or with `nesterov` β₁m + (1-β₁)n

    ``c(t) = t^(1/4)``. There is no bias correction: v starts at a gradient, and m is meant to warm up. After an
    infinite gradient, v is so large that the element all but stops: keep infinite gradients out
    (`optax.apply_if_finite`).
    """

    b1: Beta = 0.9
    b2: Beta = 0.9999
    eps: NonNegative = 1e-6
    nesterov: bool = False
    use_clipping: bool = True
    clip_value_fn: NonNegative = fourth_root

    has_moments: ClassVar[bool] = True
    squared_factor: ClassVar[float] = 1.0
    state_type: ClassVar[Any] = optax.ScaleByAdamState

    @property
    def slots(self) -> Mapping[str, Slot]:
        # If the bound grows, its value after a million steps.
        bound = self.clip_value_fn if isinstance(self.clip_value_fn, float) else 32.0
        return {"mu": Slot(bound=bound if self.use_clipping else None), "nu": Slot(signed=False)}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        first = clock.count == 0
        denominator = jnp.maximum(safe_sqrt(slots["nu"]), self.eps)
        normalised = g / jnp.where(denominator == 0, 1, denominator)
        if self.use_clipping:
            normalised = jnp.clip(normalised, -self.clip_value_fn, self.clip_value_fn)
        normalised = jnp.where(first, 0, normalised)
        mu = ema(self.b1, slots["mu"], normalised)
        nu = jnp.where(first, g * g, ema(self.b2, slots["nu"], g * g))
        return ema(self.b1, mu, normalised) if self.nesterov else mu, {"mu": mu, "nu": nu}

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array:
        return slots["mu"]  # An average of ratios, without bias correction.


@lists_options
def adopt(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.9999,
    eps: Hyper = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Hyper = fourth_root,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """ADOPT (Taniguchi et al., arXiv 2411.02853): ``p ← p - α m``, see the rule `ADOPT`. The authors' α is 1e-3.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the momentum, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      eps: the least value of √v, in units of the gradient.
      mu_dtype: the dtype in which the momentum is stored; float32 by default.
      nesterov: whether to use Nesterov's momentum.
      use_clipping: whether to bound the normalised gradient; not in the first version of the paper.
      clip_value_fn: the bound c, a schedule as in optax or a number.
      **options: see `adam_fn.options.Options`.
    """
    rule = ADOPT(b1, b2, eps, nesterov, use_clipping, clip_value_fn)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, **options)
