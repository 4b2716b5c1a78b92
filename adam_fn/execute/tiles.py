"""Tiles: some successive blocks at a time, for leaves that a TPU can not split into blocks where they lie."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_fn.codec import Stored
from adam_fn.execute.body import Inputs
from adam_fn.execute.step import Done, Step, in_blocks
from adam_fn.execute.store import Form, Slots
from adam_fn.noise import Part
from adam_fn.rule import Clock, Rule

#: Elements of a tile: all that it needs fits into the fast memory of a TPU.
TILE = 2**20


def in_tiles(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """A loop over tiles, and what is left of the last blocks padded to full ones.

    Rows that are no multiple of a block, and rows of a length that fills no whole registers, XLA would lay out anew
    for the split, several leaves of memory in all. A tile of them is small.
    """
    layout, codecs = step.form.blocks, step.codecs
    count = min(max(1, TILE * layout.blocks // math.prod(layout.shape)), layout.blocks)
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
        noise = Part(layout.scales, [start * layout.width if i == axis else 0 for i in range(len(layout.scales))])
        new = in_blocks(part, rule, own, state, clock, noise, lambda x: x)  # A tile is laid out as it is taken.
        sizes = Done(rows, None if done.low is None else rows, lengths(done.stored))  # pyright: ignore
        return jax.tree.map(lambda x, y, length: put(x, y, length, start), done, new, sizes)

    like = jax.eval_shape(lambda: step.write.leave(inputs, step.write.enter(inputs).g)[0])
    place = "p" if step.write.parameters else "g" if like.dtype == inputs.g.dtype else None
    blank = getattr(inputs, place) if place else jnp.zeros_like(inputs.g, like.dtype)
    done = Done(blank, inputs.low, dict(stored))
    done = jax.lax.fori_loop(0, whole, lambda i, done: tile(i * count, count, done), done)
    left = layout.blocks - whole * count
    return tile(whole * count, left, done) if left else done
