"""LAMB: Adam with the step of each leaf scaled to the norm of its parameter, times the rate."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.arithmetic import safe_sqrt
from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.hyper import Hyper
from adam_fn.algebra.rate_and_decay import WeightDecay
from adam_fn.algebra.rule import Rule
from adam_fn.family.adam import Adam
from adam_fn.options import MuOptions, built, lists_options
from adam_fn.trees.leaves import Mask, PyTree
from adam_fn.trees.transform import Transformation, transform
from adam_fn.wrappers.base import TreeTransformation, inner, map_trained


@dataclasses.dataclass(frozen=True)
class Lamb(TreeTransformation):
    """The implementation of `lamb`: links before and after the trust ratio of each leaf. Its state is optax's."""

    direction: tuple[Transformation, ...]
    step: tuple[Transformation, ...]
    layers: str | None = None

    def init(self, params: PyTree) -> tuple[PyTree, ...]:
        before, after = (tuple(link.init(params) for link in links) for links in (self.direction, self.step))
        return *before, optax.EmptyState(), *after

    def update(
        self, updates: PyTree, state: tuple[PyTree, ...], params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        first = len(self.direction)
        if type(state) is not tuple or len(state) != first + 1 + len(self.step):
            raise TypeError(f"lamb expected the state that tx.init(params) makes, got a {type(state).__name__}")
        if params is None:
            raise ValueError("lamb needs the parameters: call update(grads, state, params)")
        # Everything is computed in float32 at least, and rounded to the gradients' dtype once.
        wide, before = _applied(self.direction, _widened(updates), state[:first], params)
        wide, after = _applied(self.step, _trusted(wide, params, self.layers), state[first + 1 :], params, **extra_args)
        return _rounded(wide, updates), (*before, state[first], *after)


def _applied(
    links: Sequence[Transformation], updates: PyTree, states: Sequence[PyTree], params: PyTree, **extra_args: PyTree
) -> tuple[PyTree, list[PyTree]]:
    """Applies one transformation after the other."""
    new: list[PyTree] = []
    for link, state in zip(links, states, strict=True):
        updates, after = link.update(updates, state, params, **extra_args)
        new.append(after)
    return updates, new


@jax.jit
def _widened(grads: PyTree) -> PyTree:
    return map_trained(lambda g: g if jnp.iscomplexobj(g) else g.astype(compute_dtype(g.dtype)), grads)


@functools.partial(jax.jit, static_argnames="layers")
def _trusted(updates: PyTree, params: PyTree, layers: str | None) -> PyTree:
    """Each leaf of the updates, times ``‖p‖/‖u‖``, or 1 where either is 0."""

    def trusted(u: jax.Array, p: jax.Array) -> jax.Array:
        of_u, of_p = safe_sqrt(inner(u, u)), safe_sqrt(inner(p, p))
        ratio = jnp.where((of_u == 0) | (of_p == 0), 1, of_p / jnp.where(of_u == 0, 1, of_u))
        return u * ratio.astype(u.real.dtype)

    return map_trained(trusted, updates, params, layers=layers)


@jax.jit
def _rounded(updates: PyTree, grads: PyTree) -> PyTree:
    return map_trained(lambda u, g: u.astype(g.dtype), updates, grads)


@lists_options
def lamb(
    learning_rate: Hyper,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-6,
    eps_root: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    mask: Mask | None = None,
    *,
    layers: str | None = None,
    **options: Unpack[MuOptions],
) -> optax.GradientTransformationExtraArgs:
    """LAMB (You et al., arXiv 1904.00962): ``p ← p - α (‖p‖/‖r‖) r``, ``r = m̂/(√v̂ + ε) + λp``, norms of each leaf.

    The ratio is 1 where either norm is 0. With ``decay="independent"`` (and the rate in λ) the decay is outside the
    ratio, as in Keras. The norms are computed in float32 (float64 for float64), for a complex leaf from its two reals.
    They are norms of whole leaves, so use `lamb` outside `shard_map`.

    `layers` is the path of parameters that are stacked along a first axis, as for `jax.lax.scan`, such as
    ``"decoder/layers"``: each layer's part of them has norms of its own. Otherwise a stack is one leaf. The other
    arguments are those of `adamw`; the state is that of `optax.lamb`.
    """
    found = built(Adam(b1, b2, eps, eps_root), learning_rate, weight_decay=weight_decay, mask=mask, **options)

    def link(part: Rule) -> Transformation:
        unused = (
            {"mask"}
            if part.slots
            else {"storage", "storage_mask"} | (set() if isinstance(part, WeightDecay) else {"mask"})
        )
        return transform(part, **{name: x for name, x in found.arguments.items() if name not in unused})

    return Lamb(
        tuple(map(link, found.direction.parts())), tuple(map(link, found.step.parts())), layers
    ).transformation()
