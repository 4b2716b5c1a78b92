"""Random bits from a counter: a cheap hash of (seed, step, leaf, element) that needs no state and no communication."""

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Part(NamedTuple):
    """The part of an array of `shape` that begins at `starts`."""

    shape: Sequence[int]
    starts: Sequence[ArrayLike]

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, start: ArrayLike) -> "Part":
        """The part from `start` on along one axis."""
        return cls(shape, [start if i == axis else 0 for i in range(len(shape))])


def random_bits(
    seed: ArrayLike, step: ArrayLike, leaf: ArrayLike, shape: Sequence[int], part: Part | None = None
) -> jax.Array:
    """32 uniform bits for each element of a leaf, uint32 of `shape`.

    The integers `seed`, `step` and `leaf` (scalars, modulo 2³²) choose one of 2⁶⁴ streams. The bits of an element
    depend on these and on its row-major index alone, so that they are the same under `jit` and under any sharding.
    Their quality is statistical, not cryptographic. A leaf of more than 2³² elements uses bits twice. Inside
    `shard_map` and `vmap`, shape and index are those of one shard or one member. An array that is a `part` of a leaf
    gets the leaf's bits.
    """
    # Two keys: of one alone the streams would be permutations of each other, element i of one element j of another.
    first, second = _key(0x9E3779B9, seed, step, leaf), _key(0x85EBCA6B, seed, step, leaf)
    whole = part.shape if part else shape
    strides = list(itertools.accumulate(reversed(whole[1:]), operator.mul, initial=1))[::-1] if shape else []
    index = jnp.zeros(tuple(shape), jnp.uint32)
    for axis, stride in enumerate(strides):
        rows = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        if part and not (isinstance(part.starts[axis], int) and part.starts[axis] == 0):
            rows = rows + _shaped(jnp.asarray(part.starts[axis]).astype(jnp.uint32), rows)
        if whole[axis] > 1:
            index += rows * jnp.uint32(stride % 2**32)
    return _mix(index ^ _shaped(first, index), _shaped(second, index))


def even_bits(
    seed: ArrayLike, step: ArrayLike, leaf: ArrayLike, shape: Sequence[int], part: Part | None = None
) -> jax.Array:
    """Like `random_bits`, but the numbers of an element are spread evenly over the steps instead of independent.

    They start at random and advance by the golden ratio of 2³² (an additive recurrence): every number is as likely as
    any other, but among any few successive ones small and large ones are in proportion. Rounding errors that add up
    over the steps then partly cancel.
    """
    advance = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    start = random_bits(seed, 0, leaf, shape, part)
    return start + _shaped(advance, start)


def _shaped(number: jax.Array, x: jax.Array) -> jax.Array:
    """An integer, which in kernels is an array of one element, in a shape that broadcasts to `x`."""
    return number.reshape((1,) * x.ndim)


def _key(start: int, *numbers: ArrayLike) -> jax.Array:
    """A scalar hash of some integers."""
    key = jnp.uint32(start)
    for number in numbers:
        key = _mix(
            key ^ (jnp.uint32(number % 2**32) if isinstance(number, int) else jnp.asarray(number).astype(jnp.uint32))
        )
    return key


def _mix(x: jax.Array, key: ArrayLike = 0) -> jax.Array:
    """A bijection of the 32-bit integers in which any bit moves any other: Wellons' `triple32`, with a key inside."""
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) + jnp.asarray(key, jnp.uint32)
    x = x * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)
