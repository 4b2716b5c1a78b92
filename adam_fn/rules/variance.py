"""Adam with another second moment or another trust in it: RAdam, AdaBelief, Yogi."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax

from adam_fn.arithmetic import ema, one_minus
from adam_fn.bias import Lagged
from adam_fn.codec import Slot, Slots
from adam_fn.options import Options, alias, optimizer
from adam_fn.rule import Beta, Clock, Hyper, NonNegative, Range
from adam_fn.rules.adam import Adam
from adam_fn.transform import Transformation


@dataclasses.dataclass(frozen=True)
class RAdam(Adam):
    """RAdam (arXiv 1908.03265): Adam, rectified for the variance of its adaptive rate.

    ::

        ρ∞ = 2/(1-β₂) - 1,   ρ = ρ∞ - 2tβ₂ᵗ/(1-β₂ᵗ)
        r = √((ρ-4)(ρ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρ))
        u = r m̂/(√v̂ + ε)  where ρ ≥ threshold,  else m̂, or 0 without `degenerated_to_sgd`

    ``ρ + 1`` is twice the mean age of the gradients in v. It is computed in this way, from a third bias weight, the
    moving average of the second (``a ← β₂a + (1-β₂)w₂``, ``ρ = 2a/((1-β₂)w₂) - 1``): the difference above loses every
    digit in float32 when β₂ is near 1. Below ρ = 4 there is no r: the threshold is 4 at least.
    """

    threshold: Annotated[Any, Range(4.0, math.inf)] = 5.0
    degenerated_to_sgd: bool = True

    @property
    def betas(self) -> Sequence[Any]:
        return *super().betas, Lagged(self.b2)

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        clipped = self.clipped(g)
        mu, stored = self.first_moment(slots, clipped)
        nu = self.second_moment(slots["nu"], g, mu)
        direction = self.direction(mu, clipped, clock)
        longest = 2 / one_minus(self.b2) - 1
        length = 2 * clock.weights[2] / (one_minus(self.b2) * clock.weights[1]) - 1
        rectified = length >= jnp.maximum(self.threshold, 4)
        length = jnp.where(rectified, length, longest)  # r = 1 where it is not used, and no root of a negative number.
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        adaptive = jnp.sqrt(ratio) * self.scaled(direction, nu, clock)
        plain = direction if self.degenerated_to_sgd else jnp.zeros_like(direction)
        return jnp.where(rectified, adaptive, plain), {**stored, "nu": nu}


@alias
def radam(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    threshold: Hyper = 5.0,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    degenerated_to_sgd: bool = True,
    **options: Unpack[Options],
) -> Transformation:
    """RAdam (Liu et al., arXiv 1908.03265): `adam` times r, see the rule `RAdam`.

    The step is adaptive once the length ρ of the average reaches `threshold`, at least 4. Before that the update is m̂
    (the paper, optax, torch), or 0 without `degenerated_to_sgd` (the authors' code). The other arguments are those of
    `adam`; torch has ``eps_hat=True``.
    """
    rule = RAdam(
        b1,
        b2,
        eps,
        eps_root,
        nesterov,
        eps_hat=eps_hat,
        threshold=threshold,
        degenerated_to_sgd=degenerated_to_sgd,
    )
    return optimizer(rule, learning_rate, **options)


@dataclasses.dataclass(frozen=True)
class AdaBelief(Adam):
    """AdaBelief (arXiv 2010.07468): the second moment of the gradient's distance from m.

    ::

        m, w₁, w₂ as in Adam;   s ← β₂s + (1-β₂)(g - m)² + ε_each
        u = (m/w₁) / (√(s/w₂ + ε_root) + ε)

    ε_each accumulates: it is added at every step, as in the authors' code (eps) and in optax (eps_root).
    """

    eps: NonNegative = 1e-16
    eps_each: NonNegative = 1e-16

    squares: ClassVar[float] = 2.0  # g - m
    state_type: ClassVar[Any] = optax.ScaleByBeliefState

    def measured(self, b1: Beta) -> Slot:
        return Slot()  # Of a steady gradient s is 0, and m is not.

    def second_moment(self, nu: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
        return ema(self.b2, nu, self.square(self.clipped(g) - mu)) + self.eps_each


@alias
def adabelief(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-16,
    eps_root: Hyper = 1e-16,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    **options: Unpack[Options],
) -> Transformation:
    """AdaBelief (Zhuang et al., arXiv 2010.07468): ``p ← p - α m̂/(√(s/w₂) + ε)``, see the rule `AdaBelief`.

    The arguments are those of `adam`, but `eps_root` is the rule's ε_each: added to s at every step, it accumulates.
    """
    return optimizer(
        AdaBelief(b1, b2, eps, eps_each=eps_root, nesterov=nesterov, eps_hat=eps_hat), learning_rate, **options
    )


@dataclasses.dataclass(frozen=True)
class Yogi(Adam):
    """Yogi (Zaheer et al., NeurIPS 2018): a second moment that changes additively.

    ::

        m, w₁, w₂ as in Adam;   v ← v - (1-β₂) sign(v - g²) g²
        u = (m/w₁) / (√(v/w₂ + ε_root) + ε)

    Both moments start at `initial`, 1e-6 as in the authors' code and optax.
    """

    eps: NonNegative = 1e-3
    initial: float = 1e-6

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {name: slot._replace(initial=self.initial) for name, slot in super().slots.items()}

    def second_moment(self, nu: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
        squared = self.square(g)
        return nu - one_minus(self.b2) * jnp.sign(nu - squared) * squared


@alias
def yogi(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-3,
    **options: Unpack[Options],
) -> Transformation:
    """Yogi (Zaheer et al., NeurIPS 2018): `adam` with ``v ← v - (1-β₂) sign(v - g²) g²``, see the rule `Yogi`.

    The arguments are those of `adam`.
    """
    return optimizer(Yogi(b1, b2, eps), learning_rate, **options)
