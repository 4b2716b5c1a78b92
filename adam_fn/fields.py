"""Frozen dataclasses as pytrees, whose leaves are the arrays in their fields; everything else is compared by value."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adam_fn.functions import method_of

_Aux = tuple[tuple[str, ...], tuple[tuple[str, object], ...]]


def register(kind: type) -> None:
    """Makes a dataclass a pytree."""
    jax.tree_util.register_pytree_node(kind, _flatten, functools.partial(_unflatten, kind))


def _has_arrays(value: object) -> bool:
    leaves = jax.tree.leaves(value)
    return any(isinstance(leaf, (jax.Array, np.ndarray)) or method_of(leaf) is not leaf for leaf in leaves)


def _flatten(x: Any) -> tuple[tuple[object, ...], _Aux]:  # noqa: ANN401
    fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    # Once flattened, the same fields have the leaves, whatever they hold: of a tree that was split it may be None.
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
