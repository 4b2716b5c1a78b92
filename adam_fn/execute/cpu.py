"""The step of a leaf as it suits XLA on a CPU: one output a pass, in an order that lets each be written in place."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from adam_fn.algebra.arithmetic import add_constant, multiply
from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.execute.body import Codecs, LeafResult, Times, body
from adam_fn.execute.compiler import one_after, opaque
from adam_fn.execute.destination import Destination, Inputs
from adam_fn.execute.sources import sources
from adam_fn.storage.codec import Stored

#: Leaves of fewer elements stay in the caches in any order.
LARGE = 2**16


def single_device() -> bool:
    """Whether there is one device. On several, reading one element to force an order would make devices talk."""
    return jax.device_count() == 1


def cpu_needs_passes(inputs: Inputs, stored: Stored) -> bool:
    """Whether a leaf is large and stored in narrow arrays; for others XLA finds the passes by itself."""
    dtype = compute_dtype((inputs.g if inputs.p is None else inputs.p).dtype)
    narrow = inputs.remainder is not None or any(x.dtype != dtype for x in stored.values())
    return inputs.g.size >= LARGE and narrow


def in_passes(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> LeafResult:
    """Computes each output in a pass of its own; where possible in an order that lets each be written in place.

    XLA on a CPU makes one pass over the memory for each output. It stores values that several outputs need, such as the
    decoded moments, and copies the old value of an output unless it knows that the output is written after the last
    pass that reads it. This fresh memory costs more than the arithmetic. A factor of 1 that XLA cannot foresee makes
    each pass compute from its own inputs, and, where the factor depends on the previous output, fixes the order.
    There is no such order where the result is an update: XLA computes it in the pass that adds it to the parameters,
    and would have to store it before.
    """
    step = functools.partial(body, rule, codecs, destination)
    in_place = destination.parameters and single_device()

    def later(last: jax.Array | None) -> tuple[Inputs, Stored]:
        assert last is not None
        one = one_after(last, jax.tree.leaves(clock.count)[0]) if in_place else opaque(jnp.ones((), jnp.float32))
        return jax.tree.map(functools.partial(_times_one, one), (inputs, stored))

    result = step(inputs, stored, clock, times).result
    last, remainder = result, inputs.remainder
    if remainder is not None:
        remainder = last = step(*later(last), clock, times).remainder
    found: dict[str, jax.Array] = {}
    for name in _order(rule, codecs, destination, inputs, stored, clock, times) if in_place else stored:
        found[name] = last = step(*later(last), clock, times).stored[name]
    return LeafResult(result, remainder, {name: found[name] for name in stored})


def _times_one(one: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies floats by 1; narrow ones are widened first, so that this is exact. Adds ``one - 1`` to integers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return multiply(jax.lax.convert_element_type(x, compute_dtype(x.dtype)), one)
    return add_constant(x, jax.lax.sub(one, np.float32(1)))


def _order(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> list[str]:
    """An order of the arrays in which each is written after all that read its old value, if there is one."""

    def step(p: jax.Array | None, stored: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return body(rule, codecs, destination, inputs._replace(p=p), stored, clock, times).stored

    left = sorted(stored)
    reads = sources(step, inputs.p, stored)
    found: list[str] = []
    while left:
        free = [name for name in left if not any(name in reads[other] for other in left if other != name)]
        found.append((free or left)[0])
        left.remove(found[-1])
    return found
