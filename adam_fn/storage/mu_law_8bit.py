"""An element in 8 bits: the code of a first moment in the 24-bit storage."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from adam_fn.algebra.slots import Slot, Unit
from adam_fn.storage import noise
from adam_fn.storage.codec import Codec, slot_of


@dataclasses.dataclass(frozen=True)
class MuLaw(Codec):
    """A dithered μ-law: stores a slot that is bounded in its unit, such as ``r = m/√v``, in 8 bits.

    ::

        y = c + |r|,   code = sign(r) ⌊(bits(y) - bits(c))/2¹⁹ + u⌋,   0 ≤ u < 1

    u is the dither. The code is made of the upper bits of y, including four fraction bits, so there are 16 codes per
    octave of y, and evenly spaced codes below c. R is the bound (see `Slot`); c, about R/240, is the least number on
    the grid of the codes for which the code of R is at most 127. The stored array is int8. With v as it is stored,
    ``m = r √v``.

    With a unit there is no code for nan. The slot may be nan or infinite only where its unit is: decoding multiplies by
    the unit, so it becomes nan again. Rules guarantee this, since a gradient that is not finite makes all slots nan.
    Without a unit -128 stands for nan and infinity.

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
    """The code of the magnitude of each element, an int32.

    0 has the code `lowest_code`; `bound` has at most ``lowest_code + 2**(bits - 1) - 1``.
    """
    shift = 27 - bits
    y = lax.bitcast_convert_type(lax.add(lax.abs(r), _least(bits, bound)), np.int32)
    return lax.shift_right_arithmetic(lax.add(y, noise.upper_bits(dither, shift)), np.int32(shift))


def lowest_code(bits: int, bound: float) -> int:
    """The code of 0 in `mu_law`."""
    return int(_least(bits, bound).view(np.int32)) >> (27 - bits)


def from_mu_law(place: jax.Array, bits: int, bound: float) -> jax.Array:
    """Inverts `mu_law`, in float32; `place` is ``code - lowest_code``, shifted to its position in the bits of y."""
    least = _least(bits, bound)
    return lax.sub(lax.bitcast_convert_type(lax.add(place, least.view(np.int32)), np.float32), least)


@functools.cache
def _least(bits: int, bound: float) -> np.float32:
    """The smallest c on the grid of the codes for which `bound` still has a code of ``bits - 1`` bits."""
    steps, shift = 2 ** (bits - 1) - 1, 27 - bits

    def reach(code: int) -> float:
        first, last = np.asarray([code, code + steps], np.int32) << shift
        return float(last.view(np.float32)) - float(first.view(np.float32))

    code = bisect.bisect_left(range(255 * 2 ** (23 - shift) - steps), bound, key=reach)
    return np.int32(code << shift).view(np.float32)
