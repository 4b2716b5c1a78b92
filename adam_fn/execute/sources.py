"""What the new slots of a rule are computed from, found by tracing it."""

from collections.abc import Iterable
from typing import cast

import jax
import jax.extend.core
import numpy as np

from adam_fn.codec import Cast
from adam_fn.execute.body import Coded, Inputs, body, compute_dtype
from adam_fn.rule import Clock, Rule, Slots

#: Stands for the parameter among the names of slots.
PARAMETER = ""


def sources(rule: Rule, inputs: Inputs, slots: Iterable[str], clock: Clock) -> dict[str, set[str]]:
    """For each slot those whose old values its new value depends on, and `PARAMETER` where it depends on that."""
    dtype = np.dtype(compute_dtype((inputs.g if inputs.p is None else inputs.p).dtype))
    names = sorted(slots)
    plain = dict.fromkeys(names, Cast())
    number = jax.ShapeDtypeStruct((), dtype)

    def leaf(g: jax.Array, p: jax.Array, slots: Slots) -> Slots:
        coded = {name: Coded(x) for name, x in slots.items()}
        return body(rule, plain, Inputs(g, None if inputs.p is None else p), coded, clock)[1]

    jaxpr = jax.make_jaxpr(leaf)(number, number, dict.fromkeys(names, number)).jaxpr
    given = [(PARAMETER, jaxpr.invars[1]), *zip(names, jaxpr.invars[2:], strict=True)]
    found: dict[str, set[str]] = {}
    for name, out in zip(names, jaxpr.outvars, strict=True):
        needed = {cast(object, out)}
        for equation in reversed(jaxpr.eqns):
            if needed.intersection(equation.outvars):
                needed.update(x for x in equation.invars if not isinstance(x, jax.extend.core.Literal))
        found[name] = {source for source, x in given if x in needed}
    return found
