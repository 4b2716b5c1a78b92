"""Frozen dataclasses as pytrees: their leaves are the arrays in them, and everything else is compared by value."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


class ByValue:
    """A pytree that is compared by value, except for its leaves: arrays may be tracers and are compared by identity."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        (ours, treedef), (theirs, other_treedef) = jax.tree.flatten(self), jax.tree.flatten(other)
        return treedef == other_treedef and all(a is b for a, b in zip(ours, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))


class Method(ByValue):
    """An `init` or `update` as a frozen dataclass that is a pytree."""


def method_of(function: Any) -> Any:  # noqa: ANN401
    """The `Method` behind an `init` or `update` of this package; any other function itself."""
    return getattr(function, "method", function)


_Aux = tuple[tuple[str, ...], tuple[tuple[str, object], ...]]


def register(kind: type) -> None:
    """Makes a dataclass a pytree."""
    jax.tree_util.register_pytree_node(kind, _flatten, functools.partial(_unflatten, kind))


def _has_arrays(value: object) -> bool:
    leaves = jax.tree.leaves(value)
    return any(isinstance(leaf, (jax.Array, np.ndarray)) or method_of(leaf) is not leaf for leaf in leaves)


def _flatten(x: Any) -> tuple[tuple[object, ...], _Aux]:  # noqa: ANN401
    fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    # Once flattened, the same fields hold the leaves, whatever their values: a tree that was split may hold None.
    dynamic = x.__dict__.get("_dynamic")
    if dynamic is None:
        dynamic = tuple(name for name, value in fields.items() if _has_arrays(value))
    static = tuple((name, value) for name, value in fields.items() if name not in dynamic)
    return tuple(fields[name] for name in dynamic), (dynamic, static)


def _unflatten(kind: type, aux: _Aux, children: Sequence[object]) -> Any:  # noqa: ANN401
    x = object.__new__(kind)
    object.__setattr__(x, "_dynamic", aux[0])
    for name, value in (*zip(aux[0], children, strict=True), *aux[1]):
        object.__setattr__(x, name, value)
    return x
