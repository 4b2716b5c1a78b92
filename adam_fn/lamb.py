"""LAMB: Adam with the step of each leaf scaled to the norm of its parameter, times the rate."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from adam_fn.arithmetic import safe_sqrt
from adam_fn.leaves import Mask, PyTree
from adam_fn.options import MuOptions, alias, codecs, links
from adam_fn.rule import Hyper
from adam_fn.rules.adam import Adam
from adam_fn.transform import State, Transformation, transform
from adam_fn.wrapper import Wrapper, check_state, inner, map_trained


@dataclasses.dataclass(frozen=True)
class Lamb(Wrapper):
    """A direction, times the trust ratio of each leaf, then a step. The state is the pair of theirs."""

    direction: Transformation
    step: Transformation

    def init(self, params: PyTree) -> tuple[State, State]:
        return self.direction.init(params), self.step.init(params)

    def update(
        self, updates: PyTree, state: tuple[State, State], params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, tuple[State, State]]:
        check_state(state, tuple, "lamb")
        if params is None:
            raise ValueError("lamb needs the parameters: call update(grads, state, params)")
        # Everything in float32 at least, and rounded to the gradients' dtype once.
        wide, direction = self.direction.update(_widened(updates), state[0], params)
        wide, step = self.step.update(_trusted(wide, params), state[1], params, **extra_args)
        return _rounded(wide, updates), (direction, step)


@jax.jit
def _widened(grads: PyTree) -> PyTree:
    return map_trained(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)


@jax.jit
def _trusted(updates: PyTree, params: PyTree) -> PyTree:
    """Each leaf of the updates, times ``‖p‖/‖u‖``, or 1 where either is 0."""

    def trusted(u: jax.Array, p: jax.Array) -> jax.Array:
        of_u, of_p = safe_sqrt(inner(u, u)), safe_sqrt(inner(p, p))
        ratio = jnp.where((of_u == 0) | (of_p == 0), 1, of_p / jnp.where(of_u == 0, 1, of_u))
        return u * ratio.astype(u.real.dtype)

    return map_trained(trusted, updates, params)


@jax.jit
def _rounded(updates: PyTree, grads: PyTree) -> PyTree:
    return map_trained(lambda u, g: u.astype(g.dtype), updates, grads)


@alias
def lamb(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-6,
    eps_root: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    **options: Unpack[MuOptions],
) -> optax.GradientTransformationExtraArgs:
    """LAMB (You et al., arXiv 1904.00962): ``p ← p - α (‖p‖/‖r‖) r``, ``r = m̂/(√v̂ + ε) + λp``, norms of each leaf.

    The ratio is 1 where either norm is 0. With ``decay="independent"`` (and the rate in λ) the decay is outside the
    ratio, as in Keras. The norms are computed in float32 (float64 for float64), for a complex leaf from its two reals.
    They are norms of whole leaves, so use `lamb` outside `shard_map`.

    The arguments are those of `adamw`; the state is a pair: the state of the direction and the state of the rate.
    """
    frozen = options.get("frozen")
    rule = Adam(b1, b2, eps, eps_root)
    direction, step = links(rule, learning_rate, weight_decay, options.get("decay", "scaled"))
    stored = codecs(rule, options.get("mu_dtype"), options.get("nu_dtype"), options.get("storage"))
    where, groups = options.get("storage_mask"), options.get("groups")
    kept = transform(direction, storage=stored, mask=mask, frozen=frozen, storage_mask=where, groups=groups)
    return Lamb(kept, transform(step, mask=mask, frozen=frozen, groups=groups)).transformation()
