"""One kernel per leaf, with `body` inside: every element is read once and written once, in its place.

A kernel (Pallas) is asked for by name, ``kernel=True``. On each tile of a leaf it does what `in_blocks` does; what is
said here is where the tiles lie, which differs between TPU and GPU, and how numbers of a tile get to their places.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import ArrayLike

from adam_fn.execute.body import Inputs, compute_dtype
from adam_fn.execute.step import Done, Step, in_blocks
from adam_fn.execute.store import Form, Slots
from adam_fn.layout import BLOCK, Layout, layout
from adam_fn.noise import Part
from adam_fn.rule import Clock, Rule

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of device.

    Attributes:
      tile: the shape of a tile of a leaf, of whole blocks; None where no kernel suits the leaf.
      divisible: whether JAX can be told how to divide a kernel among devices (`on_mesh`). It cannot on a TPU (JAX issue
        38196), and raises: there the step belongs inside `shard_map`.
      options: makes those of `pallas_call`.
    """

    tile: Callable[[Layout], Shape | None]
    divisible: bool
    options: Callable[[], Mapping[str, Any]] = dict


def _tpu_tile(blocks: Layout) -> Shape | None:
    """2¹⁷ elements or so: all that is computed from them stays in the core's memory, and the next tile comes meanwhile.

    Rows that lie in registers with the columns are multiples of 256, those of the scales then of 8. What a tile has
    beyond the end of the leaf is not written. XLA lays out columns that fill no whole registers in another order, which
    a kernel cannot take.
    """
    *before, rows = blocks.shape[: blocks.axis + 1]
    *between, columns = blocks.shape[blocks.axis + 1 :] or (1,)
    least = BLOCK if between else 8 * BLOCK
    row = math.prod(between[:-1]) * -(-between[-1] // 8) * 8 if between else 1  # Registers have 8 rows.
    wide = [x for x in (512, 384, 256, 128) if columns % x == 0 and least * row * x <= 2**17]
    if not wide:
        return None
    high = 2**17 // (row * wide[0] * least) * least
    return (*(1 for _ in before), min(high, -(-rows // BLOCK) * BLOCK), *between, wide[0])


def _gpu_tile(blocks: Layout) -> Shape | None:
    """One row of blocks of up to 64 columns, a power of 2: they stay in the registers of 4 warps. No leaf's end."""
    rows, columns = blocks.shape[blocks.axis], blocks.shape[-1]
    wide = min(64, columns & -columns)
    if rows % BLOCK or wide < 16 or blocks.axis == len(blocks.shape) - 1:
        return None
    return tuple({blocks.axis: BLOCK, len(blocks.shape) - 1: wide}.get(axis, 1) for axis in range(len(blocks.shape)))


def _gpu_options() -> dict[str, Any]:
    from jax.experimental.pallas import triton  # noqa: PLC0415 (not every jaxlib has it)

    return {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=1)}


TPU = Machine(_tpu_tile, divisible=False)
GPU = Machine(_gpu_tile, divisible=True, options=_gpu_options)


@dataclasses.dataclass(frozen=True)
class Tile(Layout):
    """The layout of a tile, in operations that compilers of kernels have.

    Attributes:
      left: how many rows from its first on are in the leaf, where that is not known to be all.
    """

    left: jax.Array | None = None

    def largest(self, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        found = {name: self._kept(value.astype(jnp.int32)).max(self.axis + 1) for name, value in x.items()}
        return {name: value.reshape(self.scales).astype(x[name].dtype) for name, value in found.items()}

    def unpack(self, codes: jax.Array, packed: int) -> jax.Array:
        return super().unpack(codes.astype(jnp.int32), packed) if packed > 1 else codes

    def pack(self, codes: Mapping[str, jax.Array], packed: int) -> dict[str, jax.Array]:
        axis, bits = self.axis + 1, 8 // packed
        found = {}
        for name, x in codes.items():
            values = self._kept(x.astype(jnp.int32) & 2**bits - 1)
            values = values.reshape(*values.shape[:axis], packed, -1, *values.shape[axis + 1 :])
            values = values << bits * jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
            found[name] = self.merge(values.sum(axis, dtype=jnp.int32)).astype(x.dtype)
        return found

    def _kept(self, x: jax.Array) -> jax.Array:
        """Split elements with zeros in the place of those that are beyond the leaf."""
        if self.left is None:
            return x
        block, row = (jax.lax.broadcasted_iota(jnp.int32, x.shape, i) for i in (self.axis, self.axis + 1))
        return jnp.where(block * BLOCK + row < self.left, x, 0)


def opaque(function: Callable[..., Done]) -> Callable[..., Done]:
    """A function that says so where it is asked for derivatives or batches, which kernels do not have."""

    def refused(what: str) -> NotImplementedError:
        return NotImplementedError(f"kernel=True: a kernel has no {what}; leave the option out there")

    def jvp(primals: object, tangents: object) -> Any:  # noqa: ANN401 (it does not return)
        del primals, tangents
        raise refused("derivatives")

    def batch(size: int, batched: object, *arguments: object) -> Any:  # noqa: ANN401 (it does not return)
        del size, batched, arguments
        raise refused("vmap")

    differentiable = jax.custom_jvp(function)
    differentiable.defjvp(jvp)
    batchable = jax.custom_batching.custom_vmap(differentiable)
    batchable.def_vmap(batch)
    return batchable


def matrix(blocks: Layout) -> Layout:
    """A vector's layout as that of the matrix whose rows its blocks are made of; another one as it is."""
    return Layout((blocks.shape[0] // blocks.width, blocks.width), 0) if blocks.width > 1 else blocks


def suited(machine: Machine, inputs: Inputs) -> Layout | None:
    """The blocks of a leaf that the kernel suits: not of small ones, of uneven vectors, and of float64."""
    blocks = layout(inputs.g.shape)
    dtype = compute_dtype((inputs.g if inputs.p is None else inputs.p).dtype)
    if blocks is None or blocks.block < BLOCK or (blocks.width > 1 and not blocks.even) or dtype != jnp.float32:
        return None
    return blocks if machine.tile(matrix(blocks)) else None


def in_kernel(
    machine: Machine,
    step: Step,
    rule: Rule,
    inputs: Inputs,
    stored: Slots,
    clock: Clock,
    *,
    blocks: Layout,
    part: Part | None = None,
    interpret: bool = False,
) -> Done:
    """A leaf, or the part of one that has the scales `part`, tile by tile; `blocks` is its layout."""
    if blocks.width > 1:
        as_rows = functools.partial(jax.tree.map, lambda x: x.reshape(-1, blocks.width))
        if part is not None:
            part = Part((part.shape[0] // blocks.width, blocks.width), (jnp.asarray(part.starts[0]) // blocks.width, 0))
        done = in_kernel(machine, step, rule, as_rows(inputs), as_rows(dict(stored)), clock,
                         blocks=matrix(blocks), part=part, interpret=interpret)  # fmt: skip
        return jax.tree.map(lambda x: x.reshape(-1), done)
    part = part or Part(blocks.scales, [0] * len(blocks.shape))
    shape = machine.tile(blocks)
    assert shape is not None
    axis, rank = blocks.axis, len(shape)
    numbers, numbers_tree = jax.tree.flatten((rule, clock, list(part.starts)))
    arrays, arrays_tree = jax.tree.flatten((inputs, dict(stored)))
    done = jax.eval_shape(
        lambda: Done(step.write.leave(inputs, step.write.enter(inputs).g)[0], inputs.low, dict(stored))
    )
    results, results_tree = jax.tree.flatten(done)

    def run(*refs: Any) -> None:  # noqa: ANN401 (Pallas has no public type of references)
        places = [pl.program_id(i) for i in range(rank)]
        values = [ref[...] for ref in refs[: -len(results)]]
        own_rule, own_clock, starts = numbers_tree.unflatten(values[: len(numbers)])
        left = None if blocks.even else blocks.shape[axis] - places[axis] * shape[axis]
        tile = Tile(shape, axis, left=left)
        begin = [start + i * length for start, i, length in zip(starts, places, tile.scales, strict=True)]
        own, state = arrays_tree.unflatten(values[len(numbers) :])
        own_step = dataclasses.replace(step, form=Form(tile))
        done = in_blocks(own_step, own_rule, own, state, own_clock, Part(part.shape, begin), lambda x: x)
        for ref, value in zip(refs[-len(results) :], jax.tree.leaves(done), strict=True):
            ref[...] = value

    # Numbers are arrays of one element, of the rank of what is split into blocks: vector units compute with them what
    # scalar ones cannot.
    ones = (1,) * (rank + 1)
    scalars = [_short(x).reshape(ones) for x in numbers]
    scalar = pl.BlockSpec(ones, lambda *index: (index[0] * 0,) * (rank + 1))  # Of the index's own 32 bits.
    found = pl.pallas_call(
        run,
        grid=tuple(-(-whole // one) for whole, one in zip(blocks.shape, shape, strict=True)),
        in_specs=[*(scalar for _ in scalars), *(_block(x.shape, blocks, shape) for x in arrays)],
        out_specs=[_block(x.shape, blocks, shape) for x in results],
        out_shape=results,
        input_output_aliases=_replaced(step, inputs, stored, done.result, arrays, len(scalars)),
        interpret=interpret,
        name="adam_fn",
        **machine.options(),
    )(*scalars, *arrays)
    return results_tree.unflatten(found)


def _short(number: ArrayLike) -> jax.Array:
    """A number of 32 bits: those of 64 that `jax_enable_x64` makes are more than a kernel computes with, or can."""
    x = jnp.asarray(number)
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _block(shape: Sequence[int], blocks: Layout, tile: Shape) -> pl.BlockSpec:
    """What belongs to a tile: of an array of the leaf's shape, or of one with fewer rows, as codes and scales have."""
    rows, axis = shape[blocks.axis], blocks.axis
    high = tile[axis] if rows == blocks.shape[axis] else tile[axis] // BLOCK * (rows // blocks.blocks)
    return pl.BlockSpec((*tile[:axis], high, *tile[axis + 1 :]), lambda *index: index)


def _replaced(
    step: Step, inputs: Inputs, stored: Slots, like: jax.ShapeDtypeStruct, arrays: Sequence[jax.Array], before: int
) -> dict[int, int]:
    """By the number of an operand, `before` of which are no arrays, that of the result which takes its place."""
    place = inputs.p if step.write.parameters else inputs.g if like.dtype == inputs.g.dtype else None
    old = [place, *jax.tree.leaves((inputs.low, dict(stored)))]
    numbers = {id(x): before + i for i, x in enumerate(arrays)}
    return {numbers[id(x)]: i for i, x in enumerate(old) if x is not None}
