"""Finds which old arrays the new state of a leaf is computed from, by tracing a step."""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.extend.core

#: Stands for the parameter among the names of stored arrays.
PARAMETER = ""


def sources(
    step: Callable[[jax.Array | None, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    p: jax.Array | None,
    stored: Mapping[str, jax.Array],
) -> dict[str, set[str]]:
    """The names of the arrays, `PARAMETER` included, on whose old values the new value of each stored array depends.

    `step` makes the new arrays from the parameter and the old arrays; it is traced with arrays of two numbers.
    """
    number, old = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2,), x.dtype), (p, dict(stored)))
    names = sorted(old)
    jaxpr = jax.make_jaxpr(step)(number, old).jaxpr
    labels: list[str] = [*([] if p is None else [PARAMETER]), *names]
    inputs = list(zip(labels, jaxpr.invars, strict=True))
    found: dict[str, set[str]] = {}
    for name, out in zip(names, jaxpr.outvars, strict=True):
        needed = {cast(object, out)}
        for equation in reversed(jaxpr.eqns):
            if needed.intersection(equation.outvars):
                needed.update(x for x in equation.invars if not isinstance(x, jax.extend.core.Literal))
        found[name] = {source for source, x in inputs if x in needed}
    return found
