"""The forms of a state: one member for each set of slots; and how a matrix may lie on a mesh."""

import math
from typing import Any

import jax
import pytest
from cases import MEMBERS
from jax.sharding import AxisType, Mesh, PartitionSpec

#: Together they use all codecs. Members with the same slots differ only in arithmetic.
BY_SLOTS = tuple({frozenset(case.member.slots): case for case in MEMBERS}.values())
SPECS = {
    "last": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
    "stacked": PartitionSpec(("data", "model")),
    "none": PartitionSpec(),
}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def mesh_of(kind: AxisType = AxisType.Auto, shape: tuple[int, ...] = (8,)) -> Mesh:
    """A mesh of this shape, with as many of the eight devices as it has places."""
    axes = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, axes, (kind,) * len(shape), devices=jax.devices()[: math.prod(shape)])


def assert_placed(found: Any, places: Any) -> None:
    """Asserts that each array has the sharding and memory of its counterpart, which is a sharding or an array."""
    for (path, x), place in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(places), strict=True):
        expected = getattr(place, "sharding", place)
        assert x.sharding.is_equivalent_to(expected, x.ndim), (path, x.sharding)
        assert x.sharding.memory_kind == expected.memory_kind, path
