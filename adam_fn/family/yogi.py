"""Yogi."""

import dataclasses
from collections.abc import Mapping
from typing import Unpack

import jax
import jax.numpy as jnp

from adam_fn.algebra.arithmetic import one_minus
from adam_fn.algebra.hyper import Hyper, NonNegative
from adam_fn.algebra.slots import Slot
from adam_fn.family.adam import Adam
from adam_fn.options import Options, lists_options, optimizer
from adam_fn.trees.transform import Transformation


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


@lists_options
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
