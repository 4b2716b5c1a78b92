"""Parameters and a state of which a part belongs to layers that are stacked along a first axis."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from adam_fn.trees.layout import owners
from adam_fn.trees.leaves import Leaves, PyTree, display_path, join_keys, within


@dataclasses.dataclass(frozen=True)
class Undivided:
    """Steps parameters without dividing them. It has the interface of `Zero1`, which divides them first."""

    tx: optax.GradientTransformation

    def part(self, params: PyTree) -> Self:
        """Returns this object for a subset of the parameters, or for slices of them.

        `params` has the whole tree's structure: shapes, and None for what is left out.
        """
        return self

    def init(self, params: PyTree) -> PyTree:
        return self.tx.init(params)

    def read(self, params: PyTree, *, vary: bool = False) -> PyTree:
        return params

    def enter(self, grads: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return grads, params

    def run(
        self, step: Callable[..., Any], grads: PyTree, params: PyTree, state: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        return step(grads, state, params, **extra_args)

    def leave(self, results: PyTree) -> PyTree:
        return results

    def settle(self, params: PyTree, state: dict[int, jax.Array]) -> tuple[PyTree, dict[int, jax.Array]]:
        return params, state


class Stack:
    """Parameters and state, and which of their arrays belong to the stacked layers."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: PyTree,
        state: PyTree,
        path: str,
        every: int,
        init: Callable[[PyTree], PyTree],
    ) -> None:
        """`init(shapes)` returns the state of some parameters, as shapes; the others are None in `shapes`."""
        self.leaves = Leaves(params)
        self.path, self.every = path, every
        self.inside = within(self.leaves.names, path)
        lengths = {
            display_path(name): jnp.shape(p)[0] if jnp.ndim(p) else None
            for name, p, inside in zip(self.leaves.names, self.leaves.leaves, self.inside, strict=True)
            if inside and p is not None
        }
        if len({*lengths.values()}) != 1 or None in lengths.values():
            raise ValueError(f"the first axes of stacked layers must have one length, got {lengths}")
        self.length: int = next(iter(lengths.values())) or 0
        if self.length % every:
            raise ValueError(f"keep_every={every} does not divide the number of layers, {self.length}")
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(state)
        self.names, self.state = [join_keys(keys) for keys, _ in flat], [x for _, x in flat]
        owned = owners(tx, params)
        if jax.tree.structure(owned) != self.treedef:
            raise ValueError("the state does not have the structure of tx.init(params)")
        self.owners: list[int] = jax.tree.leaves(owned)
        kinds = ["shared" if i < 0 else "layers" if self.inside[i] else "others" for i in self.owners]
        self.one, self.rest = self._parts()
        self._find_fixed(init, kinds)
        self.shared, self.of_layers, self.others, self.fixed = (
            [k for k, own in enumerate(kinds) if own == kind] for kind in ("shared", "layers", "others", "fixed")
        )

    def _parts(self) -> tuple[PyTree, PyTree]:
        """The shapes of one layer, with a first axis of length 1, and those of all other parameters."""

        def one(inside: bool, p: Any) -> Any:  # noqa: ANN401
            return (
                jax.ShapeDtypeStruct((1, *jnp.shape(p)[1:]), jnp.result_type(p)) if inside and p is not None else None
            )

        tree = self.leaves.treedef.unflatten(map(one, self.inside, self.leaves.leaves))
        rest = self.leaves.treedef.unflatten(
            None if inside or p is None else jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p))
            for inside, p in zip(self.inside, self.leaves.leaves, strict=True)
        )
        return tree, rest

    def _find_fixed(self, init: Callable[[PyTree], PyTree], kinds: list[str]) -> None:
        """Compares the state with those of one layer and of the other parameters, and raises if they do not fit.

        Marks as "fixed", in `kinds`, the layers' arrays that have no layer axis and the same shape for one layer.
        """
        for part, left_out in ((self.one, "others"), (self.rest, "layers")):
            found = jax.tree.leaves(init(part))
            numbers = [
                k for k, kind in enumerate(kinds) if kind != left_out and (left_out == "others" or kind != "fixed")
            ]
            if len(found) != len(numbers):
                raise ValueError("tx.init gives another state for a part of the parameters than for all of them")
            for k, x in zip(numbers, found, strict=True):
                shape, dtype = jnp.shape(self.state[k]), jnp.result_type(self.state[k])
                if kinds[k] == "layers":
                    axis = self.axis(k)
                    if shape[axis : axis + 1] == (self.length,) and (*shape[:axis], 1, *shape[axis + 1 :]) == x.shape:
                        shape = x.shape
                    elif shape == x.shape:
                        kinds[k] = "fixed"
                if (shape, dtype) != (x.shape, x.dtype):
                    raise ValueError(
                        f"the state's {self.names[k]} is {dtype}{list(shape)}, and {x.dtype}{list(x.shape)} for a part "
                        "of the parameters: it cannot be stepped layer by layer"
                    )

    def axis(self, k: int) -> int:
        """The layers' axis in state array k: 1 if axis 0 is the real and imaginary part of complex numbers, else 0."""
        p = self.leaves.leaves[self.owners[k]]
        return int(jnp.iscomplexobj(p) and jnp.ndim(self.state[k]) == jnp.ndim(p) + 1)

    def tree(self, inside: Sequence[Any] | None, outside: Sequence[Any] | None) -> PyTree:
        """A tree of the parameters' structure, with None for what is not given."""
        given = [iter(inside or ()), iter(outside or ())]
        lists = (inside, outside)
        return self.leaves.treedef.unflatten(
            None if lists[not own] is None or p is None else next(given[not own])
            for own, p in zip(self.inside, self.leaves.leaves, strict=True)
        )

    def split(self, tree: PyTree) -> tuple[list[Any], list[Any]]:
        """The leaves of the layers, and the others, of a tree of the parameters' structure."""
        rows = list(zip(self.inside, self.leaves.align(tree, "the results", "the parameters"), strict=True))
        kept = [[x for inside, x in rows if inside == own and x is not None] for own in (True, False)]
        return kept[0], kept[1]

    def layer(self, slices: Sequence[Any]) -> PyTree:
        """The parameters of one layer, from their slices."""
        node, left = self.tree([squeezed(x) for x in slices], None), self.path
        while left:
            for key, child in children_of(node):
                if left == key or left.startswith(f"{key}/"):
                    node, left = child, left[len(key) + 1 :]
                    break
            else:
                raise ValueError(f"layers={self.path!r} is not the path of one node of the parameters")
        return node


def children_of(node: PyTree) -> list[tuple[str, PyTree]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(join_keys(keys), child) for keys, child in pairs if keys]


def squeezed(x: Any) -> Any:  # noqa: ANN401
    return jnp.reshape(x, x.shape[1:])
