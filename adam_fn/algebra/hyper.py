"""Hyperparameters: numbers, 0-d arrays and schedules, and the ranges that they are checked against."""

import functools
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

#: A function of the zero-based step, an int32 scalar, that returns a number or a 0-d array.
Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
#: A hyperparameter as it is given to a rule, which is a number, a 0-d array or a `Schedule`.
Hyper: TypeAlias = ArrayLike | Schedule


class Range(NamedTuple):
    """The half-open interval ``[low, high)`` that a Python number must lie in."""

    low: float
    high: float


UNIT = Range(0.0, 1.0)
# A rule's field is a `Hyper` where the rule is made and a `Scalar` where its arithmetic runs (after `Rule.at`): no
# single type says that.
#: The annotation of a rule's field that is a decay rate, a `Hyper` in [0, 1).
Beta: TypeAlias = Annotated[Any, UNIT]
#: The annotation of a rule's field that is a `Hyper` of at least 0, and finite.
NonNegative: TypeAlias = Annotated[Any, Range(0.0, math.inf)]


def checked(name: str, value: object, bounds: Range) -> Hyper:
    """Returns the hyperparameter as a Python float, a 0-d array or a schedule, or raises an error that names it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (bounds.low <= value < bounds.high):
            raise ValueError(f"{name} must be in [{bounds.low:g}, {bounds.high:g}), got {value}")
        return float(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}")
        if not jnp.issubdtype(value.dtype, np.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(f"{name} must be a real number, got an array of {value.dtype}")
        if bounds is UNIT and jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
            raise ValueError(
                f"{name} is a {value.dtype} array, which has too few digits for a decay rate near 1 (in bfloat16, "
                "0.999 becomes 1): pass it in float32, or call optax.inject_hyperparams with "
                'hyperparam_dtype=jnp.float32 or static_args=("b1", "b2")'
            )
        return value
    if callable(value):
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(f"{name} is an unhashable schedule: use a function or a frozen dataclass") from error
        return typing.cast(Schedule, value)
    raise TypeError(f"{name} must be a number, a 0-d array or a schedule, got {value!r}")


@functools.cache
def ranges(rule: type) -> dict[str, Range]:
    """The hyperparameters of a rule: the fields whose annotation carries a `Range`."""
    found: dict[str, Range] = {}
    for name, hint in typing.get_type_hints(rule, include_extras=True).items():
        notes = (note for part in (hint, *typing.get_args(hint)) for note in getattr(part, "__metadata__", ()))
        if bounds := next((note for note in notes if isinstance(note, Range)), None):
            found[name] = bounds
    return found


def rate_of_step(learning_rate: ArrayLike | None) -> jax.Array | None:
    """Checks the rate that `update` was given for one step; under `jit` it becomes an array."""
    if learning_rate is None:
        return None
    if callable(learning_rate):
        raise TypeError(f"the learning_rate of one update must be a number or a 0-d array, got {learning_rate!r}")
    # Any number becomes a float: one type, one compilation.
    rate = checked("learning_rate", learning_rate, Range(0.0, math.inf))
    if not jnp.issubdtype(jnp.result_type(rate), jnp.floating):
        raise TypeError(f"learning_rate must be floating, got an array of {jnp.result_type(rate)}")
    return typing.cast(jax.Array, rate)
