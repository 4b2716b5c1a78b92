"""The rules around an optimizer's: weight decay and the learning rate."""

import dataclasses
from typing import ClassVar

import jax

from adam_fn.algebra.arithmetic import multiply
from adam_fn.algebra.hyper import NonNegative
from adam_fn.algebra.rule import Clock, Rule, Side
from adam_fn.algebra.slots import Slots


def _required(p: jax.Array | None) -> jax.Array:
    if p is None:
        raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
    return p


@dataclasses.dataclass(frozen=True)
class WeightDecay(Rule):
    """A rule that decays weights. The `mask` of a transformation selects the leaves to which such rules apply."""

    weight_decay: NonNegative

    counts: ClassVar[bool] = False

    @property
    def side(self) -> Side:
        return "before rate"


@dataclasses.dataclass(frozen=True)
class Decay(WeightDecay):
    """Weight decay: ``u + λ p`` before the rate, or after it with `independent=True`, ``u - λ p``.

    Before the rate it is the decoupled decay of torch and optax (``p - α(u + λ p)``), before the optimizer it is L2
    regularisation, and after the rate it is the decay of the AdamW paper (``p - α u - λ p``; arXiv 1711.05101).
    """

    independent: bool = False

    @property
    def side(self) -> Side:
        return "after rate" if self.independent else "before rate"

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        decay = self.weight_decay * _required(p)
        return (g - decay if self.independent else g + decay), slots


@dataclasses.dataclass(frozen=True)
class ProximalDecay(WeightDecay):
    """Weight decay by a proximal step, after the rate: ``p + u' = (p + u)/(1 + αλ)`` (Adan's, arXiv 2208.06677)."""

    learning_rate: NonNegative

    @property
    def side(self) -> Side:
        return "after rate"

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        strength = clock.rate(self.learning_rate) * self.weight_decay
        return (g - strength * _required(p)) / (1 + strength), slots


@dataclasses.dataclass(frozen=True)
class Rate(Rule):
    """The learning rate and the sign of descent: ``-α u``; `update(..., learning_rate=x)` replaces α for one step."""

    learning_rate: NonNegative

    counts: ClassVar[bool] = False

    @property
    def side(self) -> Side:
        return "rate"

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        return multiply(g, -clock.rate(self.learning_rate)), slots
