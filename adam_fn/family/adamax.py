"""AdaMax and AdaMaxW."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.arithmetic import add_constant, ema, quotient
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots, Unit
from adam_fn.options import MuOptions, Options, lists_options, optimizer
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class AdaMax(Rule):
    """AdaMax (arXiv 1412.6980, algorithm 2).

    ::

        m ← β₁m + (1-β₁)g,   w₁ ← β₁w₁ + (1-β₁)
        v ← max(β₂v, |g| + ε)
        u = (m/w₁) / v

    ``ε = 0`` is the paper's form, in which an element whose gradients were all 0 gets a zero update. With `eps_hat`,
    ε is outside the maximum, as in Keras and Lasagne: ``v ← max(β₂v, |g|)``, ``u = (m/w₁)/(v + ε)``.
    """

    b1: Beta = 0.9
    b2: Beta = 0.999
    eps: NonNegative = 1e-8
    eps_hat: bool = False

    has_moments: ClassVar[bool] = True
    state_type: ClassVar[Any] = optax.ScaleByAdamState

    @property
    def slots(self) -> Mapping[str, Slot]:
        b1, b2 = (self.b1, self.b2) if isinstance(self.b1, float) and isinstance(self.b2, float) else (0.9, 0.999)
        # Gradients that shrink as v does reach the bound.
        bound = (1 - b1) / (1 - b1 / b2) if b1 < b2 else None
        return {"mu": Slot(bound=bound, unit=Unit("nu", root=False)), "nu": Slot(signed=False)}

    @property
    def betas(self) -> Sequence[Any]:
        return (self.b1,)

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu = ema(self.b1, slots["mu"], g)
        # `ema` to 0 and not `b2 * v`: a rounded β₂ would be raised to the power of the steps since the last maximum.
        inside, outside = (0.0, self.eps) if self.eps_hat else (self.eps, 0.0)
        nu = jnp.maximum(ema(self.b2, slots["nu"], 0.0), add_constant(jnp.abs(g), inside))
        return quotient(mu * clock.corrections[0], nu, outside), {"mu": mu, "nu": nu}

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array:
        return quotient(slots["mu"] * clock.corrections[0], slots["nu"], 0.0)


@lists_options
def adamax(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    *,
    eps_hat: bool = False,
    **options: Unpack[Options],
) -> Transformation:
    """AdaMax (Kingma and Ba, arXiv 1412.6980, section 7.1): ``p ← p - α m̂/v``, ``v ← max(β₂v, |g| + ε)``.

    The paper's α is 0.002 and its ε is 0; torch and optax have ε inside the maximum, as here.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the first moment, in [0, 1).
      b2: the decay rate of the maximum, in [0, 1).
      eps: in units of the gradient.
      eps_hat: whether ε is added to v outside the maximum, as in Keras.
      **options: see `adam_fn.options.Options`.
    """
    return optimizer(AdaMax(b1, b2, eps, eps_hat), learning_rate, **options)


@lists_options
def adamaxw(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-4,
    mask: Mask | None = None,
    *,
    eps_hat: bool = False,
    **options: Unpack[MuOptions],
) -> Transformation:
    """`adamax` with decoupled weight decay: ``p ← p - α(m̂/v + λp)``, λ = `weight_decay`."""
    return optimizer(AdaMax(b1, b2, eps, eps_hat), learning_rate, weight_decay=weight_decay, mask=mask, **options)
