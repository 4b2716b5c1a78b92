"""Averages of the parameters over the steps of training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.arithmetic import one_minus
from adam_fn.algebra.dtypes import as_dtype
from adam_fn.algebra.hyper import Beta, Hyper
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.trees.states import state_type
from adam_fn.trees.transform import Transformation, transform

Params = TypeVar("Params")


@dataclasses.dataclass(frozen=True)
class Average(Rule):
    """The average of the parameters, with bias correction (arXiv 1412.6980, section 7.2); the update passes through.

    ::

        w ← βw + (1-β);   p̄ ← p̄ + (1-β)/w · (p + u - p̄)

    p̄ is the bias-corrected average itself, the paper's ``p̂ = (β p̄' + (1-β)p)/(1 - βᵗ)``: it is right at every step.
    With a decay of None it is Polyak and Ruppert's average, the mean of all parameters so far,
    ``p̄ ← p̄ + (p + u - p̄)/t``.
    """

    decay: Beta | None = None

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"average": Slot()}

    @property
    def betas(self) -> Sequence[Any]:
        return () if self.decay is None else (self.decay,)

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        if p is None:
            raise ValueError("average_params needs the parameters: call update(updates, state, params)")
        part = 1 / (clock.count.astype(p.dtype) + 1)
        if self.decay is not None:
            part = one_minus(self.decay) * clock.corrections[0]
        average = slots["average"]
        return g, {"average": average + part * (p + g - average)}


def average_params(decay: Hyper | None = 0.999) -> Transformation:
    """Averages the parameters and leaves the updates alone; the last link of a chain.

    ``p̄ = Σ βᵗ⁻ⁱ pᵢ / Σ βᵗ⁻ⁱ`` over the parameters after each step (Kingma and Ba, arXiv 1412.6980, section 7.2)::

        tx = optax.chain(adam_fn.adam(1e-3), adam_fn.average_params(0.999))
        ...
        evaluate(adam_fn.averaged_params(opt_state, params))

    The average is ``state.average``: it has the shapes of the parameters and is stored in float32 (float64 for
    float64 parameters). The value averaged is p + u, before it is rounded to a lower precision.

    Args:
      decay: β in [0, 1), a number, a 0-d array or a schedule; the paper uses Adam's β₂. None gives the mean of all
        steps (Polyak and Ruppert). Integer leaves are not averaged; to leave out others, use `optax.masked`.
    """
    return transform(Average(decay))


def averaged_params(state: optax.OptState, params: Params) -> Params:
    """The averaged parameters that a state holds, in the dtypes of `params`.

    Leaves that are not averaged are taken from `params`; before the first step all are. `state` is the state of
    `average_params`, or of a chain or wrapper that contains it; anything else is an error.
    """
    kind = state_type(tuple(Average().slots))
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: type(x) is kind) if type(x) is kind]
    if len(found) != 1:
        raise ValueError(f"expected a state that contains exactly one average_params, found {len(found)}")
    leaves, treedef = jax.tree.flatten(params)
    averages = treedef.flatten_up_to(found[0].average)
    started = found[0].count > 0
    return treedef.unflatten(
        p if isinstance(average, optax.MaskedNode) else jnp.where(started, as_dtype(average, jnp.result_type(p)), p)
        for p, average in zip(leaves, averages, strict=True)
    )
