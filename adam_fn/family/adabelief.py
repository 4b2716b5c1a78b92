"""AdaBelief."""

import dataclasses
from typing import Any, ClassVar, Unpack

import jax
import optax

from adam_fn.algebra.arithmetic import ema
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.slots import Slot
from adam_fn.family.adam import Adam
from adam_fn.options import Options, lists_options, optimizer
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class AdaBelief(Adam):
    """AdaBelief (arXiv 2010.07468): the second moment of the gradient's distance from m.

    ::

        m, w₁, w₂ as in Adam;   s ← β₂s + (1-β₂)(g - m)² + ε_each
        u = (m/w₁) / (√(s/w₂ + ε_root) + ε)

    ``ε_each`` accumulates: it is added at every step, as in the authors' code (eps) and in optax (eps_root).
    """

    eps: NonNegative = 1e-16
    eps_each: NonNegative = 1e-16

    squared_factor: ClassVar[float] = 2.0  # g - m
    state_type: ClassVar[Any] = optax.ScaleByBeliefState

    def first_moment_slot(self, b1: Beta) -> Slot:
        return Slot()  # No bound: for a steady gradient s is 0, and m is not.

    def second_moment(self, nu: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
        return ema(self.b2, nu, self.square(g - mu)) + self.eps_each


@lists_options
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

    The arguments are those of `adam`, but `eps_root` is the rule's ``ε_each``: added to s at every step, it
    accumulates.
    """
    return optimizer(
        AdaBelief(b1, b2, eps, eps_each=eps_root, nesterov=nesterov, eps_hat=eps_hat), learning_rate, **options
    )
