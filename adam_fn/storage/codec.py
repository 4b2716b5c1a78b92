"""Codecs: how slots are stored between steps. A codec knows nothing of rules, leaves or devices.

Everything here is elementwise: there are no blocks, scales or reductions. So a stored array has its parameter's shape
and sharding, a step stays one pass over the memory, and no element depends on its neighbours.
"""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from adam_fn.algebra.slots import Slot, Unit
from adam_fn.storage import noise

#: The stored arrays of a leaf, by name.
Stored: TypeAlias = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store one or several slots in one array. Codecs are static: hashable, compared by value, without arrays.

    A subclass is a frozen dataclass that defines `encode` and `decode`, element by element. Laws: ``decode(encode(x))``
    is x where a code stands for x, and otherwise one of the two codes around it, such that the mean over all dithers is
    x. Code 0 stands for 0. nan is stored as nan, infinity as infinity or nan.

    Attributes:
      slots: the names of the slots in the array; `for_slot` fills it in.
    """

    slots: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_static(cls)

    @property
    def exact(self) -> bool:
        """Whether nothing is ever rounded; `encode` then gets no dither."""
        return False

    @property
    def units(self) -> tuple[Unit | None, ...]:
        """The unit in which each of the slots is encoded; None for plain numbers."""
        return (None,) * len(self.slots)

    def for_slot(self, name: str, slots: Mapping[str, Slot]) -> "Codec":
        """Returns the codec for the array `name` of a rule's state, or raises an error that says why there is none."""
        slot_of(self, name, slots)
        return dataclasses.replace(self, slots=(name,))

    @abc.abstractmethod
    def encode(self, x: tuple[jax.Array, ...], dither: tuple[jax.Array, ...]) -> jax.Array:
        """Encodes the slots, each in its unit; `dither` has int32 numbers for each, or is empty if `exact`."""

    @abc.abstractmethod
    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        """Inverts `encode`; the results have floating `dtype`."""


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """A cast of a slot to another floating dtype, dithered if that is narrower; without a dtype, no change.

    ::

        bits(q) = ⌊(bits(x) + u)/2¹⁶⌋,   0 ≤ u < 2¹⁶

    for a float32 x and a bfloat16 q; u is the dither.
    """

    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            dtype = jnp.dtype(self.dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"moments must be stored in a floating dtype, got {dtype}")
            object.__setattr__(self, "dtype", dtype)

    @property
    def exact(self) -> bool:
        return self.dtype is None

    def __str__(self) -> str:
        return "Cast()" if self.dtype is None else f"Cast('{self.dtype}')"

    def for_slot(self, name: str, slots: Mapping[str, Slot]) -> Codec:
        if not slot_of(self, name, slots).signed and self.dtype is not None and jnp.finfo(self.dtype).minexp > -64:
            warnings.warn(
                f"{self.dtype} cannot represent small second moments: where they underflow to 0 the update is m/eps. "
                "Use bfloat16",
                stacklevel=2,
            )
        return super().for_slot(name, slots)

    def encode(self, x: tuple[jax.Array, ...], dither: tuple[jax.Array, ...]) -> jax.Array:
        dtype = x[0].dtype if self.dtype is None else np.dtype(self.dtype)
        return x[0].astype(dtype) if is_wide(dtype, x[0].dtype) else narrowed(x[0], dtype, dither[0])

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        return (jnp.asarray(code, dtype),)


def slot_of(codec: Codec, name: str, slots: Mapping[str, Slot]) -> Slot:
    """Returns the slot of a name, or raises an error."""
    if name not in slots:
        raise ValueError(f"{codec} is to store {name!r}, but the slots are {', '.join(slots)}")
    return slots[name]


def positive(unit: jax.Array) -> jax.Array:
    """A unit that is not negative, as a divisor: at least 2⁻¹²⁶.

    A maximum and not a `where`, which would use the root twice: XLA for CPUs stores a root that is used more than once,
    but recomputes a maximum.
    """
    return lax.max(unit, np.asarray(2.0**-126, unit.dtype))


def is_wide(dtype: np.dtype, computed: np.dtype) -> bool:
    """Whether `dtype` holds every number of `computed`."""
    ours, theirs = jnp.finfo(dtype), jnp.finfo(computed)
    return ours.nmant >= theirs.nmant and ours.minexp <= theirs.minexp


def is_lossless(codec: Codec, computed: Iterable[np.dtype]) -> bool:
    """Whether a codec stores every number of some dtypes as it is."""
    dtype = codec.dtype if isinstance(codec, Cast) else None
    return codec.exact or (dtype is not None and all(is_wide(np.dtype(dtype), x) for x in computed))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def narrowed(x: jax.Array, dtype: np.dtype, dither: jax.Array) -> jax.Array:
    """Rounds `x` to one of the two numbers around it in a narrower floating dtype; the mean over all dithers is `x`.

    Finite numbers stay finite; nan and infinity stay what they are.
    """
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    drop = wide.nmant - narrow.nmant
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{wide.bits}"))
    low = lax.convert_element_type(noise.upper_bits(dither, min(drop, 31)), bits.dtype)
    low = low << (drop - 31) if drop > 31 else low
    bits = lax.add(bits, jnp.where(lax.is_finite(x), low, 0))  # The bits of a nan could overflow.
    if dtype == jnp.bfloat16 and wide.bits == 32:
        return lax.platform_dependent(bits, cpu=_upper_half, default=_converted)
    rounded = lax.bitcast_convert_type(bits & np.asarray(-(1 << drop), bits.dtype), x.dtype)
    if narrow.minexp > wide.minexp:  # There are numbers outside its range.
        least = float(narrow.smallest_subnormal)
        small = jnp.floor(x / least + noise.upper_bits(dither, 24).astype(x.dtype) * 2.0**-24) * least
        inside = jnp.clip(rounded, -float(narrow.max), float(narrow.max))
        inside = jnp.where(jnp.abs(x) < float(narrow.smallest_normal), small, inside)
        rounded = jnp.where(jnp.isfinite(x), inside, x)
    return rounded.astype(dtype)


def _converted(bits: jax.Array) -> jax.Array:
    """The bfloat16 in the upper half of an int32; a TPU makes a conversion part of the pass over the parameters."""
    return lax.bitcast_convert_type(lax.bitwise_and(bits, np.int32(-(1 << 16))), np.float32).astype(jnp.bfloat16)


def _upper_half(bits: jax.Array) -> jax.Array:
    """`_converted` for CPUs, where XLA's conversion would round again and double the number of operations."""
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.int16), jnp.bfloat16)


@narrowed.defjvp
def _narrowed_jvp(
    dtype: np.dtype, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivative of a cast, which the rounding is on average."""
    return narrowed(primals[0], dtype, primals[1]), tangents[0].astype(dtype)
