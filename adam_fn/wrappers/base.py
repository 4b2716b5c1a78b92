"""Optax transformations around others, which need not be elementwise; equal ones compare equal."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_fn.algebra.dtypes import as_real, compute_dtype
from adam_fn.algebra.values import Method, register
from adam_fn.trees.functions import Functions, write_of
from adam_fn.trees.leaves import Leaves, PyTree, arrays_of, within


class TreeTransformation(abc.ABC):
    """A transformation as a frozen dataclass of its arguments.

    `transformation` returns it as the pair of functions that optax knows.
    """

    def __init_subclass__(cls) -> None:
        register(cls)

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The new updates and the new state."""

    def write(self, grads: PyTree, state: PyTree, params: PyTree, **extra_args: PyTree) -> tuple[PyTree, PyTree]:
        """The new parameters and the new state."""
        updates, state = self.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return Functions(_Method(self, "init"), _Method(self, "update"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Method(Method):
    """A bound method that compares by value."""

    owner: TreeTransformation
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        # The parameters are the first argument of `init` and the third one of `update`.
        i = 0 if self.name == "init" else 2
        args = (*args[:i], *(arrays_of(x) for x in args[i : i + 1]), *args[i + 1 :])
        kwargs |= {"params": arrays_of(kwargs["params"])} if "params" in kwargs else {}
        return getattr(self.owner, self.name)(*args, **kwargs)

    def write(self, grads: PyTree, state: PyTree, params: PyTree, **extra_args: PyTree) -> tuple[PyTree, PyTree]:
        """Calls `TreeTransformation.write`, for an `update`."""
        return self.owner.write(grads, state, params, **extra_args)


def step_parameters(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: optax.OptState,
    params: PyTree,
    **extra_args: PyTree,
) -> tuple[PyTree, PyTree]:
    """The new parameters and the new state of any transformation; those of this package store no update for it."""
    if (write := write_of(tx)) is not None:
        return write(grads, state, params, **extra_args)
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def is_trained(update: jax.Array | None) -> bool:
    """Whether an update is of a trained leaf; updates of integers and booleans are zeros that nothing may scale."""
    return update is not None and jnp.issubdtype(jnp.result_type(update), jnp.inexact)


def map_trained(
    function: Callable[..., jax.Array], updates: PyTree, *others: PyTree, layers: str | None = None
) -> PyTree:
    """Applies `function` to each trained leaf of the updates, and to the same leaf of the other trees.

    It is applied to one layer after the other of leaves that are stacked along a first axis, at the path `layers`. An
    integer leaf may have a floating update, all zeros, if its gradient was floating.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    rows = zip(leaves, *map(treedef.flatten_up_to, others), strict=True)
    stacked = [False] * len(leaves) if layers is None else within(Leaves(updates).names, layers)
    ways = {False: function, True: jax.vmap(function)}
    return treedef.unflatten(
        ways[own](*row) if all(map(is_trained, row)) else row[0] for own, row in zip(stacked, rows, strict=True)
    )


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner product in the dtype of the arithmetic; complex arrays count as two reals.

    It does not use `jnp.vdot`, which would flatten sharded arrays.
    """
    x, y = (as_real(z).astype(compute_dtype(z.dtype)) for z in (x, y))
    return jnp.sum(x * y)


def check_transformation(tx: object, name: str, *, wraps: bool = True) -> None:
    """Raises if the function `name`, which `wraps` a transformation or only takes one, was given anything else."""
    if all(callable(getattr(tx, method, None)) for method in ("init", "update")):
        return
    needed = (
        f"wraps a transformation, as in {name}(adam_fn.adamw(1e-3))"
        if wraps
        else "takes a transformation, such as adam_fn.adamw(1e-3)"
    )
    found = f"{type(tx).__name__}: pass its tx" if hasattr(tx, "tx") else f"{tx!r:.80}"
    raise TypeError(f"{name} {needed}, got {found}")


def check_state(state: object, expected: type, name: str, **dtypes: Sequence[DTypeLike]) -> None:
    """Raises if `state` is not one that the transformation `name` made, or if a number in it was cast."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{name} expected its own state, {expected.__name__}, got a {type(state).__name__}: make it by "
            "tx.init(params), or by tx.init(params)._replace(inner=state) from a state of what is inside"
        )
    for field, expected_dtypes in dtypes.items():
        found = jnp.result_type(getattr(state, field))
        if found not in expected_dtypes:
            wanted = " or ".join(str(jnp.dtype(dtype)) for dtype in expected_dtypes)
            raise TypeError(f"{name}: the state's {field} is {found}, expected {wanted}: was the state cast?")


#: The dtypes of counts, and of other numbers.
COUNT, WIDE = (jnp.int32,), (jnp.float32, jnp.float64)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` along which devices may hold different values of an array."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def alike_over_devices(tree: PyTree) -> PyTree:
    """Marks all arrays as varying over the union of their axes; branches of control flow must agree on this."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(tree)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
