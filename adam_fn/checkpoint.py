"""Checks whether a checkpoint belongs to this transformation and these parameters.

States are pytrees of arrays: Orbax, `flax.serialization` and pickle save and restore them as they are, and training
resumes bit for bit. What they cannot know is whether a state is the right one. Orbax casts float32 to bfloat16
silently, flax accepts any shape, and the moments of two optimizers look alike.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_fn.leaves import PyTree, joined
from adam_fn.observe import observed
from adam_fn.rule import Rule

_FORMAT = "adam_fn.checkpoint"


def _form(x: PyTree) -> str:
    """The dtype and shape, as in ``float32[2,3]``, of an array or of what stands for one."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        shape, dtype = np.shape(x), jnp.result_type(x)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _forms(name: str, tree: PyTree) -> dict[str, str]:
    """The form of each leaf by path. Attributes, keys and indices read alike: checkpoints keep no named tuples.

    The ``value`` of a boxed parameter is part of the path: a box that was restored is a dictionary.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = (f"{name}/{joined(keys)}" if keys else name for keys, _ in flat)
    return dict(zip(paths, (_form(leaf) for _, leaf in flat), strict=True))


def describe(tx: optax.GradientTransformation, params: PyTree) -> dict[str, Any]:
    """A description of a checkpoint of `params` and of the state of `tx`, to be saved with it as JSON.

    It names the rules of this package in `tx` that have a memory, in the order in which `tx` makes their states, and
    shape and dtype of each leaf of parameters and state by path. Hyperparameters are left out: a run may continue with
    another rate or decay. So are optax's transformations, except for their states.

    Args:
      tx: any optax transformation.
      params: arrays or `jax.ShapeDtypeStruct`; nothing is computed or allocated.
    """

    def init(params: PyTree) -> PyTree:
        return tx.init(params)

    # JAX has the shapes of a function that it knows, or of one inside `jit`, without a call: then nothing is noted.
    with observed() as seen, jax.disable_jit():
        state = jax.eval_shape(init, params)
    rules = [type(part).__name__ for rule in seen if isinstance(rule, Rule) for part in rule.parts() if part.slots]
    return {"format": _FORMAT, "rules": rules, "params": _forms("params", params), "state": _forms("state", state)}


def check(saved: PyTree, tx: optax.GradientTransformation, params: PyTree) -> None:
    """Raises where a checkpoint is not one of `tx` and `params`, with a line for each path that differs.

    ::

        manager.save(step, args=..., custom_metadata=checkpoint.describe(tx, params))
        ...
        checkpoint.check(manager.metadata(step).custom_metadata, tx, params)  # before anything is restored

    Args:
      saved: what `describe` returned when the checkpoint was made. Or a state (restored by whatever means), or the
        shapes of one, such as Orbax's ``manager.item_metadata(step)["state"]``: then the leaves of the state are
        compared, but neither rules nor parameters.
      tx: the transformation that is to continue.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: names every difference, saved and expected: another optimizer, and each leaf of parameters and state
        that is missing, is not expected or has another shape or dtype.
    """
    expected = describe(tx, params)
    if not (isinstance(saved, Mapping) and saved.get("format") == _FORMAT):
        saved = {**expected, "state": _forms("state", saved)}
    found, wanted = ({"rules": ", ".join(x["rules"]) or "none", **x["params"], **x["state"]} for x in (saved, expected))
    lines = [
        f"  {path}: {found.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
        for path in {**wanted, **found}
        if found.get(path) != wanted.get(path)
    ]
    if lines:
        raise ValueError(
            "\n".join(["the checkpoint does not belong to this transformation and these parameters:", *lines])
        )
