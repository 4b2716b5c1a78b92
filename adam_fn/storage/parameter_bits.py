"""Arithmetic with the bits of bfloat16 parameters: masters made with a remainder, and stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np

from adam_fn.storage import noise

LARGEST = 0x7F7F  # The bits of the largest finite bfloat16; one more is inf.


# A bfloat16 is a float32 whose lower 16 bits are 0, and is computed as such here. At the end floats are converted to
# bfloat16, and remainders to integers: on a TPU a conversion joins the pass that reads the parameters, while operations
# on bits do not.


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of an array of float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def as_float(magnitude: jax.Array, like: jax.Array) -> jax.Array:
    """The float32 with these 31 magnitude bits and the sign of `like`; `like` itself where it is inf or nan."""
    x = jax.lax.bitcast_convert_type((bits_of(like) & np.uint32(1 << 31)) | magnitude.astype(jnp.uint32), jnp.float32)
    return jnp.where(jnp.isfinite(like), x, like)


def _shortened(x: jax.Array, bits: int) -> jax.Array:
    """``|x|`` of a float32 as an int32: its upper 15 + `bits` bits, rounded half up."""
    drop = 16 - bits
    return (((bits_of(x) & 0x7FFFFFFF) + ((1 << drop) >> 1)) >> drop).astype(jnp.int32)


def visible(x: jax.Array, bits: int) -> jax.Array:
    """The parameter of a float32 master: the nearest bfloat16, halves away from 0; finite numbers stay finite."""
    half = 1 << (bits - 1)
    return as_float(jnp.minimum((_shortened(x, bits) + half) >> bits, LARGEST) << 16, x)


def remainder_of(x: jax.Array, q: jax.Array, bits: int) -> jax.Array:
    """The remainder with which `join` leads from the parameter `q` back to `x`, or as near as it can."""
    half = 1 << (bits - 1)
    whole = ((bits_of(q) & 0x7FFFFFFF) >> (16 - bits)).astype(jnp.int32)
    difference = jnp.clip((_shortened(x, bits) - whole).astype(jnp.float32), -half, half - 1)
    same = bits_of(x) >> 31 == bits_of(q) >> 31  # A sign can differ where one of the two is 0.
    joined = jnp.isfinite(x) & jnp.isfinite(q) & same
    return jnp.where(joined, difference, 0).astype(f"int{bits}")


def join(p: jax.Array, remainder: jax.Array, bits: int) -> jax.Array:
    """The float32 master of a bfloat16 parameter and its remainder."""
    wide = p.astype(jnp.float32)
    whole = ((bits_of(wide) & 0x7FFFFFFF) >> (16 - bits)).astype(jnp.int32)
    return as_float(jnp.maximum(whole + remainder.astype(jnp.int32), 0) << (16 - bits), wide)


def landing(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The float32 update that leads from `p` to `q`, and the bfloat16 on which `optax.apply_updates` lands with it.

    It lands on `q`, unless |q| is below about 2⁻¹⁶|p| and float32 cannot hold q - p: then it is off by 2⁻²⁵|p| at most.
    """
    wide = p.astype(jnp.float32)
    u = jnp.where(q == wide, 0, q - wide)  # Where both are inf the difference is nan.
    return u, (wide + u).astype(jnp.bfloat16).astype(jnp.float32)


def round_stochastically(x: jax.Array, dither: jax.Array) -> jax.Array:
    """Rounds a float32 to one of the two bfloat16 around it; the mean over all dithers is `x`.

    Finite numbers stay finite.
    """
    magnitude = ((bits_of(x) & 0x7FFFFFFF).astype(jnp.int32) + noise.upper_bits(dither, 16)) >> 16
    return as_float(jnp.minimum(magnitude, LARGEST) << 16, x)
