"""Converts a state to another storage."""

import jax
import optax

from adam_fn.interop.moments import Target
from adam_fn.trees.functions import owner_of
from adam_fn.trees.leaves import PyTree, is_masked
from adam_fn.trees.states import State
from adam_fn.wrappers.masters import MasterState, MasterWeights


def change_storage(
    old: optax.GradientTransformation, tx: optax.GradientTransformation, params: PyTree, state: State
) -> State:
    """The state with which `tx` continues where `old` stopped: the same optimizer with another storage.

    ::

        old, tx = adam_fn.adamw(1e-3), adam_fn.adamw(1e-3, storage="24bit")
        state = adam_fn.interop.change_storage(old, tx, params, state)

    The moments are decoded and stored as `tx` stores its moments, and live where the parameters live. The step count,
    the bias weights and the remainders of masters are kept; if only `tx` has masters, they start at the parameters.
    Moments of leaves that `tx` freezes are dropped.

    Args:
      old: the optimizer that made the state, or `adam_fn.master_weights` around one.
      tx: the optimizer that continues, or `adam_fn.master_weights` around one.
      params: the parameters, now.
      state: the state of `old`.

    Raises:
      TypeError: if `old` and `tx` are different optimizers.
      ValueError: if `tx` has moments that are not in the state (the error lists all of them), or if it would drop or
        round the remainders of masters.
    """
    source, target = Target(old, params), Target(tx, params)
    if type(source.rule) is not type(target.rule):
        kinds = ", ".join(type(rule).__name__ for rule in (source.rule, target.rule))
        raise TypeError(f"expected the same optimizer with two storages, got {kinds}")
    if source.masters and _bits(old) != _bits(tx):
        raise ValueError(
            f"the state's masters have {_bits(old)} bits besides the parameters, but those of tx have {_bits(tx)}: "
            f"pass master_weights(…, bits={_bits(old)}) as tx, or convert state.inner and start with new masters"
        )
    new = target.state(source.moments(state), "the state")
    inner = state.inner if isinstance(state, MasterState) else state
    kept = source.update.definition.form.read(inner)
    # Keeps the old state's counts and bias weights: another schedule of β in `tx` would have led to other weights.
    form = target.update.definition.form
    made = form.read(new.inner if isinstance(new, MasterState) else new)
    if len(made.weights) == len(kept.weights):
        made = made._replace(weights=kept.weights)
    counts = zip(made.counts, kept.counts, strict=False)
    same = len(made.counts) == len(kept.counts)
    made = made._replace(counts=tuple(x if y is None else y for x, y in counts)) if same else made
    if not isinstance(new, MasterState):
        return form.made(made)
    remainder = new.remainder
    if isinstance(state, MasterState):
        remainder = jax.tree.map(lambda x, y: x if is_masked(x) else y, remainder, state.remainder, is_leaf=is_masked)
    return MasterState(remainder, form.made(made))


def _bits(tx: optax.GradientTransformation) -> int:
    """The bits of what masters keep beside a bfloat16 parameter; 0 without masters."""
    owner = owner_of(tx)
    return owner.bits if isinstance(owner, MasterWeights) else 0
