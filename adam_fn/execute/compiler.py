"""Functions that serve a compiler alone. Each says what XLA would do otherwise."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from adam_fn.algebra.dtypes import as_real, compute_dtype

T = TypeVar("T")


def opaque(x: T) -> T:
    """Hides the value of `x` from XLA, which otherwise would compute with a constant before the program runs."""
    return jax.lax.optimization_barrier(x)


def as_scalars(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Scalars that all leaves read, where they may be elements of one array.

    XLA for GPUs would read that array in each leaf, and fuse leaves that read the same array: GPT-2 small would take
    half as long again to compile. XLA for CPUs would make a kernel of its own for each scalar.
    """
    return jax.lax.platform_dependent(*xs, cpu=lambda *xs: xs, default=lambda *xs: opaque(xs)) if xs else ()


def zeros_like(p: jax.Array) -> jax.Array:
    """Zeros of the parameter's (real) shape and arithmetic dtype that live where the parameter lives.

    They are computed from its bits. A constant would be placed on one device under `jit`, would not vary over the mesh
    inside `shard_map`, and XLA would merge the equal constants of leaves that are laid out differently.
    """
    p = as_real(p)
    bits = jax.lax.bitcast_convert_type(p, f"uint{jnp.finfo(p.dtype).bits}")
    return (bits ^ opaque(bits)).astype(compute_dtype(p.dtype))


def one_after(x: jax.Array, count: jax.Array) -> jax.Array:
    """The number 1, but known only after `x` is; `count` is any int32 number that is not a constant.

    XLA for CPUs copies an array that a later output still reads, and stores intermediate values that several outputs
    need. A factor that comes from the previous output makes it compute one after the other, each from its own inputs.
    """

    def first(x: jax.Array) -> jax.Array:
        return jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)

    def one(x: jax.Array) -> jax.Array:
        return jax.lax.full_like(first(x), 1)  # Of the same type as `first`, inside `shard_map` too.

    # The condition is always true, but XLA does not see that.
    return jax.lax.cond(count | 1 != 0, one, first, jax.lax.stop_gradient(x))


def run_at_most_once(todo: jax.Array, function: Callable[[T], T], x: T) -> T:
    """Applies `function` to `x` in place if `todo` is true, and returns `x` otherwise.

    XLA copies whatever leaves a conditional, but changes in place what a loop carries.
    """
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), function(c[1])), (todo, x))[1]


def fetched_after(grads: Any, state: T) -> T:  # noqa: ANN401
    """Makes the state depend on the gradients.

    Otherwise XLA would fetch it to the device while activations still fill the memory.
    """
    wanted = [x for x in jax.tree.leaves(grads) if isinstance(x, jax.Array)]
    return opaque((state, wanted))[0]
