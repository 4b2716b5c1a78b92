"""The forms of a state: one member for each set of slots; and how a matrix may lie on a mesh."""

import math
from typing import Any

import jax
import pytest
from cases import MEMBERS
from jax.sharding import AxisType, Mesh, PartitionSpec

#: All codecs are among theirs. Members with the same slots differ in arithmetic alone.
BY_SLOTS = tuple({frozenset(case.member.slots): case for case in MEMBERS}.values())
SPECS = {
    "last": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
    "stacked": PartitionSpec(("data", "model")),
    "none": PartitionSpec(),
}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def mesh_of(kind: AxisType = AxisType.Auto, shape: tuple[int, ...] = (8,)) -> Mesh:
    """As many of the eight devices as the shape has places."""
    axes = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, axes, (kind,) * len(shape), devices=jax.devices()[: math.prod(shape)])


def assert_placed(found: Any, places: Any) -> None:
    """Each array has the sharding, and is in the memory, of the sharding or the array in its place."""
    for (path, x), place in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(places), strict=True):
        expected = getattr(place, "sharding", place)
        assert x.sharding.is_equivalent_to(expected, x.ndim), (path, x.sharding)
        assert x.sharding.memory_kind == expected.memory_kind, path
