"""Adam with another momentum or another use of it: LaProp, AdEMAMix, Adan, ADOPT, Lion, Adam-atan2."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike

from adam_fn.arithmetic import ema, largest_ratios_of_adan, plain, safe_sqrt, square
from adam_fn.codec import Slot, Slots, Unit
from adam_fn.leaves import Mask
from adam_fn.options import CommonOptions, DecayOptions, MuOptions, Options, alias, optimizer
from adam_fn.rule import Beta, Clock, Hyper, NonNegative, Rule
from adam_fn.rules.adam import Adam, Moments
from adam_fn.transform import Transformation


@dataclasses.dataclass(frozen=True)
class LaProp(Adam):
    """LaProp (arXiv 2002.04839): the momentum of normalised gradients.

    ::

        v, w₁, w₂ as in Adam;   m ← β₁m + (1-β₁) g/(√(v/w₂ + ε_root) + ε)
        u = m/w₁
    """

    eps: NonNegative = 1e-15

    state_type: ClassVar[Any] = None  # Its m is another one than Adam's.

    def measured(self, b1: Beta) -> Slot:
        b2 = self.b2 if isinstance(self.b2, float) else 0.999
        return Slot(bound=1 / math.sqrt(1 - b2))  # Of normalised gradients, and so of their average.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        nu = self.second_moment(slots["nu"], g, g)
        normalised = self.scaled(self.clipped(g), nu, clock)
        mu, stored = self.first_moment(slots, normalised)
        return self.direction(mu, normalised, clock), {**stored, "nu": nu}

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        return slots["mu"] * (1 / clock.weights[0]) if "mu" in slots else None  # m is of ratios already.


@alias
def laprop(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-15,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """LaProp (Ziyin, Wang and Ueda, arXiv 2002.04839): ``p ← p - α m̂``, m the momentum of ``g/(√v̂ + ε)``.

    The authors' α is 4e-4. Their code keeps α inside m, which is the same while α is constant. The arguments are those
    of `adam`.
    """
    return optimizer(LaProp(b1, b2, eps, eps_root, nesterov), learning_rate, mu_dtype=mu_dtype, **options)


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
        return {**super().slots, "slow": self.measured(self.b3)}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        clipped = self.clipped(g)
        mu, stored = self.first_moment(slots, clipped)
        slow = ema(self.b3, slots["slow"], clipped)
        nu = self.second_moment(slots["nu"], g, mu)
        u = self.scaled(self.direction(mu, clipped, clock) + self.alpha * slow, nu, clock)
        return u, {**stored, "slow": slow, "nu": nu}


@alias
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
      learning_rate: α_t, a number, a 0-d array or a schedule, as is every hyperparameter here.
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


@dataclasses.dataclass(frozen=True)
class Adan(Adam):
    """Adan (arXiv 2208.06677): Nesterov's momentum by the difference of successive gradients.

    ::

        d = g - g₋  (0 at the first step)
        m ← β₁m + (1-β₁)g,   δ ← β₂δ + (1-β₂)d,   n ← β₃n + (1-β₃)(g + β₂d)²
        u = (m/w₁ + β₂ δ/w₂) / (√(n/w₃ + ε_root) + ε)

    The betas are those of the authors' code; the paper's are one minus these.
    """

    b1: Beta = 0.98
    b2: Beta = 0.92
    b3: Beta = 0.99

    squares: ClassVar[float] = 3.0  # g + β₂(g - g₋)
    state_type: ClassVar[Any] = None  # That of optax has the same form, but other moments.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov:
            raise ValueError("nesterov must be False: Adan has a Nesterov momentum of its own")

    @property
    def slots(self) -> Mapping[str, Slot]:
        betas = (self.b1, self.b2, self.b3)
        betas = betas if all(isinstance(beta, float) for beta in betas) else (0.98, 0.92, 0.99)
        bounds = dict(zip(("mu", "delta", "grad"), largest_ratios_of_adan(*betas), strict=True))
        names = [*super().slots, "delta", "grad"]
        return {
            name: Slot(bound=bounds[name], unit=Unit("nu")) if name in bounds else Slot(signed=False) for name in names
        }

    @property
    def betas(self) -> Sequence[Any]:
        return self.b1, self.b3, self.b2  # As `Adam.direction` and `Adam.scaled` expect them: of m, of n; then of δ.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        g = self.clipped(g)
        difference = jnp.where(clock.count == 0, 0, g - slots["grad"])
        mu, stored = self.first_moment(slots, g)
        delta = ema(self.b2, slots["delta"], difference)
        nu = ema(self.b3, slots["nu"], self.square(g + plain(self.b2) * difference))
        ahead = self.direction(mu, g, clock) + plain(self.b2) / clock.weights[2] * delta
        return self.scaled(ahead, nu, clock), {**stored, "nu": nu, "delta": delta, "grad": g}


@alias
def adan(
    learning_rate: Hyper,
    b1: Hyper = 0.98,
    b2: Hyper = 0.92,
    b3: Hyper = 0.99,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    **options: Unpack[MuOptions],
) -> Transformation:
    """Adan (Xie et al., arXiv 2208.06677): ``p ← p - α(m̂ + β₂δ̂)/(√n̂ + ε)``, see the rule `Adan`.

    Four numbers are kept for each parameter: m, n, δ and the last gradient; `mu_dtype` and `nu_dtype` store m and n.

    The betas are written as in the authors' code and optax; `optax.adan` multiplies δ̂ and d by 1-β₂, where the paper
    and the authors' code have β₂, so its trajectories differ. The authors' weight decay is ``decay="proximal"``; with
    their `no_prox` it is ``"scaled"``, the default here. The authors have no `eps_root`; optax's is 1e-8.
    """
    rule = Adan(b1, b2, eps, eps_root, b3=b3)
    return optimizer(rule, learning_rate, weight_decay=weight_decay, mask=mask, **options)


def fourth_root(count: jax.Array) -> jax.Array:
    """``t^(1/4)``: ADOPT's bound."""
    return jnp.sqrt(jnp.sqrt(count.astype(float)))


@dataclasses.dataclass(frozen=True)
class ADOPT(Rule):
    """ADOPT (arXiv 2411.02853): the gradient is divided by the root of the second moment of the gradients before it.

    ::

        t = 0:  v ← g²,  u = 0
        t > 0:  n = clip(g / max(√v, ε), ±c(t)),   m ← β₁m + (1-β₁)n,   v ← β₂v + (1-β₂)g²
                u = m,  or with `nesterov` β₁m + (1-β₁)n

    ``c(t) = t^(1/4)``. There is no bias correction: v starts at a gradient, and m is meant to warm up. After an
    infinite gradient, v is so large that the element all but stops: keep infinite gradients out
    (`optax.apply_if_finite`).
    """

    b1: Beta = 0.9
    b2: Beta = 0.9999
    eps: NonNegative = 1e-6
    nesterov: bool = False
    use_clipping: bool = True
    clip_value_fn: NonNegative = fourth_root

    squares: ClassVar[float] = 1.0
    state_type: ClassVar[Any] = optax.ScaleByAdamState

    @property
    def slots(self) -> Mapping[str, Slot]:
        # Of a bound that grows, what it is after a million steps.
        bound = self.clip_value_fn if isinstance(self.clip_value_fn, float) else 32.0
        return {"mu": Slot(bound=bound if self.use_clipping else None), "nu": Slot(signed=False)}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        first = clock.count == 0
        denominator = jnp.maximum(safe_sqrt(slots["nu"]), self.eps)
        normalised = g / jnp.where(denominator == 0, 1, denominator)
        if self.use_clipping:
            normalised = jnp.clip(normalised, -self.clip_value_fn, self.clip_value_fn)
        normalised = jnp.where(first, 0, normalised)
        mu = ema(self.b1, slots["mu"], normalised)
        nu = jnp.where(first, square(g), ema(self.b2, slots["nu"], square(g)))
        return ema(self.b1, mu, normalised) if self.nesterov else mu, {"mu": mu, "nu": nu}

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array:
        return slots["mu"]  # The average of ratios, which has no bias correction.


@alias
def adopt(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.9999,
    eps: Hyper = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Hyper = fourth_root,
    **options: Unpack[DecayOptions],
) -> Transformation:
    """ADOPT (Taniguchi et al., arXiv 2411.02853): ``p ← p - α m``, see the rule `ADOPT`. The authors' α is 1e-3.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the momentum, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      eps: the least value of √v, in units of the gradient.
      mu_dtype: the dtype in which the momentum is stored; float32 by default.
      nesterov: whether to use Nesterov's momentum.
      use_clipping: whether to bound the normalised gradient; not in the first version of the paper.
      clip_value_fn: the bound c, a schedule as in optax or a number.
      **options: see `adam_fn.options.Options`.
    """
    rule = ADOPT(b1, b2, eps, nesterov, use_clipping, clip_value_fn)
    return optimizer(rule, learning_rate, mu_dtype=mu_dtype, **options)


@dataclasses.dataclass(frozen=True)
class Lion(Rule):
    """Lion (arXiv 2302.06675): the sign of a momentum.

    ::

        u = sign(β₁m + (1-β₁)g);   m ← β₂m + (1-β₂)g
    """

    b1: Beta = 0.9
    b2: Beta = 0.99

    state_type: ClassVar[Any] = optax.ScaleByLionState

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"mu": Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        return jnp.sign(ema(self.b1, slots["mu"], g)), {"mu": ema(self.b2, slots["mu"], g)}


@alias
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


@dataclasses.dataclass(frozen=True)
class AdamAtan2(Moments):
    """Adam-atan2 (arXiv 2407.05872): Adam without ε, invariant to the scale of the gradients.

    ::

        m, v, w₁, w₂ as in Adam;   u = a atan2(m/w₁, b √(v/w₂))

    With ``b = 1``, ``a = 4/π`` makes the step of a constant gradient α, as in Adam. No step exceeds ``aαπ/2``, here 2α;
    gradients below 1e-19, whose squares are 0 in float32, take that step.
    """

    b2: Beta = 0.99
    a: NonNegative = 4 / math.pi
    b: NonNegative = 1.0

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, stored = self.first_moment(slots, self.clipped(g))
        nu = self.second_moment(slots["nu"], g, mu)
        direction = mu * (1 / clock.weights[0])
        scale = self.b * safe_sqrt(nu * (1 / clock.weights[1]))
        # The derivative of atan2 at a scale of 0 is not finite; its value there is ±π/2, or 0 at 0.
        angle = jnp.arctan2(direction, jnp.where(scale == 0, 1, scale))
        return self.a * jnp.where(scale == 0, math.pi / 2 * jnp.sign(direction), angle), {**stored, "nu": nu}


@alias
def adam_atan2(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.99,
    a: Hyper = 4 / math.pi,
    b: Hyper = 1.0,
    **options: Unpack[Options],
) -> Transformation:
    """Adam-atan2 (Everett et al., arXiv 2407.05872): ``p ← p - α a atan2(m̂, b√v̂)``; there is no ε.

    Args:
      learning_rate: α, a number, a 0-d array or a schedule, as is every hyperparameter here.
      b1: the decay rate of the first moment, in [0, 1).
      b2: the decay rate of the second moment, in [0, 1).
      a: the scale of the step; with b = 1, 4/π gives a constant gradient the step α.
      b: the scale of √v̂; as it grows, the step becomes ``(a/b) m̂/√v̂``.
      **options: see `adam_fn.options.Options`.
    """
    return optimizer(AdamAtan2(b1, b2, a, b), learning_rate, **options)
