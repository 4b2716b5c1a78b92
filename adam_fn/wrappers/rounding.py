"""Stochastic rounding: bfloat16 parameters that learn with no extra memory per parameter."""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_fn.algebra.arithmetic import incremented
from adam_fn.algebra.values import method_of
from adam_fn.execute.destination import PARAMETERS, UPDATES, Destination, Inputs
from adam_fn.storage import noise
from adam_fn.storage.parameter_bits import landing, round_stochastically
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.update import Update
from adam_fn.wrappers.base import COUNT, TreeTransformation, check_state, check_transformation
from adam_fn.wrappers.masters import Params


class RoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
      count: the number of updates made so far, an int32 scalar.
      inner: the state of the wrapped transformation.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: optax.OptState


@dataclasses.dataclass(frozen=True)
class RoundedDestination(Destination):
    """The destination that rounds the float32 step of a bfloat16 parameter to one of the two bfloat16 around it."""

    parameters: bool = False

    def for_dtype(self, dtype: np.dtype) -> Destination:
        return self if dtype == jnp.bfloat16 else PARAMETERS if self.parameters else UPDATES

    def read(self, inputs: Inputs) -> Inputs:
        return inputs._replace(g=inputs.g.astype(jnp.float32))

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        assert dither is not None
        q = round_stochastically(inputs.p.astype(jnp.float32) + u.astype(jnp.float32), dither)
        return q.astype(jnp.bfloat16) if self.parameters else landing(inputs.p, q)[0], None


@dataclasses.dataclass(frozen=True)
class StochasticRounding(TreeTransformation):
    """The implementation of `stochastic_rounding`."""

    tx: optax.GradientTransformation
    seed: int

    def init(self, params: PyTree) -> RoundingState:
        tree = Params("stochastic_rounding", params)
        return RoundingState(jnp.zeros((), jnp.int32), self.tx.init(tree.widened(tree.leaves)))

    def update(
        self, updates: PyTree, state: RoundingState, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, RoundingState]:
        check_state(state, RoundingState, "stochastic_rounding", count=COUNT)
        if isinstance(method_of(self.tx.update), Update):
            return self._inside(updates, state, params, RoundedDestination(), **extra_args)
        tree = Params("stochastic_rounding", params)
        wide, masters = (tree.widened(tree.align(updates, "gradient")), tree.widened(tree.leaves))
        wide, inner = optax.with_extra_args_support(self.tx).update(wide, state.inner, masters, **extra_args)
        return _rounded(self._time(state), wide, params, extra_args.get("layer")), self._next(state, inner)

    def write(
        self, grads: PyTree, state: RoundingState, params: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, RoundingState]:
        if not isinstance(method_of(self.tx.update), Update):
            return super().write(grads, state, params, **extra_args)
        check_state(state, RoundingState, "stochastic_rounding", count=COUNT)
        return self._inside(grads, state, params, RoundedDestination(parameters=True), **extra_args)

    def _inside(
        self,
        grads: PyTree,
        state: RoundingState,
        params: PyTree,
        destination: RoundedDestination,
        **extra_args: PyTree,
    ) -> tuple[PyTree, RoundingState]:
        """Makes a step that rounds each parameter where it is stepped."""
        update = cast(Update, method_of(self.tx.update))
        Params("stochastic_rounding", params).align(grads, "gradient")
        new, _, inner = update.written(grads, state.inner, params, destination, time=self._time(state), **extra_args)
        return new, self._next(state, inner)

    def _time(self, state: RoundingState) -> jax.Array:
        return _time(state.count, np.uint32(self.seed))

    def _next(self, state: RoundingState, inner: optax.OptState) -> RoundingState:
        return RoundingState(incremented(state.count), inner)


@jax.jit
def _time(count: jax.Array, seed: jax.Array) -> jax.Array:
    """The `noise.time_offsets` of a step, from a sequence of its own for each seed."""
    return noise.time_offsets(count, ["parameters"])["parameters"] ^ (seed * np.uint32(0x9E3779B9)).astype(jnp.int32)


@jax.jit
def _rounded(time: jax.Array, updates: PyTree, params: PyTree, layer: jax.Array | None = None) -> PyTree:
    tree = Params("stochastic_rounding", params)
    new = tree.align(updates, "update")
    for i, (short, u, p) in enumerate(zip(tree.short, new, tree.leaves, strict=True)):
        if short and u is not None:
            new[i], _ = RoundedDestination().write(Inputs(u, p), u, noise.dither(noise.lattice(p, layer), time))
    return tree.treedef.unflatten(new)


def stochastic_rounding(tx: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Rounds bfloat16 parameters so that small updates arrive on average, around any transformation.

    ::

        x = p + tx(g, p) in float32;   q = one of the two bfloat16 around x, such that the mean of q is x
        u = q - p

    ``tx = adam_fn.stochastic_rounding(adam_fn.adamw(1e-3))``. `tx` sees gradients and parameters in float32. The
    updates u are float32, and `optax.apply_updates` lands on q exactly (`equinox.apply_updates` would leave the
    parameters in float32, and they would never be rounded again). Whether q is the lower or the upper neighbour depends
    on the seed, the step and the element's place in its leaf, never on the sharding, and is spread evenly over the
    steps.

    Nothing but the step is stored. A member of a `vmap` or a shard of a `shard_map` is rounded as it would be alone, so
    members are rounded alike; to give each its own dither, start them at distant steps:
    ``state._replace(count=jnp.arange(members) << 20)``.

    An update below 2⁻²⁵ of its parameter vanishes in x; so do subnormal numbers where XLA treats them as 0 (on CPUs).
    Parameters in float16 and float8 are errors. Leaves of float32 and wider, integers and None go to `tx` as they are.

    Args:
      tx: any optax transformation.
      seed: an integer in [0, 2³²). Transformations with equal seeds round alike.
    """
    check_transformation(tx, "stochastic_rounding")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return StochasticRounding(tx, int(seed)).transformation()
