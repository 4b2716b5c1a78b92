"""What becomes of an update: it is returned, or added to the parameter."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from adam_fn.algebra.dtypes import compute_dtype


class Inputs(NamedTuple):
    """What a step of a leaf starts from beside its state, all of one shape.

    Attributes:
      g: the gradient.
      p: the parameter, if there is one.
      remainder: what is stored of the parameter beside it: see `adam_fn.wrappers.masters`.
    """

    g: jax.Array
    p: jax.Array | None
    remainder: jax.Array | None = None


class Destination(abc.ABC):
    """What a step of a leaf makes of its update, element by element. Static: compared by value.

    Attributes:
      parameters: whether the results are new parameters.
      has_remainder: whether something is stored beside the parameter.
    """

    parameters: bool = False
    has_remainder: ClassVar[bool] = False

    def for_dtype(self, dtype: np.dtype) -> "Destination":
        """What it does with a parameter of a dtype."""
        return self

    def read(self, inputs: Inputs) -> Inputs:
        """What the rule sees."""
        return inputs

    @abc.abstractmethod
    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The result, and what `remainder` becomes."""


@dataclasses.dataclass(frozen=True)
class Updates(Destination):
    """The update is the result."""

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return u, inputs.remainder


@dataclasses.dataclass(frozen=True)
class Parameters(Destination):
    """The new parameter is, as `optax.apply_updates` has it: no update is ever stored."""

    parameters = True

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        # The sum is rounded once either way; a TPU makes a conversion at the end part of the pass over the state.
        wide = compute_dtype(inputs.p.dtype)
        return (inputs.p.astype(wide) + u.astype(wide)).astype(inputs.p.dtype), inputs.remainder


UPDATES, PARAMETERS = Updates(), Parameters()
