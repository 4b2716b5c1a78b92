"""What other libraries store of Adam's moments, emulated: what is decoded of what was encoded.

Written for comparisons, not for speed; the formulas are those of the libraries named, in our own words. All round to
the nearest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

#: The value that stands for z, of -1 to 1 (0 to 1 for second moments), in units of its block's scale.
Grid: TypeAlias = Callable[[jax.Array], jax.Array]


class Moment(NamedTuple):
    """How a moment is stored: its bytes a parameter, and what is decoded of an array that was encoded."""

    bytes: float
    stored: Callable[[jax.Array], jax.Array]


class Peer(NamedTuple):
    """A library's storage."""

    name: str
    mu: Moment
    nu: Moment


def table(values: Sequence[float]) -> Grid:
    """The nearest of some values."""
    ordered = np.sort(values)
    between = (ordered[1:] + ordered[:-1]) / 2
    return lambda z: jnp.asarray(ordered, z.dtype)[jnp.searchsorted(jnp.asarray(between, z.dtype), z)]


def companded(z: jax.Array) -> jax.Array:
    """127 codes on either side of 0, for the values of 2z/(1 + |z|)."""
    y = jnp.round(127 * 2 * z / (1 + jnp.abs(z))) / 127
    return y / (2 - jnp.abs(y))


def square_root(z: jax.Array) -> jax.Array:
    """256 codes, for the values of √z."""
    return (jnp.round(255 * jnp.sqrt(z)) / 255) ** 2


def dynamic(bits: int, exponents: int, *, signed: bool) -> list[float]:
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
    return sorted(float(value) for value in values)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of a block of `group` neighbours: its largest magnitude, at least `floor`, in `dtype`.

    `root`: the scale is that of the root instead. A code is made with the scale as it was before it was rounded.
    """

    dtype: str
    group: int
    floor: float = 0.0
    root: int = 1

    def blocks(self, bits: int, grid: Grid) -> Moment:
        """Blocks that have such scales and, for each element, a code of so many bits."""

        def stored(x: jax.Array) -> jax.Array:
            rows = x.reshape(-1, self.group)
            exact = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True) ** (1 / self.root), self.floor)
            rounded = exact.astype(self.dtype).astype(x.dtype)
            z = jnp.clip(rows / jnp.where(exact > 0, exact, 1.0) ** self.root, -1, 1)
            return (grid(z) * rounded**self.root).reshape(x.shape)

        return Moment((bits + 8 * jnp.dtype(self.dtype).itemsize / self.group) / 8, stored)


#: Moments that are not rounded.
EXACT = Moment(8, lambda x: x)
#: The nearest bfloat16.
BFLOAT16 = Moment(2, lambda x: jax.lax.reduce_precision(x, 8, 7))


def peers() -> list[Peer]:
    """The libraries compared."""
    # bitsandbytes, optim.Adam8bit. (It also keeps the sign of m where the nearest value is 0.)
    scale = Scale("float32", 256)
    signed, unsigned = (table(dynamic(8, 7, signed=sign)) for sign in (True, False))
    bitsandbytes = Peer("bitsandbytes 8 bits", scale.blocks(8, signed), scale.blocks(8, unsigned))
    # torchao, optim.Adam8bit: the same with scales of at least 1e-12.
    scale = Scale("float32", 256, floor=1e-12)
    torchao = Peer("torchao 8 bits", scale.blocks(8, signed), scale.blocks(8, unsigned))
    # torchao, optim.Adam4bit (arXiv 2309.01507): v in sixteenths without 0.
    scale = Scale("float32", 128, floor=1e-12)
    linear = table([i / 16 for i in range(1, 17)])
    four = Peer("torchao 4 bits", scale.blocks(4, table(dynamic(4, 3, signed=True))), scale.blocks(4, linear))
    # FlashOptim (arXiv 2602.23349): the scale of v is that of √v; both are at least 1e-12 before float16 rounds them.
    m_scale, v_scale = (Scale("float16", 32, floor=1e-12, root=root) for root in (1, 2))
    flash = Peer("FlashOptim 8 bits", m_scale.blocks(8, companded), v_scale.blocks(8, square_root))
    return [Peer("plain bfloat16", BFLOAT16, BFLOAT16), bitsandbytes, torchao, four, flash]


def adam(mu: Moment, nu: Moment, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam at the rate 1, for one array: the update is that of the new moments, which are then stored. 0/0 is 0."""

    def init(params: optax.Params) -> optax.OptState:
        zeros = jnp.zeros_like(cast(jax.Array, params))
        return jnp.zeros(()), zeros, zeros

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        g, (count, m, v) = cast(jax.Array, updates), cast(tuple[jax.Array, jax.Array, jax.Array], state)
        m, v, count = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, count + 1
        root = jnp.sqrt(v / (1 - b2**count)) + eps
        ratio = jnp.where(m == 0, 0.0, m / (1 - b1**count) / root)
        return -ratio, (count, mu.stored(m), nu.stored(v))

    return optax.GradientTransformation(init, update)
