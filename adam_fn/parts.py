"""The transformations of this package inside of any transformation, with their states and hyperparameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_fn.averaging import Average
from adam_fn.leaves import Leaves, PyTree
from adam_fn.observe import Call, located, observed
from adam_fn.rule import Chain, Rule
from adam_fn.states import Memory
from adam_fn.transform import Update


class Part(NamedTuple):
    """A transformation of this package that another one contains, with its state after a step."""

    spec: Any
    state: Any

    @property
    def memory(self) -> Memory:
        return self.spec.form.read(self.state)

    @property
    def has_moments(self) -> bool:
        return any(rule.slots and not isinstance(rule, Average) for rule in self.spec.rule.parts())

    def rule(self, ahead: int) -> Rule:
        """With the values of the schedules; `ahead`: 0 at the last step, 1 at the next."""
        counts = self.memory.counts
        then = (jnp.zeros((), jnp.int32) if count is None else earlier(count, ahead) for count in counts)
        return Chain(self.spec.rule.parts()).at(tuple(then))

    def kept(self, params: PyTree) -> PyTree:
        """The parameters that have slots, and `optax.MaskedNode` in the place of the others."""
        name, _ = self.spec.codecs[0]
        leaves = Leaves(params)
        slots = leaves.match(self.memory.slots[name], f"the state's {name}", "the parameters")
        blank = [isinstance(x, optax.MaskedNode) for x in slots]
        return leaves.treedef.unflatten(
            optax.MaskedNode() if no else p for no, p in zip(blank, leaves.leaves, strict=True)
        )

    def decoded(self, params: PyTree) -> dict[str, PyTree]:
        """The slots as arrays in the dtype of the arithmetic."""
        return Update(self.spec).decoded(self.state, params)


def earlier(count: jax.Array, ahead: int) -> jax.Array:
    """The zero-based number of the last step, or with ``ahead=1`` of the next, from the count after the last."""
    return jnp.maximum(count - 1 + ahead, 0)


def calls_of(tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree) -> list[Call]:
    """The updates that `tx` calls. What they compute is not used, so no compiled program contains it."""
    with observed() as seen:
        try:
            tx.update(grads, state, params)
        except TypeError:  # Inside of `lax.cond` updates must have the gradients' dtype, which may be a wider one.
            seen.clear()
            tx.update(jax.tree.map(_widened, grads), state, params)
    calls = [call for call in seen if isinstance(call, Call)]
    # The last of equal ones: `MultiSteps` traces two branches. Hyperparameters that are arrays do not count.
    return list({jax.tree.structure(call.spec): call for call in calls}.values())


def _widened(g: jax.Array) -> jax.Array:
    return g.astype(jnp.float32) if g.dtype in (jnp.bfloat16, jnp.float16) else g


def parts_of(tx: optax.GradientTransformation, state: PyTree, params: PyTree, ahead: int = 0) -> list[Part]:
    """All parts, with the hyperparameters that `optax.inject_hyperparams` gives them at the step that is meant."""

    def moved(path: jax.tree_util.KeyPath, x: Any) -> Any:  # noqa: ANN401
        is_count = path and path[-1] == jax.tree_util.GetAttrKey("count") and jnp.issubdtype(x.dtype, jnp.integer)
        return earlier(x, ahead) if is_count else x

    then = jax.tree_util.tree_map_with_path(moved, state)
    # Where `init` puts it and not what was called with: inside of `lax.cond` (`MultiSteps`) that is of another program.
    states = located(tx, params).states(state)
    return [
        Part(call.spec, found)
        for call in calls_of(tx, jax.tree.map(jnp.zeros_like, params), then, params)
        for spec, found in states
        if jax.tree.structure(spec) == jax.tree.structure(call.spec)
    ]


def optimizer_of(parts: Sequence[Part]) -> Part:
    """The part that has moments."""
    found = [part for part in parts if part.has_moments]
    if len(found) != 1:
        raise ValueError(
            f"expected a transformation that contains exactly one adam_fn optimizer, found {len(found)}: pass the one "
            "you mean, and its state"
        )
    return found[0]


def hyperparameter(parts: Sequence[Part], kind: type[Rule], name: str, ahead: int) -> jax.Array | None:
    """What the part of a kind has; None where there is no such part."""
    own = {id(part.spec): part for part in parts}.values()  # Many states may have the slots of one part.
    found = [rule for part in own for rule in part.rule(ahead).parts() if isinstance(rule, kind)]
    if len(found) > 1:
        raise ValueError(f"expected one {kind.__name__} in the transformation, found {len(found)}: {found}")
    return jnp.asarray(getattr(found[0], name), float) if found else None
