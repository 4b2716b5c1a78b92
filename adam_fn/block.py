"""The block codec: a byte or half a byte for each element, and a scale for each 32. Codes are the float's own bits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adam_fn.codec import Codec

#: Codes an octave of the slots that are never negative, by bits; from `benchmarks/codes.py`.
CODES_PER_OCTAVE = {8: 20, 4: 2}
#: Their random numbers u become u + u(1-u)/2^SKEW.
SKEW = {8: 6, 4: 3}

_ONE = 0x3F800000  # The bits of 1.0
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_FRACTION = 16  # Bits of a code's fraction.
_LEAST = 2.0**-124  # The reciprocal of a smaller scale would overflow.


@dataclasses.dataclass(frozen=True)
class Block(Codec):
    """8- or 4-bit codes in blocks of 32 that share an int16 scale. A code is a part of a float32's bit pattern.

    ::

        signed:    y = 1 + 15|x|/s,   step = the nearest of q an octave of y, at most L+1 on the side of the block's
                   largest and L on the other;   code = -step or step,   q = 32 or 2,  L = 127 or 7
        unsigned:  place = ⌊n bits(x)/2²³ + c⌋,   code = place - base, at least 0 and at most L
                   n = 20 or 2,  L = 255 or 15

    Signed slots: y runs over the four octaves from 1 to 16, where the bit pattern of a float, taken as an integer, is
    the piecewise linear logarithm of its value: these are the codes of the μ-law. s is the block's largest magnitude,
    truncated to 7 bits; the scale consists of the upper 14 bits of s and one bit for the sign of the largest element.
    If s is below 2⁻¹²⁴, the block is stored as 0.

    Unsigned slots: all blocks share one grid of values, the floats with the bits 2²³k/n, n in each octave and evenly
    spaced there; the scale is the base, the place of the block's largest element minus L. When the base changes, no
    other element moves. A place is rounded up or down at random: rounded to nearest, a second moment would stay where
    it is, because it moves by only a thousandth per step. A block has one random number u (so all of its elements keep
    their order), which starts at a hash of leaf, slot and block and advances evenly with the step
    (`adam_fn.noise.even_bits`); it is the same under any sharding. c = u + u(1-u)/64 or u + u(1-u)/8 rounds up a little
    more often than down, since 1/√x is too large on average if x is right on average. Elements below the base (about
    2⁻¹²·⁷ or 2⁻⁷·⁵ of the block's largest) are stored as the base: no second moment becomes 0 beside others that are
    not.

    A block that contains a nan is nan; in signed slots, a block that contains an infinity holds no finite number.

    Blocks are 32 successive rows of a column (see `adam_fn.layout`). Two 4-bit codes share a byte. Arrays of fewer than
    4,096 elements stay as they are: there is nothing to gain.

    The range is float32's, for float64 as well. A running maximum (AMSGrad, AdaMax), rounded at random, climbs to the
    next code, which is at most 1 + 1/n times as large: AMSGrad's updates are smaller by up to 2.4% (8 bits) or 18% (4
    bits), AdaMax's by 5% or 33%.

    ``{"codes": uint8, "scales": int16}``: 1.0625 bytes per element (8 bits) and 0.5625 (4 bits).

    Attributes:
      bits: 8 or 4.
      signed: set by the slot; None until then.
    """

    bits: int = 8
    signed: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits of Block must be 8 or 4, got {self.bits}")

    def __str__(self) -> str:
        return f"Block({self.bits})"

    def of(self, *, signed: bool) -> "Block":
        return dataclasses.replace(self, signed=signed)

    @property
    def scaled(self) -> bool:
        return True

    @property
    def random(self) -> bool:
        return not self.signed

    @property
    def packed(self) -> int:
        return 8 // self.bits

    def chance(self, random: jax.Array) -> jax.Array:
        u = (random >> 16).astype(jnp.int32)
        skewed = u + (u * ((1 << _FRACTION) - u) >> (_FRACTION + SKEW[self.bits]))
        # What is on the grid stays there: its fraction is below `odd`.
        return jnp.minimum(skewed, (1 << _FRACTION) - self._odd[0]).astype(jnp.uint16)

    def scale(self, x: jax.Array, chance: jax.Array | None) -> jax.Array:
        bits = _bits(x)
        if self.signed:
            return ((bits & _MAGNITUDE) >> 17 << 1 | (bits >= 0).astype(jnp.int32)).astype(jnp.int16)
        return jnp.maximum(self._place(bits & _MAGNITUDE, chance) - self._levels, 0).astype(jnp.int16)

    def encode(self, x: jax.Array, scale: jax.Array | None = None, chance: jax.Array | None = None) -> jax.Array:
        assert scale is not None
        bits, held = _bits(x), scale.astype(jnp.int32)
        if self.signed:
            s = _float(held >> 1 << 17)
            y = 1 + _float(bits & _MAGNITUDE) * jnp.where(s >= _LEAST, 15 / s, 0)
            step = (_bits(y) - _ONE + (1 << self._shift >> 1)) >> self._shift
            same = (bits >> 31 ^ held) & 1  # Whether it has the sign of the largest.
            code = (jnp.minimum(step, self._levels + same) ^ -same) + same & 2**self.bits - 1
        else:
            code = jnp.clip(self._place(bits & _MAGNITUDE, chance) - held, 0, self._levels)
        return code.astype(jnp.uint8)

    def decode(self, codes: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
        assert scale is not None
        code, held = codes.astype(jnp.int32), scale.astype(jnp.int32)
        if self.signed:
            code = code << (32 - self.bits) >> (32 - self.bits)  # With its sign.
            y = _float((jnp.abs(code) << self._shift) + _ONE)
            # A little more, or the largest might come out below s and the next scale be another one.
            x = (y - 1) * (_float(held >> 1 << 17) * ((1 + 2.0**-20) / 15))
            x = _float(_bits(x) | (code >> 31 ^ held) << 31)
        else:
            octave, places = CODES_PER_OCTAVE[self.bits], 255 * CODES_PER_OCTAVE[self.bits]  # Below infinity.
            place = jnp.where(held > places - self._levels, 256 * octave - 1, code + held)
            x = _float(self._grid(place))
        return x.astype(dtype)

    @property
    def _levels(self) -> int:
        """The largest code; of a signed slot the largest magnitude of one."""
        return 2 ** (self.bits - 1 if self.signed else self.bits) - 1

    @property
    def _shift(self) -> int:
        """The bits of a fraction below a step, of which there are q = 2^(bits - 3) an octave."""
        return 23 - (self.bits - 3)

    @property
    def _odd(self) -> tuple[int, int]:
        """n/2²³ as an odd number and a shift: ``n bits/2²³ = odd (bits >> shift)/2¹⁶``."""
        octave = CODES_PER_OCTAVE[self.bits]
        twos = (octave & -octave).bit_length() - 1
        return octave >> twos, 23 - _FRACTION - twos

    def _place(self, bits: jax.Array, chance: jax.Array | None) -> jax.Array:
        """The place on the grid of a number that is not negative; only infinity gets to infinity's."""
        odd, shift = self._odd
        last = -((1 - 255 * CODES_PER_OCTAVE[self.bits]) * 2**_FRACTION // odd) << shift
        bits = jnp.where(bits < _INFINITY, jnp.minimum(bits, last), bits)
        chance = jnp.asarray(1 << _FRACTION >> 1) if chance is None else chance.astype(jnp.int32)
        return ((bits >> shift) * odd + chance.astype(jnp.int32)) >> _FRACTION

    def _grid(self, place: jax.Array) -> jax.Array:
        """``⌈2²³ place/n⌉``, the bits of a place's value."""
        odd, shift = self._odd
        whole, rest = divmod(1 << _FRACTION, odd)
        units = place * whole
        if rest:
            assert rest == 1
            units += ((place + odd - 1) * ((1 << 18) // odd + 1)) >> 18  # ⌈place/odd⌉ for places below 2¹³.
        return units << shift


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
