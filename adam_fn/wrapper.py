"""What is not elementwise: optax transformations around others, made so that equal ones compare equal."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_fn.execute.body import as_real, compute_dtype
from adam_fn.leaves import PyTree


class Wrapper(abc.ABC):
    """A transformation as a frozen dataclass of what defines it.

    `transformation` gives the pair of functions that optax knows. Those of equal wrappers compare equal, hash alike and
    pickle, like the transformations of rules; closures and bound methods would not.
    """

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The new updates and the new state."""

    def write(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """The new parameters and the new state."""
        updates, state = self.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(_Method(self, "init"), _Method(self, "update"))


@dataclasses.dataclass(frozen=True)
class _Method:
    """A bound method that compares by value."""

    wrapper: Wrapper
    name: str

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return getattr(self.wrapper, self.name)(*args, **kwargs)

    def write(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """Of an update: see `Wrapper.write`."""
        return self.wrapper.write(grads, state, params)


def written(
    tx: optax.GradientTransformation, grads: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The new parameters and the new state of any transformation; one of this package stores no update on the way."""
    if (write := getattr(tx.update, "write", None)) is not None:
        return write(grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def is_trained(update: jax.Array | None) -> bool:
    """Whether an update is of a trained leaf; those of integers and booleans are zeros that nothing may scale."""
    return update is not None and jnp.issubdtype(jnp.result_type(update), jnp.inexact)


def map_trained(function: Callable[..., jax.Array], updates: PyTree, *others: PyTree) -> PyTree:
    """The updates with `function` of each trained leaf, and of what stands in its place in the other trees."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    rows = zip(leaves, *map(treedef.flatten_up_to, others), strict=True)
    return treedef.unflatten(function(*row) if is_trained(row[0]) else row[0] for row in rows)


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner product in the dtype of the arithmetic; of complex arrays that of their reals.

    Not `jnp.vdot`, which would flatten what is sharded.
    """
    x, y = (as_real(z).astype(compute_dtype(z.dtype)) for z in (x, y))
    return jnp.sum(x * y)


def check_state(state: object, expected: type, name: str) -> None:
    """Raises if `state` is not one that the transformation `name` made."""
    if not isinstance(state, expected):
        raise TypeError(f"{name} expected its own state, {expected.__name__}, got a {type(state).__name__}")


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` along which devices may hold different values of an array."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def alike_over_devices(tree: PyTree) -> PyTree:
    """The tree with every array varying along all axes along which any of them does: control flow needs them equal."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(tree)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
