"""The storage of Adam's moments in other libraries, emulated: arrays are encoded and decoded again.

Written for comparisons, not for speed; the formulas are those of the libraries named, in our own words. All round to
the nearest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

#: The value that stands for z, of -1 to 1 (0 to 1 for second moments), in units of its block's scale.
Grid: TypeAlias = Callable[[jax.Array], jax.Array]


class Moment(NamedTuple):
    """The storage of a moment: its bytes per parameter, and a function that encodes and decodes an array."""

    bytes: float
    stored: Callable[[jax.Array], jax.Array]


def table(values: Sequence[float]) -> Grid:
    """A grid of some values: numbers become the nearest of them."""
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


def dynamic(bits: int, exponents: int, signed: bool) -> list[float]:
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


def blocks(bits: int, grid: Grid, group: int, *, scale: str = "float32", least: float = 0.0, root: int = 1) -> Moment:
    """A code of so many bits for each element, in units of the largest magnitude of its `group` neighbours.

    That is a scale of at least `least`, stored in the dtype `scale`; with a `root`, what is stored is the scale's root.
    A code is made with the scale as it was before it was rounded.
    """

    def stored(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, group)
        exact = jnp.maximum(jnp.abs(rows).max(-1, keepdims=True) ** (1 / root), least)
        rounded = exact.astype(scale).astype(x.dtype)
        z = jnp.clip(rows / jnp.where(exact > 0, exact, 1.0) ** root, -1, 1)
        return (grid(z) * rounded**root).reshape(x.shape)

    return Moment((bits + 8 * jnp.dtype(scale).itemsize / group) / 8, stored)


EXACT = Moment(8, lambda x: x)
#: The nearest bfloat16.
BFLOAT16 = Moment(2, lambda x: jax.lax.reduce_precision(x, 8, 7))
SIGNED, UNSIGNED, FOUR = (table(dynamic(*sizes)) for sizes in ((8, 7, True), (8, 7, False), (4, 3, True)))
SIXTEENTHS = table([i / 16 for i in range(1, 17)])
#: The libraries compared: how each stores m and v.
PEERS = {
    "plain bfloat16": (BFLOAT16, BFLOAT16),
    # optim.Adam8bit. (It also keeps the sign of m where the nearest value is 0.)
    "bitsandbytes 8 bits": (blocks(8, SIGNED, 256), blocks(8, UNSIGNED, 256)),
    # optim.Adam8bit: the same with scales of at least 1e-12.
    "torchao 8 bits": (blocks(8, SIGNED, 256, least=1e-12), blocks(8, UNSIGNED, 256, least=1e-12)),
    # optim.Adam4bit (arXiv 2309.01507): v in sixteenths without 0.
    "torchao 4 bits": (blocks(4, FOUR, 128, least=1e-12), blocks(4, SIXTEENTHS, 128, least=1e-12)),
    # arXiv 2602.23349: the scale of v is that of √v; both are at least 1e-12 before float16 rounds them.
    "FlashOptim 8 bits": (
        blocks(8, companded, 32, scale="float16", least=1e-12),
        blocks(8, square_root, 32, scale="float16", least=1e-12, root=2),
    ),
}


def adam(mu: Moment, nu: Moment, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam at the rate 1, for one array: the update is that of the new moments, which are then stored. 0/0 is 0."""

    def init(params: Any) -> optax.OptState:  # noqa: ANN401 (an array)
        return jnp.zeros(()), jnp.zeros_like(params), jnp.zeros_like(params)

    def update(updates: Any, state: Any, params: object = None) -> tuple[optax.Updates, optax.OptState]:  # noqa: ANN401 (an array)
        g, (count, m, v) = updates, state
        m, v, count = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, count + 1
        root = jnp.sqrt(v / (1 - b2**count)) + eps
        ratio = jnp.where(m == 0, 0.0, m / (1 - b1**count) / root)
        return -ratio, (count, mu.stored(m), nu.stored(v))

    return optax.GradientTransformation(init, update)
