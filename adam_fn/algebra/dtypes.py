"""The dtypes of the arithmetic, and complex arrays as two reals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic for a parameter's dtype: float64 for float64 and complex128, else float32."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32)


def compute_dtypes(tree: Any) -> set[np.dtype]:  # noqa: ANN401
    """The dtypes of the arithmetic for the floating and complex leaves of a tree."""
    dtypes = map(jnp.result_type, jax.tree.leaves(tree))
    return {compute_dtype(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)}


def as_real(x: jax.Array) -> jax.Array:
    """A complex array as two reals, stacked in front; a real array as it is."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `as_real`, in `dtype`."""
    return (jax.lax.complex(x[0], x[1]) if jnp.issubdtype(dtype, jnp.complexfloating) else x).astype(dtype)
