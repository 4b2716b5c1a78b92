"""Schedules that the sources describe and optax lacks; every optax schedule works as well.

A schedule is a function of the zero-based step ``count`` (the first update sees 0) that returns a scalar. The schedules
below are frozen dataclasses, so equal ones compare equal, hash alike, pickle and share compilations; their names are
lower case because they are used like optax's functions. In the formulas ``t = count + 1`` is the papers' one-based
step. All lengths are in steps (optimizer updates). Values are float32, or float64 under ``jax_enable_x64``.
"""

# ruff: noqa: N801
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def _real(count: ArrayLike) -> jax.Array:
    return jnp.asarray(count, dtype=float)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class inverse_sqrt:
    """The rate ``α/√t``, with an optional linear warm-up.

    ``α_t = α · min(1/√t, t/W^1.5)``, ``W = warmup_steps``; the two terms meet at ``t = W``, at the peak ``α/√W``.
    Without a warm-up it is the ``α/√t`` of Adam's convergence theorem (arXiv 1412.6980, section 4).
    """

    init_value: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        t = _real(count) + 1
        value = 1 / jnp.sqrt(t)
        if self.warmup_steps > 1:
            value = jnp.minimum(value, t * self.warmup_steps**-1.5)
        return self.init_value * value


@dataclasses.dataclass(frozen=True)
class inverse_time:
    """Keras's ``decay``: ``α / (1 + decay · count)``, ``decay`` per step (Keras 1 and 2, ``OptimizerV2``)."""

    init_value: float
    decay: float

    def __post_init__(self) -> None:
        _require(self.decay >= 0, f"decay must not be negative, got {self.decay}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        return self.init_value / (1 + self.decay * _real(count))


@dataclasses.dataclass(frozen=True)
class beta1_decay:
    """``β₁ λ^(t-1)``: the decaying first beta of Adam's convergence theorem (arXiv 1412.6980, section 4)."""

    b1: float = 0.9
    decay: float = 1 - 1e-8

    def __post_init__(self) -> None:
        _require(0 <= self.b1 < 1, f"b1 must be in [0, 1), got {self.b1}")
        _require(0 < self.decay <= 1, f"decay must be in (0, 1], got {self.decay}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        # The logarithm is taken in Python: float32 rounds the paper's λ = 1 - 1e-8 to 1.
        return self.b1 * jnp.exp(math.log(self.decay) * _real(count))


@dataclasses.dataclass(frozen=True)
class nadam_momentum:
    """NAdam's momentum: ``μ_t = β₁ (1 - 0.96^(t ψ) / 2)``, ``ψ = momentum_decay`` per step.

    It rises from about ``β₁/2`` to ``β₁``. ``ψ = 0.004`` in Dozat's paper (ICLR 2016 workshop) and torch, 1 in Keras 3.
    """

    b1: float | jax.Array = 0.9
    momentum_decay: float | jax.Array = 4e-3

    def __call__(self, count: ArrayLike) -> jax.Array:
        t = _real(count) + 1
        return self.b1 * (1 - 0.5 * jnp.exp(math.log(0.96) * self.momentum_decay * t))


@dataclasses.dataclass(frozen=True)
class warmup_stable_decay:
    """Linear warm-up, a plateau, then a decay to ``end_value`` (WSD; MiniCPM, arXiv 2404.06395).

    ``α · (count+1)/warmup_steps`` while ``count < warmup_steps``, then ``α`` for ``stable_steps``, then over
    ``decay_steps`` ``end + (α - end) · (1 - x)`` (``shape="linear"``) or ``end + (α - end) · (1 - √x)``
    (``shape="sqrt"``, arXiv 2405.18392), with ``x`` the fraction of the decay that is over; ``end_value`` from then on.
    """

    peak_value: float
    warmup_steps: int
    stable_steps: int
    decay_steps: int
    end_value: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "stable_steps", "decay_steps"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.shape in ("linear", "sqrt"), f"shape must be 'linear' or 'sqrt', got {self.shape!r}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        step = _real(count)
        # `max(…, 1)`: a phase of no steps must not divide by zero; the other phases then hide it.
        warm = self.peak_value * (step + 1) / max(self.warmup_steps, 1)
        start = self.warmup_steps + self.stable_steps
        x = jnp.clip((step - start) / max(self.decay_steps, 1), 0, 1)
        if not self.decay_steps:
            x = jnp.where(step >= start, 1.0, 0.0)
        fraction = 1 - (x if self.shape == "linear" else jnp.sqrt(x))
        decayed = self.end_value + (self.peak_value - self.end_value) * fraction
        return jnp.where(step < self.warmup_steps, warm, decayed)


@dataclasses.dataclass(frozen=True)
class warm_restarts:
    """AdamWR's multiplier: a cosine from ``eta_max`` to ``eta_min`` that restarts (arXiv 1711.05101, 1608.03983).

    ``η = η_min + (η_max - η_min)/2 · (1 + cos(π T_cur/T_i))``; ``T_cur`` counts the steps since the last restart,
    ``T_0 = first_period`` and ``T_{i+1} = T_i · factor``, in steps.

    The paper multiplies both the rate α and the decay by η, and normalises the decay,
    ``λ = λ_norm · √(b/(B T))``, where b is the batch, B the examples and T the epochs of the current period, so that
    ``B T / b`` is the period in steps and ``λ_i = λ_norm/√T_i``::

        eta = warm_restarts(first_period=1000)
        adamw(lambda count: 1e-3 * eta(count), weight_decay=eta.weight_decay(0.05), decay="independent")
    """

    first_period: int
    factor: float = 2.0
    eta_min: float = 0.0
    eta_max: float = 1.0

    def __post_init__(self) -> None:
        _require(self.first_period >= 1, f"first_period must be at least 1 step, got {self.first_period}")
        _require(self.factor >= 1, f"factor must be at least 1, got {self.factor}")

    def period(self, count: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """``(T_cur, T_i)``: steps since the last restart, and the length of the current period."""
        step = _real(count)
        if self.factor == 1:
            return jnp.mod(step, self.first_period), jnp.full_like(step, self.first_period)
        # Restart i is at T_0 (f^i - 1)/(f - 1). The logarithm may miss a restart by one rounding, so its neighbours
        # are compared with the step itself.
        ratio = step * (self.factor - 1) / self.first_period + 1
        guess = jnp.floor(jnp.log(ratio) / math.log(self.factor))
        index = guess - 1
        for candidate in (guess, guess + 1):
            index = jnp.where(step >= self._restart(candidate), candidate, index)
        return step - self._restart(index), self.first_period * self._power(index)

    def _power(self, index: jax.Array) -> jax.Array:
        return jnp.round(self.first_period * self.factor**index) / self.first_period

    def _restart(self, index: jax.Array) -> jax.Array:
        return jnp.round(self.first_period * (self.factor**index - 1) / (self.factor - 1))

    def __call__(self, count: ArrayLike) -> jax.Array:
        current, length = self.period(count)
        return self.eta_min + (self.eta_max - self.eta_min) / 2 * (1 + jnp.cos(jnp.pi * current / length))

    def weight_decay(self, norm: float) -> "normalized_weight_decay":
        """The schedule ``η(count) · norm/√T_i`` for ``decay="independent"``; the paper found 0.025 to 0.05 good."""
        return normalized_weight_decay(self, norm)


@dataclasses.dataclass(frozen=True)
class normalized_weight_decay:
    """``η(count) · λ_norm/√T_i``: the weight decay of AdamWR (arXiv 1711.05101, section 3 and appendix B.1)."""

    restarts: warm_restarts
    norm: float

    def __call__(self, count: ArrayLike) -> jax.Array:
        return self.restarts(count) * self.norm / jnp.sqrt(self.restarts.period(count)[1])


@dataclasses.dataclass(frozen=True)
class ademamix_alpha:
    """AdEMAMix's mixing coefficient: ``α · min(t/T, 1)``, ``T = warmup_steps`` (arXiv 2409.03137, section 3)."""

    alpha: float
    warmup_steps: int

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 1, f"warmup_steps must be at least 1, got {self.warmup_steps}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        return self.alpha * jnp.minimum((_real(count) + 1) / self.warmup_steps, 1)


@dataclasses.dataclass(frozen=True)
class ademamix_b3:
    """AdEMAMix's slow decay rate, whose half-life grows linearly from that of ``β₁`` to that of ``β₃``.

    ``f(β) = ln ½ / ln β - 1``, ``β_t = f⁻¹((1 - t/T) f(β₁) + (t/T) f(β₃)) = 2^(-1/(f + 1))`` until ``t = T``, then
    ``β₃`` (arXiv 2409.03137, section 3). The optimizers of this package call `one_minus`: computed from a float32 β,
    ``1 - β`` would be off by 2e-4 at 0.9999 and by 1e-2 at 0.999999.
    """

    b3: float
    warmup_steps: int
    b1: float = 0.9

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 1, f"warmup_steps must be at least 1, got {self.warmup_steps}")
        for name in ("b1", "b3"):
            _require(0 < getattr(self, name) < 1, f"{name} must be in (0, 1), got {getattr(self, name)}")

    def __call__(self, count: ArrayLike) -> jax.Array:
        return 1 - self.one_minus(count)

    def one_minus(self, count: ArrayLike) -> jax.Array:
        """``1 - β_t``"""
        x = jnp.minimum((_real(count) + 1) / self.warmup_steps, 1)
        # Half-lives, ln ½ / ln β: the -1 of f and the +1 of its inverse cancel.
        start, end = (math.log(0.5) / math.log(beta) for beta in (self.b1, self.b3))
        return -jnp.expm1(-math.log(2) / (start + (end - start) * x))


@dataclasses.dataclass(frozen=True)
class by_complement:
    """A decay rate near 1, given by its distance from 1: ``β_t = 1 - f(t)``; a float32 β loses the digits of ``1 - β``.

    ::

        adam_fn.adam(1e-3, b2=by_complement(lambda count: 1 / (count + 10)))

    Any schedule that has a method ``one_minus(count)`` besides its ``__call__`` is exact in the same way.
    """

    complement: Callable[[ArrayLike], ArrayLike]

    def __call__(self, count: ArrayLike) -> ArrayLike:
        return 1 - self.complement(count)

    def one_minus(self, count: ArrayLike) -> ArrayLike:
        """``1 - β_t = f(t)``"""
        return self.complement(count)
