"""One jitted step that updates parameters and state in place."""

from collections.abc import Callable
from typing import TypeVar

import jax
import optax

Params = TypeVar("Params")
OptState = TypeVar("OptState")


def make_step(
    tx: optax.GradientTransformation,
) -> Callable[[Params, OptState, Params], tuple[Params, OptState]]:
    """``step(params, state, grads) -> (params, state)``: one compiled program that works in place.

    It donates `params` and `state`: their buffers become the new ones and must not be used again. `tx` is any optax
    transformation.
    """

    def step(params: Params, state: OptState, grads: Params) -> tuple[Params, OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))
