"""AdEMAMix."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import optax
import optax.contrib
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import ema
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.family.adam import Adam
from adam_fn.options import CommonOptions, lists_options, optimizer
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class AdEMAMix(Adam):
    """AdEMAMix (arXiv 2409.03137): Adam with a second, slow momentum.

    ::

        m, v, w₁, w₂ as in Adam;   m_slow ← β₃m_slow + (1-β₃)g
        u = (m/w₁ + α m_slow) / (√(v/w₂ + ε_root) + ε)

    The slow momentum is not corrected: it is meant to fill slowly. ``b1 = 0`` is the paper's variant without the fast
    momentum, which is then not stored.
    """

    b3: Beta = 0.9999
    alpha: NonNegative = 5.0

    state_type: ClassVar[Any] = optax.contrib.ScaleByAdemamixState
    state_fields: ClassVar[Mapping[str, str]] = {"mu": "m1", "slow": "m2"}

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {**super().slots, "slow": self.first_moment_slot(self.b3)}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, stored = self.first_moment(slots, g)
        slow = ema(self.b3, slots["slow"], g)
        nu = self.second_moment(slots["nu"], g, mu)
        u = self.scaled(self.direction(mu, g, clock) + self.alpha * slow, nu, clock)
        return u, {**stored, "slow": slow, "nu": nu}


@lists_options
def ademamix(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    b3: Hyper = 0.9999,
    alpha: Hyper = 5.0,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    **options: Unpack[CommonOptions],
) -> Transformation:
    """AdEMAMix (Pagliardini, Ablin and Grangier, arXiv 2409.03137): ``p ← p - α_t((m̂ + alpha m_slow)/(√v̂ + ε) + λp)``.

    The paper raises `alpha` and `b3` over a warm-up: `adam_fn.schedules.ademamix_alpha` and `ademamix_b3`, both over T
    steps, usually the whole training.

    Args:
      learning_rate: ``α_t``, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the fast momentum, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      b3: the decay rate of the slow momentum, in [0, 1).
      alpha: how much of the slow momentum is added; 5 in optax and Apple's optax code, 2 in Apple's torch code.
      eps: in units of the gradient.
      eps_root: in units of its square.
      mu_dtype: the dtype in which the fast momentum is stored; float32 by default.
      weight_decay: λ.
      mask: the leaves that decay; all by default.
      **options: see `adam_fn.options.Options`.
    """
    rule = AdEMAMix(b1, b2, eps, eps_root, b3=b3, alpha=alpha)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask, **options)
