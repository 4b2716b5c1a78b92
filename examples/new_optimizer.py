"""QHAdam (Ma and Yarats, arXiv 1810.06801) as a rule of adam_fn, checked against a float64 transcription of its paper.

    python examples/new_optimizer.py

`docs/new_optimizer.md` explains it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import adam_fn
from adam_fn import Beta, Clock, NonNegative, Rate, Rule, Slot, Slots, ema


@dataclasses.dataclass(frozen=True)
class QHAdam(Rule):
    """``u = ((1-ν₁)g + ν₁m̂) / (√((1-ν₂)g² + ν₂v̂) + ε)``; ν₁ = ν₂ = 1 is Adam."""

    b1: Beta = 0.995
    b2: Beta = 0.999
    nu1: NonNegative = 0.7
    nu2: NonNegative = 1.0
    eps: NonNegative = 1e-8

    squared_factor: ClassVar[float] = 1.0  # `leaf` squares the gradient itself.

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"mu": Slot(), "nu": Slot(signed=False)}

    @property
    def betas(self) -> Sequence[float]:
        return self.b1, self.b2  # `clock.corrections` are the bias corrections of these.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu, nu = ema(self.b1, slots["mu"], g), ema(self.b2, slots["nu"], g * g)
        c1, c2 = clock.corrections
        numerator = (1 - self.nu1) * g + self.nu1 * c1 * mu
        denominator = jnp.sqrt((1 - self.nu2) * (g * g) + self.nu2 * c2 * nu) + self.eps
        return numerator / denominator, {"mu": mu, "nu": nu}


def transcription(grads: Iterable[np.ndarray], rate: float) -> Iterator[np.ndarray]:
    """The updates of the paper's algorithm with the default hyperparameters, in float64."""
    b1, b2, nu1, nu2, eps = 0.995, 0.999, 0.7, 1.0, 1e-8
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        yield -rate * ((1 - nu1) * g + nu1 * m_hat) / (np.sqrt((1 - nu2) * g**2 + nu2 * v_hat) + eps)


def largest_error(steps: int = 300) -> float:
    """The largest relative L2 error of a float32 update against the transcription."""
    grads = np.random.default_rng(0).normal(size=(steps, 1000)).astype(np.float32)
    tx = adam_fn.transform(QHAdam() >> Rate(1e-3))
    state = tx.init(jnp.zeros(1000))
    errors = []
    for g, expected in zip(grads, transcription(grads.astype(np.float64), 1e-3), strict=True):
        update, state = tx.update(jnp.asarray(g), state)
        errors.append(np.linalg.norm(np.asarray(update, np.float64) - expected) / np.linalg.norm(expected))
    return max(errors)


if __name__ == "__main__":
    print(f"largest relative error of 300 updates: {largest_error():.1e}")
