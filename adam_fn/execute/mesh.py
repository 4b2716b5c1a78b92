"""Kernels on several devices: each runs one on its own part of a leaf. XLA cannot split a kernel by itself."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)

from adam_fn.execute.body import Inputs
from adam_fn.execute.kernel import Machine, in_kernel
from adam_fn.execute.step import Done, Step
from adam_fn.execute.store import Slots
from adam_fn.layout import Layout
from adam_fn.noise import Part
from adam_fn.rule import Clock, Rule


def on_mesh(
    machine: Machine,
    step: Step,
    rule: Rule,
    inputs: Inputs,
    stored: Slots,
    clock: Clock,
    *,
    blocks: Layout,
    interpret: bool = False,
) -> Done:
    """`in_kernel`, divided as the leaf is: along any axis, but the axis of the blocks only between blocks."""
    numbers, numbers_tree = jax.tree.flatten((rule, clock))
    arrays, arrays_tree = jax.tree.flatten((inputs, dict(stored)))
    # What tells a device where its part begins: the numbers of the blocks along each axis, divided as the leaf is.
    lengths = [blocks.blocks if axis == blocks.axis else length for axis, length in enumerate(blocks.shape)]
    places = [jax.lax.iota(jnp.int32, length) for length in lengths]

    def run(numbers: Sequence[jax.Array], places: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> Done:
        own_rule, own_clock = numbers_tree.unflatten(numbers)
        own, state = arrays_tree.unflatten(arrays)
        starts = [x[0] * (blocks.width if axis == blocks.axis else 1) for axis, x in enumerate(places)]
        local = Layout(own.g.shape, blocks.axis, blocks.width)
        return in_kernel(machine, step, own_rule, own, state, own_clock, blocks=local,
                         part=Part(blocks.scales, starts), interpret=interpret)  # fmt: skip

    def partition(mesh: Any, given: Any, results: Any) -> Any:  # noqa: ANN401 (they are JAX's)
        shardings = jax.tree.map(lambda x: x.sharding, (given, results))
        if not _between_blocks(blocks, given):
            shardings = jax.tree.map(_undivided, shardings)
        return mesh, run, shardings[1], shardings[0]

    like = jax.eval_shape(run, numbers, places, arrays)
    sizes: dict[str, int] = {}
    axes = [f"axis{axis}" for axis in range(len(lengths))]
    given = [*(ArrayMapping() for _ in numbers), *map(ArrayMapping, axes)]
    given += [_factors(blocks, x.shape, sizes) for x in arrays]
    results = [_factors(blocks, x.shape, sizes) for x in jax.tree.leaves(like)]
    if blocks.even:
        division = SdyShardingRule(tuple(given), tuple(results), **sizes)  # pyright: ignore[reportArgumentType]
    else:
        whole = (axes[blocks.axis], *sizes)
        division = SdyShardingRule(tuple(given), tuple(results), need_replication_factors=whole)
    divided = custom_partitioning(run)
    # Not decoded: an axis of the mesh may have been divided itself, which a `NamedSharding` cannot say.
    divided.def_partition(partition, sharding_rule=division, decode_shardings=False)
    return divided(numbers, places, arrays)


def _factors(blocks: Layout, shape: Sequence[int], sizes: dict[str, int]) -> ArrayMapping:
    """What the axes of an array consist of: the leaf's axes, and what a block has along its own, added to `sizes`."""
    found: list[str | CompoundFactor] = [f"axis{axis}" for axis in range(len(shape))]
    rows = shape[blocks.axis]
    if not blocks.even:
        if rows != blocks.blocks:
            found[blocks.axis] = f"rows{rows}"
            sizes[f"rows{rows}"] = rows
        return ArrayMapping(*found)
    high = rows // blocks.blocks // blocks.width
    inside = {name: size for name, size in {f"rows{high}": high, "lanes": blocks.width}.items() if size > 1}
    if inside:
        sizes |= inside
        found[blocks.axis] = CompoundFactor(f"axis{blocks.axis}", *inside)
    return ArrayMapping(*found)


def _between_blocks(blocks: Layout, given: Any) -> bool:  # noqa: ANN401 (it is JAX's)
    """Whether all arrays are divided alike, and only between blocks."""
    _, places, arrays = given
    try:
        lengths = [x.sharding.shard_shape(x.shape)[0] for x in places]
        shapes = [(x.shape, x.sharding.shard_shape(x.shape)) for x in arrays]
    except ValueError:  # Not into equal parts.
        return False
    return all(
        own[axis] * (blocks.blocks if axis == blocks.axis else whole[axis]) == whole[axis] * length
        for whole, own in shapes
        for axis, length in enumerate(lengths)
    )


def _undivided(sharding: Any) -> Any:  # noqa: ANN401 (JAX has no public type for it)
    return type(sharding).get_replicated(sharding._device_assignment)
