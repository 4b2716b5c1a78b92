"""Destinations of a step's result: it is returned as an update, or added to the parameter."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from adam_fn.algebra.dtypes import compute_dtype


class Inputs(NamedTuple):
    """The inputs of a leaf's step besides its state, all of one shape.

    Attributes:
      g: the gradient.
      p: the parameter, if there is one.
      remainder: what is stored beside a bfloat16 parameter; see `adam_fn.wrappers.masters`.
    """

    g: jax.Array
    p: jax.Array | None
    remainder: jax.Array | None = None


class Destination(abc.ABC):
    """The place where the result of a leaf's step goes, element by element. Static: compared by value.

    Attributes:
      parameters: whether the results are new parameters.
      has_remainder: whether something is stored beside the parameter.
    """

    parameters: bool = False
    has_remainder: ClassVar[bool] = False

    def for_dtype(self, dtype: np.dtype) -> "Destination":
        """The destination for a parameter of this dtype."""
        return self

    def read(self, inputs: Inputs) -> Inputs:
        """The inputs as the rule sees them."""
        return inputs

    @abc.abstractmethod
    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns the result and the new remainder."""


@dataclasses.dataclass(frozen=True)
class Updates(Destination):
    """The destination that returns the update."""

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return u, inputs.remainder


@dataclasses.dataclass(frozen=True)
class Parameters(Destination):
    """The destination that returns the new parameter, as `optax.apply_updates` has it; no update is ever stored."""

    parameters = True

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        # The sum is rounded once either way; on a TPU a conversion at the end joins the pass over the state.
        wide = compute_dtype(inputs.p.dtype)
        return (inputs.p.astype(wide) + u.astype(wide)).astype(inputs.p.dtype), inputs.remainder


UPDATES, PARAMETERS = Updates(), Parameters()
