"""Block codecs: a byte or half a byte for each element, and a scale for each 32."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_fn.codec import Codec, Noise, Stored

BLOCK = 32
SMALL = 4096
COMPANDING = 2
#: Codes an octave of the non-negative slots, by bits. Both from `benchmarks/codes.py`.
CODES_PER_OCTAVE = {8: 20, 4: 2}


@dataclasses.dataclass(frozen=True)
class Block(Codec):
    """8- or 4-bit codes in blocks of 32 along the last axis, with a bfloat16 scale s each.

    ::

        signed:    x̂ = s c / ((1+k)L - k|c|),    c = -L … L-1,  L = 128 or 8,   k = 2
        unsigned:  x̂ = s 2^(1 - (L - c)/n),      c = 0 … L,     L = 255 or 15,  n = 20 or 2

    Signed slots: s is minus the element of the largest magnitude, rounded up, whose code is then -L; the others get the
    code of the nearest value. Unsigned slots: s is a power of two, so that all blocks share one grid of values and a
    scale that changes moves no other element; a code is rounded up or down at random so that its mean is the logarithm
    of x. To the nearest, a second moment would stay where it is, as it moves by a thousandth a step. Values below the
    lowest code, which is 2^-11.7 or 2^-6.5 of the block's largest or less, count as that: no second moment becomes 0
    beside others that are not. The random numbers start at a hash of leaf, slot and element and move on evenly with the
    step (`adam_fn.noise.even_bits`); they are the same under any sharding. A block with a nan is nan.

    Two 4-bit codes share a byte. Last axes that are no multiple of 32 make blocks of equal, shorter length. Arrays of
    fewer than 4,096 elements or with a last axis of 1 stay as they are: there is nothing to gain.

    The range is that of float32, for float64 as well. A running maximum (AMSGrad, AdaMax) that is rounded at random
    climbs to the code above: AMSGrad's updates are smaller by up to 2% (8 bits) or 16% (4 bits), AdaMax's by 4% or 30%.

    ``{"codes": uint8[..., blocks, bytes], "scales": bfloat16[..., blocks]}``: 1.0625 bytes an element (8 bits) and
    0.5625 (4 bits) for last axes that are multiples of 32.

    Attributes:
      bits: 8 or 4.
      signed: set by the slot; None until then.
    """

    bits: int = 8
    signed: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"a block codec has 8 or 4 bits, got {self.bits}")

    def of(self, *, signed: bool) -> "Block":
        return dataclasses.replace(self, signed=signed)

    @property
    def random(self) -> bool:
        return not self.signed

    @property
    def group(self) -> int:
        return BLOCK

    def encode(self, x: jax.Array, noise: Noise | None = None) -> Stored:
        assert self.signed is not None
        if x.size < SMALL or x.shape[-1] == 1:
            return {"codes": x, "scales": optax.MaskedNode()}
        rows = _blocks(x.astype(jnp.float32))
        codes, scales = self._signed_codes(rows) if self.signed else self._unsigned_codes(rows, noise)
        codes = codes.astype(jnp.int32) & (2**self.bits - 1)
        if self.bits == 4:
            half = codes.shape[-1] // 2
            codes = codes[..., :half] | codes[..., half:] << 4
        return {"codes": codes.astype(jnp.uint8), "scales": scales[..., 0].astype(jnp.bfloat16)}

    def decode(self, stored: Stored, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
        assert isinstance(stored, dict)
        codes, scales = stored["codes"], stored["scales"]
        if isinstance(scales, optax.MaskedNode):
            return codes.astype(dtype)
        codes = codes.astype(jnp.int32)
        if self.bits == 4:
            codes = jnp.concatenate([codes & 15, codes >> 4], -1)
        values = self._signed_values(codes, dtype) if self.signed else self._unsigned_values(codes, dtype)
        x = values * scales.astype(dtype)[..., None]
        return x.reshape(*shape[:-1], -1)[..., : shape[-1]]

    def _signed_codes(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        scales = -_away(_largest(rows))
        # XLA on a CPU multiplies by the reciprocal, which is 0 for the largest scales.
        part = jnp.where(jnp.abs(scales) > 1, 0.125, 1).astype(rows.dtype)
        z = (rows * part) / (jnp.where(scales == 0, 1, scales).astype(rows.dtype) * part)
        levels, magnitude = 2 ** (self.bits - 1), jnp.abs(z)
        below = jnp.floor(levels * (1 + COMPANDING) * magnitude / (1 + COMPANDING * magnitude))
        codes = below + (2 * magnitude > self._expanded(below) + self._expanded(below + 1)).astype(rows.dtype)
        return jnp.clip(jnp.where(z < 0, -codes, codes), -levels, levels - 1), scales

    def _signed_values(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        shift = 32 - self.bits  # Sign-extends a code of few bits.
        codes = ((codes << shift) >> shift).astype(dtype)
        return jnp.sign(codes) * self._expanded(jnp.abs(codes))

    def _expanded(self, code: jax.Array) -> jax.Array:
        """What a code that is not negative stands for, in units of the scale."""
        return code / ((1 + COMPANDING) * 2 ** (self.bits - 1) - COMPANDING * code)

    def _unsigned_codes(self, rows: jax.Array, noise: Noise | None) -> tuple[jax.Array, jax.Array]:
        levels, octave = 2**self.bits - 1, CODES_PER_OCTAVE[self.bits]
        largest = _largest(rows)
        exponent = jnp.maximum(jnp.frexp(largest)[1] - 1, -125)
        unit, inverse = (jnp.ldexp(jnp.ones_like(largest), e) for e in (exponent, 2 - exponent))
        chance = jnp.full_like(rows, 0.5) if noise is None else (noise(rows.shape) >> 8).astype(rows.dtype) * 2.0**-24
        shared = chance[..., :1]
        most = octave - (exponent >= 127).astype(rows.dtype)  # The next code would be beyond the range.
        # 1/unit itself may be subnormal.
        highest, places = (jnp.minimum(octave * _log2(0.25 * x * inverse), most) for x in (largest, rows))
        top = _rounded(highest, shared)
        above = (top > 0).astype(rows.dtype)  # Whether it is in the octave above the unit.
        # Where the largest can be rounded to, one number decides for all: none gets above it.
        codes = _rounded(places, jnp.where(places >= jnp.floor(highest), shared, chance))
        codes = jnp.where(rows == largest, top, codes) - octave * above + levels
        scales = jnp.where((largest > 0) & jnp.isfinite(largest), unit * jnp.exp2(above - 1), largest)
        return jnp.clip(codes, 0, levels), scales

    def _unsigned_values(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        levels, octave = 2**self.bits - 1, CODES_PER_OCTAVE[self.bits]
        return jnp.exp2((codes.astype(dtype) - (levels - octave)) * (1 / octave))


def _length(last: int) -> int:
    """The length of the blocks of an axis: at most 32, equal and even."""
    length = -(-last // -(-last // BLOCK))
    return length + length % 2


def _blocks(x: jax.Array) -> jax.Array:
    """``[..., n]`` as ``[..., blocks, length]``, padded with zeros."""
    length = _length(x.shape[-1])
    missing = -x.shape[-1] % length
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    return x.reshape(*x.shape[:-1], -1, length)


def _largest(rows: jax.Array) -> jax.Array:
    """Of each block the element of the largest magnitude, nan where there is one; of two that differ in sign +.

    One maximum of integers that are ordered like that: the exponent and fraction, and then the sign.
    """
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    most = (bits << 1 | ~bits >> 31).max(-1, keepdims=True)
    return jax.lax.bitcast_convert_type(most >> 1 | ~most << 31, jnp.float32)


def _away(x: jax.Array) -> jax.Array:
    """The bfloat16 number next to x that is not nearer to 0, or the largest there is."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))
    bits = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(x), jnp.nan, x), jnp.uint32)  # As any payload could carry.
    return jax.lax.bitcast_convert_type(((bits + 0xFFFF) >> 16).astype(jnp.uint16), jnp.bfloat16)


def _log2(x: jax.Array) -> jax.Array:
    return jnp.log2(jnp.maximum(x, 2.0**-100))


def _rounded(y: jax.Array, chance: jax.Array) -> jax.Array:
    """Down to a whole number, or up where the chance is below the fraction."""
    # What is a code already stays one, whatever the logarithm's last digit is.
    y = jnp.where(jnp.abs(y - jnp.round(y)) < 1e-4, jnp.round(y), y)
    below = jnp.floor(y)
    return below + (chance < y - below).astype(y.dtype)
