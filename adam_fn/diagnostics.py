"""What can be read off a transformation and its state."""

import jax
import optax

from adam_fn.leaves import PyTree


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """The bytes of the state that `tx` keeps for `params`, codes and scales included; nothing is allocated.

    `params` may be arrays or `jax.ShapeDtypeStruct`. Sharded arrays count as wholes.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))
