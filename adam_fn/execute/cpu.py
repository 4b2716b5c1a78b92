"""The step of a leaf as it suits XLA on a CPU: one output a fusion, in an order that lets each be written in place."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.execute.body import Codecs, LeafResult, Times, body
from adam_fn.execute.compiler import one_after
from adam_fn.execute.destination import Destination, Inputs
from adam_fn.execute.sources import sources
from adam_fn.storage.codec import Stored

#: Leaves of fewer elements stay in the caches in any order.
LARGE = 2**16


def single_device() -> bool:
    """Whether there is one device. On several, reading one element to force an order would make devices talk."""
    return jax.device_count() == 1


def cpu_needs_order(inputs: Inputs, stored: Stored) -> bool:
    """Whether a leaf is large and stored in narrow arrays; for others XLA finds the order by itself."""
    dtype = compute_dtype((inputs.g if inputs.p is None else inputs.p).dtype)
    narrow = inputs.remainder is not None or any(x.dtype != dtype for x in stored.values())
    return inputs.g.size >= LARGE and single_device() and narrow


def ordered(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> LeafResult:
    """Computes the result, then the stored arrays one after the other, each after all that read its old value.

    XLA on a CPU makes one pass over the memory for each output. It stores values that several outputs need, such as the
    decoded moments, and copies the old value of an output unless it knows that the output is written after the last
    pass that reads it. This fresh memory costs more than the arithmetic. A factor of 1 that XLA cannot foresee,
    and that depends on the previous output, fixes the order and makes each pass compute from its own inputs.
    """
    step = functools.partial(body, rule, codecs, destination)
    result = step(inputs, stored, clock, times).result
    last, remainder = result, inputs.remainder
    if remainder is not None:
        remainder = last = step(*_after(last, inputs, stored, clock), clock, times).remainder
    found: dict[str, jax.Array] = {}
    for name in _order(rule, codecs, destination, inputs, stored, clock, times):
        assert last is not None
        found[name] = last = step(*_after(last, inputs, stored, clock), clock, times).stored[name]
    return LeafResult(result, remainder, {name: found[name] for name in stored})


def _after(last: jax.Array, inputs: Inputs, stored: Stored, clock: Clock) -> tuple[Inputs, Stored]:
    """The same numbers, but known only after `last` is; floats become float32 at least, in which times 1 is exact."""
    one = one_after(last, jax.tree.leaves(clock.count)[0])

    def later(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(compute_dtype(x.dtype))
            return x * jnp.reshape(one.astype(x.dtype), (1,) * x.ndim)
        return x + jnp.reshape((one - 1).astype(x.dtype), (1,) * x.ndim)

    return jax.tree.map(later, (inputs, stored))


def _order(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> list[str]:
    """The names of the stored arrays, each after all whose new value depends on its old one, if that is possible."""

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
