"""The storages that have a name, 64, 32, 24 or 16 bits of Adam's state per parameter, and the codecs of any storage."""

import typing
from collections.abc import Mapping
from typing import Literal, TypeAlias

from adam_fn.algebra.slots import Slot
from adam_fn.storage.codec import Cast, Codec
from adam_fn.storage.mu_law_8bit import MuLaw
from adam_fn.storage.word_16bit import WORD, Word

#: The name of a storage, ``"float32"``, ``"bfloat16"``, ``"24bit"`` or ``"16bit"``. The last two count the bits of
#: Adam's two moments of a parameter.
StorageName: TypeAlias = Literal["float32", "bfloat16", "24bit", "16bit"]
#: A storage of moments, given as a name, a codec for all slots, or codecs by the names of the stored arrays.
StorageLike: TypeAlias = StorageName | Codec | Mapping[str, Codec]


def named(storage: StorageName, slots: Mapping[str, Slot]) -> dict[str, Codec]:
    """The codecs of a named storage, by the names of the stored arrays."""
    if storage in {"float32", "bfloat16"}:
        return dict.fromkeys(slots, Cast(storage))
    bounded = {name for name, slot in slots.items() if slot.signed and slot.bound is not None}
    found: dict[str, Codec] = {name: MuLaw() if name in bounded else Cast("bfloat16") for name in slots}
    if storage == "16bit" and "mu" in bounded and "nu" in slots:
        return {WORD: Word(), **{name: codec for name, codec in found.items() if name not in Word.slots}}
    return found


def by_stored_array(storage: StorageLike | None, slots: Mapping[str, Slot]) -> Mapping[str, Codec]:
    """The codecs that a storage names, by the names of the stored arrays."""
    if storage is None:
        return {}
    if isinstance(storage, Codec):
        return dict.fromkeys(slots, storage)
    if isinstance(storage, Mapping):
        return storage
    if storage in typing.get_args(StorageName):
        return named(storage, slots)
    kind = ValueError if isinstance(storage, str) else TypeError
    raise kind(
        f"storage must be one of {list(typing.get_args(StorageName))}, a codec such as Cast('bfloat16'), or a mapping "
        f"from slot names to codecs, got {storage!r}"
    )


def codecs_of(storage: StorageLike | None, slots: Mapping[str, Slot]) -> tuple[tuple[str, Codec], ...]:
    """The codec of each stored array. Every slot is in exactly one; slots without a codec are stored as computed.

    Raises an error for anything that is not a storage, for unknown slots and for codecs that do not suit a slot.
    """
    asked = by_stored_array(storage, slots)
    for name, codec in asked.items():
        if not isinstance(codec, Codec):
            raise TypeError(f"storage[{name!r}] must be a codec, such as Cast('bfloat16') or MuLaw(), got {codec!r}")
        if name not in slots and name != WORD:
            raise ValueError(f"storage names {name!r}, but the slots are {', '.join(slots) or 'none'}")
    found = {name: codec.for_slot(name, slots) for name, codec in asked.items()}
    covered = [slot for codec in found.values() for slot in codec.slots]
    if twice := sorted({slot for slot in covered if covered.count(slot) > 1}):
        raise ValueError(f"storage says twice how {', '.join(twice)} is stored")
    order = [*found, *(name for name in slots if name not in covered)]
    return tuple((name, found[name] if name in found else Cast().for_slot(name, slots)) for name in order)
