"""A step of one leaf in two passes, the scales of the new slots and then everything: what XLA runs on TPU and GPU."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_fn.codec import Stored
from adam_fn.execute.body import Codecs, Coded, Inputs, Write, body, encode, scales
from adam_fn.execute.sources import PARAMETER, sources
from adam_fn.execute.store import Form, Slots
from adam_fn.noise import Part
from adam_fn.rule import Clock, Rule
from adam_fn.rule import Slots as Arrays


class Done(NamedTuple):
    """What a step of a leaf gives: the update or the new parameter, what `low` becomes, and what is stored."""

    result: jax.Array
    low: jax.Array | None
    stored: dict[str, Stored]


@dataclasses.dataclass(frozen=True)
class Step:
    """What is static about a step of one leaf of reals.

    Attributes:
      codecs: by slot, those that the leaf is stored with.
      write: what is made of the update.
      form: the shape of the elements.
    """

    codecs: Codecs
    write: Write
    form: Form

    def enter(self, inputs: Inputs) -> Inputs:
        return jax.tree.map(self.form.enter, inputs)

    def leave(self, inputs: Inputs, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The result and `low`, of entered inputs."""
        return jax.tree.map(self.form.leave, self.write.leave(inputs, u))

    def body(self, rule: Rule, inputs: Inputs, coded: Mapping[str, Coded], clock: Clock) -> tuple[jax.Array, Arrays]:
        return body(rule, self.codecs, self.write.enter(inputs), coded, clock)

    def held(self, new: Arrays, coded: Mapping[str, Coded]) -> dict[str, jax.Array]:
        """The scales of the new slots."""
        return self.form.largest(scales(self.codecs, new, coded))

    def encode(self, new: Arrays, coded: Mapping[str, Coded], held: Mapping[str, jax.Array]) -> dict[str, Stored]:
        """What is stored of the new slots."""
        spread = {name: self.form.scale(x) for name, x in held.items() if name in new}
        return self.form.stored(self.codecs, encode(self.codecs, new, coded, spread), held)

    def shares(self, name: str) -> bool:
        """Whether a slot has several codes in every byte, so that `shared` can make them."""
        packed = self.codecs[name].packed
        return packed > 1 and self.form.blocks.block % packed == 0

    def shared(
        self,
        name: str,
        rule: Rule,
        inputs: Inputs,
        stored: Slots,
        chances: Mapping[str, jax.Array],
        clock: Clock,
        scale: jax.Array,
    ) -> jax.Array:
        """The new codes of a slot, several in a byte, byte by byte: so XLA can write them in their place."""
        packed, layout = self.codecs[name].packed, self.form.blocks
        codes = []
        for i in range(packed):
            part = jax.tree.map(lambda x, i=i: layout.share(x, i, packed), inputs)
            coded = self.form.share(self.codecs, stored, chances, i, packed)
            new = {name: self.body(rule, part, coded, clock)[1][name]}
            spread = {name: layout.spread(scale, packed)}
            code = encode(self.codecs, new, coded, spread)[name].codes
            if not layout.even:
                code = jnp.where(layout.share(jnp.ones(layout.shape, bool), i, packed), code, 0)
            codes.append(code << (8 // packed * i))
        return functools.reduce(jnp.bitwise_or, codes)


def whole(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """A leaf without scales, in one pass."""
    coded = step.form.coded(step.codecs, stored)
    u, new = step.body(rule, inputs, coded, clock)
    return Done(*step.leave(inputs, u), step.encode(new, coded, {}))


def in_one(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """`whole`, in one fusion on a TPU too where the slots are shorter than the arithmetic.

    Otherwise XLA makes another one for the parameters. It takes the casts of the slots back through a barrier, so that
    no float32 array is stored; other codes it would not, nor with the update instead of a parameter.
    """
    coded = step.form.coded(step.codecs, stored)
    u, new = step.body(rule, inputs, coded, clock)
    return Done(*step.leave(inputs, u), step.encode(jax.lax.optimization_barrier(new), coded, {}))


def in_rows(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock, part: Part | None = None) -> Done:
    """Rows as they are: what suits a GPU, where all but the reduction is one kernel for any number of rows.

    Scales, the old and the new, go through a barrier between the two passes: without it XLA would recognise the second
    pass as the first and store its float32 results in between. They are 1/32 of the leaf; a barrier for all operands
    would do as well, but what is computed from others would have to be stored for it.

    XLA writes a result in the place of an operand only if it is computed from that operand, and copies the operand
    otherwise. The codes of Adan's last gradient are not: these are chosen over the old ones by a condition that always
    holds, which XLA does not see.

    A kernel has results of one shape only, and packed codes are of another one than the parameter. That is written by
    the first pass then, if the second can do without the old one. Where the last block is not full a kernel of its own
    writes it, and the second pass waits for that: it writes over what that kernel reads.
    """
    form, codecs = step.form, step.codecs
    chances = form.chances(codecs, clock, part)
    inputs = step.enter(inputs)
    coded = form.coded(codecs, stored, chances)
    u, new = step.body(rule, inputs, coded, clock)
    held = step.held(new, coded)
    reads = sources(rule, step.write.enter(inputs), codecs, clock)
    packed = any(codec.packed > 1 for codec in codecs.values())
    free = step.write.parameters and not any(PARAMETER in read for read in reads.values())
    early = step.leave(inputs, u) if packed and free else None
    waited = None if form.blocks.even else early
    old = {name: x["scales"] for name, x in stored.items() if isinstance(x, dict) and name in held}
    old, held, waited = jax.lax.optimization_barrier((old, held, waited))
    stored = {n: {**x, "scales": old[n]} if isinstance(x, dict) and n in old else x for n, x in stored.items()}
    coded = form.coded(codecs, stored, chances)
    u, new = step.body(rule, inputs, coded, clock)
    found = step.encode({name: x for name, x in new.items() if not step.shares(name)}, coded, held)
    for name, scale in held.items():
        if step.shares(name):
            found[name] = {"codes": step.shared(name, rule, inputs, stored, chances, clock, scale), "scales": scale}
        if name not in reads[name]:
            codes = jnp.where(clock.count | 1 != 0, found[name]["codes"], stored[name]["codes"])
            found[name] = {"codes": codes, "scales": scale}
    result, low = waited or early or step.leave(inputs, u)
    return Done(result, low, {name: found[name] for name in stored})


def in_blocks(
    step: Step,
    rule: Rule,
    inputs: Inputs,
    stored: Slots,
    clock: Clock,
    part: Part | None = None,
    pin: Callable[[Any], Any] = jax.lax.optimization_barrier,
) -> Done:
    """Rows split into blocks, all of which are full: what suits a TPU.

    What is stored is split before a barrier, `pin`: without it XLA would compute on rows as they are and lay the
    results out anew for the reduction. The gradient has none, as it may be computed from others.
    """
    form, codecs = dataclasses.replace(step.form, split=True), step.codecs
    step = dataclasses.replace(step, form=form)
    inputs = step.enter(inputs)
    p, low = pin((inputs.p, inputs.low))
    inputs = inputs._replace(p=p, low=low)
    coded = form.coded(codecs, stored, form.chances(codecs, clock, part), pin)
    u, new = step.body(rule, inputs, coded, clock)
    return Done(*step.leave(inputs, u), step.encode(new, coded, step.held(new, coded)))
