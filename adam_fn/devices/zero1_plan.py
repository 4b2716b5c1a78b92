"""Plans where `zero1` (zero1.py) puts the parameters and their state, once, from shapes and shardings."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from adam_fn.trees.layout import Division, Shape, StateLayout, check_mesh, device_count, divided, division
from adam_fn.trees.leaves import PyTree, display_path, within

#: Leaves of fewer elements are not worth a warning.
SMALL = 4096


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a parameter on the mesh.

    Attributes:
      path: its name in errors.
      shape: its whole shape.
      sharding: its sharding between the steps.
      step_sharding: its sharding during a step; equal to `sharding` if it is not divided further.
      axis: the axis along which it is divided further, or None.
    """

    path: str
    shape: Shape
    sharding: NamedSharding
    step_sharding: NamedSharding
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Tree:
    """A tree of hashable leaves, compared by value."""

    leaves: tuple[Any, ...]
    treedef: Any  # JAX has no public type for it.

    def tree(self) -> PyTree:
        return self.treedef.unflatten(self.leaves)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of `zero1` for all leaves.

    Attributes:
      places: a `Place` for each parameter, or None.
      state: the shardings of the state.
      undivided: path and number of elements of each parameter whose state is not divided.
    """

    places: Tree
    state: Tree
    undivided: tuple[tuple[str, int], ...]

    def part(self, tx: optax.GradientTransformation, params: PyTree, mesh: Mesh) -> "Plan":
        """The plan for parts of the parameters along their first axes, such as one layer; None for the others."""
        places: list[Place | None] = []
        for place, x in zip(self.places.leaves, self.places.treedef.flatten_up_to(params), strict=True):
            if place is not None and x is not None and place.axis == 0 and x.shape[:1] != place.shape[:1]:
                raise ValueError(
                    f"zero1 divides {place.path} along the axis of the layers: give it layers=…, the path of the layers"
                )
            places.append(None if place is None or x is None else dataclasses.replace(place, shape=x.shape))
        over = [() if place is None else division(place.step_sharding, len(place.shape)) for place in places]
        leaves, treedef = jax.tree.flatten(StateLayout(tx, params).shardings(mesh, over))
        return Plan(Tree(tuple(places), self.places.treedef), Tree(tuple(leaves), treedef), ())


def plan(
    tx: optax.GradientTransformation, params: PyTree, mesh: Mesh, names: Sequence[str], layers: str | None = None
) -> Plan:
    """Plans how to divide the state of `tx` over axes of a mesh; warns of large leaves that stay whole.

    The first axis of parameters at the path `layers` is not divided.
    """
    slots = StateLayout(tx, params)
    stored = [False] * len(slots.shapes)
    slots.map(lambda i, _: stored.__setitem__(i, True), lambda _: None)
    places: list[Place | None] = []
    whole: dict[str, Shape] = {}
    names_ = slots.leaves.names
    stacked = [False] * len(names_) if layers is None else within(names_, layers)
    for path, x, p, kept, start in zip(names_, slots.leaves.leaves, slots.shapes, stored, stacked, strict=True):
        if p is None:
            places.append(None)
            continue
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            check_mesh("zero1", display_path(path), sharding, mesh)
        own = division(sharding, len(p.shape))
        free = not any(set(names) & set(other) for other in own)
        place = divided(mesh, own)
        found = first_axis(mesh, names, own, p.shape, start) if kept and free else None
        if found is None:
            places.append(Place(display_path(path), p.shape, place, place))
            if kept and free:
                whole[path] = p.shape
        else:
            spread = divided(mesh, (*own[:found], (*own[found], *names), *own[found + 1 :]))
            places.append(Place(display_path(path), p.shape, place, spread, found))
    large = [f"{display_path(path)} of shape {shape}" for path, shape in whole.items() if math.prod(shape) >= SMALL]
    if large:
        warnings.warn(
            f"zero1: the state of {', '.join(large)} stays whole on each of the {device_count(mesh, names)} devices of "
            f"{' and '.join(map(repr, names))}: no axis can be divided evenly among them",
            stacklevel=3,
        )
    over = [() if place is None else division(place.step_sharding, len(place.shape)) for place in places]
    leaves, treedef = jax.tree.flatten(slots.shardings(mesh, over))
    sizes = tuple((path, math.prod(shape)) for path, shape in whole.items())
    tree = Tree(tuple(places), slots.leaves.treedef)
    return Plan(tree, Tree(tuple(leaves), treedef), sizes)


def first_axis(mesh: Mesh, names: Sequence[str], own: Division, shape: Shape, start: int) -> int | None:
    """The first axis from `start` on along which a leaf can be divided further, or None."""
    parts = [device_count(mesh, (*own[axis], *names)) for axis in range(len(shape))]
    return next((axis for axis in range(start, len(shape)) if shape[axis] and shape[axis] % parts[axis] == 0), None)
