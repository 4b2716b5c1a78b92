"""Members: the transformations of this package inside another one, with their states and hyperparameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.dtypes import compute_dtype, compute_dtypes
from adam_fn.algebra.rule import Chain, Clock, Rule
from adam_fn.storage.codec import is_lossless
from adam_fn.storage.names import codecs_of
from adam_fn.trees.leaves import Leaves, PyTree
from adam_fn.trees.recording import UpdateCall, located, recorded
from adam_fn.trees.states import Memory
from adam_fn.trees.update import Update


class Member(NamedTuple):
    """A transformation of this package that another one contains, with its state after a step."""

    definition: Any
    state: Any

    @property
    def memory(self) -> Memory:
        return self.definition.form.read(self.state)

    @property
    def has_moments(self) -> bool:
        return any(rule.has_moments for rule in self.definition.rule.parts())

    def rule(self, ahead: int) -> Rule:
        """The rule with schedules evaluated at the last step (`ahead` is 0), at the next one (1), and so on."""
        counts = self.memory.counts
        then = (jnp.zeros((), jnp.int32) if count is None else earlier(count, ahead) for count in counts)
        return Chain(self.definition.rule.parts()).at(tuple(then))

    def kept(self, params: PyTree) -> PyTree:
        """The parameters that have slots, and `optax.MaskedNode` in place of the others."""
        name, _ = self.definition.codecs[0]
        leaves = Leaves(params)
        slots = leaves.align(self.memory.slots[name], f"the state's {name}", "the parameters")
        blank = [isinstance(x, optax.MaskedNode) for x in slots]
        return leaves.treedef.unflatten(
            optax.MaskedNode() if no else p for no, p in zip(blank, leaves.leaves, strict=True)
        )

    def decoded(self, params: PyTree) -> dict[str, PyTree]:
        """The slots as arrays in the dtype of the arithmetic."""
        return Update(self.definition).decoded(self.state, params)


def earlier(count: jax.Array, ahead: int) -> jax.Array:
    """The zero-based index of the last step, or with ``ahead=1`` of the next, from the count after the last."""
    return jnp.maximum(count - 1 + ahead, 0)


def calls_of(tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree) -> list[UpdateCall]:
    """Lists the updates that `tx` calls. Their results are not used, so no compiled program contains them."""
    with recorded() as seen:
        try:
            tx.update(grads, state, params)
        except TypeError:  # Inside `lax.cond` updates must have the gradients' dtype: try a wider one.
            seen.clear()
            tx.update(jax.tree.map(_widened, grads), state, params)
    calls = [call for call in seen if isinstance(call, UpdateCall)]
    # Only the last of equal calls: `MultiSteps` traces two branches. Array hyperparameters are not compared.
    return list({jax.tree.structure(call.definition): call for call in calls}.values())


def _widened(g: jax.Array) -> jax.Array:
    return g.astype(jnp.float32) if g.dtype in (jnp.bfloat16, jnp.float16) else g


def members_of(tx: optax.GradientTransformation, state: PyTree, params: PyTree, ahead: int = 0) -> list[Member]:
    """All members, with the hyperparameters of `optax.inject_hyperparams` at the last step, or `ahead` steps later."""

    def moved(path: jax.tree_util.KeyPath, x: Any) -> Any:  # noqa: ANN401
        is_count = path and path[-1] == jax.tree_util.GetAttrKey("count") and jnp.issubdtype(x.dtype, jnp.integer)
        return earlier(x, ahead) if is_count else x

    then = jax.tree_util.tree_map_with_path(moved, state)
    # States are taken from where `init` puts them: inside `lax.cond` (`MultiSteps`) a call's is of another program.
    states = located(tx, params).states(state)
    return [
        Member(call.definition, found)
        for call in calls_of(tx, jax.tree.map(jnp.zeros_like, params), then, params)
        for definition, found in states
        if jax.tree.structure(definition) == jax.tree.structure(call.definition)
    ]


def optimizer_of(members: Sequence[Member]) -> Member:
    """The only member that has moments, or an error."""
    found = [member for member in members if member.has_moments]
    if len(found) != 1:
        raise ValueError(
            f"expected a transformation that contains exactly one adam_fn optimizer, found {len(found)}: pass the one "
            "you mean, and its state"
        )
    return found[0]


def hyperparameter(members: Sequence[Member], kind: type[Rule], name: str, ahead: int) -> jax.Array | None:
    """The hyperparameter `name` of the only rule of type `kind`, or None."""
    own = {id(member.definition): member for member in members}.values()  # Several members may share a definition.
    found = [rule for member in own for rule in member.rule(ahead).parts() if isinstance(rule, kind)]
    if len(found) > 1:
        raise ValueError(f"expected one {kind.__name__} in the transformation, found {len(found)}: {found}")
    return jnp.asarray(getattr(found[0], name), float) if found else None


def signal_to_noise_of(member: Member, params: PyTree) -> PyTree | None:
    """The ratio ``m̂/√v̂`` of every element, or None if the rule of the member has none."""
    kept = member.kept(params)
    leaves, rule = Leaves(kept), member.rule(0)
    slots = {name: leaves.align(slot, name, "the parameters") for name, slot in member.decoded(kept).items()}
    memory = member.memory
    counts = tuple(None if count is None else earlier(count, 0) for count in memory.counts)
    clock = Clock(counts, member.definition.corrections(memory, jnp.result_type(float)))
    found: list[jax.Array | None] = []
    for i, p in enumerate(leaves.leaves):
        if p is None:
            found.append(None)
            continue
        dtype = compute_dtype(jnp.result_type(p))
        now = dataclasses.replace(clock, corrections=[x.astype(dtype) for x in clock.corrections])
        ratio = rule.cast(dtype).signal_to_noise({name: slot[i] for name, slot in slots.items()}, now)
        if ratio is None:
            return None
        found.append(jnp.where(memory.steps > 0, ratio, 0))  # All bias weights are 0 before the first step.
    return leaves.treedef.unflatten(found)


def storage_errors(
    tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree
) -> dict[str, tuple[PyTree, PyTree]]:
    """For each slot that is not stored exactly: its exact new value and the error of storing it."""
    found = [call for call in calls_of(tx, grads, state, params) if Member(call.definition, call.state).has_moments]
    if len(found) != 1:
        optimizer_of([Member(call.definition, call.state) for call in found])
    definition, grads, before, params = found[0]
    exact_ones = codecs_of(None, definition.rule.slots)
    reference = grads if params is None else params
    kinds = compute_dtypes(reference)
    coded = [slot for _, codec in definition.codecs if not is_lossless(codec, kinds) for slot in codec.slots]
    if not coded:
        return {}
    plain = dataclasses.replace(definition, codecs=exact_ones, storage_mask=None)
    slots = Member(definition, before).decoded(reference)
    memory = definition.form.read(before)
    _, exact = Update(plain)(grads, plain.form.made(memory._replace(slots=slots)), params)
    exact = plain.form.read(exact).slots
    _, after = Update(definition)(grads, before, params)
    stored = Update(definition).decoded(after, reference)
    return {name: (exact[name], jax.tree.map(jnp.subtract, stored[name], exact[name])) for name in coded}
