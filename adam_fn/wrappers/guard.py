"""A guard that skips steps whose gradients are not finite."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.arithmetic import incremented
from adam_fn.trees.leaves import PyTree
from adam_fn.wrappers.base import (
    COUNT,
    TreeTransformation,
    check_state,
    check_transformation,
    is_trained,
    step_parameters,
)


class GuardState(NamedTuple):
    """The state of `skip_nonfinite`.

    Attributes:
      skipped: how many steps have been skipped so far, an int32 scalar.
      consecutive: how many steps in a row, up to and including the last one, had a gradient that was not finite; an
        int32 scalar.
      inner: the state of the wrapped transformation.
    """

    skipped: jax.Array
    consecutive: jax.Array
    inner: optax.OptState


@dataclasses.dataclass(frozen=True)
class SkipNonfinite(TreeTransformation):
    """The implementation of `skip_nonfinite`."""

    tx: optax.GradientTransformation
    max_consecutive: int

    def init(self, params: PyTree) -> GuardState:
        # Two arrays, not one: a buffer can be donated only once.
        return GuardState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), self.tx.init(params))

    def update(
        self, updates: PyTree, state: GuardState, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, GuardState]:
        check_state(state, GuardState, "skip_nonfinite", skipped=COUNT, consecutive=COUNT)
        new, inner = optax.with_extra_args_support(self.tx).update(updates, state.inner, params, **extra_args)
        return _guarded(self.max_consecutive, updates, state, inner, new)

    def write(
        self, grads: PyTree, state: GuardState, params: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, GuardState]:
        check_state(state, GuardState, "skip_nonfinite", skipped=COUNT, consecutive=COUNT)
        new, inner = step_parameters(self.tx, grads, state.inner, params, **extra_args)
        return _guarded(self.max_consecutive, grads, state, inner, new, params)


@jax.jit
def _guarded(
    max_consecutive: int, grads: PyTree, state: GuardState, inner: PyTree, new: PyTree, old: PyTree = None
) -> tuple[PyTree, GuardState]:
    """Finite gradients: the new result and state. Otherwise the old state, and `old` or an update of zero."""
    finite = jnp.asarray(True)
    for g in filter(is_trained, jax.tree.leaves(grads)):
        finite &= jnp.isfinite(g).all()
    made, after = decided(max_consecutive, finite, state)

    def nothing(u: jax.Array) -> jax.Array:
        # -0 + 0 is 0, so adding 0 would change a parameter of -0; adding -0 does not.
        return -jnp.zeros_like(u) if is_trained(u) else jnp.zeros_like(u)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(made, new, old)

    result = jax.tree.map(choose, new, jax.tree.map(nothing, new) if old is None else old)
    return result, after._replace(inner=jax.tree.map(choose, inner, state.inner))


def decided(max_consecutive: int, finite: jax.Array, state: GuardState) -> tuple[jax.Array, GuardState]:
    """Whether to make the step, and the new `GuardState` with `inner` still the old one."""
    consecutive = jnp.where(finite, 0, incremented(state.consecutive))
    made = finite | (consecutive > max_consecutive)
    skipped = jnp.where(made, state.skipped, incremented(state.skipped))
    return made, state._replace(skipped=skipped, consecutive=consecutive)


def skip_nonfinite(
    tx: optax.GradientTransformation, max_consecutive: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Skips every step in which a gradient is infinite or nan; wraps any transformation.

    It must be the outermost wrapper; only `zero1` and `offload` go outside it.

    ::

        tx = skip_nonfinite(optax.chain(clip_by_global_norm(1.0), adamw(1e-3)))

    A skipped step leaves the parameters, the moments and the step count, and with them schedules and random streams,
    bit for bit as they were: training continues as if the batch had not been drawn. ``state.skipped`` counts such
    steps. Like `optax.apply_if_finite`, it eventually gives up: after `max_consecutive` skips in a row it makes every
    update, whatever it is, until the gradients are finite again, so that a broken run becomes visible.

    Every step is computed, and its result is then kept or dropped, element by element. So each member of a `vmap`
    decides for itself, and `make_step` still works in place. Inside `shard_map`, give all shards the same gradients
    (after `psum`); otherwise they may decide differently. Gradients of frozen leaves count as well; gradients of
    integers, and None, do not.

    Args:
      tx: any optax transformation.
      max_consecutive: how many steps in a row are skipped at most; 0 skips none.
    """
    check_transformation(tx, "skip_nonfinite")
    if isinstance(max_consecutive, bool) or not isinstance(max_consecutive, int) or max_consecutive < 0:
        raise ValueError(f"max_consecutive must be an integer of at least 0, got {max_consecutive!r}")
    return SkipNonfinite(tx, max_consecutive).transformation()
