"""Converts the variables of Keras 3's optimizers to a state of ours and back. Keras is not imported."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optax
from numpy.typing import NDArray

from adam_fn.algebra.rule import Rule
from adam_fn.family.adam import Adam
from adam_fn.family.adamax import AdaMax
from adam_fn.family.amsgrad import AMSGrad
from adam_fn.family.lion import Lion
from adam_fn.interop.moments import Axes, MomentsByPath, Paths, Target, Transpose, as_array, fail, in_order
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.states import State

#: ``optimizer.variables``, or the arrays that ``optimizer.save_own_variables(store)`` stores, by index.
Variables: TypeAlias = Sequence[Any] | Mapping[str, Any]

#: Keras's names of our slots: those of the first mapping alternate, those of the others follow one after the other.
_FORMS: Mapping[type[Rule], tuple[Mapping[str, str], ...]] = {
    Adam: ({"mu": "momentum", "nu": "velocity"},),
    AMSGrad: ({"mu": "momentum", "nu": "velocity"}, {"nu_max": "velocity_hat"}),
    AdaMax: ({"mu": "momentum", "nu": "norm"},),
    Lion: ({"mu": "momentum"},),
}


def from_keras(
    tx: optax.GradientTransformation,
    params: PyTree,
    variables: Variables,
    *,
    paths: Paths,
    names: Sequence[str] | None = None,
    transpose: Transpose | None = None,
) -> State:
    """The state with which `tx` continues where Keras 3's Adam, AdamW, Adamax, Nadam or Lion stopped.

    ::

        state = adam_fn.interop.from_keras(tx, params, optimizer.variables, paths=["dense/kernel", "dense/bias"])

    `tx` should be the preset of `adam_fn.presets` with Keras's name (``keras3_adam``, …) and hyperparameters.

    Args:
      tx: an optimizer of this package, or `adam_fn.master_weights` around one; its remainders then start at 0.
      params: the parameters, now. Paths are their keys joined by ``/``, as in `adam_fn.masks.path`.
      variables: ``optimizer.variables``, arrays in that order, or what ``save_own_variables`` stored, by index (as in
        the ``optimizer/vars`` of a file).
      paths: the path of each of ``model.trainable_variables``, in that order, with None for a variable that has no
        counterpart here; or a mapping or a function from the names of the variables to paths.
      names: for such a mapping or function, the names in that order: ``[v.path for v in model.trainable_variables]``.
      transpose: as in `from_torch`.

    Raises:
      ValueError: if moments are missing, have another shape or kind, or belong to no parameter (the error lists all of
        them); if there are other variables than this optimizer has.
      TypeError: if `tx` has no counterpart in Keras.
    """
    target = Target(tx, params)
    given, order = _listed(variables), _order(paths, names)
    axes = Axes(transpose, order)
    slots: dict[str, dict[str, Any]] = {}
    for i, slot, number in _places(target, given, len(order)):
        if slot is not None and (path := order[number]) is not None:
            slots.setdefault(slot, {})[path] = axes.ours(path, as_array(given[i]))
    return target.state(MomentsByPath(int(as_array(given[0])), slots), "the variables of Keras")


def to_keras(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: State,
    variables: Variables,
    *,
    paths: Paths,
    names: Sequence[str] | None = None,
    transpose: Transpose | None = None,
) -> list[NDArray[Any]]:
    """The values with which Keras's optimizer continues where `tx` stopped: the inverse of `from_keras`.

    ::

        values = adam_fn.interop.to_keras(tx, params, state, optimizer.variables, paths=paths)
        for variable, value in zip(optimizer.variables, values):
            variable.assign(value)

    Args:
      tx: the transformation that made the state.
      params: the parameters, now.
      state: the state of `tx`.
      variables: the variables of Keras's optimizer, after ``optimizer.build(model.trainable_variables)``.
      paths: as in `from_keras`.
      names: as in `from_keras`.
      transpose: as in `from_torch`.

    Returns:
      an array for each variable, in its dtype; the learning rate and averages of the parameters stay as they are.

    Raises:
      ValueError: if a variable has no moments here, or moments have no variable, or their shapes differ; the error
        lists all of them.
      TypeError: if `tx` has no counterpart in Keras.
    """
    target = Target(tx, params)
    given, order = _listed(variables), _order(paths, names)
    axes = Axes(transpose, order)
    moments = target.moments(state)
    fail(target.uncovered(order), "the parameters are not those of Keras")
    values = [as_array(x) for x in given]
    values[0] = np.asarray(moments.count, values[0].dtype)
    problems = []
    for i, slot, number in _places(target, given, len(order)):
        if slot is None:
            new = np.asarray(1 - target.weights(moments.count)[0])  # The product of Nadam's momenta.
        elif (path := order[number]) is None:
            continue
        else:
            new = axes.theirs(path, np.asarray(moments.array(slot, path)))
            if new.shape != values[i].shape:
                problems.append(f"{path}: {slot} has shape {new.shape}, Keras's {values[i].shape}")
        values[i] = new.astype(values[i].dtype)
    fail(problems, "the state does not fit the variables of Keras")
    return values


def _listed(variables: Variables) -> list[Any]:
    if isinstance(variables, Mapping):
        return [variables[key] for key in sorted(variables, key=int)]
    return list(variables)


def _order(paths: Paths, names: Sequence[str] | None) -> list[str | None]:
    number = len(paths) if isinstance(paths, Sequence) else len(names or ())
    return in_order(paths, names, number, "Keras")


def _places(target: Target, given: Sequence[Any], number: int) -> Iterator[tuple[int, str | None, int]]:
    """For each moment: its index in `variables`, our slot's name (None: Nadam's product), and its parameter's index.

    Moments are the last variables. Before them are the number of steps, the learning rate if it is no schedule, and
    averages of the parameters if there are any.
    """
    form: tuple[Mapping[str, str], ...] = target.form(_FORMS, "Keras")
    places: list[tuple[str | None, str, int]] = []
    for names in form:
        places += [(slot, theirs, i) for i in range(number) for slot, theirs in names.items()]
    if isinstance(target.rule, Adam) and target.rule.nesterov:
        places.append((None, "", 0))
    first = len(given) - len(places)
    known = [getattr(x, "name", None) for x in given]
    wrong = [
        f"variable {first + i} is {known[first + i]}, expected a {theirs}"
        for i, (slot, theirs, _) in enumerate(places)
        if first > 0 and slot is not None and not str(known[first + i] or theirs).endswith(theirs)
    ]
    wrong += [
        f"variable {i} is {name}: gradients are accumulated" for i, name in enumerate(known) if "accumul" in str(name)
    ]
    named = all(name is not None for name in known)
    if not (first in (1, 2) or (named and first > 0)):
        wrong.append(f"there are {len(given)} variables, expected {len(places)} and 1 or 2 before them")
    fail(wrong, f"these are not the variables of Keras's {type(target.rule).__name__} for {number} parameters")
    return iter((first + i, slot, parameter) for i, (slot, _, parameter) in enumerate(places))
