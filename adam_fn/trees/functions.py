"""The two functions of a transformation, made so that equal transformations compare equal, hash alike and pickle.

They are instances of frozen dataclasses: closures and bound methods would be compared by identity. If hyperparameters
are arrays, they are closures over such instances: Equinox looks for arrays in closures, and Flax does not.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self

import jax
import optax

from adam_fn.algebra.values import Method, method_of

#: The function of each object, shared by equal ones as long as it is in use.
_FUNCTIONS: weakref.WeakValueDictionary[Method, Any] = weakref.WeakValueDictionary()


class Functions(optax.GradientTransformationExtraArgs):
    """The pair ``(init, update)``, made from two `Method` objects."""

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


def owner_of(tx: optax.GradientTransformation) -> Any:  # noqa: ANN401
    """The object whose methods are the functions of a transformation, such as a `MasterWeights`, or None."""
    return getattr(method_of(tx.init), "owner", None)


def write_of(tx: optax.GradientTransformation) -> Callable[..., Any] | None:
    """The ``write(grads, state, params) -> (params, state)`` of a transformation of this package, or None."""
    return getattr(method_of(tx.update), "write", None)
