"""The leaves of a tree by path, and masks over them: structures are compared here, and errors name the leaf."""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

#: Any tree of JAX, such as one of parameters or gradients.
PyTree: TypeAlias = Any
#: A tree of booleans (a prefix will do), or a function of the parameters that returns one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]


def join_keys(keys: jax.tree_util.KeyPath) -> str:
    """Keys of dictionaries, attributes and indices joined by ``/``, all alike: ``layers/0/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def within(names: Sequence[str], path: str) -> list[bool]:
    """Whether each leaf, by its name, is at a path or below it; if none is, that is a ValueError."""
    found = [name == path or name.startswith(f"{path}/") for name in names]
    if not any(found):
        raise ValueError(f"layers={path!r} names no parameters; there are {', '.join(map(display_path, names[:8]))}")
    return found


#: The classes, with their packages, in which frameworks box an array: the ``value`` in a box is not part of a path.
_BOXES = {("flax", "AxisMetadata"), ("flax", "Variable"), ("flax", "VariableState"), ("penzai", "ParameterValue")}


@functools.cache
def _is_box(kind: type) -> bool:
    return any((base.__module__.partition(".")[0], base.__name__) in _BOXES for base in kind.__mro__)


def _unbox(*trees: PyTree) -> str:
    """Advice for an error about trees of which one has boxes and another has none, or other ones."""
    nodes = jax.tree.leaves(trees, is_leaf=lambda x: _is_box(type(x)))
    return "; pass nnx.as_pure(…) of trees with variables of NNX" if any(_is_box(type(x)) for x in nodes) else ""


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves with their paths as patterns, errors and users see them: without the ``value`` of boxes."""

    def stops(x: object) -> bool:
        return _is_box(type(x)) or (is_leaf is not None and is_leaf(x))

    found: list[tuple[str, Any]] = []
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)[0]:
        if not _is_box(type(node)):
            found.append((join_keys(keys), node))
            continue
        for inner, leaf in jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)[0]:
            own = inner[1:] if inner and inner[0] == jax.tree_util.GetAttrKey("value") else inner
            found.append((join_keys((*keys, *own)), leaf))
    return found


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps a tree by a `function` of the path and the value of each leaf."""
    return jax.tree.structure(tree).unflatten(function(name, leaf) for name, leaf in named_leaves(tree))


def check_distinct(names: Iterable[str | None]) -> None:
    """Raises if two leaves have the same path, where leaves must be told apart by it."""
    known = [name for name in names if name is not None]
    if twice := [name for name in dict.fromkeys(known) if known.count(name) > 1]:
        raise ValueError(f"two leaves have the same path, {twice[0]}: rename a key that contains '/'")


def display_path(path: str) -> str:
    """A path in a sentence, since the path of a tree that is one leaf is empty."""
    return path or "the only leaf"


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, without None and `optax.MaskedNode`."""
    found = named_leaves(tree)
    check_distinct(name for name, _ in found)
    return dict(found)


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
    """The mask in a hashable form. A callable that is a pytree (an Equinox module of booleans) counts as a tree."""
    if isinstance(mask, (str, type)):
        raise TypeError(
            f"{name} must be a tree of booleans or a function of the parameters, such as masks.path('*bias') or "
            f"masks.rank(2) of adam_fn.masks, got {mask!r}"
        )
    if mask is None or (callable(mask) and jax.tree_util.all_leaves([mask])):
        return mask

    leaves = Leaves(mask)
    for path, value in zip(leaves.paths, leaves.leaves, strict=True):
        if isinstance(value, str):
            raise TypeError(f"{name}: a list of patterns is not a mask: use adam_fn.masks.path({value!r})")
        if value is not None and not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} of {path} must be a Python bool, got {value!r}")
    return TreeMask(leaves.treedef.unflatten(None if value is None else bool(value) for value in leaves.leaves))


def arrays_of(tree: PyTree) -> PyTree:
    """Replaces Flax's mutable variables by their arrays, and things that are not arrays by None.

    Such things are the functions in an Equinox model. A variable of Flax is a leaf if it is one of JAX's mutable types
    (``hijax=True``), and otherwise a container.
    """

    def is_array(x: object) -> bool:
        return isinstance(x, (jax.Array, np.ndarray, bool, int, float, complex))

    def array(x: Any) -> Any:  # noqa: ANN401
        if hasattr(x, "get_value"):
            return x.get_value()
        return x if hasattr(x, "dtype") else None

    if all(map(is_array, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: x if is_array(x) else array(x), tree)


class Leaves:
    """The leaves of a tree by path, ``None`` included.

    Attributes:
      names: their paths as patterns see them.
      paths: their paths as errors show them; see `display_path`.
    """

    def __init__(self, tree: PyTree) -> None:
        flat = named_leaves(tree, is_leaf=lambda x: x is None)
        self.treedef = jax.tree.structure(tree, is_leaf=lambda x: x is None)
        self.names = [name for name, _ in flat]
        self.paths = [display_path(name) for name in self.names]
        self.leaves = [leaf for _, leaf in flat]

    def align(self, tree: PyTree, what: str, of: str) -> list[Any]:
        """Returns the parts of `tree` at this tree's leaves, or raises an error with the first path that differs."""
        try:
            found = self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            own = self.treedef.unflatten(self.leaves)
            where = difference(own, tree) or str(error)
            raise ValueError(f"{what} must have the structure of {of}: {where}{_unbox(own, tree)}") from error
        for path, x in zip(self.paths, found, strict=True):
            if x is not None and not isinstance(x, optax.MaskedNode) and not jax.tree_util.all_leaves([x]):
                raise ValueError(
                    f"{what} must have the structure of {of}: {path} is a {type(x).__name__}, not an array{_unbox(x)}"
                )
        return found

    def broadcast_mask(self, name: str, mask: Mask, tree: PyTree) -> list[bool]:
        """A mask as one boolean per leaf."""
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
            other = _other_container(tree, mask.tree) or (
                f"the static data of their containers differ ({jax.tree.structure(mask.tree)})"
                if isinstance(error, ValueError) and Leaves(mask.tree).names == self.names
                else str(error)
            )
            where = f"{extra[0]} is not a parameter" if extra else other
            raise ValueError(f"{name} must have the structure of the parameters or a prefix of it: {where}") from error
        return found


def _containers(tree: PyTree, keys: jax.tree_util.KeyPath = ()) -> Iterator[tuple[str, type]]:
    """The path and the type of every node of a tree that is not a leaf, from the outside in."""
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree or x is None)
    if not jax.tree_util.treedef_is_leaf(treedef):
        yield join_keys(keys) or "the tree", type(tree)
        for key, child in children:
            yield from _containers(child, (*keys, *key))


def _other_container(ours: PyTree, theirs: PyTree) -> str | None:
    """The first container whose type differs, for trees with equal leaf paths."""
    kinds = dict(_containers(ours))
    for path, kind in _containers(theirs):
        if kinds.get(path, kind) is not kind:
            return f"{path} is a {kind.__name__}, not a {kinds[path].__name__}"
    return None


def difference(ours: PyTree, theirs: PyTree) -> str | None:
    """Describes the first path at which the structure of `theirs` differs from `ours`; None if no path differs."""
    expected, found = Leaves(ours).paths, Leaves(theirs).paths
    if missing := [path for path in expected if path not in found]:
        return f"{missing[0]} is missing"
    if extra := [path for path in found if path not in expected]:
        return f"{extra[0]} is not there"
    return _other_container(ours, theirs)


def match_patterns(patterns: Sequence[str], tree: PyTree) -> list[tuple[str, list[bool]]]:
    """The path of each leaf, None included, and whether each of the patterns matches it.

    A pattern that matches nothing is an error. Leaves that `optax.masked` took out of the tree can be matched too.
    """

    def is_leaf(x: object) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    flat = named_leaves(tree, is_leaf)
    names = [name for name, _ in flat]
    for pattern in patterns if flat else ():  # No leaves: a placeholder, as of `optax.tree_map_params`.
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            slashes = pattern.replace(".", "/")
            meant = [x for x in (f"{pattern}/*", slashes, f"{slashes}/*") if fnmatch.filter(names, x)]
            hint = f"; did you mean {meant[0]!r}?" if meant else ""
            raise ValueError(f"the pattern {pattern!r} matches no parameter; their paths are {listed}{hint}")
    return [
        (name, [fnmatch.fnmatchcase(name, pattern) for pattern in patterns])
        for name, leaf in flat
        if not isinstance(leaf, optax.MaskedNode)
    ]


@contextlib.contextmanager
def leaf_in_errors(path: str) -> Iterator[None]:
    """Adds a note to errors that names the leaf that they are about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"adam_fn: this is about the leaf {path}")
        raise


def is_masked(x: object) -> bool:
    """Whether this is what a state has in the place of an array of a leaf that is not trained."""
    return isinstance(x, optax.MaskedNode)


def element_masks(leaves: Leaves, params: PyTree, where: PyTree) -> list[jax.Array]:
    """A boolean for each leaf, or a boolean array that broadcasts to it."""
    if isinstance(where, str):
        return [jnp.asarray(hit[0]) for _, hit in match_patterns([where], params)]
    found = leaves.align(where(params) if callable(where) else where, "where", "the parameters")
    for path, p, x in zip(leaves.paths, leaves.leaves, found, strict=True):
        if p is None or x is None:
            continue
        if not jnp.issubdtype(jnp.result_type(x), jnp.bool_):
            raise ValueError(f"where of {path} is {jnp.result_type(x)}, expected booleans")
        try:
            fits = np.broadcast_shapes(jnp.shape(x), jnp.shape(p)) == jnp.shape(p)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"where of {path} has shape {jnp.shape(x)}, which does not broadcast to {jnp.shape(p)}")
    return [jnp.zeros((), bool) if x is None else jnp.asarray(x) for x in found]
