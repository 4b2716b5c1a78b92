"""What suits XLA on a CPU: one output a fusion, in an order that lets each be written in its place."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from adam_fn.codec import Stored
from adam_fn.execute.body import Coded, Inputs, compute_dtype, scales
from adam_fn.execute.sources import sources
from adam_fn.execute.step import Done, Step
from adam_fn.execute.store import Form, Slots, shaped
from adam_fn.rule import Clock, Rule

#: Smaller leaves stay in the caches, whatever is done with them.
LARGE = 2**16
#: Shorter stretches of memory do not reward a loop over the rows of a block.
WIDE = 64


def alone() -> bool:
    """Whether there is one device. What is shared by several cannot be ordered by one of its elements."""
    return jax.device_count() == 1


def suits(step: Step, inputs: Inputs) -> bool:
    """Whether a leaf is large and stored in another way than as float32 arrays, whose order XLA finds by itself."""
    if inputs.g.size < LARGE or not alone():
        return False
    dtype = compute_dtype((inputs.g if inputs.p is None else inputs.p).dtype)
    blank = jnp.zeros((), dtype)
    return any(codec.scaled or codec.encode(blank).dtype != dtype for codec in step.codecs.values())


def in_order(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """The scales, the result, then the slots one by one, each after all that read its old codes.

    XLA on a CPU fuses what leads to one output and makes one pass for each. Where it does not know that an output is
    written after the last pass that reads its old value, it copies that first, and fresh memory costs more than the
    arithmetic. A factor of 1 that it cannot foresee and that depends on the output before makes the order known.
    """
    form, codecs = step.form, step.codecs
    chances = {} if form.layout is None else form.chances(codecs, clock)
    coded = form.coded(codecs, stored, chances)
    held: Mapping[str, jax.Array] = {}
    if form.layout is not None:
        if form.layout.even and math.prod(form.layout.shape[form.layout.axis + 1 :]) * form.layout.width >= WIDE:
            held = _by_rows(step, rule, inputs, stored, chances, clock)
        else:
            held = step.held(step.body(rule, *jax.lax.stop_gradient((inputs, coded)), clock)[1], coded)
    result, low = step.leave(inputs, step.body(rule, inputs, coded, clock)[0])
    if low is not None:
        own = inputs._replace(g=_times(inputs.g, _one_after(result, clock)))
        _, low = step.leave(own, step.body(rule, own, coded, clock)[0])
    found: dict[str, Stored] = {}
    last = result if low is None else low
    for name in _order(rule, inputs, coded, clock):
        one = _one_after(last, clock)
        own = inputs._replace(g=_times(inputs.g, one))
        scale = {name: _times(held[name], one)} if name in held else {}
        if step.shares(name) and form.blocks.even:
            last = step.shared(name, rule, own, stored, chances, clock, scale[name])
            found[name] = {"codes": last}
        else:
            found |= step.encode({name: step.body(rule, own, coded, clock)[1][name]}, coded, scale)
            last = jax.tree.leaves(found[name])[0]
        if name in held:  # The old scales are read until then.
            found[name] = {"codes": last, "scales": _times(held[name], _one_after(last, clock))}
    return Done(result, low, {name: found[name] for name in stored})


def _times(x: jax.Array, one: jax.Array) -> jax.Array:
    return x * shaped(one.astype(x.dtype), x)


def _by_rows(
    step: Step,
    rule: Rule,
    inputs: Inputs,
    stored: Slots,
    chances: Mapping[str, jax.Array],
    clock: Clock,
) -> dict[str, jax.Array]:
    """The scales, by a loop over the rows of all blocks.

    A reduction is computed one element of its result after the other, with a stride of a row between the elements that
    are read for it; a row of all blocks is read as it lies.
    """
    layout = step.form.blocks
    split = Form(layout, split=True)
    inputs, stored = jax.lax.stop_gradient((jax.tree.map(split.enter, inputs), stored))

    def row(i: jax.Array) -> dict[str, jax.Array]:
        own = split.row(step.codecs, stored, chances, i)
        part = jax.tree.map(lambda x: layout.row(x, i), inputs)
        return scales(step.codecs, step.body(rule, part, own, clock)[1], own)

    found = jax.lax.fori_loop(
        1, layout.block, lambda i, held: jax.tree.map(jnp.maximum, held, row(i)), row(jnp.int32(0)), unroll=2
    )
    return {name: x.reshape(layout.scales) for name, x in found.items()}


def _one_after(x: jax.Array, clock: Clock) -> jax.Array:
    """1, but known only after `x` is."""

    def first(x: jax.Array) -> jax.Array:
        return jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)

    def one(x: jax.Array) -> jax.Array:
        return jnp.where(first(x) > 0, jnp.float32(1), 1)  # Of the same type, inside `shard_map` too.

    # Always true, which XLA does not see.
    return jax.lax.cond(clock.count | 1 != 0, one, first, jax.lax.stop_gradient(x))


def _order(rule: Rule, inputs: Inputs, coded: Mapping[str, Coded], clock: Clock) -> list[str]:
    """The slots, each after all others whose new value depends on its old one, where that can be."""
    left = sorted(coded, reverse=True)  # Those with random numbers first: these need not be kept any longer then.
    reads = sources(rule, inputs, coded, clock)
    found: list[str] = []
    while left:
        free = [name for name in left if not any(name in reads[other] for other in left if other != name)]
        found.append((free or left)[0])
        left.remove(found[-1])
    return found
