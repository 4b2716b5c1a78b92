"""A step of one leaf in two passes, the scales of the new slots and then everything: what XLA runs on TPU and GPU."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from adam_fn.codec import Stored
from adam_fn.execute.body import Codecs, Coded, Inputs, Write, body, encode, scales
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


def whole(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock) -> Done:
    """A leaf without scales, in one pass."""
    coded = step.form.coded(step.codecs, stored)
    u, new = step.body(rule, inputs, coded, clock)
    return Done(*step.leave(inputs, u), step.encode(new, coded, {}))


def in_rows(step: Step, rule: Rule, inputs: Inputs, stored: Slots, clock: Clock, part: Part | None = None) -> Done:
    """Rows as they are: what suits a GPU, where all but the reduction is one kernel for any number of rows.

    Scales, the old and the new, go through a barrier between the two passes: without it XLA would recognise the second
    pass as the first and store its float32 results in between. They are 1/32 of the leaf; a barrier for all operands
    would do as well, but what is computed from others would have to be stored for it.
    """
    form, codecs = step.form, step.codecs
    chances = form.chances(codecs, clock, part)
    inputs = step.enter(inputs)
    coded = form.coded(codecs, stored, chances)
    held = step.held(step.body(rule, inputs, coded, clock)[1], coded)
    old, held = jax.lax.optimization_barrier(({n: x["scales"] for n, x in stored.items() if n in held}, held))
    stored = {n: {**x, "scales": old[n]} if isinstance(x, dict) and n in old else x for n, x in stored.items()}
    coded = form.coded(codecs, stored, chances)
    u, new = step.body(rule, inputs, coded, clock)
    return Done(*step.leave(inputs, u), step.encode(new, coded, held))


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
