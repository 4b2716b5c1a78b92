"""`body`: the arithmetic of a step, on any array of elements. All ways to run a step call this and nothing else."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adam_fn.codec import Codec
from adam_fn.rule import Clock, Rule, Slots

#: Codecs by slot.
Codecs: TypeAlias = Mapping[str, Codec]


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
    """What a step of a leaf makes of its update, element by element. Static: compared by value."""

    #: Whether the results are new parameters.
    parameters: bool = False

    def of(self, dtype: np.dtype) -> "Write":
        """What it does with a parameter of a dtype."""
        return self

    def enter(self, inputs: Inputs) -> Inputs:
        """What the rule sees."""
        return inputs

    @abc.abstractmethod
    def leave(self, inputs: Inputs, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The result, and what `low` becomes."""


@dataclasses.dataclass(frozen=True)
class Updates(Write):
    """The update is the result."""

    def leave(self, inputs: Inputs, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return u, inputs.low


@dataclasses.dataclass(frozen=True)
class Parameters(Write):
    """The new parameter is, as `optax.apply_updates` has it: no update is ever stored."""

    parameters = True

    def leave(self, inputs: Inputs, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        return (inputs.p + u).astype(inputs.p.dtype), inputs.low


class Coded(NamedTuple):
    """What is stored of a slot, in a shape in which all of it broadcasts to the inputs.

    Attributes:
      codes: one for each element.
      scale: of the blocks as they were stored; None where there are none.
      chance: of the blocks, for this step; None where nothing is random.
    """

    codes: jax.Array
    scale: jax.Array | None = None
    chance: jax.Array | None = None


UPDATES, PARAMETERS = Updates(), Parameters()


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic for a parameter's dtype: float64 for float64 and complex128, else float32."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32)


def as_real(x: jax.Array) -> jax.Array:
    """A complex array as two reals, stacked in front; a real array as it is."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `as_real`, in `dtype`."""
    return (jax.lax.complex(x[0], x[1]) if jnp.issubdtype(dtype, jnp.complexfloating) else x).astype(dtype)


def body(
    rule: Rule, codecs: Codecs, inputs: Inputs, stored: Mapping[str, Coded], clock: Clock
) -> tuple[jax.Array, Slots]:
    """One step of real elements: decode, then the rule. The update in the gradient's dtype, and what the slots become.

    The new slots are encoded apart from it (`scales`, `encode`), since a block's scale depends on all of its elements.
    """
    g, p, _ = inputs
    dtype = compute_dtype((g if p is None else p).dtype)
    rule = rule.cast(dtype)
    clock = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, clock)
    gradient, param = g.astype(dtype), None if p is None else p.astype(dtype)
    slots = {name: codecs[name].decode(x.codes, x.scale, dtype) for name, x in stored.items()}
    u, new = rule.leaf(rule.bounded(gradient), param, slots, clock)
    found = {"update": u.shape} | {name: x.shape for name, x in new.items()}
    expected = {"update": gradient.shape} | {name: x.shape for name, x in slots.items()}
    if found != expected:
        raise ValueError(f"{type(rule).__name__}.leaf returned shapes {found}, expected {expected}")
    return u.astype(g.dtype), new


def scales(codecs: Codecs, new: Slots, stored: Mapping[str, Coded]) -> dict[str, jax.Array]:
    """The least scale that holds each element, of the slots that have scales."""
    return {name: codecs[name].scale(x, stored[name].chance) for name, x in new.items() if codecs[name].scaled}


def encode(codecs: Codecs, new: Slots, stored: Mapping[str, Coded], held: Mapping[str, jax.Array]) -> dict[str, Coded]:
    """The new codes of all slots; `held` are the new scales, by slot."""
    return {
        name: Coded(codecs[name].encode(x, held.get(name), stored[name].chance), held.get(name))
        for name, x in new.items()
    }
