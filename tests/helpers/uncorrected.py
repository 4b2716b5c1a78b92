"""Variants of Adam that the paper compares with."""

from typing import Any

import figure4
import jax
import jax.numpy as jnp

import adam_fn


def uncorrected(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 0.0) -> adam_fn.Transformation:
    """`adam_fn.adam` without bias correction."""
    return adam_fn.transform(figure4.PerhapsCorrected(b1, b2, eps, corrected=0.0) >> adam_fn.Rate(learning_rate))


def mean_decay(count: jax.Array) -> jax.Array:
    """``β₂ = 1 - 1/t``: v is the plain mean of the squared gradients."""
    t = jnp.asarray(count, float) + 1
    return 1 - 1 / t
