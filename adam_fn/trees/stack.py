"""Parameters and a state of which a part belongs to layers that are stacked along a first axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_fn.trees.layout import owners
from adam_fn.trees.leaves import Leaves, PyTree, display_path, join_keys


class Stack:
    """Parameters and state, and which of their arrays belong to the stacked layers."""

    def __init__(self, tx: optax.GradientTransformation, params: PyTree, state: PyTree, path: str, every: int) -> None:
        self.leaves = Leaves(params)
        self.path, self.every = path, every
        self.inside = [name == path or name.startswith(f"{path}/") for name in self.leaves.names]
        lengths = {
            display_path(name): jnp.shape(p)[0] if jnp.ndim(p) else None
            for name, p, inside in zip(self.leaves.names, self.leaves.leaves, self.inside, strict=True)
            if inside and p is not None
        }
        if not lengths:
            raise ValueError(f"layers={path!r} names no parameters; there are {', '.join(self.leaves.paths)}")
        if len({*lengths.values()}) > 1 or None in lengths.values():
            raise ValueError(f"the first axes of stacked layers must have one length, got {lengths}")
        self.length: int = next(iter(lengths.values())) or 0
        if self.length % every:
            raise ValueError(f"keep_every={every} does not divide the number of layers, {self.length}")
        self.state, self.treedef = jax.tree.flatten(state)
        owned = owners(tx, params)
        if jax.tree.structure(owned) != self.treedef:
            raise ValueError("the state does not have the structure of tx.init(params)")
        self.owners: list[int] = jax.tree.leaves(owned)

    def numbers(self) -> tuple[list[int], list[int], list[int]]:
        """The numbers of the arrays of the state that belong to no parameter, to the layers, and to the others."""
        kinds = [0 if owner < 0 else 1 if self.inside[owner] else 2 for owner in self.owners]
        shared, layers, others = ([k for k, own in enumerate(kinds) if own == kind] for kind in range(3))
        return shared, layers, others

    def axis(self, k: int) -> int:
        """The axis of the layers in an array of the state: that of two reals stands before it."""
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
