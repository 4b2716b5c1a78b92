"""The two functions of a transformation, made so that equal transformations compare equal, hash alike and pickle.

They are objects of frozen dataclasses, which closures and bound methods could not be. Where hyperparameters are arrays
they are closures over such objects: there Equinox looks for arrays, and Flax does not.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self

import jax
import optax


class ByValue:
    """A pytree that is compared by value, but its leaves by identity: arrays may be tracers."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        (ours, treedef), (theirs, other_treedef) = jax.tree.flatten(self), jax.tree.flatten(other)
        return treedef == other_treedef and all(a is b for a, b in zip(ours, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))


class Method(ByValue):
    """An `init` or `update` as a frozen dataclass that is a pytree."""


#: One function for equal objects, as long as somebody has it.
_FUNCTIONS: weakref.WeakValueDictionary[Method, Any] = weakref.WeakValueDictionary()


class Functions(optax.GradientTransformationExtraArgs):
    """``(init, update)`` of two `Method` objects."""

    __slots__ = ()

    def __new__(cls, init: Callable[..., Any], update: Callable[..., Any]) -> Self:
        return super().__new__(cls, _function(init), _function(update))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (method_of(self.init), method_of(self.update))


def _function(method: Any) -> Any:  # noqa: ANN401
    if not isinstance(method, Method) or not jax.tree.leaves(method):
        return method

    if (known := _FUNCTIONS.get(method)) is not None:
        return known

    def function(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return method(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    function.method = method  # pyright: ignore[reportFunctionMemberAccess]
    _FUNCTIONS[method] = function
    return function


def method_of(function: Any) -> Any:  # noqa: ANN401
    """The object that an `init` or `update` of this package is, or what another one is."""
    return getattr(function, "method", function)
