"""AMSGrad."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adam_fn.algebra.hyper import Hyper
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.family.adam import Adam
from adam_fn.options import DecayOptions, lists_options, optimizer
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class AMSGrad(Adam):
    """AMSGrad (arXiv 1904.09237): Adam with the maximum of its second moments.

    ::

        m, v, w₁, w₂ as in Adam;   v_max ← max(v_max, v)
        u = (m/w₁) / (√(v_max/w₂ + ε_root) + ε)

    The maximum is taken of the raw v and corrected afterwards, as in torch and Keras (optax corrects first). The paper
    has no correction: without `bias_correction_mu` (`bias_correction_nu`) w₁ (w₂) is 1.
    """

    bias_correction_mu: bool = True
    bias_correction_nu: bool = True

    state_type: ClassVar[Any] = None  # optax takes the maximum of the corrected v.

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {**super().slots, "nu_max": Slot(signed=False)}

    def _corrected(self, clock: Clock) -> Clock:
        corrected = (self.bias_correction_mu, self.bias_correction_nu)
        factors = [x if use else jnp.ones_like(x) for x, use in zip(clock.corrections, corrected, strict=True)]
        return dataclasses.replace(clock, corrections=factors)

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        return super().signal_to_noise({**slots, "nu": slots["nu_max"]}, self._corrected(clock))

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        clock = self._corrected(clock)
        mu, stored = self.first_moment(slots, g)
        nu = self.second_moment(slots["nu"], g, mu)
        nu_max = jnp.maximum(slots["nu_max"], nu)
        u = self.scaled(self.direction(mu, g, clock), nu_max, clock)
        return u, {**stored, "nu": nu, "nu_max": nu_max}


@lists_options
def amsgrad(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    eps_hat: bool = False,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """AMSGrad (Reddi, Kale and Kumar, arXiv 1904.09237): ``p ← p - α m̂/(√(max v/w₂ + ε_root) + ε)``.

    The maximum is taken of the raw second moments, then corrected (torch, Keras); without the two corrections this is
    the paper's form. The other arguments are those of `adam`.
    """
    rule = AMSGrad(
        b1,
        b2,
        eps,
        eps_root,
        eps_hat=eps_hat,
        bias_correction_mu=bias_correction_mu,
        bias_correction_nu=bias_correction_nu,
    )
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, **options)
