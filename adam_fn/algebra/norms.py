"""Norms and shares of arrays, for diagnostics. They neither overflow nor underflow unless the numbers do."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.dtypes import as_real, compute_dtype


def norm(arrays: Sequence[jax.Array]) -> jax.Array:
    """The L2 norm of several arrays taken as one; a scalar of their dtype."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in arrays], jnp.zeros(()))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = sum((jnp.sum((x / scale.astype(x.dtype)) ** 2) for x in arrays), jnp.zeros_like(scale))
    return scale * jnp.sqrt(squares)


def size(arrays: Sequence[jax.Array]) -> int:
    return max(sum(x.size for x in arrays), 1)


def rms(arrays: Sequence[jax.Array]) -> jax.Array:
    return norm(arrays) / size(arrays) ** 0.5


def share(arrays: Sequence[jax.Array], threshold: float) -> jax.Array:
    """The share of the elements whose magnitude is at least `threshold`."""
    return sum((jnp.sum(jnp.abs(x) >= threshold, dtype=x.dtype) for x in arrays), jnp.zeros(())) / size(arrays)


def norm_ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """The ratio ``x/y`` of norms; 0 where both are 0."""
    return jnp.where(x == 0, x, x / jnp.where((x == 0) & (y == 0), 1, y))


def reals(tree: Any) -> Any:  # noqa: ANN401
    """Converts arrays to the dtype of the arithmetic, complex ones to two reals, and integers to `optax.MaskedNode`."""

    def real(x: ArrayLike) -> jax.Array | optax.MaskedNode:
        array = jnp.asarray(x)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return optax.MaskedNode()
        return as_real(array).astype(compute_dtype(array.dtype))

    return jax.tree.map(real, tree)
