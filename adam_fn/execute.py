"""`body`, the only place where a rule's arithmetic meets its storage, and the ways to run it."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from adam_fn.codec import Codec, Noise, Stored
from adam_fn.noise import even_bits
from adam_fn.rule import Clock, Rule


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic for a parameter's dtype: float64 for float64 and complex128, else float32."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32)


def as_real(x: jax.Array) -> jax.Array:
    """A complex array as two reals, stacked in front; a real array as it is."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `as_real`, in `dtype`."""
    return (jax.lax.complex(x[0], x[1]) if jnp.issubdtype(dtype, jnp.complexfloating) else x).astype(dtype)


def _widened(g: jax.Array, dtype: np.dtype) -> jax.Array:
    """The gradient in the dtype of the arithmetic.

    A low-precision gradient whose square would overflow there (bfloat16 above 9e18) counts as the largest that does
    not, so that any finite one gives a finite update; inf and nan stay what they are.
    """
    exponent = jnp.finfo(dtype).maxexp // 2 - 1
    wide = g.astype(dtype)
    if jnp.finfo(g.dtype).bits >= 32 or jnp.finfo(g.dtype).maxexp <= exponent:
        return wide
    return jnp.where(jnp.isfinite(wide), jnp.clip(wide, -(2.0**exponent), 2.0**exponent), wide)


def _noise(slot: int, clock: Clock) -> Noise:
    """Random numbers of their own for each slot and leaf, which move on with the step."""
    assert clock.index is not None
    return functools.partial(even_bits, slot, clock.count, clock.index)


def body(
    rule: Rule,
    codecs: Mapping[str, Codec],
    g: jax.Array,
    p: jax.Array | None,
    stored: Mapping[str, Stored],
    clock: Clock,
) -> tuple[jax.Array, dict[str, Stored]]:
    """One step of one leaf: decode, the rule, encode. The update has the gradient's dtype and shape."""
    dtype = compute_dtype((g if p is None else p).dtype)
    rule = rule.cast(dtype)
    clock = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, clock)
    shape = jax.eval_shape(as_real, g).shape
    slots = {name: codecs[name].decode(x, dtype, shape) for name, x in stored.items()}
    param = None if p is None else as_real(p).astype(dtype)
    gradient = _widened(as_real(g), dtype)
    u, new = rule.leaf(gradient, param, slots, clock)
    found = {"update": u.shape} | {name: x.shape for name, x in new.items()}
    expected = {"update": gradient.shape} | {name: x.shape for name, x in slots.items()}
    if found != expected:
        raise ValueError(f"{type(rule).__name__}.leaf returned shapes {found}, expected {expected}")
    return as_dtype(u, g.dtype), {
        name: codecs[name].encode(new[name], None if clock.index is None else _noise(i, clock))
        for i, name in enumerate(codecs)
    }


#: `body` over a whole leaf. Jitted, so that it is traced and lowered once per distinct leaf and not once per leaf.
run_leaf = jax.jit(body)
