"""Slots: the numbers that a rule keeps for each element between the steps."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax

#: The slots of a leaf, by name.
Slots: TypeAlias = Mapping[str, jax.Array]


class Unit(NamedTuple):
    """The unit of a slot: another slot of the same element, or its square root."""

    slot: str
    root: bool = True


class Slot(NamedTuple):
    """A number that a rule keeps for each element.

    Attributes:
      initial: its value before the first step.
      signed: whether it can become negative.
      bound: the largest magnitude that it can have, in its unit, whatever the gradients are; None if it is unbounded.
      unit: the unit of the bound; None for plain numbers.
    """

    initial: float = 0.0
    signed: bool = True
    bound: float | None = None
    unit: Unit | None = None
