"""Codecs: how a slot is stored between steps. A codec knows nothing of rules, leaves or devices."""

import abc
import dataclasses
import warnings
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

#: What is stored of one array, which is an array or a dictionary of arrays.
Stored: TypeAlias = jax.Array | dict[str, Any]


class Codec(abc.ABC):
    """Stores an array element by element. Codecs are static: hashable, compared by value, without arrays of their own.

    Everything here is elementwise, so that it runs on a whole leaf, on a part of it and inside a kernel alike. If 32
    successive elements share a `scale`, `encode` and `decode` get it in a shape that broadcasts to the elements.

    Laws: ``encode(decode(encode(x))) = encode(x)``, and stored arrays that are all 0 stand for 0.
    """

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_static(cls)

    def of(self, *, signed: bool) -> "Codec":
        """The codec for a slot; `signed`: whether the slot can become negative."""
        return self

    @property
    def scaled(self) -> bool:
        """Whether blocks of elements share a scale; small leaves are then stored as they are."""
        return False

    @property
    def random(self) -> bool:
        """Whether codes are rounded at random; `scale` and `encode` then get a `chance`."""
        return False

    @property
    def packed(self) -> int:
        """How many codes share a byte; with more than one, `encode` returns numbers that fit into that part of it."""
        return 1

    def chance(self, random: jax.Array) -> jax.Array:
        """Turns random bits, 32 for each block, into the `chance` that `scale` and `encode` get."""
        return random

    def scale(self, x: jax.Array, chance: jax.Array | None) -> jax.Array:
        """The least scale that can hold each element, int16 and at least 0; a block has the largest of its elements.

        `chance`: random numbers, one for each block.
        """
        raise TypeError(f"{self} has no scales")

    @abc.abstractmethod
    def encode(self, x: jax.Array, scale: jax.Array | None = None, chance: jax.Array | None = None) -> jax.Array:
        """What is stored for each element of `x` (float32 or float64)."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
        """The numbers, of floating `dtype`, that `codes` stand for."""


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """Stores an array in another floating dtype; without one, in the dtype of the arithmetic (the identity)."""

    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            dtype = jnp.dtype(self.dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"moments must be stored in a floating dtype, got {dtype}")
            object.__setattr__(self, "dtype", dtype)

    def __str__(self) -> str:
        return "Cast()" if self.dtype is None else f"Cast('{self.dtype}')"

    def of(self, *, signed: bool) -> "Cast":
        if not signed and self.dtype is not None and jnp.finfo(self.dtype).minexp > -64:
            warnings.warn(
                f"{self.dtype} cannot represent small second moments: where they underflow to 0 the update is m/eps. "
                "Use bfloat16 or Block(8)",
                stacklevel=2,
            )
        return self

    def encode(self, x: jax.Array, scale: jax.Array | None = None, chance: jax.Array | None = None) -> jax.Array:
        return x if self.dtype is None else x.astype(self.dtype)

    def decode(self, codes: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
        return jnp.asarray(codes, dtype)


@dataclasses.dataclass(frozen=True)
class Uncoded(Cast):
    """Stores arrays as they are in the place of `codec`: small leaves, and those that `storage_mask` leaves out."""

    codec: Codec | None = None
