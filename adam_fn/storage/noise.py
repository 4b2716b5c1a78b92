"""Dither: a number that is added before the last bits are dropped, so that the rounding errors average to zero.

It needs no state, no random numbers and no communication. The dither of element ``[i, j, …]`` at step t is

::

    u = i·A + j·B + … + s(t)   (mod 2³²)

This is a lattice: over the elements of a leaf, u is spread more evenly than random numbers are. Over the steps it is
spread evenly by s(t), so that errors cancel within the memory of an average. Divide the interval into 2ⁿ equal parts:
of 2ⁿ steps that start at a multiple of 2ⁿ, each falls into a different part (a van der Corput sequence). A hash
scrambles their order, so that no periodic gradient can stay in phase with it (an Owen scrambling; the hash is that of
Laine and Karras, "Stratified sampling for stochastic transparency", 2011). Each array that is rounded has an s of its
own. Indices count in the whole leaf, so u is the same under any sharding; inside `shard_map` and `vmap` they count in
one shard or one mapped array, and all of these share one dither.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: The multiples of this A, of A² and of A² + A, modulo 2³², fill the interval almost as evenly as those of the golden
#: ratio: n successive ones leave no gap wider than 2/n.
_FACTOR = 0x2FB276CF
#: The factors of Horner's scheme for the last two indices: ``(i·x + j)·y = i·(A² + A) + j·A²``.
_LAST_FACTORS = [np.uint32(x % 2**32).astype(np.int32) for x in (1 + pow(_FACTOR, -1, 2**32), _FACTOR**2)]


def time_offsets(count: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """The s(t) of each array that is rounded, after `count` steps, by name: int32 scalars.

    Each is a scrambling of the one before, so that XLA for GPUs computes them and the count in one kernel.
    """
    if not names:
        return {}
    # `lax` and not `jnp`, whose functions are traced anew for each transformation.
    mul, shl, shr, xor, u32 = lax.mul, lax.shift_left, lax.shift_right_logical, lax.bitwise_xor, np.uint32
    s = lax.convert_element_type(count, u32)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        upper, lower = lax.bitwise_and(shr(s, u32(shift)), u32(mask)), lax.bitwise_and(s, u32(mask))
        s = lax.bitwise_or(upper, shl(lower, u32(shift)))
    found = {}
    for name in names:
        s = lax.add(s, u32(zlib.crc32(name.encode())))
        for factor in (0x6C50B47C, 0xB82F1E52, 0xC7AFE638, 0x8D22F6E6):  # Even: bits depend on lower ones alone.
            s = xor(s, mul(s, u32(factor)))
        found[name] = lax.bitcast_convert_type(s, np.int32)
    return found


def dither(lattice: jax.Array, time: jax.Array) -> jax.Array:
    """The dither of each element of a leaf, int32."""
    return lax.add(lattice, time)


def lattice(like: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """``i·A + j·B + …`` of each element ``[i, j, …]``, int32, with the shape and the sharding of `like`, a float array.

    With `layer`, the array is this layer's part of a stack of layers, with a first axis of length 1, and gets the
    lattice that it has in the stack.
    """
    shape, place = like.shape, jax.typeof(like).sharding
    # Without a sharding, each device would compute the lattice of the whole leaf over explicit axes.
    indices = [
        lax.broadcasted_iota(jnp.int32, shape, axis, out_sharding=place) for axis, n in enumerate(shape) if n > 1
    ]
    if layer is not None:  # Two reals, of a complex number, stand before the axis of the layers.
        indices.insert(shape[0] != 1, jnp.reshape(layer.astype(jnp.int32), (1,) * like.ndim))
    if not indices:
        return jnp.zeros_like(like, jnp.int32)
    factors = [_FACTOR] if len(indices) == 1 else [*[_FACTOR] * (len(indices) - 2), *_LAST_FACTORS]
    found = lax.platform_dependent(like, cpu=lambda x: lax.full_like(x, 0, np.int32), default=_zero)
    for index, factor in zip(indices, factors, strict=True):
        found = lax.mul(lax.add(found, index), np.int32(factor))
    return found


def _zero(like: jax.Array) -> jax.Array:
    """Int32 zeros computed from `like` (arbitrary where it is not finite), so that leaves cannot share a lattice.

    Otherwise XLA for GPUs and TPUs would compute one lattice for all leaves of a shape, and then fuse these leaves into
    one program, or try to, which takes long to compile. XLA for CPUs does not do this: there a constant 0 is cheaper.
    """
    zero = lax.bitcast_convert_type(lax.sub(like, like), f"int{8 * like.dtype.itemsize}")
    return lax.convert_element_type(zero, np.int32)


def upper_bits(dither: jax.Array, bits: int) -> jax.Array:
    """The upper bits of a dither, an int32 that is not negative, to be added below the bits that are kept."""
    return lax.shift_right_logical(dither, np.int32(32 - bits))
