"""The leaves of a tree by path, and masks over them: where structures meet, and errors name the leaf."""

import contextlib
import fnmatch
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

#: Any tree of JAX, of parameters, gradients or what else.
PyTree: TypeAlias = Any
#: A tree of booleans (a prefix will do), or a function of the parameters that returns one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]


def joined(keys: jax.tree_util.KeyPath) -> str:
    """Keys of dictionaries, attributes and indices joined by ``/``, all alike: ``layers/0/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def path_name(keys: jax.tree_util.KeyPath) -> str:
    """A leaf's path as patterns and users see it, everywhere: `joined`, without the ``.value`` of a boxed parameter."""
    return joined(keys[:-1] if keys and keys[-1] == jax.tree_util.GetAttrKey("value") else keys)


def shown(path: str) -> str:
    """A path in a sentence: that of a tree that is one leaf is empty."""
    return path or "the only leaf"


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path; nothing for None and `optax.MaskedNode`."""
    return {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


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
    if isinstance(mask, (str, type)):
        raise TypeError(
            f"{name} must be a tree of booleans or a function of the parameters, such as masks.path('*bias') or "
            f"masks.rank(2) of adam_fn.masks, got {mask!r}"
        )
    if mask is None or (callable(mask) and jax.tree_util.all_leaves([mask])):
        return mask

    def as_bool(keys: jax.tree_util.KeyPath, value: object) -> bool | None:
        if value is None or isinstance(value, (bool, np.bool_)):
            return None if value is None else bool(value)
        raise TypeError(f"{name} of {shown(path_name(keys))} must be a Python bool, got {value!r}")

    return TreeMask(jax.tree_util.tree_map_with_path(as_bool, mask, is_leaf=lambda x: x is None))


class Leaves:
    """The leaves of a tree by path, ``None`` included.

    Attributes:
      names: their paths as patterns see them.
      paths: the same as `shown` in errors.
    """

    def __init__(self, tree: PyTree) -> None:
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
        self.names = [path_name(keys) for keys, _ in flat]
        self.paths = [shown(name) for name in self.names]
        self.leaves = [leaf for _, leaf in flat]

    def match(self, tree: PyTree, what: str, of: str) -> list[Any]:
        """What stands in `tree` at this tree's leaves, or an error that names the first path that differs."""
        try:
            found = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            where = difference(self.treedef.unflatten(self.leaves), tree) or str(error)
            raise ValueError(f"{what} must have the structure of {of}: {where}") from error
        for path, x in zip(self.paths, found, strict=True):
            if x is not None and not isinstance(x, optax.MaskedNode) and not jax.tree_util.all_leaves([x]):
                raise ValueError(
                    f"{what} must have the structure of {of}: {path} is a {type(x).__name__}, not an array"
                )
        return found

    def spread(self, name: str, mask: Mask, tree: PyTree) -> list[bool]:
        """One boolean per leaf."""
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
                raise TypeError("it is None in place of a parameter")
            found.extend([bool(value)] * len(leaves))

        try:
            jax.tree.map(add, mask.tree, tree, is_leaf=lambda x: x is None)
        except (ValueError, TypeError) as error:
            below = [f"/{name}/" for name in self.names]
            extra = [x for x in Leaves(mask.tree).names if x and not any(y.startswith(f"/{x}/") for y in below)]
            where = f"{extra[0]} is not a parameter" if extra else _other_container(tree, mask.tree) or str(error)
            raise ValueError(f"{name} must have the structure of the parameters or a prefix of it: {where}") from error
        return found


def _containers(tree: PyTree, keys: jax.tree_util.KeyPath = ()) -> Iterator[tuple[str, type]]:
    """The type of every node of a tree that is no leaf, by path, from the outside in."""
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree or x is None)
    if not jax.tree_util.treedef_is_leaf(treedef):
        yield shown(path_name(keys)), type(tree)
        for key, child in children:
            yield from _containers(child, (*keys, *key))


def _other_container(ours: PyTree, theirs: PyTree) -> str | None:
    """Where trees whose leaves have the same paths differ all the same."""
    kinds = dict(_containers(ours))
    for path, kind in _containers(theirs):
        if kinds.get(path, kind) is not kind:
            return f"{path} is a {kind.__name__}, not a {kinds[path].__name__}"
    return None


def difference(ours: PyTree, theirs: PyTree) -> str | None:
    """The first path at which `theirs` differs in structure from `ours`, in words; None where that is in no path."""
    expected, found = Leaves(ours).paths, Leaves(theirs).paths
    if missing := [path for path in expected if path not in found]:
        return f"{missing[0]} is missing"
    if extra := [path for path in found if path not in expected]:
        return f"{extra[0]} is not there"
    return _other_container(ours, theirs)


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
            listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ValueError(f"the pattern {pattern!r} matches no parameter; their paths are {listed}")
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
