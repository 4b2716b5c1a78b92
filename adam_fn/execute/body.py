"""`body`: the arithmetic of a step, on any array of elements. All ways to run a step call this and nothing else."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_fn import noise
from adam_fn.arithmetic import safe_sqrt
from adam_fn.codec import Codec, Slots, Stored, Unit, ratio
from adam_fn.rule import Clock, Rule

#: Codecs by the names of the stored arrays.
Codecs: TypeAlias = Mapping[str, Codec]
#: `noise.lattice` of a leaf, computed at the first call: where nothing is rounded nothing is traced.
Lattice: TypeAlias = Callable[[], jax.Array]


class Times(NamedTuple):
    """The `noise.times` of a step: of each slot, and of a `Write` that dithers."""

    slots: Mapping[str, jax.Array]
    write: jax.Array | None = None


class Inputs(NamedTuple):
    """What a step of a leaf starts from beside its state, all of one shape.

    Attributes:
      g: the gradient.
      p: the parameter, if there is one.
      low: what is stored of the parameter beside it: see `adam_fn.write`.
    """

    g: jax.Array
    p: jax.Array | None
    low: jax.Array | None = None


class Write(abc.ABC):
    """What a step of a leaf makes of its update, element by element. Static: compared by value.

    Attributes:
      parameters: whether the results are new parameters.
      has_low: whether something is stored beside the parameter.
    """

    parameters: bool = False
    has_low: ClassVar[bool] = False

    def of(self, dtype: np.dtype) -> "Write":
        """What it does with a parameter of a dtype."""
        return self

    def enter(self, inputs: Inputs) -> Inputs:
        """What the rule sees."""
        return inputs

    @abc.abstractmethod
    def leave(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The result, and what `low` becomes."""


@dataclasses.dataclass(frozen=True)
class Updates(Write):
    """The update is the result."""

    def leave(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return u, inputs.low


@dataclasses.dataclass(frozen=True)
class Parameters(Write):
    """The new parameter is, as `optax.apply_updates` has it: no update is ever stored."""

    parameters = True

    def leave(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        # The sum is rounded once either way; a TPU makes a conversion at the end part of the pass over the state.
        wide = compute_dtype(inputs.p.dtype)
        return (inputs.p.astype(wide) + u.astype(wide)).astype(inputs.p.dtype), inputs.low


UPDATES, PARAMETERS = Updates(), Parameters()


class Done(NamedTuple):
    """What a step of a leaf gives: the update or the new parameter, what `low` becomes, and what is stored."""

    result: jax.Array
    low: jax.Array | None
    stored: dict[str, jax.Array]


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic for a parameter's dtype: float64 for float64 and complex128, else float32."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32)


def as_real(x: jax.Array) -> jax.Array:
    """A complex array as two reals, stacked in front; a real array as it is."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `as_real`, in `dtype`."""
    return (jax.lax.complex(x[0], x[1]) if jnp.issubdtype(dtype, jnp.complexfloating) else x).astype(dtype)


def lattice_of(like: jax.Array) -> Lattice:
    """The lattice of a leaf."""
    return functools.cache(functools.partial(noise.lattice, like))


def _unit(unit: Unit, slots: Slots) -> jax.Array:
    """What a slot is measured in."""
    return safe_sqrt(slots[unit.slot]) if unit.root else slots[unit.slot]


def decode(codecs: Codecs, stored: Stored, dtype: DTypeLike) -> dict[str, jax.Array]:
    """The slots of a leaf, of floating `dtype`."""
    plain: dict[str, jax.Array] = {}
    measured: dict[str, tuple[jax.Array, Unit]] = {}
    for name, codec in codecs.items():
        for slot, unit, x in zip(codec.slots, codec.units, codec.decode(stored[name], dtype), strict=True):
            if unit is None:
                plain[slot] = x
            else:
                measured[slot] = x, unit
    return plain | {slot: x * _unit(unit, plain) for slot, (x, unit) in measured.items()}


def encode(codecs: Codecs, slots: Slots, lattice: Lattice, times: Slots) -> dict[str, jax.Array]:
    """What is stored of the slots of a leaf; `times`: those of `adam_fn.noise`, of each slot that is rounded."""

    def measured(slot: str, unit: Unit | None) -> jax.Array:
        if unit is None:
            return slots[slot]
        return ratio(slots[slot], _unit(unit, slots))

    found = {}
    for name, codec in codecs.items():
        x = tuple(measured(slot, unit) for slot, unit in zip(codec.slots, codec.units, strict=True))
        rounded = () if codec.exact else codec.slots
        found[name] = codec.encode(x, tuple(noise.dither(lattice(), times[slot]) for slot in rounded))
    return found


def body(rule: Rule, codecs: Codecs, write: Write, inputs: Inputs, stored: Stored, clock: Clock, times: Times) -> Done:
    """One step of real elements: decode, then the rule, then write and encode."""
    g, p, _ = write.enter(inputs)
    dtype = compute_dtype((g if p is None else p).dtype)
    rule = rule.cast(dtype)
    clock = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, clock)
    gradient, param = g.astype(dtype), None if p is None else p.astype(dtype)
    slots = decode(codecs, stored, dtype)
    u, new = rule.leaf(rule.bounded(gradient), param, slots, clock)
    found = {"update": u.shape} | {name: x.shape for name, x in new.items()}
    expected = {"update": gradient.shape} | {name: x.shape for name, x in slots.items()}
    if found != expected:
        names = " >> ".join(type(part).__name__ for part in rule.parts())
        raise ValueError(f"{names}.leaf returned shapes {found}, expected {expected}")
    lattice = lattice_of(gradient)
    dither = None if times.write is None else noise.dither(lattice(), times.write)
    return Done(*write.leave(inputs, u.astype(g.dtype), dither), encode(codecs, new, lattice, times.slots))
