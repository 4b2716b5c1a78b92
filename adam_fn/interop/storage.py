"""Converts a state to another storage."""

import optax

from adam_fn.interop.moments import Target
from adam_fn.leaves import PyTree
from adam_fn.transform import State
from adam_fn.write import MasterState, MasterWeights


def change_storage(
    old: optax.GradientTransformation, tx: optax.GradientTransformation, params: PyTree, state: State | MasterState
) -> State | MasterState:
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
            f"the state's masters have {_bits(old)} bits beside the parameters, but those of tx have {_bits(tx)}: pass "
            f"master_weights(…, bits={_bits(old)}) as tx, or convert state.inner and start with new masters"
        )
    new = target.state(source.moments(state), "the state")
    inner = state.inner if isinstance(state, MasterState) else state
    if not isinstance(new, MasterState):
        return _with_weights(new, inner)
    low = state.remainder if isinstance(state, MasterState) else new.remainder
    return MasterState(low, _with_weights(new.inner, inner))


def _bits(tx: optax.GradientTransformation) -> int:
    """The bits of what masters keep beside a bfloat16 parameter; 0 without masters."""
    wrapper = getattr(tx.update, "wrapper", None)
    return wrapper.bits if isinstance(wrapper, MasterWeights) else 0


def _with_weights(new: PyTree, old: PyTree) -> State:
    """With the bias weights of the old state, which a β that is scheduled otherwise in `tx` would not have come to."""
    return new._replace(weights=old.weights)
