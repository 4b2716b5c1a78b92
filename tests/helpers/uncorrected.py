"""Variants of Adam that the paper compares with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import adam_fn


@dataclasses.dataclass(frozen=True)
class Uncorrected(adam_fn.Adam):
    """Adam without bias correction: both bias weights are 1."""

    def leaf(
        self, g: jax.Array, p: jax.Array | None, slots: Mapping[str, jax.Array], clock: adam_fn.Clock
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        ones = tuple(jnp.ones_like(w) for w in clock.weights)
        return super().leaf(g, p, slots, dataclasses.replace(clock, weights=ones))


def uncorrected(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 0.0) -> adam_fn.Transformation:
    """`adam_fn.adam` without bias correction."""
    return adam_fn.transform(Uncorrected(b1, b2, eps) >> adam_fn.Rate(learning_rate))


def mean_decay(count: jax.Array) -> jax.Array:
    """``β₂ = 1 - 1/t``: v is the plain mean of the squared gradients."""
    t = jnp.asarray(count, float) + 1
    return 1 - 1 / t
