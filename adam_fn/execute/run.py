"""Steps one leaf. By default it calls `body` once.

On CPUs each output of a large leaf in low precision is computed in a pass of its own. On TPUs remainders are computed
separately.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adam_fn.algebra.dtypes import as_dtype, as_real
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.execute.body import Codecs, LeafResult, Times, body
from adam_fn.execute.compiler import opaque
from adam_fn.execute.cpu import cpu_needs_passes, in_passes
from adam_fn.execute.destination import Destination, Inputs
from adam_fn.storage.codec import Stored


def apart(
    rule: Rule, codecs: Codecs, destination: Destination, inputs: Inputs, stored: Stored, clock: Clock, times: Times
) -> LeafResult:
    """Makes a step for a TPU, in which the remainder is computed by a second `body`, from the gradient times 1.

    Otherwise XLA would store the new float32 master, which parameter and remainder share, and make another pass for one
    of them. The factor, whose value XLA cannot see, keeps it from merging both computations.
    """
    done = body(rule, codecs, destination, inputs, stored, clock, times)
    one = opaque(jnp.ones((1,) * inputs.g.ndim, inputs.g.dtype))
    again = body(rule, codecs, destination, inputs._replace(g=inputs.g * one), stored, clock, times)
    return done._replace(remainder=again.remainder)


@functools.partial(jax.jit, static_argnames="destination")
def step_leaf(
    rule: Rule, codecs: Codecs, inputs: Inputs, stored: Stored, clock: Clock, times: Times, *, destination: Destination
) -> LeafResult:
    """Makes the step of one leaf. It is jitted, to be traced and lowered once per distinct leaf, not once per leaf."""
    dtype = (inputs.p if destination.parameters and inputs.p is not None else inputs.g).dtype
    if not jnp.iscomplexobj(inputs.g):
        rule = rule.of_real()
    inputs = jax.tree.map(as_real, inputs)
    by_platform: dict[str, Callable[..., LeafResult]] = {"default": body}
    if cpu_needs_passes(inputs, stored):
        by_platform["cpu"] = in_passes
    if inputs.remainder is not None:
        by_platform["tpu"] = apart

    def step(platform: str, rule: Rule, inputs: Inputs, stored: Stored, clock: Clock, times: Times) -> LeafResult:
        return by_platform[platform](rule, codecs, destination, inputs, stored, clock, times)

    bound = {platform: functools.partial(step, platform) for platform in by_platform}
    arrays = rule, inputs, stored, clock, times
    done = bound["default"](*arrays) if len(bound) == 1 else jax.lax.platform_dependent(*arrays, **bound)
    return done._replace(result=as_dtype(done.result, dtype)) if jnp.issubdtype(dtype, jnp.complexfloating) else done
