"""The form of a state: for each part of the rule, the state of optax's transformation of the same meaning.

`optax.adamw` is a chain of three transformations, and the state of `adam_fn.adamw` is that of this chain. A part that
optax lacks has a named tuple of the same form: ``count``, and a field for each stored array.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.bias import BiasWeights, Weight, is_kept
from adam_fn.algebra.rate_and_decay import WeightDecay
from adam_fn.algebra.rule import Rule
from adam_fn.storage.codec import Codec
from adam_fn.trees.leaves import PyTree

#: The state of a transformation; optax has no type for the state of a chain.
State: TypeAlias = Any


class Memory(NamedTuple):
    """The contents of a state: a step reads one and writes the next.

    Attributes:
      counts: the number of updates made so far, for each part of the rule; None where nothing depends on it.
      weights: the bias weights that are kept.
      slots: a tree of the parameters' structure for each stored array, by name.
      others: other fields that count the same steps, by name.
    """

    counts: tuple[jax.Array | None, ...]
    weights: tuple[Weight, ...]
    slots: dict[str, PyTree]
    others: Mapping[str, jax.Array] = {}

    @property
    def steps(self) -> jax.Array:
        """The count of the first part that has one."""
        return next((x for x in self.counts if x is not None), jnp.zeros((), jnp.int32))


def _with_article(x: object) -> str:
    name = type(x).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


class _Link(NamedTuple):
    """The structure of one part's state.

    Attributes:
      kind: the type of the named tuple.
      counts: its fields that count steps.
      fields: its fields by the names of the stored arrays.
      masked: whether it is inside `optax.MaskedState`.
    """

    kind: type[Any]
    counts: tuple[str, ...]
    fields: Mapping[str, str]
    masked: bool = False

    def problem(self, state: object) -> str | None:
        """The reason why an object is not a state of this form, or None."""
        if self.masked:
            if type(state) is not optax.MaskedState:
                return f"MaskedState expected, got {_with_article(state)}"
            state = state.inner_state
        return None if type(state) is self.kind else f"{self.kind.__name__} expected, got {_with_article(state)}"

    def read(self, state: State) -> tuple[jax.Array | None, dict[str, PyTree], dict[str, jax.Array]]:
        inner = state.inner_state if self.masked else state
        counts = {field: getattr(inner, field) for field in self.counts}
        slots = {name: getattr(inner, field) for name, field in self.fields.items()}
        return next(iter(counts.values()), None), slots, {field: counts[field] for field in self.counts[1:]}

    def made(self, count: jax.Array | None, slots: Mapping[str, PyTree], others: Mapping[str, jax.Array]) -> State:
        # Each count is an array of its own: a program that donates the state must not get one buffer twice.
        counts: dict[str, Any] = {}
        for field in self.counts:
            counts[field] = others.get(field, jnp.add(cast(jax.Array, count), 0)) if counts else count
        values = counts | {field: slots[name] for name, field in self.fields.items()}
        inner = self.kind(**values)
        return optax.MaskedState(inner) if self.masked else inner


@dataclasses.dataclass(frozen=True)
class Form:
    """The structure of a state: a tuple with the state of each part, then `BiasWeights` if any are kept.

    A state of one part that keeps no bias weights stands by itself, without a tuple.

    Attributes:
      links: one for each part.
      kept: the number of bias weights that are kept.
    """

    links: tuple[_Link, ...]
    kept: int

    @property
    def _size(self) -> int:
        return len(self.links) + (self.kept > 0)

    def check(self, state: object) -> None:
        """Raises if an object has another form."""
        if (problem := self._problem(state)) is None:
            self._check_numbers(state)
            return
        plain = isinstance(state, (dict, list)) or (
            type(state) is tuple and any(type(x) in (dict, list) for x in state)
        )
        how = (
            "it was restored as plain containers: restore it into tx.init(params)"
            if plain
            else "was the state made by this transformation? adam_fn.interop.from_optax converts a state of optax, and "
            "adam_fn.interop.change_storage converts one that was made with another storage, mask or schedule"
        )
        raise TypeError(f"the state does not have the form of tx.init(params), {self}: {problem}; {how}")

    def _check_numbers(self, state: object) -> None:
        memory = self.read(state)
        for count in (*memory.counts, *memory.others.values()):
            if count is not None and jnp.result_type(count) != jnp.int32:
                raise TypeError(f"the state's count is {jnp.result_type(count)}, expected int32: was the state cast?")
        for weight in jax.tree.leaves(memory.weights):
            if jnp.result_type(weight) not in (jnp.float32, jnp.float64):
                raise TypeError(f"a bias weight of the state is {jnp.result_type(weight)}, expected float32 or float64")

    def _problem(self, state: object) -> str | None:
        if self._size == 1:
            return self.links[0].problem(state)
        if type(state) is not tuple or len(state) != self._size:
            length = f" of {len(state)}" if isinstance(state, tuple) else ""
            return f"a tuple of {self._size} expected, got a {type(state).__name__}{length}"
        for i, (link, x) in enumerate(zip(self.links, state, strict=False)):
            if (problem := link.problem(x)) is not None:
                return f"[{i}]: {problem}"
        if self.kept and not (type(state[-1]) is BiasWeights and len(state[-1].weights) == self.kept):
            return f"[{self._size - 1}]: BiasWeights of {self.kept} decay rates expected, got {state[-1]!r}"
        return None

    def __str__(self) -> str:
        names = [link.kind.__name__ for link in self.links] + ["BiasWeights"] * (self.kept > 0)
        return names[0] if len(names) == 1 else f"({', '.join(names)})"

    def read(self, state: Any) -> Memory:  # noqa: ANN401
        links = (state,) if self._size == 1 else state
        found = [link.read(x) for link, x in zip(self.links, links, strict=False)]
        weights = tuple(Weight(*w) for w in links[-1].weights) if self.kept else ()
        slots = {name: tree for _, slots, _ in found for name, tree in slots.items()}
        others = {field: x for *_, others in found for field, x in others.items()}
        return Memory(tuple(count for count, *_ in found), weights, slots, others)

    def made(self, memory: Memory) -> Any:  # noqa: ANN401
        """The inverse of `read`."""
        links = [
            link.made(count, memory.slots, memory.others) for link, count in zip(self.links, memory.counts, strict=True)
        ]
        links += [BiasWeights(memory.weights)] * (self.kept > 0)
        return links[0] if len(links) == 1 else tuple(links)


def form_of(rule: Rule, codecs: Sequence[tuple[str, Codec]], *, masked: bool) -> Form:
    """The structure of a rule's state; `masked` tells whether a mask selects the leaves that decay."""
    kept = sum(map(is_kept, rule.betas))
    links: list[_Link] = []
    left = dict(codecs)
    for part, names in rule.named_parts():
        own = {full: name for name, full in names.items()}  # The slots' names in the part, by those in the rule.
        stored = {x: own[x] if len(codec.slots) == 1 else x for x, codec in left.items() if codec.slots[0] in own}
        links.append(_link(part, stored, masked=masked and isinstance(part, WeightDecay)))
    return Form(tuple(links), kept)


def _link(part: Rule, stored: Mapping[str, str], *, masked: bool) -> _Link:
    if not part.slots:
        counted = part.counts or part.is_scheduled
        kind = (
            optax.EmptyState if not counted else _decay_schedule() if masked or isinstance(part, WeightDecay) else None
        )
        return _Link(kind or optax.ScaleByScheduleState, ("count",) if counted else (), {}, masked)
    kind = part.state_type
    fields = {name: part.state_fields.get(local, local) for name, local in stored.items()}
    if kind is not None:
        counts = tuple(field for field in kind._fields if field.startswith("count"))
        if {*counts, *fields.values()} == set(kind._fields):
            return _Link(kind, counts, fields)
    return _Link(state_type(tuple(stored.values())), ("count",), stored)


@functools.cache
def _decay_schedule() -> type[Any]:
    """The type of state in which `optax.add_decayed_weights` counts steps; it has no public name."""
    return type(jax.eval_shape(optax.add_decayed_weights(lambda _: 0.0).init, ()))


@functools.cache
def state_type(fields: tuple[str, ...]) -> type[Any]:
    """The type of the state of a part that optax lacks: ``count``, and the stored arrays by name."""
    kind = collections.namedtuple("MomentsState", ("count", *fields), module=__name__)
    kind.__qualname__ = f"MomentsState({','.join(fields)})"  # The name by which pickle finds it.
    kind.__doc__ = "The number of updates made so far, an int32 scalar, and what is stored of each moment."
    return kind


def __getattr__(name: str) -> type[Any]:
    if found := re.fullmatch(r"MomentsState\((.*)\)", name):
        return state_type(tuple(found[1].split(",")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
