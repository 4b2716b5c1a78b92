"""Converts the states of optax's optimizers to ours and back."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from adam_fn.algebra.rule import Rule
from adam_fn.family.adabelief import AdaBelief
from adam_fn.family.adam import Adam
from adam_fn.family.adam_atan2 import AdamAtan2
from adam_fn.family.adamax import AdaMax
from adam_fn.family.adan import Adan
from adam_fn.family.ademamix import AdEMAMix
from adam_fn.family.adopt import ADOPT
from adam_fn.family.amsgrad import AMSGrad
from adam_fn.family.lion import Lion
from adam_fn.family.radam import RAdam
from adam_fn.family.yogi import Yogi
from adam_fn.interop.moments import ByPath, MomentsByPath, Target, fail
from adam_fn.trees.leaves import PyTree, by_path, display_path, join_keys, map_named
from adam_fn.trees.states import State

S = TypeVar("S")


class _Form(NamedTuple):
    """The form of a state of optax.

    Attributes:
      state: its type.
      slots: the fields of the moments, by our slots.
      counts: the fields that count steps.
    """

    state: type[Any]
    slots: Mapping[str, str]
    counts: tuple[str, ...] = ("count",)


_MOMENTS = {"mu": "mu", "nu": "nu"}
_ADAM = _Form(optax.ScaleByAdamState, _MOMENTS)
_FORMS: Mapping[type[Rule], _Form] = {
    **dict.fromkeys((Adam, AdamAtan2, AdaMax, RAdam, Yogi, ADOPT), _ADAM),
    AMSGrad: _Form(optax.ScaleByAmsgradState, {**_MOMENTS, "nu_max": "nu_max"}),
    AdaBelief: _Form(optax.ScaleByBeliefState, _MOMENTS),
    Lion: _Form(optax.ScaleByLionState, {"mu": "mu"}),
    Adan: _Form(optax.ScaleByAdanState, {"mu": "m", "delta": "v", "nu": "n", "grad": "g"}, ("t",)),
    AdEMAMix: _Form(optax.contrib.ScaleByAdemamixState, {"mu": "m1", "slow": "m2", "nu": "nu"}, ("count", "count_m2")),
}
#: The states of optax that count steps for schedules, by name: some are not public.
_SCHEDULES = {
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "ScaleByScheduleState",
    "WeightDecaySchedule",
    "WrappedScheduleState",
}


def from_optax(tx: optax.GradientTransformation, params: PyTree, optax_state: State) -> State:
    """The state with which `tx` continues where an optimizer of optax stopped.

    ::

        tx = adam_fn.adamw(1e-3, storage="24bit")
        state = adam_fn.interop.from_optax(tx, params, optax_state)

    optax's moments are found wherever they are: in a chain, masked, partitioned, under `inject_hyperparams`,
    `MultiSteps` or `apply_if_finite`. They are stored as `tx` stores its moments, and live where the parameters live.
    Whatever else such wrappers keep (injected hyperparameters, accumulated gradients) is not taken over, nor are
    moments of leaves that `tx` freezes. `tx` should have the hyperparameters of optax's optimizer: they are not part of
    the state.

    Adam, AdamW, NAdam, AdaMax, RAdam, AdaBelief, Yogi, Lion, ADOPT and AdEMAMix continue as they would have in optax.
    `adam_fn.adam_atan2`, which optax lacks, continues from the state of Adam. Two of optax's optimizers differ from
    those of the same name here. `optax.amsgrad` takes the maximum of the corrected v, while `AMSGrad` (like torch)
    corrects the maximum. ``nu_max`` is converted so that the two agree now; afterwards they agree only if ``β₂ᵗ`` is
    negligible, or without ``bias_correction_nu``, when they are the same. `optax.adan` has 1-β₂ in place of β₂ (see
    `adam_fn.adan`).

    Args:
      tx: an optimizer of this package, or `adam_fn.master_weights` around one; its remainders then start at 0.
      params: the parameters, now.
      optax_state: the state of an optimizer of optax for parameters of this structure. A state from a checkpoint must
        be restored into ``optax_tx.init(params)``: plain dictionaries and lists are a ValueError that says how.

    Raises:
      ValueError: if moments are missing, have another shape or kind, or belong to no parameter (the error lists all of
        them); if two places count steps differently; or if a complex parameter has a second moment and `tx` was not
        made with ``complex="magnitude"``, which is what optax does.
      TypeError: if `tx` has no counterpart in optax.
    """
    target, form = _target(tx, params)
    found: list[Any] = []
    untyped: list[Any] = []  # Parts of a checkpoint that was restored without its types.
    counts: dict[str, int] = {}

    def look(keys: jax.tree_util.KeyPath, node: Any) -> Any:  # noqa: ANN401
        for field in _counted(node, form):
            counts[f"{join_keys(keys)} {type(node).__name__}.{field}".strip()] = int(getattr(node, field))
        if isinstance(node, form.state):
            found.append(node)
        elif isinstance(node, Mapping) and set(form.state._fields) <= set(node):
            untyped.append(node)
        return node

    _map_nodes(look, optax_state, form)
    if not found:
        lost = (
            ". It was restored as plain containers: restore it into optax_tx.init(params), with Orbax's "
            "StandardRestore(optax_tx.init(params)) or flax.serialization.from_state_dict(optax_tx.init(params), …)"
        )
        raise ValueError(
            f"the optax state contains no {form.state.__name__}, which {type(target.rule).__name__} needs in order to "
            "continue" + (lost if untyped else "")
        )
    if len(set(counts.values())) > 1:
        fail((f"{where}: {count}" for where, count in counts.items()), "the state of optax counts steps differently")
    slots: dict[str, ByPath] = {}
    both = target.complex if getattr(target.rule, "magnitude", False) else []
    for name, field in form.slots.items():
        trees = [by_path(getattr(node, field)) for node in found]
        merged = {path: x for tree in trees for path, x in tree.items()}
        twice = [path for path in merged if sum(path in tree for tree in trees) > 1]
        fail((f"{path}: more than once" for path in twice), f"the state of optax has {field} of one parameter twice")
        pairs = both if name.startswith("nu") else []
        slots[name] = {path: _for_both(x) if path in pairs else x for path, x in merged.items()}
    count = next(iter(counts.values()))
    if "nu_max" in slots:
        weight = _corrected(target, count)
        slots["nu_max"] = {path: jnp.asarray(x) * weight for path, x in slots["nu_max"].items()}
    return target.state(MomentsByPath(count, slots), "the state of optax")


def to_optax(tx: optax.GradientTransformation, params: PyTree, state: State, optax_state: S) -> S:
    """The state with which an optimizer of optax continues where `tx` stopped: the inverse of `from_optax`.

    ::

        optax_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        optax_state = adam_fn.interop.to_optax(tx, params, state, optax_tx.init(params))

    Args:
      tx: the transformation that made the state.
      params: the parameters, now.
      state: the state of `tx`.
      optax_state: a state of optax's optimizer, as its `init` returns it. Moments and counts of steps are replaced, in
        its dtypes; everything else stays.

    Raises:
      ValueError: if a parameter has moments in only one of the states, or of another shape; the error lists all of
        them.
      TypeError: if `tx` has no counterpart in optax.
    """
    target, form = _target(tx, params)
    count, slots = target.moments(state)
    slots = dict(slots)
    if "nu_max" in slots and (weight := _corrected(target, count)):
        slots["nu_max"] = {path: x / weight for path, x in slots["nu_max"].items()}
    problems: list[str] = []
    used: set[str] = set()

    def moved(name: str, path: str, old: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            return old
        used.add(path)
        if name not in slots:  # With β₁ = 0 optax keeps a first moment that it ignores.
            return jnp.zeros_like(old)
        if path not in slots[name]:
            problems.append(f"{display_path(path)}: {name} is not in the state")
            return old
        new = slots[name][path]
        if name.startswith("nu") and jnp.iscomplexobj(new):
            new = jax.lax.complex((new.real + new.imag) / 2, jnp.zeros_like(new.real))
        if new.shape != jnp.shape(old) or jnp.iscomplexobj(new) != jnp.iscomplexobj(old):
            theirs = f"{jnp.result_type(old)}{list(jnp.shape(old))}"
            problems.append(f"{display_path(path)}: {name} is {new.dtype}{list(new.shape)}, optax's {theirs}")
            return old
        return new.astype(jnp.result_type(old))

    def replaced(keys: jax.tree_util.KeyPath, node: Any) -> Any:  # noqa: ANN401
        del keys
        new = {field: _as_count(getattr(node, field), count) for field in _counted(node, form)}
        if isinstance(node, form.state):
            for name, field in form.slots.items():
                new[field] = map_named(functools.partial(moved, name), getattr(node, field))
        return node._replace(**new) if new else node

    result = _map_nodes(replaced, optax_state, form)
    problems += [f"{display_path(path)}: has no moments in optax's" for path in target.trained if path not in used]
    fail(problems, "the state does not fit the optax state")
    return result


def _target(tx: optax.GradientTransformation, params: PyTree) -> tuple[Target, _Form]:
    target = Target(tx, params)
    form: _Form = target.form(_FORMS, "optax")
    if "nu" in form.slots:
        fail(
            () if getattr(target.rule, "magnitude", False) else target.complex,
            "optax has one second moment, |g|², for a complex parameter; here each part has its own without "
            'complex="magnitude"',
        )
    return target, form


def _for_both(x: jax.Array) -> jax.Array:
    """Copies v to both parts: optax keeps one v per complex element."""
    return jax.lax.complex(jnp.real(x), jnp.real(x))


def _corrected(target: Target, count: int) -> float:
    """The bias weight by which optax divides v before it takes the maximum."""
    rule = target.rule
    assert isinstance(rule, AMSGrad)
    return float(target.weights(count)[1]) if rule.bias_correction_nu else 1.0


def _counted(node: object, form: _Form) -> tuple[str, ...]:
    """The fields of a state of optax in which it counts steps."""
    if isinstance(node, form.state):
        return form.counts
    return ("count",) if type(node).__name__ in _SCHEDULES else ()


def _as_count(old: Any, count: int) -> jax.Array:  # noqa: ANN401
    return jnp.asarray(old) * 0 + np.int32(count)


def _map_nodes(
    function: Callable[[jax.tree_util.KeyPath, Any], Any],
    node: Any,  # noqa: ANN401
    form: _Form,
    keys: jax.tree_util.KeyPath = (),
) -> Any:  # noqa: ANN401
    """Applies `function` to every node of a tree, from the outside in, down to the states of a form."""
    node = function(keys, node)
    if isinstance(node, form.state):
        return node
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        return node
    return treedef.unflatten(_map_nodes(function, child, form, (*keys, *key)) for key, child in children)
