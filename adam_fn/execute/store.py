"""What is stored of a slot of one leaf: its structure, shapes and dtypes, whole arrays to it and back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from adam_fn.codec import Codec, Stored, Uncoded
from adam_fn.execute.body import Codecs, Coded
from adam_fn.layout import Layout, layout, nibble
from adam_fn.noise import Part, even_bits
from adam_fn.rule import Clock

#: What is stored of the slots of a leaf.
Slots: TypeAlias = Mapping[str, Stored]
#: What is stored where blocks of elements share a scale.
PARTS = ("codes", "scales")


def structure(codec: Codec) -> Any:  # noqa: ANN401 (JAX has no public type for it)
    """The tree structure of what is stored of a slot, the same for all leaves."""
    return jax.tree.structure(dict.fromkeys(PARTS, 0) if _structured(codec) else 0)


def _structured(codec: Codec) -> bool:
    return codec.scaled or (isinstance(codec, Uncoded) and codec.codec is not None and codec.codec.scaled)


def _parts(stored: Stored) -> tuple[jax.Array, jax.Array | None]:
    """Codes and scales."""
    return (stored["codes"], stored["scales"]) if isinstance(stored, dict) else (stored, None)


def used(codec: Codec, shape: tuple[int, ...]) -> Codec:
    """The codec that a leaf of a (real) shape is stored with: leaves without blocks are stored as they are."""
    return Uncoded(codec=codec) if codec.scaled and layout(shape) is None else codec


@functools.cache
def stored_spec(codec: Codec, shape: tuple[int, ...], dtype: np.dtype) -> Stored:
    """Shapes and dtypes of what is stored of an array, without making it."""
    return jax.eval_shape(functools.partial(store, codec), jax.ShapeDtypeStruct(shape, dtype))


def store(codec: Codec, x: jax.Array) -> Stored:
    """A whole array as it is stored, without random numbers."""
    codec, form = used(codec, x.shape), Form.of({"": codec}, x.shape)
    held = form.largest({"": codec.scale(x, None)}) if codec.scaled else {}
    scale = form.scale(held[""]) if held else None
    return form.stored({"": codec}, {"": Coded(codec.encode(x, scale))}, held)[""]


def load(codec: Codec, stored: Stored, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
    """The array of floating `dtype` and (real) `shape` that is stored."""
    codec = used(codec, shape)
    form = Form.of({"": codec}, shape)
    coded = form.coded({"": codec}, {"": stored})[""]
    return codec.decode(coded.codes, coded.scale, dtype)


@dataclasses.dataclass(frozen=True)
class Form:
    """The shape in which the elements of a leaf meet their scales: rows as they are, or split into blocks.

    Attributes:
      layout: of the leaf; None where nothing has scales.
      split: whether rows are split into blocks, all of which must be full.
    """

    layout: Layout | None
    split: bool = False

    @classmethod
    def of(cls, codecs: Codecs, shape: tuple[int, ...]) -> "Form":
        """Rows, of a leaf of a (real) shape."""
        return cls(layout(shape) if any(codec.scaled for codec in codecs.values()) else None)

    @property
    def blocks(self) -> Layout:
        assert self.layout is not None
        return self.layout

    def enter(self, x: jax.Array) -> jax.Array:
        """An array of the leaf's shape."""
        return self.blocks.split(x) if self.split else x

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        return self.blocks.merge(x) if self.split else x

    def scale(self, x: jax.Array) -> jax.Array:
        """Numbers of blocks, as they are stored, for their elements."""
        return self.blocks.split_scales(x) if self.split else self.blocks.spread(x)

    def largest(self, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The largest of each block."""
        return self.blocks.largest(x if self.split else {name: self.blocks.padded(y) for name, y in x.items()})

    def chances(self, codecs: Codecs, clock: Clock, part: Part | None = None) -> dict[str, jax.Array]:
        """Random numbers of the blocks for each slot that needs them, of their own for each leaf."""
        return {
            # Numbered as `jit` sorts them, so that a slot's number is the same outside.
            name: codecs[name].chance(even_bits(i, clock.count, clock.index, self.blocks.scales, part))
            for i, name in enumerate(sorted(codecs))
            if codecs[name].random and codecs[name].scaled and clock.index is not None
        }

    def coded(
        self,
        codecs: Codecs,
        stored: Slots,
        chances: Mapping[str, jax.Array] | None = None,
        pin: Callable[[Any], Any] = lambda x: x,
    ) -> dict[str, Coded]:
        """What is stored, in the shape of the elements; `pin` is applied to what is split, before anything else."""
        found = {}
        for name, x in stored.items():
            codes, scales = _parts(x)
            if not codecs[name].scaled:
                found[name] = Coded(self.enter(codes))
                continue
            assert scales is not None
            packed, chance = codecs[name].packed, (chances or {}).get(name)
            if self.split:
                codes, scales = pin((self.blocks.split_codes(codes, packed), self.scale(scales)))
                codes = self.blocks.unpack(codes, packed)
            else:
                codes, scales = self.blocks.unpack_rows(codes, packed), self.scale(scales)
            found[name] = Coded(codes, scales, None if chance is None else self.scale(chance))
        return found

    def row(self, codecs: Codecs, stored: Slots, chances: Mapping[str, jax.Array], i: jax.Array) -> dict[str, Coded]:
        """Row `i` of all blocks of what is stored."""
        found = {}
        for name, x in stored.items():
            codes, scales = _parts(x)
            if not codecs[name].scaled:
                found[name] = Coded(self.blocks.row(self.enter(codes), i))
                continue
            assert scales is not None
            packed, chance = codecs[name].packed, chances.get(name)
            codes = self.blocks.row(self.blocks.split_codes(codes, packed), i, packed)
            # Never negative, which XLA does not see: of what does not change in a loop it would make arrays beforehand.
            scales = self.scale(jnp.where(i < 0, 0, scales))
            found[name] = Coded(codes, scales, None if chance is None else self.scale(jnp.where(i < 0, 0, chance)))
        return found

    def share(
        self, codecs: Codecs, stored: Slots, chances: Mapping[str, jax.Array], i: int, packed: int
    ) -> dict[str, Coded]:
        """What is stored of the elements whose codes are the `i`-th in bytes of `packed` (`Layout.share`)."""
        found = {}
        for name, x in stored.items():
            codes, scales = _parts(x)
            own = codecs[name].packed == packed
            codes = nibble(codes, i, packed) if own else self.blocks.share(codes, i, packed)
            spread = [
                None if y is None or not codecs[name].scaled else self.blocks.spread(y, packed)
                for y in (scales, chances.get(name))
            ]
            found[name] = Coded(codes, *spread)
        return found

    def stored(self, codecs: Codecs, coded: Mapping[str, Coded], held: Mapping[str, jax.Array]) -> dict[str, Stored]:
        """The inverse of `coded`; `held` are the scales of the blocks by slot."""
        packed: dict[str, jax.Array] = {}
        for several in sorted({codecs[name].packed for name in coded} - {1}):
            pack = self.blocks.pack if self.split else self.blocks.pack_rows
            packed |= pack({name: x.codes for name, x in coded.items() if codecs[name].packed == several}, several)
        found: dict[str, Stored] = {}
        for name, x in coded.items():
            codes = packed[name] if name in packed else self.leave(x.codes)
            if codecs[name].scaled:
                found[name] = {"codes": codes, "scales": held[name]}
            else:
                found[name] = {"codes": codes, "scales": optax.MaskedNode()} if _structured(codecs[name]) else codes
        return found


def shaped(scalar: ArrayLike, x: jax.Array) -> jax.Array:
    """A scalar as an array that broadcasts to `x` without rank promotion."""
    return jnp.reshape(scalar, (1,) * x.ndim)
