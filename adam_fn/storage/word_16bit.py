"""An element in 16 bits: one word that holds both moments of Adam. (One moment as bfloat16 is `Cast` in codec.py.)"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from adam_fn.algebra.slots import Slot, Unit
from adam_fn.storage import noise
from adam_fn.storage.codec import Codec, slot_of
from adam_fn.storage.mu_law_8bit import from_mu_law, lowest_code, mu_law

#: The name of the array in which a `Word` stores mu and nu.
WORD = "mu_nu"
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

    u is the dither, another one for k than for n. k has 8 codes per octave of ``c + |r|``; c, about R/230, is the least
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
