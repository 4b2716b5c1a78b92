"""`body`: the arithmetic of a step, on any array of elements. All ways to run a step call this and nothing else."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import safe_sqrt
from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slots, Unit
from adam_fn.execute.destination import Destination, Inputs
from adam_fn.storage import noise
from adam_fn.storage.codec import Codec, Stored, positive

#: Codecs by the names of the stored arrays.
Codecs: TypeAlias = Mapping[str, Codec]
#: `noise.lattice` of a leaf, computed at the first call, so that nothing is traced where nothing is rounded.
Lattice: TypeAlias = Callable[[], jax.Array]


class Times(NamedTuple):
    """The inputs of a dither besides the element's index.

    Attributes:
      slots: the `noise.time_offsets` of the slots that are rounded.
      write: the one of a `Destination` that dithers.
      layer: the index of the layer, if the leaf is one layer's part of a stack.
    """

    slots: Mapping[str, jax.Array]
    write: jax.Array | None = None
    layer: jax.Array | None = None


class LeafResult(NamedTuple):
    """The result of a leaf's step: the update or the new parameter, the new remainder, and the new stored arrays."""

    result: jax.Array
    remainder: jax.Array | None
    stored: dict[str, jax.Array]


def lattice_of(like: jax.Array, layer: jax.Array | None = None) -> Lattice:
    """The lattice of a leaf, computed when it is first needed."""
    return functools.cache(functools.partial(noise.lattice, like, layer))


def _unit(unit: Unit, slots: Slots) -> jax.Array:
    """The value of the unit of a slot."""
    return safe_sqrt(slots[unit.slot]) if unit.root else slots[unit.slot]


def decode(codecs: Codecs, stored: Stored, dtype: DTypeLike) -> dict[str, jax.Array]:
    """Decodes the slots of a leaf to floating `dtype`."""
    plain: dict[str, jax.Array] = {}
    measured: dict[str, tuple[jax.Array, Unit]] = {}
    for name, codec in codecs.items():
        for slot, unit, x in zip(codec.slots, codec.units, codec.decode(stored[name], dtype), strict=True):
            if unit is None:
                plain[slot] = x
            else:
                measured[slot] = x, unit
    return plain | {slot: jax.lax.mul(x, _unit(unit, plain)) for slot, (x, unit) in measured.items()}


def encode(codecs: Codecs, slots: Slots, lattice: Lattice, times: Slots) -> dict[str, jax.Array]:
    """Encodes the slots of a leaf; `times` are the `noise.time_offsets` of each slot that is rounded."""

    def measured(slot: str, unit: Unit | None) -> jax.Array:
        if unit is None:
            return slots[slot]
        return jax.lax.div(slots[slot], positive(_unit(unit, slots)))

    found = {}
    for name, codec in codecs.items():
        x = tuple(measured(slot, unit) for slot, unit in zip(codec.slots, codec.units, strict=True))
        rounded = () if codec.exact else codec.slots
        found[name] = codec.encode(x, tuple(noise.dither(lattice(), times[slot]) for slot in rounded))
    return found


@functools.partial(jax.jit, static_argnames="destination", inline=True)  # Traced once for equal shapes.
def body(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> LeafResult:
    """One step of real elements: decode, then the rule, then write and encode."""
    g, p, _ = destination.read(inputs)
    dtype = compute_dtype((g if p is None else p).dtype)
    rule = rule.cast(dtype)
    clock = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, clock)
    gradient, param = g.astype(dtype), None if p is None else p.astype(dtype)
    slots = decode(codecs, stored, dtype)
    u, new = rule.leaf(rule.clipped_gradient(gradient), param, slots, clock)
    found = {"update": u.shape} | {name: x.shape for name, x in new.items()}
    expected = {"update": gradient.shape} | {name: x.shape for name, x in slots.items()}
    if found != expected:
        names = " >> ".join(type(part).__name__ for part in rule.parts())
        raise ValueError(f"{names}.leaf returned shapes {found}, expected {expected}")
    lattice = lattice_of(gradient, times.layer)
    dither = None if times.write is None else noise.dither(lattice(), times.write)
    return LeafResult(*destination.write(inputs, u.astype(g.dtype), dither), encode(codecs, new, lattice, times.slots))
