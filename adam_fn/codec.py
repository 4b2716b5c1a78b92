"""Codecs: how a slot is stored between steps. A codec knows nothing of rules."""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
        """The codec for a slot; `signed`: whether the slot can become negative."""
        return self

    @property
    def random(self) -> bool:
        """Whether `encode` uses its noise."""
        return False

    @property
    def group(self) -> int | None:
        """How many successive elements of the last axis are encoded together; None: the array as a whole.

        With a number, all stored arrays keep the axes but the last in front: rows are encoded each for itself.
        """
        return None

    @abc.abstractmethod
    def encode(self, x: jax.Array, noise: Noise | None = None) -> Stored:
        """What is stored of `x` (float32 or float64): a pytree whose structure is the same for every `x`.

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

    def of(self, *, signed: bool) -> "Cast":
        if not signed and self.dtype is not None and jnp.finfo(self.dtype).minexp > -64:
            warnings.warn(
                f"{self.dtype} cannot hold small second moments: where they become 0 the update is m/eps. bfloat16 "
                "can, and Block(8)",
                stacklevel=2,
            )
        return self

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


@dataclasses.dataclass(frozen=True)
class Uncoded(Codec):
    """Stores arrays as they are, in the structure of another codec; for the leaves that `storage_mask` leaves out."""

    codec: Codec

    def encode(self, x: jax.Array, noise: Noise | None = None) -> Stored:
        outer = structure(self.codec)
        return outer.unflatten([x, *[optax.MaskedNode()] * (outer.num_leaves - 1)])

    def decode(self, stored: Stored, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
        return jax.tree.leaves(stored)[0].astype(dtype)


def structure(codec: Codec) -> Any:  # noqa: ANN401 (JAX has no public type for it)
    """The tree structure of what `codec` makes of an array, the same for all arrays."""
    return jax.tree.structure(stored_spec(codec, (1 << 20,), jnp.dtype(jnp.float32)))
