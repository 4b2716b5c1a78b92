"""Clipping by the global norm, right for every floating dtype and every magnitude."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.arithmetic import safe_sqrt
from adam_fn.algebra.dtypes import as_dtype, as_real, compute_dtype
from adam_fn.execute.compiler import opaque
from adam_fn.trees.leaves import PyTree
from adam_fn.wrappers.base import TreeTransformation, is_trained, map_trained


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(TreeTransformation):
    """The implementation of `clip_by_global_norm`."""

    max_norm: ArrayLike

    def init(self, params: PyTree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        self, updates: PyTree, state: optax.EmptyState, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, optax.EmptyState]:
        return _clipped(updates, self.max_norm), state


@jax.jit
def _clipped(updates: PyTree, max_norm: ArrayLike) -> PyTree:
    found = [as_real(u) for u in jax.tree.leaves(updates) if is_trained(u)]
    if not found:
        return updates
    wide = jnp.float64 in {compute_dtype(x.dtype) for x in found}
    dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    max_norm = jnp.asarray(max_norm, dtype)

    def total(function: object) -> jax.Array:
        return sum((jnp.sum(function(x.astype(dtype))) for x in found), jnp.zeros((), dtype))  # pyright: ignore[reportCallIssue]

    # One pass over the elements sums the squares as they are and, for trees whose squares leave the range, times powers
    # of two. Whatever underflows in the sum that is used is too small to be seen beside the rest.
    half = jnp.finfo(dtype).maxexp // 2
    up, down = 2.0**half, 2.0 ** -(half + half // 2)
    # Without `opaque` XLA would multiply the squares by the square of a constant, which is 0 or infinite.
    plain, large, small = (total(lambda x, by=by: (x * by) ** 2) for by in opaque(jnp.asarray([1.0, down, up], dtype)))
    infinities = total(lambda x: jnp.isinf(x).astype(dtype))

    infinite = (infinities > 0) & ~jnp.isnan(plain)
    is_small, is_large = plain < 2.0 ** -(half - 4), plain == jnp.inf
    root = safe_sqrt(jnp.where(is_small, small, jnp.where(is_large, large, plain)))
    root = jnp.where(infinite, jnp.sqrt(infinities), root)
    scale = jnp.where(is_small, up, jnp.where(is_large, down, 1.0)).astype(dtype)
    clips = ~(root / scale <= max_norm) | infinite  # A norm of nan clips, and makes everything nan.

    def clipped(u: jax.Array) -> jax.Array:
        x = as_real(u).astype(dtype)
        # In this order: the norm may exceed the largest number, and max_norm divided by it may be below the least.
        x = (
            jnp.where(infinite, jnp.where(jnp.isinf(x), jnp.sign(x), 0), x * scale)
            / jnp.where(root == 0, 1, root)
            * max_norm
        )
        return jnp.where(clips, as_dtype(x, u.dtype), u)

    return map_trained(clipped, updates)


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scales the gradients so that their global norm, ``√Σ|g|²`` over all leaves, is at most `max_norm`.

    Like `optax.clip_by_global_norm`, but the norm is computed in float32 (float64 if a leaf is float64) whatever the
    dtype of the gradients, and no square overflows or vanishes: gradients of 300 in float16, and of 1e30 or 1e-30 in
    float32, are clipped correctly. Zeros stay zero. Infinities are treated as a limit: they divide `max_norm` among
    themselves and keep their signs, and finite elements become 0. A nan makes everything nan. Put `skip_nonfinite`
    outside, where it sees the original gradients:
    ``skip_nonfinite(optax.chain(clip_by_global_norm(1.0), adamw(1e-3)))``.

    Updates keep their dtypes. A complex leaf counts by its absolute values; integers and None pass through. Inside
    `shard_map` each shard has a norm of its own.

    Args:
      max_norm: a number of at least 0, or a 0-d array, in units of the gradient.
    """
    check_norm(max_norm)
    return ClipByGlobalNorm(max_norm).transformation()


def check_norm(max_norm: ArrayLike) -> None:
    """Raises if an object cannot be the limit of a norm: a scalar of at least 0."""
    if callable(max_norm):
        raise TypeError(f"max_norm must be a number or a 0-d array, not a schedule, got {max_norm!r}")
    if isinstance(max_norm, (int, float, np.generic)) and not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if jnp.shape(max_norm) != ():
        raise ValueError(f"max_norm must be a scalar, got an array of shape {jnp.shape(max_norm)}")
