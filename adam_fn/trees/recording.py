"""Finds the members of a transformation: chains and wrappers, of any package, close over them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from adam_fn.trees.leaves import PyTree


class UpdateCall(NamedTuple):
    """A call of an `update` of this package: the definition of the transformation, and the call's arguments."""

    definition: Any
    grads: PyTree
    state: Any
    params: PyTree | None


_seen: contextvars.ContextVar[list[object] | None] = contextvars.ContextVar("adam_fn_seen", default=None)
_marked: contextvars.ContextVar[list[object] | None] = contextvars.ContextVar("adam_fn_marked", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[object]]:
    """Lists what this thread records inside the context: the `UpdateCall` of every `update`."""
    seen: list[object] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Hides from `recorded` what is recorded inside the context: it belongs to another program."""
    token = _seen.set(None)
    try:
        yield
    finally:
        _seen.reset(token)


def record(what: object) -> None:
    """Records a call, for `recorded` to list."""
    if (seen := _seen.get()) is not None:
        seen.append(what)


@jax.tree_util.register_pytree_node_class
class Marked:
    """The state of a member inside another state, while `located` looks for it."""

    def __init__(self, number: int, state: PyTree) -> None:
        self.number, self.state = number, state

    def tree_flatten(self) -> tuple[tuple[PyTree], int]:
        return (self.state,), self.number

    @classmethod
    def tree_unflatten(cls, number: int, children: tuple[PyTree]) -> "Marked":
        return cls(number, children[0])


def is_marking() -> bool:
    """Whether `located` is calling an `init`."""
    return _marked.get() is not None


def marked(definition: object, state: PyTree) -> PyTree:
    """The state that an `init` returns, marked if `located` looks for it."""
    if (definitions := _marked.get()) is None:
        return state
    definitions.append(definition)
    return Marked(len(definitions) - 1, state)


class Located(NamedTuple):
    """The state of a transformation, as shapes and dtypes, and where in it the states of its members are.

    Attributes:
      definitions: the definition of each member, in the order in which their states are made.
      state: the state, with a `Marked` for the state of each member.
    """

    definitions: list[Any]
    state: PyTree

    def states(self, state: PyTree) -> list[tuple[Any, PyTree]]:
        """The definition of each member, and its state within a state of the same structure."""
        return [(self.definitions[mark.number], own) for mark, own in self._rows(state) if isinstance(mark, Marked)]

    def map(self, function: Callable[..., PyTree], *states: PyTree) -> PyTree:
        """Combines several states of equal structure into one.

        At each member it is ``function(definition, *member_states)``, elsewhere the first state's array.
        """
        treedef = jax.tree.structure(self.state, is_leaf=_is_marked)
        return treedef.unflatten(
            function(self.definitions[mark.number], *own) if isinstance(mark, Marked) else own[0]
            for mark, *own in self._rows(*states)
        )

    def _rows(self, *states: PyTree) -> list[tuple[Any, ...]]:
        """The leaves of the marked state, each with the parts of the states in its place."""
        marks, treedef = jax.tree.flatten(self.state, is_leaf=_is_marked)
        try:
            return list(zip(marks, *map(treedef.flatten_up_to, states), strict=True))
        except ValueError as error:
            raise ValueError(
                "the state does not have the structure of tx.init(params): was it made by this transformation, from "
                "these parameters?"
            ) from error


def _is_marked(x: object) -> bool:
    return isinstance(x, Marked)


def located(tx: optax.GradientTransformation, params: PyTree) -> Located:
    """Calls an `init`, without computing anything, to find the states of its members."""

    def init(params: PyTree) -> PyTree:
        return tx.init(params)

    definitions: list[Any] = []
    token = _marked.set(definitions)
    try:
        # JAX may return cached shapes without calling `init`; a new function and `disable_jit` force the call.
        with jax.disable_jit():
            return Located(definitions, jax.eval_shape(init, params))
    finally:
        _marked.reset(token)
