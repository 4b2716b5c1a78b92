"""Tiles: some successive blocks at a time, so that on a TPU all that is in between stays in its fast memory."""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_fn.codec import Stored
from adam_fn.execute.body import Coded, Inputs
from adam_fn.execute.sources import PARAMETER, sources
from adam_fn.execute.step import Done, Step, in_blocks
from adam_fn.execute.store import Form, Slots
from adam_fn.layout import layout as blocks_of
from adam_fn.noise import Part
from adam_fn.rule import Clock, Rule

#: Elements of a tile: all that it needs fits into the fast memory of a TPU, and it outweighs the start of its kernels.
TILE = 2**23
#: Smaller leaves have no tiles, larger ones two or more.
LARGE = 2**20
#: Of one that is laid out anew and needs more.
PADDED = 2**22

_barrier = jax.lax.optimization_barrier


def in_tiles(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """A leaf whose blocks are all full, in three passes over a tile: the result, the scales, then the codes.

    Arrays are split before the loop, so that a tile is a part of a major axis and has no other shape in any pass. Each
    pass takes the tile anew, at a place that is known only when the pass before is done: so XLA neither keeps what they
    have in common nor writes in the place of what is yet to be read.
    """
    layout, codecs = step.form.layout or blocks_of(inputs.g.shape), step.codecs
    assert layout is not None
    axis, wide = layout.axis, layout.parted(max(codec.packed for codec in codecs.values()))
    # The packed codes of as many blocks as share a byte fill the registers as those of one do that are not packed.
    group = wide.parts if layout.blocks % wide.parts == 0 else 1
    count = max(1, min(TILE * layout.blocks // math.prod(layout.shape), layout.blocks // 2) // group) * group

    def split(x: jax.Array) -> jax.Array:
        """An array of the leaf's shape, or what is stored of one."""
        length = x.shape[axis] // (layout.blocks * layout.width)
        inside = wide.inside if length == layout.block else (length,)
        units = layout.blocks
        if 1 < length < layout.block:
            units, inside = units // group, (length * group,)
        width = (layout.width,) if layout.width > 1 else ()
        return x.reshape(*x.shape[:axis], units, *inside, *width, *x.shape[axis + 1 :])

    def take(x: jax.Array, start: jax.Array, blocks: int) -> jax.Array:
        units = layout.blocks // x.shape[axis]
        return jax.lax.dynamic_slice_in_dim(x, start // units, blocks // units, axis)

    def put(x: jax.Array, part: jax.Array, start: jax.Array, blocks: int) -> jax.Array:
        units = layout.blocks // x.shape[axis]
        part = part.reshape(*x.shape[:axis], blocks // units, *x.shape[axis + 1 :])
        return jax.lax.dynamic_update_slice_in_dim(x, part, start // units, axis)

    def tile(start: jax.Array, blocks: int, done: Done) -> Done:
        part = dataclasses.replace(step, form=Form(wide.part(blocks), split=True))
        chances = part.form.chances(codecs, clock, Part.along(layout.scales, axis, start * layout.width))

        # What is packed is laid out anew for its elements: once, of 32 bits, which takes no longer than to read it.
        codes = {n: x["codes"] for n, x in done.stored.items() if isinstance(x, dict) and codecs[n].packed > 1}
        unpacked = _barrier(jax.tree.map(lambda x: take(x, start, blocks).astype(jnp.int32), codes))

        def own(start: jax.Array) -> tuple[Inputs, dict[str, Coded]]:
            source = given._replace(low=done.low, **{place: done.result} if place else {})
            inputs, state = jax.tree.map(lambda x: take(x, start, blocks), (source, done.stored))
            state |= {name: {**state[name], "codes": x} for name, x in unpacked.items()}
            return part.enter(inputs), part.form.coded(codecs, state, chances)

        inputs, coded = own(start)
        written = part.leave(inputs, part.body(rule, inputs, coded, clock)[0])
        if direct:
            written = jax.tree.map(lambda x, y: put(x, y, start, blocks), done[:2], written)
        start, written = _barrier((start, written))
        inputs, coded = own(start)
        held = part.held(part.body(rule, inputs, coded, clock)[1], coded)
        start, held = _barrier((start, held))
        inputs, coded = own(start)
        new = part.encode(part.body(rule, inputs, coded, clock)[1], coded, held)
        state = jax.tree.map(lambda x, y: put(x, y, start, blocks), done.stored, new)
        if not direct:
            start, state = _barrier((start, state))
            written = jax.tree.map(lambda x, y: put(x, y, start, blocks), done[:2], written)
        return Done(written[0], written[1], state)

    first, place = _first(step, inputs, stored)
    read = sources(rule, step.write.enter(inputs), codecs, clock)
    direct = place != "g" and PARAMETER not in set().union(*read.values())
    given, done = cast(tuple[Inputs, Done], jax.tree.map(split, (inputs, first)))
    whole = layout.blocks // count
    done = jax.lax.fori_loop(0, whole, lambda i, done: tile(i * count, count, done), done)
    left = layout.blocks - whole * count
    done = tile(jnp.int32(whole * count), left, done) if left else done
    return jax.tree.map(lambda x, like: x.reshape(like.shape), done, first)


def _first(step: Step, inputs: Inputs, stored: Slots) -> tuple[Done, str | None]:
    """What a loop begins with, and in the place of which input the result is written."""
    like = jax.eval_shape(lambda: step.write.leave(inputs, step.write.enter(inputs).g)[0])
    place = "p" if step.write.parameters else "g" if like.dtype == inputs.g.dtype else None
    blank = getattr(inputs, place) if place else jnp.zeros_like(inputs.g, like.dtype)
    return Done(blank, inputs.low, dict(stored)), place


def in_padded_tiles(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """A leaf with rows that are no multiple of a block, and what is left of the last blocks padded to full ones.

    XLA would lay out anew all of it for the split, several leaves of memory; a tile is small.
    """
    layout, codecs = step.form.blocks, step.codecs
    count = min(max(1, PADDED * layout.blocks // math.prod(layout.shape)), layout.blocks)
    whole = layout.shape[layout.axis] // (layout.block * layout.width) // count
    axis, rows = layout.axis, layout.block * layout.width

    def lengths(stored: Slots) -> dict[str, Stored]:
        """Of every array of the state, how long a block is along the axis."""
        return {
            name: {"codes": -(-layout.block // codecs[name].packed) * layout.width, "scales": layout.width}
            if codecs[name].scaled
            else jax.tree.map(lambda _: rows, x)
            for name, x in stored.items()
        }  # pyright: ignore[reportReturnType]

    def take(x: jax.Array, length: int, start: ArrayLike, blocks: int) -> jax.Array:
        if isinstance(start, int):
            x = jax.lax.slice_in_dim(x, start * length, min((start + blocks) * length, x.shape[axis]), axis=axis)
            missing = blocks * length - x.shape[axis]
            return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
        return jax.lax.dynamic_slice_in_dim(x, start * length, blocks * length, axis)

    def put(x: jax.Array, part: jax.Array, length: int, start: ArrayLike) -> jax.Array:
        if isinstance(start, int):
            part = jax.lax.slice_in_dim(part, 0, min(part.shape[axis], x.shape[axis] - start * length), axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(x, part, start * length, axis)

    def tile(start: ArrayLike, blocks: int, done: Done) -> Done:
        source = inputs._replace(low=done.low, **{place: done.result} if place else {})
        own = jax.tree.map(lambda x: take(x, rows, start, blocks), source)
        state = jax.tree.map(lambda x, length: take(x, length, start, blocks), done.stored, lengths(done.stored))
        part = dataclasses.replace(step, form=Form(layout.part(blocks)))
        noise = Part.along(layout.scales, axis, start * layout.width)
        new = in_blocks(part, rule, own, state, clock, noise)
        sizes = Done(rows, None if done.low is None else rows, lengths(done.stored))  # pyright: ignore
        return jax.tree.map(lambda x, y, length: put(x, y, length, start), done, new, sizes)

    done, place = _first(step, inputs, stored)
    done = jax.lax.fori_loop(0, whole, lambda i, done: tile(i * count, count, done), done)
    left = layout.blocks - whole * count
    return tile(whole * count, left, done) if left else done
