"""Ready-made masks: which leaves decay (``mask=``) or are frozen (``frozen=``), by rank or by path.

A mask is a function of the parameters that returns a tree of booleans. These are frozen dataclasses, so equal masks
compare equal, hash alike and pickle; `optax.masked` takes them too. `adam_fn.options.Options` says what each option
does with a mask.
"""

# `rules_per_leaf` in trees/groups.py drops the decay of leaves that ``mask=`` excludes.
# ruff: noqa: N801
import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from adam_fn.trees.leaves import match_patterns

PyTree: TypeAlias = Any


def _check_tree(mask: object, params: PyTree) -> None:
    """Raises if a mask was taken for a schedule."""
    if isinstance(params, jax.Array) and params.shape == () and jnp.issubdtype(params.dtype, jnp.integer):
        raise TypeError(
            f"{mask} is a mask, but was called with a step count: optax.inject_hyperparams treats every function as a "
            'schedule; exclude masks with static_args=("mask", "frozen", "storage_mask")'
        )


@dataclasses.dataclass(frozen=True)
class rank:
    """A mask of the leaves with at least `at_least` axes: ``rank(2)`` leaves out biases and the scales of norms.

    The rank of layers stacked along an extra first axis (for `scan` or `vmap`) is one higher.
    """

    at_least: int = 2

    def __call__(self, params: PyTree) -> PyTree:
        _check_tree(self, params)
        return jax.tree.map(lambda p: jnp.ndim(p) >= self.at_least, params)


@dataclasses.dataclass(frozen=True, init=False)
class path:
    """A mask of the leaves whose path matches one of the patterns, or with ``invert=True`` none of them.

    A leaf's path is its keys joined by ``/``, as in ``layers/0/kernel``; the patterns are those of `fnmatch` (``*``
    matches ``/`` as well) and must match the whole path: ``path("*bias", "*norm*", invert=True)``. The ``.value`` of a
    boxed parameter (of an `nnx.State`, of `flax.linen.Partitioned`) is not part of its path. Errors, and everything
    else in this package that names a leaf, use this path. A pattern that matches no leaf is an error.
    """

    patterns: tuple[str, ...]
    invert: bool

    def __init__(self, *patterns: str, invert: bool = False) -> None:
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"a pattern must be a string, got {pattern!r}")
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "invert", invert)

    def __call__(self, params: PyTree) -> PyTree:
        _check_tree(self, params)
        leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
        hits = [any(hit) != self.invert for _, hit in match_patterns(self.patterns, params)]
        return treedef.unflatten(None if leaf is None else hit for leaf, hit in zip(leaves, hits, strict=True))
