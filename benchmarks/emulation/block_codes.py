"""Codes of blocks, emulated in any floating dtype: what is decoded of what was encoded.

A code is a grid of values for the elements of a block, a scale for the block, and a way of rounding. Written for
comparisons, not for speed; the formulas are those of the libraries named, in our own words.
"""

import dataclasses
import math
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Rounding = Literal["nearest", "closest", "unbiased", "dithered"]
Kind = Literal[
    "14 bits", "place", "power of 2", "truncated bfloat16", "nearest bfloat16", "bfloat16", "float16", "float32"
]

# What is added to the bits of a float32 before its lower 16 bits are dropped.
ADDED: dict[Kind, int] = {"bfloat16": 0xFFFF, "nearest bfloat16": 0x8000, "truncated bfloat16": 0}


class Grid(Protocol):
    """What the codes of an element stand for, in units of its block's scale.

    `code` is increasing and the inverse of `value`; between two codes it returns a number between the two.
    """

    @property
    def lowest(self) -> int: ...
    @property
    def highest(self) -> int: ...
    def code(self, z: jax.Array) -> jax.Array: ...
    def value(self, code: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Bend:
    """Signed: code = L (1+k)z / (1 + k|z|) with L the highest code; k = 1 is FlashOptim's, k = 0 linear."""

    highest: int
    k: float
    lowest: int

    @classmethod
    def symmetric(cls, bits: int, k: float) -> "Bend":
        return cls(2 ** (bits - 1) - 1, k, 1 - 2 ** (bits - 1))

    @classmethod
    def full(cls, bits: int, k: float) -> "Bend":
        """All 2^bits codes, one more above 0 than below: for scales that have the sign of the largest element."""
        return cls(2 ** (bits - 1), k, 1 - 2 ** (bits - 1))

    def code(self, z: jax.Array) -> jax.Array:
        return self.highest * (1 + self.k) * z / (1 + self.k * jnp.abs(z))

    def value(self, code: jax.Array) -> jax.Array:
        y = code / self.highest
        return y / (1 + self.k - self.k * jnp.abs(y))

    def __str__(self) -> str:
        return f"k={self.k:g}"


@dataclasses.dataclass(frozen=True)
class Root:
    """Unsigned: code = L z^(1/p)."""

    highest: int
    p: int
    lowest: int = 0

    def code(self, z: jax.Array) -> jax.Array:
        return self.highest * z ** (1 / self.p)

    def value(self, code: jax.Array) -> jax.Array:
        return (code / self.highest) ** self.p

    def __str__(self) -> str:
        return f"{'square' if self.p == 2 else {4: 'fourth'}.get(self.p, f'{self.p}th')} root"


@dataclasses.dataclass(frozen=True)
class Log:
    """Unsigned: code c stands for 2^(-(L - c)/n), n codes an octave; the lowest is a floor, nothing is 0."""

    highest: int
    octave: float
    lowest: int = 0

    @property
    def decades(self) -> float:
        return self.highest * math.log10(2) / self.octave

    def code(self, z: jax.Array) -> jax.Array:
        return self.highest + self.octave * jnp.log2(jnp.maximum(z, 1e-300))

    def value(self, code: jax.Array) -> jax.Array:
        return jnp.exp2((code - self.highest) / self.octave)

    def __str__(self) -> str:
        return f"log {self.decades:.3g} decades" + (f" ({self.octave:g} an octave)" if self.octave % 0.5 == 0 else "")


def octaves(x: jax.Array) -> jax.Array:
    """The bits of x as a float32, in units of 2^23: the logarithm of base 2, linear between powers of two, plus 127."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32).astype(x.dtype) / 2**23


def power(y: jax.Array) -> jax.Array:
    """The inverse of `octaves`, the bits rounded up."""
    bits = jnp.ceil(y * 2**23).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Places:
    """Unsigned: place k stands for the float32 with the bits k 2^23/n, in n steps from one power of two to the next.

    The places are the same for all blocks: they go with `Scale("place")`, codes are the highest places of a block.
    """

    highest: int
    octave: float
    lowest: int = 0

    def code(self, z: jax.Array) -> jax.Array:
        return self.octave * octaves(z)

    def value(self, code: jax.Array) -> jax.Array:
        return power(code / self.octave)

    def __str__(self) -> str:
        return f"float bits, {self.octave:g} an octave"


@dataclasses.dataclass(frozen=True)
class MuLaw:
    """Signed: the code of z is that of the bits of y = 1 + (Y-1)|z|, n steps an octave; the highest code stands for Y.

    Four octaves, n = 2^bits/8: the μ-law of G.711, with more or fewer steps.
    """

    highest: int
    octave: int
    lowest: int

    @classmethod
    def symmetric(cls, bits: int) -> "MuLaw":
        return cls(2 ** (bits - 1) - 1, 2 ** (bits - 3), 1 - 2 ** (bits - 1))

    @classmethod
    def full(cls, bits: int) -> "MuLaw":
        """All 2^bits codes, as `Bend.full`."""
        return cls(2 ** (bits - 1), 2 ** (bits - 3), 1 - 2 ** (bits - 1))

    @property
    def top(self) -> float:
        """Y."""
        octave, step = divmod(self.highest, self.octave)
        return 2.0**octave * (1 + step / self.octave)

    def code(self, z: jax.Array) -> jax.Array:
        return jnp.sign(z) * self.octave * (octaves(1 + (self.top - 1) * jnp.abs(z)) - 127)

    def value(self, code: jax.Array) -> jax.Array:
        return jnp.sign(code) * (power(jnp.abs(code) / self.octave + 127) - 1) / (self.top - 1)

    def __str__(self) -> str:
        return f"μ-law bits, {self.octave} an octave"


@dataclasses.dataclass(frozen=True)
class Table:
    """Any increasing values; a `code` that is linear between them, so that the nearest code has the nearest value."""

    name: str
    values: tuple[float, ...]
    lowest: int = 0

    @property
    def highest(self) -> int:
        return len(self.values) - 1

    def code(self, z: jax.Array) -> jax.Array:
        return jnp.interp(z, jnp.asarray(self.values, z.dtype), jnp.arange(len(self.values), dtype=z.dtype))

    def value(self, code: jax.Array) -> jax.Array:
        return jnp.asarray(self.values, code.dtype)[code.astype(jnp.int32)]

    def __str__(self) -> str:
        return self.name


def dynamic(bits: int, exponents: int, *, signed: bool) -> Table:
    """The dynamic map of bitsandbytes (Dettmers 2015, arXiv 1511.04561; `functional.create_dynamic_map`).

    Decade i below the largest has half as many values as the one above it: the centres of equal parts of
    [0.1, 1] · 10^-i. With them 0 and 1; signed, the negatives of all but 1. Unsigned maps have twice the values.
    """
    values = [0.0, 1.0]
    for i in range(exponents):
        parts = 2 ** (bits - 1 - exponents + i + (0 if signed else 1))
        edges = np.linspace(0.1, 1, parts + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - exponents)
        values += [*centres, *(-centres if signed else ())]
    assert len(values) == 2**bits
    return Table("dynamic map", tuple(sorted(float(value) for value in values)))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of a block: its largest magnitude (its `root`-th root, at least `floor`), as it is stored.

    bfloat16 and powers of two (kept in bfloat16) are rounded up, and what is stored makes the codes, as it does when
    bfloat16 is rounded to the nearest or truncated and multiplied by 1 + 2^-7; float16 and float32 are rounded to the
    nearest, and the codes are made with the unrounded one. `sign`: the largest element itself is stored, so that codes
    need to reach 1 on its side only. 14 bits: truncated to 6 of the fraction, which leaves a bit for the sign. place:
    the lowest of a block's codes, an int16, for `Places`; not of `of`.
    """

    kind: Kind = "bfloat16"
    group: int = 32
    root: int = 1
    floor: float = 0.0
    sign: bool = False

    @property
    def bits(self) -> int:
        return 32 if self.kind == "float32" else 16

    def of(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a block is divided by when it is coded, and what its values are multiplied by when it is decoded."""
        largest = jnp.abs(rows).max(-1, keepdims=True)
        exact = jnp.maximum(largest ** (1 / self.root), self.floor)
        if self.kind == "power of 2":
            mantissa, exponent = jnp.frexp(exact)
            stored = jnp.ldexp(jnp.where(exact > 0, 1.0, 0.0), exponent - (mantissa == 0.5))
        elif self.kind == "14 bits":
            bits = jax.lax.bitcast_convert_type(exact.astype(jnp.float32), jnp.int32)
            stored = jax.lax.bitcast_convert_type(bits & -(1 << 17), jnp.float32).astype(exact.dtype)
        elif self.kind in ADDED:
            # On the bits: a compiler may leave out a conversion to bfloat16 and back.
            bits = jax.lax.bitcast_convert_type(exact.astype(jnp.float32), jnp.int32) + ADDED[self.kind]
            stored = jax.lax.bitcast_convert_type(bits & -65536, jnp.float32).astype(exact.dtype)
            stored = stored * (1 + 2**-7) if self.kind == "truncated bfloat16" else stored
        else:
            stored = exact.astype(self.kind).astype(exact.dtype)
        decoded = stored**self.root
        coded = exact**self.root if self.kind in ("float16", "float32") else decoded
        side = jnp.where(self.sign & (rows.min(-1, keepdims=True) == -largest), -1.0, 1.0)
        return side * jnp.where(coded > 0, coded, 1.0), side * decoded

    def __str__(self) -> str:
        return f"{self.kind}{' with its sign' if self.sign else ''} for {self.group}"


@dataclasses.dataclass(frozen=True)
class Code:
    """How one moment is stored: a grid of values, a scale for each block, and how a code is rounded.

    nearest: to the nearest code, as `grid.code` measures it; closest: to the code of the nearest value; unbiased: at
    random so that the mean of the two values is what is coded; dithered: at random so that the mean of the two codes
    is. `even`: the random numbers of an element are equidistributed in time (see `codes.trajectory`), not independent.
    `shared`: all elements of a block have its first one's. `skew`: a random number c is c + skew c(1 - c), which rounds
    up more often; with 0 places, linear between powers of two, keep the mean of v, with more that of its logarithm.
    """

    grid: Grid
    rounding: Rounding = "nearest"
    scale: Scale = Scale()
    even: bool = False
    shared: bool = False
    skew: float = 0.0

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(self.grid.highest - self.grid.lowest + 1))

    @property
    def bytes(self) -> float:
        """Bytes per element, the scales included."""
        return (self.bits + self.scale.bits / self.scale.group) / 8

    def stored(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        """What is decoded after `x` was encoded; blocks along the last axis, `noise` uniform in [0, 1)."""
        rows = x.reshape(*x.shape[:-1], -1, self.scale.group)
        noise = jnp.broadcast_to(noise, x.shape).reshape(rows.shape)
        if self.shared:
            noise = noise[..., :1]
        noise = noise + self.skew * noise * (1 - noise)
        if self.scale.kind == "place":
            place = jnp.floor(self.grid.code(rows) + noise)
            lowest = jnp.maximum(place.max(-1, keepdims=True) - self.grid.highest, 0)
            return self.grid.value(jnp.maximum(place, lowest)).reshape(x.shape)
        divisor, multiplier = self.scale.of(rows)
        z = jnp.clip(rows / divisor, -1, 1)
        lowest, highest = self.grid.lowest, self.grid.highest
        y = jnp.clip(self.grid.code(z), lowest, highest)
        if self.rounding == "nearest":
            code = jnp.round(y)
        else:
            below = jnp.clip(jnp.floor(y), lowest, highest - 1)
            chance = y - below
            if self.rounding != "dithered":
                low, high = self.grid.value(below), self.grid.value(below + 1)
                chance = (z - low) / (high - low)
            code = below + ((0.5 if self.rounding == "closest" else noise) < chance)
        return (self.grid.value(code) * multiplier).reshape(x.shape)

    def __str__(self) -> str:
        noise = " evenly" * self.even + " by block" * self.shared + (f", skew {self.skew:g}" if self.skew else "")
        return f"{self.bits} bits, {self.grid}, {self.rounding}{noise}, {self.scale}"
