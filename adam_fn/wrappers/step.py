"""One jitted step that updates parameters and state in place."""

from typing import Protocol, TypeVar, cast

import jax
import optax

from adam_fn.wrappers.base import check_transformation, step_parameters

Params = TypeVar("Params")
OptState = TypeVar("OptState")


class Step(Protocol):
    """``step(params, state, grads) -> (params, state)``: a jitted step, which also has `lower`."""

    def __call__(self, params: Params, state: OptState, grads: Params) -> tuple[Params, OptState]: ...

    def lower(self, params: object, state: object, grads: object) -> jax.stages.Lowered: ...


def make_step(tx: optax.GradientTransformation) -> Step:
    """Makes ``step(params, state, grads) -> (params, state)``, one compiled program that works in place.

    It donates `params` and `state`: their buffers are reused for the results. Do not use them again, and do not pass
    the same buffer twice (as with tied leaves, or a parameter passed as its own gradient). `tx` is any optax
    transformation; anything else is a TypeError.
    """
    check_transformation(tx, "make_step", wraps=False)

    def step(params: optax.Params, state: optax.OptState, grads: optax.Updates) -> tuple[optax.Params, optax.OptState]:
        return step_parameters(tx, grads, state, params)

    return cast(Step, jax.jit(step, donate_argnums=(0, 1)))
