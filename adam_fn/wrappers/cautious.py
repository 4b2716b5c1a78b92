"""Cautious updates: only the elements that go against the gradient are kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.dtypes import as_dtype, as_real, compute_dtype
from adam_fn.trees.leaves import PyTree
from adam_fn.wrappers.base import TreeTransformation, check_transformation, map_trained


@dataclasses.dataclass(frozen=True)
class Cautious(TreeTransformation):
    """The implementation of `cautious`."""

    tx: optax.GradientTransformation
    floor: ArrayLike
    layers: str | None = None

    def init(self, params: PyTree) -> optax.OptState:
        return self.tx.init(params)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        new, state = optax.with_extra_args_support(self.tx).update(updates, state, params, **extra_args)
        return _masked(new, updates, self.floor, self.layers), state


@functools.partial(jax.jit, static_argnames="layers")
def _masked(updates: PyTree, grads: PyTree, floor: ArrayLike, layers: str | None) -> PyTree:
    def masked(u: jax.Array, g: jax.Array) -> jax.Array:
        if u.size == 0:
            return u
        u_real, g_real = (as_real(x).astype(compute_dtype(x.dtype)) for x in (u, g))
        # Signs, not products: the product of two small float16 numbers is 0.
        agrees = (jnp.sign(u_real) == -jnp.sign(g_real)) & (g_real != 0)
        scale = 1 / jnp.maximum(agrees.mean(dtype=u_real.dtype), floor)
        # A product and not a choice, so that nan stays nan.
        return as_dtype(u_real * jnp.where(agrees, scale, 0), u.dtype)

    return map_trained(masked, updates, grads, layers=layers)


def cautious(
    tx: optax.GradientTransformation, floor: ArrayLike = 1e-3, *, layers: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Drops the elements of an update that point up the gradient (Liang et al., arXiv 2411.16085).

    ::

        φ = 1 where u·g < 0, else 0;   u' = u φ / max(mean(φ), floor)

    The mean is over a leaf, so the size of a step is kept on average. The state is the state of `tx`, and the updates
    are scaled in their own dtype. The authors apply weight decay outside the mask,
    ``optax.chain(cautious(adam(1e-3)), transform(Decay(1e-5, independent=True)))``; weight decay inside `tx` is masked
    with the rest.

    Args:
      tx: any transformation whose updates are added to the parameters (with the sign of descent).
      floor: the least value that the updates are divided by.
      layers: the path of parameters that are stacked along a first axis: each layer's part has a mean of its own.
    """
    check_transformation(tx, "cautious")
    if isinstance(floor, (int, float)) and not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], got {floor}")
    return Cautious(tx, floor, layers).transformation()
