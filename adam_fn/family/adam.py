"""Adam, AdamW, NAdam and NAdamW: one rule. The rate and the decay are rules of their own (rate_and_decay.py)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import (
    Scalar,
    add_constant,
    beta_value,
    ema,
    incremented,
    largest_ratio,
    multiply,
    one_minus,
    quotient,
    safe_sqrt,
)
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative
from adam_fn.algebra.rule import Clock, Rule, with_values
from adam_fn.algebra.slots import Slot, Slots, Unit
from adam_fn.options import CommonOptions, DecayOptions, lists_options, optimizer
from adam_fn.schedules import nadam_momentum
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation


@dataclasses.dataclass(frozen=True)
class Moments(Rule):
    """The two moving averages of the family, ``m ← β₁m + (1-β₁)g``, ``v ← β₂v + (1-β₂)g²``, and their bias weights.

    If `b1` is the number 0, m is g and is not stored. With `magnitude`, the g² of a complex g is |g|² for both parts.
    """

    b1: Beta = 0.9
    b2: Beta = 0.999
    magnitude: bool = dataclasses.field(default=False, kw_only=True)

    has_moments: ClassVar[bool] = True
    squared_factor: ClassVar[float] = 1.0
    state_type: ClassVar[Any] = optax.ScaleByAdamState

    @property
    def slots(self) -> Mapping[str, Slot]:
        first = {} if isinstance(self.b1, float) and self.b1 == 0 else {"mu": self.first_moment_slot(self.b1)}
        return {**first, "nu": Slot(signed=False)}

    def first_moment_slot(self, b1: Beta) -> Slot:
        """A slot for a moving average with decay rate `b1`, bounded relative to √v."""
        return Slot(bound=largest_ratio(b1, self.b2), unit=Unit("nu"))

    @property
    def betas(self) -> Sequence[Any]:
        return self.b1, self.b2

    def first_moment(self, slots: Slots, g: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The new m, and the slots that store it."""
        if "mu" not in slots:
            return g, {}
        mu = ema(self.b1, slots["mu"], g)
        return mu, {"mu": mu}

    def of_real(self) -> Rule:
        return with_values(self, {"magnitude": False})

    def square(self, g: jax.Array) -> jax.Array:
        """The square of g; with `magnitude`, its sum over both parts of a complex g, which are stacked in front."""
        squared = lax.square(g)
        return squared + jnp.flip(squared, 0) if self.magnitude else squared

    def second_moment(self, nu: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
        """The new v, from the old one and the new m."""
        return ema(self.b2, nu, self.square(g))

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        if "mu" not in slots:
            return None
        mu, nu = (slots[name] * factor for name, factor in zip(("mu", "nu"), clock.corrections, strict=False))
        return quotient(mu, safe_sqrt(nu), 0.0)


@dataclasses.dataclass(frozen=True)
class Adam(Moments):
    """Adam (arXiv 1412.6980, algorithm 1), and NAdam (Dozat, ICLR 2016 workshop) with `nesterov`.

    ::

        m ← β₁m + (1-β₁)g,   w₁ ← β₁w₁ + (1-β₁),   m̂ = m/w₁
        v ← β₂v + (1-β₂)g²,  w₂ ← β₂w₂ + (1-β₂),   v̂ = v/w₂
        u = m̂ / (√(v̂ + ε_root) + ε)

    The bias weights are ``w = 1 - βᵗ`` for a constant β, and exact for a scheduled β. With `nesterov`,
    ``m̂ = μ₊ m/w₊ + (1-μ)g/w``. μ is β₁ or, with `momentum_decay` ψ, the schedule ``β₁(1 - 0.96^(tψ)/2)`` of the paper
    and torch. w is its bias weight. ₊ marks the next step's values; for a scheduled β₁, both use its current value. m
    itself is averaged with β₁, as in torch and Keras; the paper has μ there too.
    With `eps_hat`, ε is the "epsilon hat" of the paper's section 2, TensorFlow and Keras: ``u = (√w₂/w₁) m/(√v + ε)``.

    A variant replaces `second_moment` or another of the small methods: everything else is shared.
    """

    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    nesterov: bool = False
    momentum_decay: NonNegative | None = None
    eps_hat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum_decay is not None and not self.nesterov:
            raise ValueError("momentum_decay schedules the momentum of NAdam: it needs nesterov=True")

    @property
    def betas(self) -> Sequence[Any]:
        return (self.b1 if self.momentum_decay is None else self.momentum), self.b2

    def momentum(self, count: jax.Array) -> Scalar:
        """NAdam's μ at a step; β₁ without a schedule."""
        return (
            self.b1 if self.momentum_decay is None else nadam_momentum(beta_value(self.b1), self.momentum_decay)(count)
        )

    def direction(self, mu: jax.Array, g: jax.Array, clock: Clock) -> jax.Array:
        """The corrected first moment m̂."""
        correction = clock.corrections[0]
        if not self.nesterov:
            return multiply(mu, correction)
        steps = (clock.count, incremented(clock.count))
        now, ahead = (beta_value(self.momentum(jnp.asarray(count))) for count in steps)
        if not isinstance(now, (int, float)) and not isinstance(ahead, (int, float)):
            now, ahead = now.astype(mu.dtype), ahead.astype(mu.dtype)
        return ahead / ema(ahead, 1 / correction, 1.0) * mu + one_minus(now) * correction * g

    def scaled(self, direction: jax.Array, nu: jax.Array, clock: Clock) -> jax.Array:
        """The direction, divided by √(v̂ + ε_root) + ε."""
        correction = clock.corrections[1]
        eps = self.eps * jnp.sqrt(correction) if self.eps_hat else self.eps
        return quotient(direction, safe_sqrt(add_constant(multiply(nu, correction), self.eps_root)), eps)

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, stored = self.first_moment(slots, g)
        nu = self.second_moment(slots["nu"], g, mu)
        return self.scaled(self.direction(mu, g, clock), nu, clock), {**stored, "nu": nu}


@lists_options
def adam(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    momentum_decay: Hyper | None = None,
    eps_hat: bool = False,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """Adam (Kingma and Ba, arXiv 1412.6980): ``p ← p - α m̂/(√v̂ + ε)``; see the rule `Adam` for the rest.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule (a function of the step; the first update sees 0), as is
        every hyperparameter here.
      b1: the decay rate of the first moment, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      eps: added to the denominator, in units of the gradient.
      eps_root: added inside the root, in units of the squared gradient.
      mu_dtype: the dtype in which the first moment is stored; float32 by default, whatever the dtype of the gradients.
      nesterov: NAdam, with constant momentum as in optax, unless `momentum_decay` is given.
      momentum_decay: ψ of NAdam's momentum schedule, per step: 0.004 in torch.
      eps_hat: whether ε is added to the uncorrected ``√v``, as in TensorFlow and Keras.
      **options: see `adam_fn.options.Options`.

    Raises:
      ValueError, TypeError: at once, if an argument is out of range or of the wrong kind; the error names it.
    """
    rule = Adam(b1, b2, eps, eps_root, nesterov, momentum_decay, eps_hat)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, **options)


@lists_options
def adamw(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyper = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    momentum_decay: Hyper | None = None,
    eps_hat: bool = False,
    **options: Unpack[CommonOptions],
) -> Transformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): `adam` with ``p ← p - α(m̂/(√v̂ + ε) + λp)``.

    As rules it is ``Adam(…) >> Decay(weight_decay) >> Rate(learning_rate)``.

    `weight_decay` is λ, times the learning rate as in torch and optax; ``decay="independent"`` is the paper's form.
    The default 1e-4 is optax's (torch: 1e-2, Keras: 4e-3). The other arguments are those of `adam` and
    `adam_fn.options.Options`; the most used of them are these. ``storage="24bit"`` and ``"16bit"`` keep 3 and 2 bytes
    of state per parameter instead of 8. ``mask=masks.rank(2)`` lets only arrays of two or more axes decay.
    ``frozen=masks.path("embedding/*")`` leaves parameters as they are, without state. ``groups={"*bias":
    Group(decay=0.0)}`` multiplies the rate and the decay of parameters by path.
    """
    rule = Adam(b1, b2, eps, eps_root, nesterov, momentum_decay, eps_hat)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask, **options)


@lists_options
def nadam(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    momentum_decay: Hyper | None = None,
    eps_hat: bool = False,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """NAdam (Dozat, ICLR 2016 workshop): `adam` with Nesterov's momentum.

    The momentum is constant, as in optax; ``momentum_decay=0.004`` gives the paper's and torch's schedule,
    ``momentum_decay=1`` gives Keras 3's.
    """
    rule = Adam(b1, b2, eps, eps_root, nesterov, momentum_decay, eps_hat)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, **options)


@lists_options
def nadamw(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyper = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
    momentum_decay: Hyper | None = None,
    eps_hat: bool = False,
    **options: Unpack[CommonOptions],
) -> Transformation:
    """NAdam with decoupled weight decay: `adamw` with Nesterov's momentum (see `nadam`)."""
    rule = Adam(b1, b2, eps, eps_root, nesterov, momentum_decay, eps_hat)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask, **options)
