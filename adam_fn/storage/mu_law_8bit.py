"""The elementwise codes, and the storages that have a name: 64, 32, 24 or 16 bits of state a parameter."""

import bisect
import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from adam_fn.algebra.slots import Slot, Unit
from adam_fn.storage import noise
from adam_fn.storage.codec import Cast, Codec, slot_of

#: The name of a storage; ``24bit`` and ``16bit`` count the bits of Adam's two moments of a parameter.
StorageName: TypeAlias = Literal["float32", "bfloat16", "24bit", "16bit"]
#: A storage of moments: a name, a codec for each slot, or codecs by the names of the stored arrays.
StorageLike: TypeAlias = StorageName | Codec | Mapping[str, Codec]

_ONE = 0x3F800000  # The bits of 1.0.


@dataclasses.dataclass(frozen=True)
class MuLaw(Codec):
    """A dithered μ-law: stores a slot that is bounded in its unit, such as ``r = m/√v``, in 8 bits.

    ::

        y = c + |r|,   code = sign(r) ⌊(bits(y) - bits(c))/2¹⁹ + u⌋,   0 ≤ u < 1

    u is the dither. The code is a part of the bits of y, four of them of its fraction: 16 codes an octave of y, and
    evenly spaced codes below c. R is the bound (see `Slot`); c, about R/240, is the least number on the grid of the
    codes for which the code of R is at most 127. The stored array is int8. With v as it is stored, ``m = r √v``.

    A slot that has a unit must be nan or infinite only where its unit is, which then makes it nan when it is decoded;
    rules see to that, since a gradient that is not finite makes all slots nan. Without a unit -128 stands for nan and
    infinity.

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
        bound = self._largest
        # XLA for CPUs stores a quotient that is used twice, such as r, but clamps a number as often as it is used.
        r = lax.clamp(-bound, x[0].astype(jnp.float32), bound)
        code = lax.sub(mu_law(r, dither[0], 8, self._range), np.int32(lowest_code(8, self._range)))
        code = lax.mul(lax.sign(r), lax.convert_element_type(code, np.float32))
        if self.unit is None:
            code = jnp.where(jnp.isfinite(x[0]), code, -128)
        return lax.convert_element_type(code, np.int8)

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        k = lax.convert_element_type(code, np.int32)
        r = from_mu_law(lax.shift_left(lax.abs(k), np.int32(19)), 8, self._range)
        r = lax.select(lax.lt(k, np.int32(0)), lax.neg(r), r)
        return ((r if self.unit else jnp.where(k == -128, jnp.nan, r)).astype(dtype),)

    @property
    def _range(self) -> float:
        assert self.bound is not None
        return self.bound

    @property
    def _largest(self) -> np.float32:
        """The number that the code 127 stands for: `bound`, or up to a code more."""
        least = _least(8, self._range)
        return np.int32(least.view(np.int32) + (127 << 19)).view(np.float32) - least


def mu_law(r: jax.Array, dither: jax.Array, bits: int, bound: float) -> jax.Array:
    """The code of the magnitude of each element, an int32: `lowest_code` for 0, 2ⁿ⁻¹ - 1 more for `bound`."""
    shift = 27 - bits
    y = lax.bitcast_convert_type(lax.add(lax.abs(r), _least(bits, bound)), np.int32)
    return lax.shift_right_arithmetic(lax.add(y, noise.upper_bits(dither, shift)), np.int32(shift))


def lowest_code(bits: int, bound: float) -> int:
    """The code of 0 in `mu_law`."""
    return int(_least(bits, bound).view(np.int32)) >> (27 - bits)


def from_mu_law(place: jax.Array, bits: int, bound: float) -> jax.Array:
    """Inverts `mu_law`, in float32; `place` is the code without `lowest_code`, where it stands in the bits of y."""
    least = _least(bits, bound)
    return lax.sub(lax.bitcast_convert_type(lax.add(place, least.view(np.int32)), np.float32), least)


@functools.cache
def _least(bits: int, bound: float) -> np.float32:
    """The least c whose bits end where those of the code do, such that the code of `bound` is not too large."""
    steps, shift = 2 ** (bits - 1) - 1, 27 - bits

    def reach(code: int) -> float:
        first, last = np.asarray([code, code + steps], np.int32) << shift
        return float(last.view(np.float32)) - float(first.view(np.float32))

    code = bisect.bisect_left(range(255 * 2 ** (23 - shift) - steps), bound, key=reach)
    return np.int32(code << shift).view(np.float32)


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

        word = 2¹⁵ (m < 0) + 512 k + n
        k = ⌊(bits(c + |r|) - bits(c))/2²⁰ + u⌋,   n = ⌊bits(s)/2²⁰ + u⌋ - 599

    u is the dither, not the same for k and n. k has 8 codes an octave of ``c + |r|``; c, about R/230, is the least
    number on their grid for which the code of R is at most 63. n is the exponent of s and 3 bits of its fraction.
    Decoded, ``v = s²`` and ``m = r s``. The word 0 stands for ``v = 0``, and ``n = 511`` for nan, of m and of v, which
    must be nan together, as for `MuLaw`. An s that is not 0 is stored as at least 2⁻⁵² and at most 1.625 2¹¹ (gradients
    from 2e-16 to 3e3); beyond that it saturates, and the update stays bounded. The stored array is called ``mu_nu``.
    For AdaMax s is v itself; for rules that normalise gradients before they average them, r is m.

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
        add, mini, shl, i32, f32 = lax.add, lax.min, lax.shift_left, np.int32, np.float32
        m, v = (lax.convert_element_type(y, f32) for y in x)
        s = lax.max(lax.sqrt(v) if self._is_root else v, f32(2.0**LOWEST))
        lowest = lowest_code(7, self.bound)
        k = mini(mu_law(m if self.unit is None else lax.div(m, s), dither[0], 7, self.bound), i32(lowest + 63))
        bits = lax.bitcast_convert_type(mini(s, f32(_LARGEST)), i32)
        bits = add(
            lax.bitwise_and(bits, i32(0x7FFFFFFF)), noise.upper_bits(dither[1], _SHIFT)
        )  # A nan can have a sign.
        n = mini(lax.shift_right_logical(bits, i32(_SHIFT)), i32(_NAN + _OFFSET))
        # The last operations are on floats, so that on a TPU they join the pass that writes the parameters.
        word = lax.convert_element_type(add(shl(k, i32(9)), n), f32)
        zero = (lowest << 9) + _OFFSET
        word = lax.sub(word, jnp.where(m < 0, f32(zero - 2**15), f32(zero)))
        return lax.convert_element_type(jnp.where(v == 0, f32(0), word), np.uint16)

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        assert self.bound is not None
        shl, bitwise_and, i32 = lax.shift_left, lax.bitwise_and, np.int32
        word = lax.convert_element_type(code, i32)
        n = bitwise_and(word, i32(_NAN))
        s = lax.bitcast_convert_type(shl(lax.add(n, i32(_OFFSET)), i32(_SHIFT)), np.float32)
        s = jnp.where(n == 0, 0, jnp.where(n == _NAN, jnp.nan, s)).astype(dtype)
        r = from_mu_law(bitwise_and(shl(word, i32(11)), i32(63 << 20)), 7, self.bound).astype(dtype)
        r = lax.select(lax.ge(word, i32(2**15)), lax.neg(r), r)
        return r + (s - s) if self.unit is None else r * s, s * s if self._is_root else s  # s - s is 0, or nan.


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
