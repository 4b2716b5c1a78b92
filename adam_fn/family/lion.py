"""Lion."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import ema
from adam_fn.algebra.hyper import Beta, Hyper
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.options import CommonOptions, lists_options, optimizer
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class Lion(Rule):
    """Lion (arXiv 2302.06675): the sign of a momentum.

    ::

        u = sign(β₁m + (1-β₁)g);   m ← β₂m + (1-β₂)g
    """

    b1: Beta = 0.9
    b2: Beta = 0.99

    has_moments: ClassVar[bool] = True
    state_type: ClassVar[Any] = optax.ScaleByLionState

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"mu": Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        return jnp.sign(ema(self.b1, slots["mu"], g)), {"mu": ema(self.b2, slots["mu"], g)}


@lists_options
def lion(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyper = 1e-3,
    mask: Mask | None = None,
    **options: Unpack[CommonOptions],
) -> Transformation:
    """Lion (Chen et al., arXiv 2302.06675): ``p ← p - α(sign(β₁m + (1-β₁)g) + λp)``.

    The paper uses a rate 3 to 10 times smaller and a decay 3 to 10 times larger than AdamW's.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the weight of the momentum in the update, in [0, 1).
      b2: the decay rate of the momentum, in [0, 1).
      mu_dtype: the dtype in which the momentum is stored; float32 by default.
      weight_decay: λ; 0 in the authors' code, 1e-3 in optax.
      mask: the leaves that decay; all by default.
      **options: see `adam_fn.options.Options`.
    """
    return optimizer(Lion(b1, b2), learning_rate, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask, **options)
