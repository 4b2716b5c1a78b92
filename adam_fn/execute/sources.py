"""Finds which old arrays the new state of a leaf is computed from, by tracing a step."""

from collections.abc import Callable, Mapping

import jax
import jax.extend.core

#: Stands for the parameter among the names of stored arrays.
PARAMETER = ""


#: Primitives that call a function with their own arguments.
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}


def sources(
    step: Callable[[jax.Array | None, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    p: jax.Array | None,
    stored: Mapping[str, jax.Array],
) -> dict[str, set[str]]:
    """The names of the arrays, `PARAMETER` included, on whose old values the new value of each stored array depends.

    `step` makes the new arrays from the parameter and the old arrays.
    """
    names = sorted(stored)
    labels: list[str] = [*([] if p is None else [PARAMETER]), *names]
    needed = dependencies(jax.make_jaxpr(step)(p, dict(stored)).jaxpr)
    return {name: {labels[i] for i in own} for name, own in zip(names, needed, strict=True)}


def dependencies(jaxpr: jax.extend.core.Jaxpr) -> list[set[int]]:
    """The indices of the inputs on which each output depends; loops depend on all that they are given."""
    known: dict[object, set[int]] = {x: {i} for i, x in enumerate(jaxpr.invars)}

    def of(x: object) -> set[int]:
        return set() if isinstance(x, jax.extend.core.Literal) else known.get(x, set())

    for equation in jaxpr.eqns:
        given = [of(x) for x in equation.invars]
        inner = [x.jaxpr for x in equation.params.values() if isinstance(x, jax.extend.core.ClosedJaxpr)]
        if equation.primitive.name == "cond":
            index, *given = given
            branches = [dependencies(x.jaxpr) for x in equation.params["branches"]]
            results = [index.union(*(given[i] for own in each for i in own)) for each in zip(*branches, strict=True)]
        elif equation.primitive.name in _CALLS and inner:
            results = [set[int]().union(*(given[i] for i in own)) for own in dependencies(inner[0])]
        else:
            results = [set[int]().union(*given)] * len(equation.outvars)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(x) for x in jaxpr.outvars]
