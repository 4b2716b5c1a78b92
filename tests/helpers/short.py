"""bfloat16 parameters: the ways to write to them, and training."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_fn
from adam_fn.wrappers import masters as write

BF16 = jnp.bfloat16
WRITES: dict[str, Callable[[Any], Any]] = {
    "masters of 16 bits": write.master_weights,
    "masters of 8 bits": functools.partial(write.master_weights, bits=8),
    "stochastic": adam_fn.stochastic_rounding,
}


def bits_of(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(np.uint32 if x.dtype == np.float32 else np.uint16)


def run(
    tx: Any, start: Any, grad: Callable[[Any, Any], Any], steps: int, jit: Callable[..., Any] = jax.jit
) -> tuple[Any, Any]:
    """The parameters after every step, and the last state, of one jitted scan; `grad` takes parameters and step."""

    @jit
    def scanned(start: Any) -> Any:
        def step(carry: Any, t: jax.Array) -> Any:
            p, state = carry
            updates, state = tx.update(grad(p, t), state, p)
            p = optax.apply_updates(p, updates)
            return (p, state), (p, state)

        return jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[1]

    return scanned(start)


def step(tx: Any, p: Any, state: Any, g: Any) -> tuple[Any, Any]:
    updates, state = tx.update(g, state, p)
    return optax.apply_updates(p, updates), state
