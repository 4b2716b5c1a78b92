"""The elementwise codes, and the storages that have a name: 64, 32, 24 or 16 bits of state a parameter."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_fn.algebra.slots import Slot, Unit
from adam_fn.storage import noise
from adam_fn.storage.codec import Cast, Codec, ratio, root, slot_of

#: The name of a storage; ``24bit`` and ``16bit`` count the bits of Adam's two moments of a parameter.
StorageName: TypeAlias = Literal["float32", "bfloat16", "24bit", "16bit"]
#: A storage of moments: a name, a codec for each slot, or codecs by the names of the stored arrays.
StorageLike: TypeAlias = StorageName | Codec | Mapping[str, Codec]

_ONE = 0x3F800000  # The bits of 1.0.


@dataclasses.dataclass(frozen=True)
class MuLaw(Codec):
    """A dithered μ-law: stores a slot that is bounded in its unit, such as ``r = m/√v``, in 8 bits.

    ::

        y = 1 + 247 |r|/R,   code = sign(r) ⌊(bits(y) - bits(1))/2¹⁹ + u⌋,   0 ≤ u < 1

    u is the dither. The code is a part of the bits of y, four of them of its fraction: 16 codes an octave, and evenly
    spaced codes below R/247. R is the bound (see `Slot`) and has the code 127. The stored array is int8; -128 stands
    for nan and infinity. With v as it is stored, ``m = r √v``.

    Attributes:
      bound: R; that of the slot by default.
      unit: the unit of the slot; `for_slot` fills it in.
    """

    bound: float | None = None
    unit: Unit | None = None

    @property
    def units(self) -> tuple[Unit | None, ...]:
        return (self.unit,)

    def __str__(self) -> str:
        return "MuLaw()" if self.bound is None else f"MuLaw(bound={self.bound:.4g})"

    def for_slot(self, name: str, slots: Mapping[str, Slot]) -> "MuLaw":
        slot = slot_of(self, name, slots)
        bound = slot.bound if self.bound is None else self.bound
        if bound is None or not slot.signed:
            raise ValueError(f"MuLaw cannot store {name}, which has no bound here: use Cast('bfloat16')")
        return MuLaw(bound, slot.unit, slots=(name,))

    def encode(self, x: tuple[jax.Array, ...], dither: tuple[jax.Array, ...]) -> jax.Array:
        r = x[0].astype(jnp.float32)
        code = mu_law(r, dither[0], 8, self._range).astype(jnp.float32)
        return jnp.where(jnp.isfinite(r), jnp.where(r < 0, -code, code), -128).astype(jnp.int8)

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        k = code.astype(jnp.int32)
        r = from_mu_law(jnp.abs(k), 8, self._range)
        return (jnp.where(k == -128, jnp.nan, jnp.where(k < 0, -r, r)).astype(dtype),)

    @property
    def _range(self) -> float:
        assert self.bound is not None
        return self.bound


def mu_law(r: jax.Array, dither: jax.Array, bits: int, bound: float) -> jax.Array:
    """The code of the magnitude of each element, an int32 from 0 to the code of the bound."""
    shift = 27 - bits
    y = 1 + np.float32(_span(bits) / bound) * jnp.abs(r)
    place = jax.lax.bitcast_convert_type(y, jnp.int32) - _ONE
    return jnp.minimum((place + noise.upper_bits(dither, shift)) >> shift, 2 ** (bits - 1) - 1)


def from_mu_law(code: jax.Array, bits: int, bound: float) -> jax.Array:
    """Inverts `mu_law`, in float32."""
    y = jax.lax.bitcast_convert_type((code << (27 - bits)) + _ONE, jnp.float32)
    return (y - 1) * np.float32(bound / _span(bits))


def _span(bits: int) -> float:
    """The y of the highest code, minus 1."""
    return float(np.int32(_ONE + ((2 ** (bits - 1) - 1) << (27 - bits))).view(np.float32)) - 1


#: The bits of the fraction of the root s in a `Word`, and its least exponent.
FRACTION, LOWEST = 3, -52
_SHIFT = 23 - FRACTION
_OFFSET = ((127 + LOWEST) << FRACTION) - 1
_NAN = 511
_LARGEST = float(np.int32((_NAN - 1 + _OFFSET) << _SHIFT).view(np.float32))


@dataclasses.dataclass(frozen=True)
class Word(Codec):
    """Both moments of Adam in one 16-bit word, a uint16 array: 7 bits for ``r = m/√v``, 9 bits for ``s = √v``.

    ::

        word = 2¹⁵ (r < 0) + 512 k + n
        y = 1 + 239 |r|/R,   k = ⌊(bits(y) - bits(1))/2²⁰ + u⌋,   n = ⌊bits(s)/2²⁰ + u⌋ - 599

    u is the dither, not the same for k and n. k has 8 codes an octave, and R the code 63; n is the exponent of s and 3
    bits of its fraction. Decoded, ``v = s²`` and ``m = r s``. ``n = 0`` stands for ``s = 0``, and 511 for nan and
    infinity, of m or of v. An s that is not 0 is stored as at least 2⁻⁵² and at most 1.625 2¹¹ (gradients from 2e-16
    to 3e3); beyond that it saturates, and the update stays bounded. The stored array is called ``mu_nu``. For
    AdaMax s is v itself; for rules that normalise gradients before they average them, r is m.

    Attributes:
      bound: R; that of mu by default.
      unit: the unit of mu; `for_slot` fills it in.
    """

    bound: float | None = None
    unit: Unit | None = None
    slots: tuple[str, ...] = dataclasses.field(default=("mu", "nu"), kw_only=True)

    def __str__(self) -> str:
        return "Word()" if self.bound is None else f"Word(bound={self.bound:.4g})"

    def for_slot(self, name: str, slots: Mapping[str, Slot]) -> "Word":
        if name != WORD:
            raise ValueError(f"Word stores both moments in one array: its name in storage is {WORD!r}, not {name!r}")
        m = slot_of(self, "mu", slots)
        slot_of(self, "nu", slots)
        bound = m.bound if self.bound is None else self.bound
        if bound is None:
            raise ValueError("Word cannot store mu, which has no bound here: use Cast('bfloat16') for both moments")
        return Word(bound, m.unit)

    @property
    def _is_root(self) -> bool:
        return self.unit is None or self.unit.root

    def encode(self, x: tuple[jax.Array, ...], dither: tuple[jax.Array, ...]) -> jax.Array:
        assert self.bound is not None
        m, v = (y.astype(jnp.float32) for y in x)
        s = root(v) if self._is_root else v
        r = m if self.unit is None else ratio(m, s)
        k = mu_law(r, dither[0], 7, self.bound)
        s = jnp.minimum(s, np.float32(_LARGEST)) + 0 * (r + s)  # nan where r or s is not finite.
        bits = jax.lax.bitcast_convert_type(s, jnp.int32) & 0x7FFFFFFF  # A nan can have a sign.
        n = ((bits + noise.upper_bits(dither[1], _SHIFT)) >> _SHIFT) - _OFFSET
        n = jnp.minimum(jnp.maximum(n, jnp.minimum(bits, 1)), _NAN)
        # The last operations are on floats, so that on a TPU they join the pass that writes the parameters.
        word = ((k << 9) + n).astype(jnp.float32)
        return jnp.where(r < 0, word + 2.0**15, word).astype(jnp.uint16)

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        assert self.bound is not None
        word = code.astype(jnp.int32)
        n = word & 511
        s = jax.lax.bitcast_convert_type((n + _OFFSET) << _SHIFT, jnp.float32)
        s = jnp.where(n == 0, 0, jnp.where(n == _NAN, jnp.nan, s)).astype(dtype)
        r = from_mu_law((word >> 9) & 63, 7, self.bound).astype(dtype)
        r = jnp.where(word >= 2**15, -r, r)
        return r if self.unit is None else r * s, s * s if self._is_root else s


#: The name of the array in which a `Word` stores mu and nu.
WORD = "mu_nu"


def named(storage: StorageName, slots: Mapping[str, Slot]) -> dict[str, Codec]:
    """The codecs of a named storage, by the names of the stored arrays."""
    if storage not in typing.get_args(StorageName):
        raise ValueError(
            f"storage must be one of {list(typing.get_args(StorageName))}, a codec or a mapping, got {storage!r}"
        )
    if storage in {"float32", "bfloat16"}:
        return dict.fromkeys(slots, Cast(storage))
    bounded = {name for name, slot in slots.items() if slot.signed and slot.bound is not None}
    found: dict[str, Codec] = {name: MuLaw() if name in bounded else Cast("bfloat16") for name in slots}
    if storage == "16bit" and "mu" in bounded and "nu" in slots:
        return {WORD: Word(), **{name: codec for name, codec in found.items() if name not in Word.slots}}
    return found


def codecs_of(storage: StorageLike | None, slots: Mapping[str, Slot]) -> tuple[tuple[str, Codec], ...]:
    """The codec of each stored array. Every slot is in exactly one; slots without a codec are stored as computed.

    Raises an error for anything that is not a storage, for unknown slots and for codecs that do not suit a slot.
    """
    if storage is None or isinstance(storage, Codec):
        storage = {} if storage is None else dict.fromkeys(slots, storage)
    elif isinstance(storage, str):
        storage = named(storage, slots)
    if not isinstance(storage, Mapping):
        raise TypeError(
            f"storage must be one of {list(typing.get_args(StorageName))}, a codec or a mapping, got {storage!r}"
        )
    for name, codec in storage.items():
        if not isinstance(codec, Codec):
            raise TypeError(f"storage[{name!r}] must be a codec, such as Cast('bfloat16') or MuLaw(), got {codec!r}")
        if name not in slots and name != WORD:
            raise ValueError(f"storage names {name!r}, but the slots are {', '.join(slots) or 'none'}")
    found = {name: codec.for_slot(name, slots) for name, codec in storage.items()}
    covered = [slot for codec in found.values() for slot in codec.slots]
    if twice := sorted({slot for slot in covered if covered.count(slot) > 1}):
        raise ValueError(f"storage says twice how {', '.join(twice)} is stored")
    order = [*found, *(name for name in slots if name not in covered)]
    return tuple((name, found[name] if name in found else Cast().for_slot(name, slots)) for name in order)
