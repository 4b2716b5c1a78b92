"""Codecs: how a slot is stored between steps. A codec knows nothing of rules."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

#: What a codec makes of one array: an array, or a pytree of arrays.
Stored: TypeAlias = jax.Array | tuple[Any, ...] | dict[str, Any]
#: Uniform 32-bit numbers of a shape, for codes that are rounded at random.
Noise: TypeAlias = Callable[[tuple[int, ...]], jax.Array]


class Codec(abc.ABC):
    """Stores an array between steps. Codecs are static: hashable, compared by value, without arrays of their own.

    Laws: ``encode(decode(encode(x))) = encode(x)``, and what is stored with all arrays 0 stands for 0.
    """

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_static(cls)

    def of(self, *, signed: bool) -> "Codec":
        """The codec for a slot, which can become negative or not."""
        return self

    def plain(self) -> "Codec":
        """A codec of the same structure that stores arrays as they are, for leaves that `storage_mask` leaves out."""
        raise TypeError(f"storage_mask needs a codec that defines plain(), got {self!r}")

    @property
    def random(self) -> bool:
        """Whether `encode` uses its noise."""
        return False

    @property
    def group(self) -> int | None:
        """How many successive elements of the last axis are encoded together; None: the array as a whole."""
        return None

    @abc.abstractmethod
    def encode(self, x: jax.Array, noise: Noise | None = None) -> Stored:
        """What is stored of `x` (float32 or float64): a pytree whose structure does not depend on the values of `x`.

        Where a leaf does not need a part of the structure, `optax.MaskedNode` stands there.
        """

    @abc.abstractmethod
    def decode(self, stored: Stored, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
        """The array of floating `dtype` and `shape` that `stored` stands for."""


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """Stores an array in another floating dtype; without one, in the dtype of the arithmetic (the identity)."""

    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            dtype = jnp.dtype(self.dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"moments are stored in a floating dtype, got {dtype}")
            object.__setattr__(self, "dtype", dtype)

    def plain(self) -> "Cast":
        return Cast()

    @property
    def group(self) -> int:
        return 1

    def encode(self, x: jax.Array, noise: Noise | None = None) -> Stored:
        return x if self.dtype is None else x.astype(self.dtype)

    def decode(self, stored: Stored, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(stored, dtype)


@functools.cache
def stored_spec(codec: Codec, shape: tuple[int, ...], dtype: np.dtype) -> Stored:
    """Shapes and dtypes of what `codec` makes of an array, without making it."""
    return jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, dtype))
