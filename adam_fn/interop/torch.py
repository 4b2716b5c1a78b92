"""Converts the states of torch's optimizers to ours and back. torch is imported only for its files and its tensors."""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from adam_fn.algebra.rule import Rule
from adam_fn.family.adam import Adam
from adam_fn.family.adamax import AdaMax
from adam_fn.family.amsgrad import AMSGrad
from adam_fn.family.radam import RAdam
from adam_fn.interop.moments import Axes, MomentsByPath, Paths, Target, Transpose, as_array, fail, in_order
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.states import State

#: The result of ``optimizer.state_dict()``, with tensors or other arrays.
StateDict: TypeAlias = Mapping[str, Any]

_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
#: torch's names of our slots.
_FORMS: Mapping[type[Rule], Mapping[str, str]] = {
    Adam: _MOMENTS,
    RAdam: _MOMENTS,
    AMSGrad: {**_MOMENTS, "nu_max": "max_exp_avg_sq"},
    AdaMax: {"mu": "exp_avg", "nu": "exp_inf"},
}


def _target(tx: optax.GradientTransformation, params: PyTree) -> tuple[Target, Mapping[str, str]]:
    """The transformation whose state is converted, and torch's names of its slots."""
    target = Target(tx, params)
    return target, target.form(_FORMS, "torch")


def from_torch(
    tx: optax.GradientTransformation,
    params: PyTree,
    state_dict: StateDict | str | os.PathLike[str],
    *,
    paths: Paths,
    names: Sequence[str] | None = None,
    transpose: Transpose | None = None,
) -> State:
    """The state with which `tx` continues where torch's Adam, AdamW, Adamax, NAdam or RAdam stopped.

    ::

        state = adam_fn.interop.from_torch(
            tx,
            params,
            "optimizer.pt",
            paths=["dense/kernel", "dense/bias"],  # In the order of model.parameters().
            transpose={"*/kernel": (1, 0)},  # torch.nn.Linear's weight is [out, in].
        )

    `tx` should be the optimizer of `adam_fn.presets` with torch's name and the hyperparameters in ``param_groups`` (see
    `torch_groups`): they are not part of the state.

    Args:
      tx: an optimizer of this package, or `adam_fn.master_weights` around one; its remainders then start at 0.
      params: the parameters, now. Paths are their keys joined by ``/``, as in `adam_fn.masks.path`.
      state_dict: the result of ``optimizer.state_dict()``, with tensors or NumPy arrays, or the name of a file to which
        torch saved it (only a file needs torch).
      paths: the path of each of torch's parameters, in the optimizer's order: the order of ``model.parameters()``, or
        of the groups one after the other; with None for a parameter that has no counterpart here. Or a mapping or a
        function from torch's names to paths, ``lambda name: name.replace(".", "/").replace("weight", "kernel")``.
      names: for such a mapping or function, torch's names: ``[name for name, _ in model.named_parameters()]``. An
        optimizer that was made from named parameters has them in its state.
      transpose: the axes of torch's arrays in the order in which they are here, by patterns of paths (`fnmatch`; the
        first that matches counts): ``{"conv*/kernel": (2, 3, 1, 0), "*/kernel": (1, 0)}``.

    Raises:
      ValueError: if moments are missing, have another shape or kind, or belong to no parameter (the error lists all of
        them); if torch's parameters have made different numbers of steps.
      TypeError: if `tx` has no counterpart in torch.
    """
    target, form = _target(tx, params)
    saved = _read(state_dict)
    order = _order(saved, paths, names)
    axes = Axes(transpose, order.values())
    state = saved["state"]
    slots: dict[str, dict[str, Any]] = {name: {} for name in form}
    steps: dict[str, int] = {}
    for number, path in order.items():
        entry = state.get(number, state.get(str(number), {}))
        if path is None or not entry:
            continue
        steps[path] = int(as_array(entry["step"]))
        for name, theirs in form.items():
            if theirs in entry:
                slots[name][path] = axes.ours(path, as_array(entry[theirs]))
    if len(set(steps.values())) > 1:
        fail((f"{path}: {count}" for path, count in steps.items()), "torch's parameters have made different steps")
    count = next(iter(steps.values()), 0)
    return target.state(MomentsByPath(count, slots), "the state of torch")


def to_torch(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: State,
    state_dict: StateDict,
    *,
    paths: Paths,
    names: Sequence[str] | None = None,
    transpose: Transpose | None = None,
) -> dict[str, Any]:
    """The state that torch's optimizer loads to continue where `tx` stopped: the inverse of `from_torch`.

    ::

        found = adam_fn.interop.to_torch(tx, params, state, optimizer.state_dict(), paths=paths)
        optimizer.load_state_dict(adam_fn.interop.torch_tensors(found))

    Args:
      tx: the transformation that made the state.
      params: the parameters, now.
      state: the state of `tx`.
      state_dict: the state that torch's optimizer has now; it may be new. Its groups and hyperparameters are kept.
      paths: as in `from_torch`.
      names: as in `from_torch`.
      transpose: as in `from_torch`.

    Returns:
      a ``state_dict`` of NumPy arrays; parameters whose path is None keep what `state_dict` has for them.

    Raises:
      ValueError: if one of torch's parameters has no moments here, or the reverse; the error lists all of them.
      TypeError: if `tx` has no counterpart in torch.
    """
    target, form = _target(tx, params)
    saved = _read(state_dict)
    order = _order(saved, paths, names)
    axes = Axes(transpose, order.values())
    moments = target.moments(state)
    fail(target.uncovered(order.values()), "the parameters are not those of torch")
    new: dict[Any, Any] = dict(saved["state"])
    for number, path in order.items():
        if path is None:
            continue
        entry: dict[str, Any] = {"step": np.asarray(moments.count, np.float32)}
        if isinstance(target.rule, Adam) and target.rule.nesterov:
            # The product of the momenta so far is 1 minus the bias weight.
            entry["mu_product"] = np.asarray(1 - target.weights(moments.count)[0], np.float32)
        for name, theirs in form.items():
            entry[theirs] = axes.theirs(path, np.asarray(moments.array(name, path)))
        new[number] = entry
    return {**saved, "state": new}


def torch_groups(
    state_dict: StateDict | str | os.PathLike[str], *, paths: Paths, names: Sequence[str] | None = None
) -> list[tuple[dict[str, Any], list[str]]]:
    """The parameter groups of a torch state: the hyperparameters of each group, and the paths here of its parameters.

    The multipliers and masks of `tx` follow from them: ``mask=masks.path(*decaying)`` if only some groups decay. The
    arguments are those of `from_torch`.
    """
    saved = _read(state_dict)
    order = _order(saved, paths, names)
    inner = {"params", "param_names"}
    return [
        (
            {key: value for key, value in group.items() if key not in inner},
            [path for number in group["params"] if (path := order[number]) is not None],
        )
        for group in saved["param_groups"]
    ]


def torch_tensors(tree: PyTree) -> PyTree:
    """A tree, such as the result of `to_torch`, with torch's tensors in place of NumPy arrays."""
    torch = _torch()
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x, tree)


def _torch() -> Any:  # noqa: ANN401
    return importlib.import_module("torch")


def _read(source: StateDict | str | os.PathLike[str]) -> StateDict:
    """Returns a state_dict, from a file if need be."""
    if isinstance(source, (str, os.PathLike)):
        source = _torch().load(source, map_location="cpu", weights_only=True)
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= source.keys():
        found = sorted(map(str, source)) if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(f"expected the state_dict of torch's optimizer, with state and param_groups, got {found}")
    return source


def _order(saved: StateDict, paths: Paths, names: Sequence[str] | None) -> dict[Any, str | None]:
    """The path of each parameter by torch's index."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if names is None and all("param_names" in group for group in saved["param_groups"]):
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
    return dict(zip(numbers, in_order(paths, names, len(numbers), "torch"), strict=True))
