"""A model in three parts: what comes before the stacked layers, one layer, and what comes after them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from adam_fn.trees.leaves import PyTree

#: ``embed(params, batch) -> h``
Embed: TypeAlias = Callable[[PyTree, PyTree], PyTree]
#: ``layer(layer_params, h, batch) -> h``
Layer: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]
#: ``head(params, h, batch) -> loss``
Head: TypeAlias = Callable[[PyTree, PyTree, PyTree], Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """The three parts of a model."""

    embed: Embed
    layer: Layer
    head: Head
    has_aux: bool

    def in_parts(self, number: int) -> "Model":
        """Returns this model, run on `number` microbatches in turn; activations get a leading axis of microbatches."""

        def split(batch: PyTree) -> PyTree:
            def parts(x: jax.Array) -> jax.Array:
                if jnp.ndim(x) == 0 or x.shape[0] % number:
                    raise ValueError(f"{number} microbatches do not divide a batch of shape {jnp.shape(x)}")
                return x.reshape(number, x.shape[0] // number, *x.shape[1:])

            return jax.tree.map(parts, batch)

        def each(function: Callable[..., Any], *xs: PyTree) -> PyTree:
            return jax.lax.map(lambda x: jax.checkpoint(function)(*x), xs)

        def head(params: PyTree, h: PyTree, batch: PyTree) -> Any:  # noqa: ANN401
            found = each(functools.partial(self.head, params), h, split(batch))
            return (found[0].mean(), found[1]) if self.has_aux else found.mean()

        return Model(
            lambda params, batch: each(functools.partial(self.embed, params), split(batch)),
            lambda params, h, batch: each(functools.partial(self.layer, params), h, split(batch)),
            head,
            self.has_aux,
        )
