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

    @classmethod
    def over(cls, highest: int, decades: float) -> "Log":
        """The lowest code is `decades` powers of ten below the highest."""
        return cls(highest, highest * math.log10(2) / decades)

    @property
    def decades(self) -> float:
        return self.highest * math.log10(2) / self.octave

    def code(self, z: jax.Array) -> jax.Array:
        return self.highest + self.octave * jnp.log2(jnp.maximum(z, 1e-300))

    def value(self, code: jax.Array) -> jax.Array:
        return jnp.exp2((code - self.highest) / self.octave)

    def __str__(self) -> str:
        return f"log {self.decades:.3g} decades" + (f" ({self.octave:g} an octave)" if self.octave % 0.5 == 0 else "")


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

    bfloat16 and powers of two (kept in bfloat16) are rounded up, and what is stored makes the codes; float16 and
    float32 are rounded to the nearest, and the codes are made with the unrounded one. `sign`: the largest element
    itself is stored, so that codes need to reach 1 on its side only.
    """

    kind: Literal["power of 2", "bfloat16", "float16", "float32"] = "bfloat16"
    group: int = 32
    root: int = 1
    floor: float = 0.0
    sign: bool = False

    @property
    def bits(self) -> int:
        return 16 if self.kind == "power of 2" else 8 * jnp.dtype(self.kind).itemsize

    def of(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a block is divided by when it is coded, and what its values are multiplied by when it is decoded."""
        largest = jnp.abs(rows).max(-1, keepdims=True)
        exact = jnp.maximum(largest ** (1 / self.root), self.floor)
        if self.kind == "power of 2":
            mantissa, exponent = jnp.frexp(exact)
            stored = jnp.ldexp(jnp.where(exact > 0, 1.0, 0.0), exponent - (mantissa == 0.5))
        else:
            number = exact.astype(self.kind)
            if self.kind == "bfloat16":
                higher = jnp.nextafter(number, jnp.asarray(jnp.inf, self.kind))
                number = jnp.where(number.astype(exact.dtype) < exact, higher, number)
            stored = number.astype(exact.dtype)
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
    is. `top`: a block's largest element is never rounded at random but gets the highest code. `even`: the random
    numbers of an element are equidistributed in time (see `codes.trajectory`), not independent.
    """

    grid: Grid
    rounding: Rounding = "nearest"
    scale: Scale = Scale()
    top: bool = False
    even: bool = False

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(self.grid.highest - self.grid.lowest + 1))

    @property
    def bytes(self) -> float:
        """Bytes an element, the scales included."""
        return (self.bits + self.scale.bits / self.scale.group) / 8

    def stored(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        """What is decoded after `x` was encoded; blocks along the last axis, `noise` uniform in [0, 1)."""
        rows = x.reshape(*x.shape[:-1], -1, self.scale.group)
        noise = jnp.broadcast_to(noise, x.shape).reshape(rows.shape)
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
            if self.top:
                code = jnp.where(rows == jnp.abs(rows).max(-1, keepdims=True), highest, code)
        return (self.grid.value(code) * multiplier).reshape(x.shape)

    def __str__(self) -> str:
        top = ", largest at the top" if self.top else ""
        return f"{self.bits} bits, {self.grid}, {self.rounding}{' evenly' * self.even}{top}, {self.scale}"
