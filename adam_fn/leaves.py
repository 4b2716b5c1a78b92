"""The leaves of a tree by path, and masks over them: where structures meet, and errors name the leaf."""

import contextlib
import fnmatch
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

PyTree: TypeAlias = Any
#: Which leaves: a tree of booleans (a prefix will do), or a function of the parameters that returns one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]


class TreeMask(Hashable):
    """A tree of booleans, compared by value and hashable, so that it can be compiled in."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree
        self._key = jax.tree.flatten(tree, is_leaf=lambda x: x is None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((tuple(self._key[0]), self._key[1]))

    def __reduce__(self) -> tuple[type["TreeMask"], tuple[PyTree]]:
        return TreeMask, (self.tree,)


def fixed_mask(name: str, mask: Mask | None) -> Hashable:
    """The mask in a hashable form. A callable that is a pytree (an Equinox module of booleans) is a tree."""
    if mask is None or (callable(mask) and jax.tree_util.all_leaves([mask])):
        return mask

    def as_bool(path: jax.tree_util.KeyPath, value: object) -> bool | None:
        if value is None or isinstance(value, (bool, np.bool_)):
            return None if value is None else bool(value)
        raise TypeError(f"{name}{jax.tree_util.keystr(path)} must be a Python bool, got {value!r}")

    return TreeMask(jax.tree_util.tree_map_with_path(as_bool, mask, is_leaf=lambda x: x is None))


class Leaves:
    """The leaves of a tree by path, ``None`` included."""

    def __init__(self, tree: PyTree) -> None:
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
        self.paths = [jax.tree_util.keystr(path) or "the only leaf" for path, _ in flat]
        self.leaves = [leaf for _, leaf in flat]

    def match(self, tree: PyTree, what: str, of: str) -> list[Any]:
        """The subtrees of `tree` at this tree's leaves, or an error that names the first path that differs."""
        try:
            return self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            theirs = Leaves(tree).paths
            missing = [path for path in self.paths if path not in theirs]
            extra = [path for path in theirs if path not in self.paths]
            difference = f"{missing[0]} is missing" if missing else f"{extra[0]} is not there" if extra else str(error)
            raise ValueError(f"{what} must have the structure of {of}: {difference}") from error

    def spread(self, name: str, mask: Mask, tree: PyTree) -> list[bool]:
        """One boolean a leaf."""
        if not self.leaves:  # A placeholder for the parameters, as of `optax.tree_map_params`.
            return []
        if callable(mask):
            mask = fixed_mask(name, mask(tree))
        if not isinstance(mask, TreeMask):
            raise TypeError(f"{name} must return a tree of booleans, got {mask!r}")
        found: list[bool] = []

        def add(value: bool | None, below: PyTree) -> None:
            leaves = Leaves(below).leaves
            if value is None and any(leaf is not None for leaf in leaves):
                raise TypeError("None stands for a parameter")
            found.extend([bool(value)] * len(leaves))

        try:
            jax.tree.map(add, mask.tree, tree, is_leaf=lambda x: x is None)
        except (ValueError, TypeError) as error:
            theirs = Leaves(mask.tree).paths
            extra = [path for path in theirs if not any(ours.startswith(path) for ours in self.paths)]
            where = f"{extra[0]} is not a parameter" if extra else str(error)
            raise ValueError(f"{name} must have the structure of the parameters or a prefix of it: {where}") from error
        return found


def path_name(keys: jax.tree_util.KeyPath) -> str:
    """A leaf's path as patterns see it: its keys joined by ``/``, without the ``.value`` of a boxed parameter."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def matches(patterns: Sequence[str], tree: PyTree) -> list[tuple[str, list[bool]]]:
    """The name of each leaf, None included, and which of the patterns match it.

    A pattern that matches nothing is an error. What `optax.masked` took out of the tree can still be matched.
    """

    def is_leaf(x: object) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    names = [path_name(keys) for keys, _ in flat]
    for pattern in patterns if flat else ():  # Without leaves it is a placeholder, as of `optax.tree_map_params`.
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ValueError(f"the pattern {pattern!r} matches no parameter; their paths are {shown}")
    return [
        (name, [fnmatch.fnmatchcase(name, pattern) for pattern in patterns])
        for name, (_, leaf) in zip(names, flat, strict=True)
        if not isinstance(leaf, optax.MaskedNode)
    ]


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Adds to an error the leaf that it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"adam_fn: this is about the leaf {path}")
        raise
