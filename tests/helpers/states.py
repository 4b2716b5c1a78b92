"""The parts of a state of this package, wherever it is in the state of a chain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adam_fn
from adam_fn.algebra.bias import BiasWeights, Weight, advance_weights, corrections_of, is_kept
from adam_fn.algebra.rule import Clock


def _is_state(x: object) -> bool:
    fields = getattr(x, "_fields", ())  # The state of `stochastic_rounding` has a count as well.
    return "count" in fields and len(fields) > 1 and "inner" not in fields


def moments_of(state: Any) -> Any:
    """The named tuple of the count and the moments."""
    return next(x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x))


def slots_of(state: Any) -> dict[str, Any]:
    """The stored arrays of each moment, by name."""
    found = moments_of(state)._asdict()
    return {name: tree for name, tree in found.items() if not name.startswith("count")}


def stored_of(tx: Any, state: Any) -> dict[str, Any]:
    """The stored arrays of each moment, by the names that the rule and its codecs use."""
    return tx.update.definition.form.read(state).slots


def count_of(state: Any) -> Any:
    return moments_of(state).count


def clock_at(rule: adam_fn.Rule, count: int) -> Clock:
    """The clock of a rule at a zero-based step, also if its decay rates follow schedules."""
    zero = jnp.zeros(())
    corrections: list[jax.Array] = []
    for part in rule.parts():
        kept = [Weight(zero, zero)] * sum(map(is_kept, part.betas))
        for t in range(count + 1 if kept else 0):
            betas = part.at(jnp.int32(t)).betas
            kept = advance_weights(part.betas, [beta(jnp.int32(t)) if callable(beta) else beta for beta in betas], kept)
        corrections += corrections_of(part.betas, kept, jnp.int32(count + 1), jnp.dtype(jnp.float32))
    return Clock(jnp.int32(count), tuple(corrections))


def bias_weights(tx: Any, state: Any) -> np.ndarray:
    """The bias weights of all decay rates, kept or computed from the count, as the last step had them."""
    spec = tx.update.definition
    return 1 / np.asarray(spec.corrections(spec.form.read(state), jnp.dtype(jnp.float32)), np.float64)


def kept_weights(state: Any) -> np.ndarray:
    """The bias weights that a state keeps: the value of each, and the part that its last rounding dropped."""
    assert isinstance(state[-1], BiasWeights)
    return np.asarray(state[-1].weights, np.float64)
