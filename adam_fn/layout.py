"""Layout: which elements of a leaf share a scale, and the shapes of what is stored of it.

A block is 32 successive rows of one column: 32 elements along the second-to-last axis, or where that is no multiple of
32 along the nearest axis before it that is, else along the longest. So nothing crosses the last axis, along which the
vector units of every device lie. A vector counts as rows of 128. Codes and scales have the leaf's rank, and so its
sharding; the last block of an axis that is no multiple of 32 is shorter.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

BLOCK = 32
#: Leaves of fewer elements have no blocks.
SMALL = 4096
#: The length of the rows of a vector.
LANES = 128

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of a leaf. Arrays have one of two shapes:

    - the leaf's, `shape`;
    - split, ``[…, blocks, rows of a block, …]``; the numbers of blocks then have ``[…, blocks, 1, …]``. With
      `parts` the rows of a block are two axes, ``[…, blocks, parts, rows of a part, …]``.

    Attributes:
      shape: of the leaf, all of whose elements are real.
      axis: the one along which the blocks follow each other.
      width: how many elements make a row of a vector; 1 for other leaves.
      parts: of a block's rows, where it is split; as many as codes share a byte, or 1.
    """

    shape: Shape
    axis: int
    width: int = 1
    parts: int = 1

    @property
    def rows(self) -> int:
        return -(-self.shape[self.axis] // self.width)

    @property
    def block(self) -> int:
        """Rows of a block."""
        return min(BLOCK, self.rows)

    @property
    def blocks(self) -> int:
        """Blocks along the axis."""
        return -(-self.rows // self.block)

    @property
    def even(self) -> bool:
        """Whether all blocks are full, so that an array can be split."""
        return self.shape[self.axis] % (self.block * self.width) == 0

    @property
    def scales(self) -> Shape:
        """The shape of the scales, with one for each block."""
        return self._along(self.blocks * self.width)

    def part(self, blocks: int) -> "Layout":
        """The layout of some successive blocks, all full."""
        return dataclasses.replace(self, shape=self._along(blocks * self.block * self.width))

    def parted(self, packed: int) -> "Layout":
        """With the rows of a block in as many parts as codes share a byte, if they can be."""
        return self if self.block % packed else dataclasses.replace(self, parts=packed)

    @property
    def inside(self) -> Shape:
        """The axes of a block's rows, where it is split."""
        return (self.parts, self.block // self.parts) if self.parts > 1 else (self.block,)

    def _along(self, *lengths: int) -> Shape:
        """The leaf's shape with other lengths in the place of the axis."""
        return (*self.shape[: self.axis], *lengths, *self.shape[self.axis + 1 :])

    def _split(self, *lengths: int) -> Shape:
        """The shape of something split."""
        return self._along(*lengths, self.width) if self.width > 1 else self._along(*lengths)

    def split(self, x: jax.Array) -> jax.Array:
        """An array of the leaf's shape, the blocks of which are all full, split."""
        return x.reshape(self._split(self.blocks, *self.inside))

    def merge(self, x: jax.Array) -> jax.Array:
        """Something split, in the leaf's shape, or in that of what is stored of it."""
        axes = x.ndim - len(self.shape) + 1  # Those that the axis was split into.
        return x.reshape(self._along(math.prod(x.shape[self.axis : self.axis + axes])))

    def _cut(self, x: jax.Array) -> jax.Array:
        """Without what was added for the last block to be full."""
        return x if self.even else jax.lax.slice_in_dim(x, 0, self.shape[self.axis], axis=self.axis)

    def padded(self, x: jax.Array) -> jax.Array:
        """An array of the leaf's shape, split, with zeros where the last block is not full."""
        missing = self.blocks * self.block * self.width - self.shape[self.axis]
        if missing:
            x = jnp.pad(x, [(0, missing if axis == self.axis else 0) for axis in range(x.ndim)])
        return self.split(x)

    def split_scales(self, x: jax.Array) -> jax.Array:
        """Numbers of the blocks, as they are stored, in a shape that broadcasts to split arrays."""
        return x.reshape(self._split(self.blocks, *(1 for _ in self.inside)))

    def spread(self, x: jax.Array, packed: int = 1) -> jax.Array:
        """Numbers of the blocks, as they are stored, each at all codes of its block, `packed` of them in a byte.

        With one in a byte that is the leaf's shape.
        """
        wide = x.reshape(self._split(self.blocks, 1))
        wide = jnp.broadcast_to(wide, self._split(self.blocks, -(-self.block // packed)))
        return self.merge(wide) if packed > 1 else self._cut(self.merge(wide))

    def largest(self, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Of each block the largest of integers that are not negative: split arrays to the shape of the scales.

        One reduction for all of them: of several, compilers make several passes over the leaf.
        """
        zeros = {name: jnp.zeros((), value.dtype) for name, value in x.items()}
        axes = tuple(self.axis + 1 + i for i in range(len(self.inside)))
        found = jax.lax.reduce(dict(x), zeros, lambda a, b: jax.tree.map(jax.lax.max, a, b), axes) if x else {}
        return {name: value.reshape(self.scales) for name, value in found.items()}

    # Several codes in a byte: the first half of a block's rows in the low bits, the second half in the high ones.

    def split_codes(self, codes: jax.Array, packed: int) -> jax.Array:
        """Codes as they are stored, `packed` of them in a byte, split; a byte is never in parts."""
        if packed == 1:
            return self.split(codes)
        return codes.reshape(self._split(self.blocks, -(-self.block // packed)))

    def unpack(self, codes: jax.Array, packed: int) -> jax.Array:
        """Codes of a byte each, split, of what `split_codes` gives."""
        if packed == 1:
            return codes
        axis = self.axis + 1
        shape = (*codes.shape[:axis], packed, *codes.shape[axis:])
        wide = jnp.broadcast_to(jnp.expand_dims(codes, axis), shape)
        values = nibble(wide, jax.lax.broadcasted_iota(codes.dtype, shape, axis), packed)
        if self.parts > 1:
            return values
        values = values.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])
        if values.shape[axis] > self.block:
            values = jax.lax.slice_in_dim(values, 0, self.block, axis=axis)
        return values

    def share(self, x: jax.Array, i: int, packed: int) -> jax.Array:
        """The elements, of an array of the leaf's shape, that are in the `i`-th bits of the packed codes' bytes.

        Zeros where the last block is not full; `packed` divides the rows of a block.
        """
        part = self.block // packed
        return self.merge(jax.lax.slice_in_dim(self.padded(x), i * part, (i + 1) * part, axis=self.axis + 1))

    def row(self, x: jax.Array, i: jax.Array, packed: int = 1) -> jax.Array:
        """Row `i` of all blocks, ``[…, blocks, 1, …]``, of what is split or of what `split_codes` gives."""
        part = x.shape[self.axis + 1]
        value = jax.lax.dynamic_index_in_dim(x, i % part if packed > 1 else i, self.axis + 1)
        return value if packed == 1 else nibble(value, i // part, packed)

    def pack(self, codes: Mapping[str, jax.Array], packed: int) -> dict[str, jax.Array]:
        """Codes as they are stored, `packed` of them in a byte, of those of a byte each, split.

        One reduction for all of them, as in `largest`; a sum, which XLA can also make between devices.
        """
        bits, axis = 8 // packed, self.axis + 1

        def shifted(x: jax.Array) -> jax.Array:
            missing = -self.block % packed
            if missing:
                x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
            if self.parts == 1:
                x = x.reshape(*x.shape[:axis], packed, -1, *x.shape[axis + 1 :])
            x = x & jnp.uint8(2**bits - 1)
            return x << (bits * jax.lax.broadcasted_iota(jnp.uint8, x.shape, axis))

        values = {name: shifted(x) for name, x in codes.items()}
        zeros = dict.fromkeys(values, jnp.uint8(0))
        found = jax.lax.reduce(values, zeros, lambda a, b: jax.tree.map(jax.lax.add, a, b), (axis,))
        return {name: self.merge(x) for name, x in found.items()}

    def unpack_rows(self, codes: jax.Array, packed: int) -> jax.Array:
        """Codes of a byte each, in the leaf's shape, of stored ones."""
        if packed == 1:
            return codes
        return self._cut(self.merge(self.unpack(self.split_codes(codes, packed), packed)))

    def pack_rows(self, codes: Mapping[str, jax.Array], packed: int) -> dict[str, jax.Array]:
        """The inverse of `unpack_rows`."""
        return self.pack({name: self.padded(x) for name, x in codes.items()}, packed)


def nibble(codes: jax.Array, i: jax.Array | int, packed: int) -> jax.Array:
    """The `i`-th of the codes in each byte."""
    bits = 8 // packed
    return codes >> jnp.asarray(i * bits).astype(codes.dtype) & jnp.asarray(2**bits - 1, codes.dtype)


@functools.cache
def layout(shape: Shape) -> Layout | None:
    """The blocks of a leaf of a (real) shape, or None for one that is too small to have any."""
    if math.prod(shape) < SMALL:
        return None
    if len(shape) == 1:
        return Layout(shape, 0, LANES)
    wide = [axis for axis, length in enumerate(shape) if length > 1]
    axes = wide[:-1] or wide
    even = [axis for axis in axes if shape[axis] % BLOCK == 0]
    return Layout(shape, even[-1] if even else max(axes, key=lambda axis: shape[axis]))
