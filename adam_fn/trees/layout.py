"""The layout of a state: which arrays belong to which parameter, and how they are divided over a mesh."""

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from adam_fn.trees.functions import owner_of
from adam_fn.trees.leaves import Leaves, PyTree

Shape: TypeAlias = tuple[int, ...]
#: The axes of a mesh that each axis of an array is divided over.
Division: TypeAlias = tuple[tuple[str, ...], ...]
T = TypeVar("T")

#: Whether an `init` is called only to find which arrays belong to which parameter.
finding_layout: contextvars.ContextVar[bool] = contextvars.ContextVar("finding_layout", default=False)


def division(sharding: Sharding | None, rank: int) -> Division:
    """The division of an array; one that is not on a mesh counts as whole."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    found = [() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in spec]
    return tuple(found + [()] * (rank - len(found)))


def divided(mesh: Mesh, over: Division) -> NamedSharding:
    """The sharding with a division: the inverse of `division`."""
    spec = (None if not names else names[0] if len(names) == 1 else names for names in over)
    return NamedSharding(mesh, PartitionSpec(*spec))


def device_count(mesh: Mesh, names: Sequence[str]) -> int:
    """The number of devices along axes of the mesh."""
    return math.prod(mesh.shape[name] for name in names)


def check_mesh(who: str, path: str, sharding: NamedSharding, mesh: Mesh) -> None:
    """Raises if a leaf lives on another mesh."""
    if dict(sharding.mesh.shape) != dict(mesh.shape):
        raise ValueError(f"{who}: {path} lives on the mesh {dict(sharding.mesh.shape)}, expected {dict(mesh.shape)}")


def real_shape(p: jax.ShapeDtypeStruct) -> Shape:
    """The shape of the slots of a parameter: that of two reals if it is complex."""
    return (2, *p.shape) if jnp.issubdtype(p.dtype, jnp.complexfloating) else p.shape


class StateLayout:
    """The state of a transformation as shapes and dtypes, and which of its arrays belong to which parameter.

    Attributes:
      leaves: the parameters.
      shapes: the shapes and dtypes of the parameters.
      state: the shapes and dtypes of the state.
      is_known: whether optax can tell which arrays belong to which parameter. False under `optax.flatten`, which
        joins all parameters into one array.
    """

    def __init__(self, tx: optax.GradientTransformation, params: PyTree) -> None:
        self.leaves = Leaves(params)
        self.shapes = [
            None if x is None else jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in self.leaves.leaves
        ]
        self._tx = tx
        token = finding_layout.set(True)
        try:
            self.state = jax.eval_shape(tx.init, self.leaves.treedef.unflatten(self.shapes))
            self.is_known = self._is_known()
        finally:
            finding_layout.reset(token)

    def _is_known(self) -> bool:
        try:
            optax.tree_utils.tree_map_params(self._tx, lambda x: x, self.state, is_leaf=_is_blank)
        except (TypeError, ValueError):
            return False
        return True

    def map(self, own: Callable[[int, jax.ShapeDtypeStruct], T], other: Callable[[Any], T]) -> PyTree:
        """Maps the state: ``own(i, x)`` for an array that belongs to parameter i, ``other(x)`` for the rest."""
        if not self.is_known:
            return jax.tree.map(other, self.state)
        numbers = self.leaves.treedef.unflatten(None if x is None else i for i, x in enumerate(self.shapes))
        token = finding_layout.set(True)
        try:
            return optax.tree_utils.tree_map_params(
                self._tx,
                lambda x, number: x if _is_blank(x) else own(number, x),
                self.state,
                numbers,
                transform_non_params=other,
                is_leaf=_is_blank,
            )
        finally:
            finding_layout.reset(token)

    def shardings(self, mesh: Mesh, over: Sequence[Division]) -> PyTree:
        """The shardings of the state: each array is divided like its parameter.

        It is not divided along axes that do not divide evenly, nor at all if its rank is neither its parameter's nor
        that of the parameter's slots.
        """

        def beside(i: int, x: jax.ShapeDtypeStruct) -> NamedSharding:
            p = self.shapes[i]
            assert p is not None
            if len(x.shape) not in (len(p.shape), len(real_shape(p))):
                return NamedSharding(mesh, PartitionSpec())
            wanted = ((),) * (len(x.shape) - len(p.shape)) + over[i]
            even = (
                names if n % device_count(mesh, names) == 0 else () for n, names in zip(x.shape, wanted, strict=True)
            )
            return divided(mesh, tuple(even))

        return self.map(beside, lambda _: NamedSharding(mesh, PartitionSpec()))


def _is_blank(x: object) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def without_placement(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation inside `zero1` and `offload`, which change where a state lives and not its structure."""
    while hasattr(owner := owner_of(tx), "state_shardings"):
        tx = owner.tx
    return tx


def owners(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The state with each array replaced by the index of the parameter that it belongs to, or by -1."""
    slots = StateLayout(without_placement(tx), params)
    if not slots.is_known:
        raise ValueError(
            f"optax cannot tell which arrays of the state of {tx!r} belong to which parameter: as under optax.flatten, "
            "or if a label function of optax.partition needs the parameters themselves (use jax.tree.map_with_path)"
        )
    return slots.map(lambda i, _: i, lambda _: -1)


def map_owned(
    function: Callable[..., jax.Array],
    owners: PyTree,
    *states: PyTree,
    other: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> PyTree:
    """Maps states: ``function(i, *arrays)`` for arrays that belong to parameter i, ``other(array)`` for the rest."""

    def each(i: int, *arrays: jax.Array) -> jax.Array:
        return other(arrays[0]) if i < 0 else function(i, *arrays)

    return jax.tree.map(each, owners, *states)
