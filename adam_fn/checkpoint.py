"""Checks whether a checkpoint belongs to this transformation and these parameters.

States are pytrees of arrays: Orbax, `flax.serialization` and pickle save and restore them as they are, and training
resumes bit for bit. None of them can tell whether a state is the right one: Orbax casts float32 to bfloat16 silently,
flax accepts any shape, and the moments of two optimizers look alike.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_fn.algebra.dtypes import compute_dtypes
from adam_fn.storage.codec import Cast
from adam_fn.trees.leaves import PyTree, check_distinct, join_keys, named_leaves
from adam_fn.trees.recording import Marked, located
from adam_fn.wrappers.base import check_transformation

_FORMAT = "adam_fn.checkpoint"


def _form(x: PyTree) -> str:
    """The dtype and shape of an array or of its stand-in, as in ``float32[2,3]``."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        shape, dtype = np.shape(x), jnp.result_type(x)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _forms(name: str, tree: PyTree, like: PyTree = None) -> dict[str, str]:
    """The form of each leaf by path. Attributes, keys and indices look alike, since checkpoints keep no named tuples.

    The ``value`` of a boxed parameter is not part of its path. Restored boxes are dictionaries: `like` tells which.
    """
    full = (join_keys(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(like)[0])
    boxed = dict(zip(full, (path for path, _ in named_leaves(like)), strict=True))
    full = (join_keys(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    paths = [boxed.get(key, path) for key, (path, _) in zip(full, named_leaves(tree), strict=True)]
    check_distinct(paths)
    leaves = zip(paths, jax.tree.leaves(tree), strict=True)
    return {f"{name}/{path}" if path else name: _form(leaf) for path, leaf in leaves}


def _without_leaves(state: PyTree) -> dict[str, str]:
    """The named tuples of a state that hold no array, such as `optax.EmptyState`, by path: Orbax compares them too."""

    def is_empty(x: object) -> bool:
        return hasattr(x, "_fields") and not isinstance(x, optax.MaskedNode) and not jax.tree.leaves(x)

    flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_empty)[0]
    return {f"state/{join_keys(keys)}".removesuffix("/"): repr(x) for keys, x in flat if is_empty(x)}


def describe(tx: optax.GradientTransformation, params: PyTree) -> dict[str, Any]:
    """Describes a checkpoint of `params` and of the state of `tx`; the result is to be saved with it, as JSON.

    It lists the rules of this package in `tx` that keep state, in the order in which `tx` creates their states, the
    codec of each slot, the shape and dtype of each leaf of the parameters and the state, and the parts of the state
    without leaves, by path. It leaves out hyperparameters, since a run may continue with another rate or decay, and
    optax's transformations, except for their states.

    Args:
      tx: any optax transformation.
      params: arrays or `jax.ShapeDtypeStruct`; nothing is computed or allocated.
    """
    check_transformation(tx, "describe", wraps=False)
    definitions, state = located(tx, params)
    definitions = [definition for definition in definitions if definition.codecs]
    # `Cast()` stores in the dtype of the arithmetic. If all parameters share one, it is described as the cast to it.
    kinds = compute_dtypes(params)
    plain = str(Cast(kinds.pop()) if len(kinds) == 1 else Cast())
    parts = [type(part).__name__ for definition in definitions for part in definition.rule.parts() if part.slots]
    return {
        "format": _FORMAT,
        "rules": parts,
        "storage": {
            f"storage/{name}" if len(definitions) == 1 else f"storage/{i}/{name}": plain
            if str(codec) == str(Cast())
            else str(codec)
            for i, definition in enumerate(definitions)
            for name, codec in definition.codecs
        },
        "params": _forms("params", params),
        "state": _forms("state", _unmarked(state)),
        "empty": _without_leaves(_unmarked(state)),
    }


def _unmarked(state: PyTree) -> PyTree:
    def is_marked(x: object) -> bool:
        return isinstance(x, Marked)

    return jax.tree.map(lambda x: x.state if is_marked(x) else x, state, is_leaf=is_marked)


def check(saved: PyTree, tx: optax.GradientTransformation, params: PyTree) -> None:
    """Raises an error, with a line for each path that differs, if a checkpoint does not belong to `tx` and `params`.

    ::

        manager.save(step, args=..., custom_metadata=checkpoint.describe(tx, params))
        ...
        checkpoint.check(manager.metadata(step).custom_metadata, tx, params)  # before anything is restored

    Args:
      saved: what `describe` returned when the checkpoint was made; or a state (restored by any means), or the shapes of
        one, such as Orbax's ``manager.item_metadata(step)["state"]``: then only the leaves of the state are compared,
        not the rules and the parameters. If only one of saved and expected has rules of this package (a run that comes
        from optax, or goes there), no rules are compared.
      tx: the transformation that resumes from the checkpoint.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if anything differs; the error lists every difference, saved and expected: another optimizer, another
        storage of a slot, and every other leaf of the parameters and the state, or part without leaves, that is missing
        or unexpected, or has another shape or dtype. Also if `saved` is None or empty.
      TypeError: if `tx` is no transformation.
    """
    check_transformation(tx, "check", wraps=False)
    if saved is None or (isinstance(saved, Mapping) and not saved):
        raise ValueError(
            "the checkpoint has no description: save describe(tx, params) as custom_metadata, or pass its state"
        )
    expected = describe(tx, params)
    if not (isinstance(saved, Mapping) and saved.get("format") == _FORMAT):
        saved = {**expected, "state": _forms("state", saved, like=_unmarked(located(tx, params).state))}
    # For slots that only one of the rules has, the leaves are compared instead of the storage.
    same, names = saved["rules"] == expected["rules"], {**expected["storage"], **saved["storage"]}
    from_another = bool(saved["rules"]) != bool(expected["rules"])  # From optax, or to it.
    compared = [name for name in names if same or all(name in x["storage"] for x in (saved, expected))]
    found, wanted = (
        {
            **({} if from_another else {"rules": ", ".join(x["rules"])}),
            **{name: x["storage"][name] for name in compared if name in x["storage"]},
            **x["params"],
            **x["state"],
            **x["empty"],
        }
        for x in (saved, expected)
    )
    differ = [path for path in {**wanted, **found} if found.get(path) != wanted.get(path)]
    # If a slot's storage differs, report that instead of each of its leaves (with one transformation only).
    changed = [path for path in differ if path in compared]
    slots = [path.replace("storage", "") + "/" for path in changed if path.count("/") == 1]
    # Nor a part without leaves if one is listed that has some in its place.
    replaced = {path for path in differ if any(other.startswith(f"{path}/") for other in differ)}
    lines = [
        f"  {path}: {found.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
        for path in differ
        if path not in replaced and not (path.startswith("state/") and any(slot in f"{path}/" for slot in slots))
    ]
    if lines and from_another:
        lines.append("adam_fn.interop.from_optax converts a state of optax, and to_optax converts back")
    elif same and (changed or any(path in saved["empty"] and path in expected["empty"] for path in differ)):
        lines.append(f"adam_fn.interop.change_storage converts a state to another {'storage' if changed else 'mask'}")
    if lines:
        raise ValueError(
            "\n".join(["the checkpoint does not belong to this transformation and these parameters:", *lines])
        )
