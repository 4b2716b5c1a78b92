"""RAdam."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Unpack

import jax
import jax.numpy as jnp

from adam_fn.algebra.arithmetic import one_minus
from adam_fn.algebra.bias import Lagged
from adam_fn.algebra.hyper import Hyper, Range
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slots
from adam_fn.family.adam import Adam
from adam_fn.options import Options, lists_options, optimizer
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class RAdam(Adam):
    """RAdam (arXiv 1908.03265): Adam, rectified for the variance of its adaptive rate.

    ::

        ρ∞ = 2/(1-β₂) - 1,   ρ = ρ∞ - 2tβ₂ᵗ/(1-β₂ᵗ)
        r = √((ρ-4)(ρ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρ))
        u = r m̂/(√v̂ + ε)  where ρ ≥ threshold,  else m̂, or 0 without `degenerated_to_sgd`

    ``ρ + 1`` is twice the mean age of the gradients in v. It is computed from a third bias weight, the
    moving average of the second (``a ← β₂a + (1-β₂)w₂``, ``ρ = 2a/((1-β₂)w₂) - 1``): the difference above loses every
    digit in float32 when β₂ is near 1. Below ρ = 4 r is undefined, so the threshold is at least 4.
    """

    threshold: Annotated[Any, Range(4.0, math.inf)] = 5.0
    degenerated_to_sgd: bool = True

    @property
    def betas(self) -> Sequence[Any]:
        return *super().betas, Lagged(self.b2)

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, stored = self.first_moment(slots, g)
        nu = self.second_moment(slots["nu"], g, mu)
        direction = self.direction(mu, g, clock)
        longest = 2 / one_minus(self.b2) - 1
        length = 2 * clock.corrections[1] / (one_minus(self.b2) * clock.corrections[2]) - 1
        rectified = length >= jnp.maximum(self.threshold, 4)
        length = jnp.where(rectified, length, longest)  # r = 1 where it is not used: no root of a negative number.
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        adaptive = jnp.sqrt(ratio) * self.scaled(direction, nu, clock)
        plain = direction if self.degenerated_to_sgd else jnp.zeros_like(direction)
        return jnp.where(rectified, adaptive, plain), {**stored, "nu": nu}


@lists_options
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
