"""What the new state of a leaf is computed from, found by tracing a step."""

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
    """For each stored array those whose old values its new value depends on, and `PARAMETER` where it depends on that.

    `step` makes the new ones of the parameter and the old ones; it is traced with two numbers in the place of arrays.
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
