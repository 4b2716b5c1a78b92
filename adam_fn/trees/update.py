"""`init` and `update` over pytrees: pairs each leaf with its gradient and its state, and steps it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_fn.algebra.bias import Weight
from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.hyper import rate_of_step
from adam_fn.algebra.rule import Clock
from adam_fn.algebra.values import Method
from adam_fn.execute.body import Times, decode, encode, lattice_of
from adam_fn.execute.compiler import as_scalars, zeros_like
from adam_fn.execute.destination import PARAMETERS, UPDATES, Destination, Inputs
from adam_fn.execute.run import step_leaf
from adam_fn.storage import noise
from adam_fn.storage.codec import Cast, Stored
from adam_fn.trees.checks import check_leaf, check_untrained, no_update
from adam_fn.trees.definition import Definition, advanced, tree_from_leaves, weight_dtype
from adam_fn.trees.groups import rules_per_leaf
from adam_fn.trees.leaves import Leaves, PyTree, arrays_of, leaf_in_errors
from adam_fn.trees.recording import UpdateCall, marked, record
from adam_fn.trees.states import Memory, State


@jax.jit
def _init(definition: Definition, params: PyTree) -> State:
    leaves = Leaves(params)
    trained = definition.trained(leaves, params)
    if definition.mask is not None:
        # A mask of another structure is an error now and not at the first step.
        leaves.broadcast_mask("mask", definition.mask, params)
    blank = [
        {name: zeros_like(jnp.asarray(p)) + slot.initial for name, slot in definition.rule.slots.items()}
        if train
        else None
        for p, train in zip(leaves.leaves, trained, strict=True)
    ]
    count = jnp.zeros((), jnp.int32)
    slots = coded(definition, leaves, params, blank, count)
    dtype = weight_dtype(leaves, trained)
    weights = tuple(Weight(jnp.zeros((), dtype), jnp.zeros((), dtype)) for _ in range(definition.form.kept))
    counts = tuple(jnp.zeros((), jnp.int32) for _ in definition.form.links)
    return definition.form.made(Memory(counts, weights, slots))


def coded(
    definition: Definition,
    leaves: Leaves,
    params: PyTree,
    slots: Sequence[Mapping[str, jax.Array] | None],
    count: jax.Array,
) -> dict[str, PyTree]:
    """Encodes the slots of each leaf, or None, into the trees of a state.

    An element with a slot that is not finite becomes nan in all slots where codes rely on it, as after a step.
    """
    times = _times(definition, count)
    stored: list[Stored | None] = []
    for path, own, codecs in zip(leaves.paths, slots, definition.codecs_of(leaves, params), strict=True):
        with leaf_in_errors(path):
            if own and not all(isinstance(codec, Cast) for codec in codecs.values()):
                finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, own.values()))
                own = {name: jnp.where(finite, x, jnp.nan) for name, x in own.items()}  # noqa: PLW2901
            stored.append(encode(codecs, own, lattice_of(next(iter(own.values()))), times) if own else own)
    return _trees(definition, leaves, stored)


def _times(definition: Definition, count: jax.Array) -> dict[str, jax.Array]:
    return noise.time_offsets(
        count, [slot for _, codec in definition.codecs if not codec.exact for slot in codec.slots]
    )


def _trees(definition: Definition, leaves: Leaves, stored: Sequence[Stored | None]) -> dict[str, PyTree]:
    return {
        name: tree_from_leaves(leaves, [None if x is None else x[name] for x in stored])
        for name, _ in definition.codecs
    }


def _as_array(x: Any) -> Any:  # noqa: ANN401
    return jnp.asarray(x) if isinstance(x, (bool, int, float, complex)) else x


@functools.partial(jax.jit, static_argnames="destination", inline=True)
def _update(
    definition: Definition,
    grads: PyTree,
    state: State,
    params: PyTree | None,
    learning_rate: jax.Array | None,
    remainder: PyTree | None = None,
    time: jax.Array | None = None,
    layer: jax.Array | None = None,
    *,
    destination: Destination = UPDATES,
) -> tuple[PyTree, PyTree | None, State]:
    """The results of a step: updates or parameters, remainders and the state; `time` is for a dithering destination."""
    # Tracing turns numbers into arrays; under `disable_jit` that is done here.
    grads, params = (jax.tree.map(_as_array, tree) for tree in (grads, params))
    learning_rate = None if learning_rate is None else jnp.asarray(learning_rate)
    memory = definition.form.read(state)
    reference = grads if params is None else params
    leaves = Leaves(reference)
    gradients = leaves.align(grads, "the gradients", "the parameters")
    trained = definition.trained(leaves, reference)
    own = definition.codecs_of(leaves, reference)
    slots = {name: leaves.align(tree, f"the state's {name}", "the parameters") for name, tree in memory.slots.items()}

    decays = (
        [True] * len(trained) if definition.mask is None else leaves.broadcast_mask("mask", definition.mask, reference)
    )
    rule, after = advanced(definition, memory)
    corrections = definition.corrections(after, weight_dtype(leaves, trained))
    corrections = as_scalars(corrections) if sum(trained) > 1 else corrections
    clock = Clock(memory.counts, corrections, learning_rate)
    groups = None if definition.groups is None else definition.groups.per_leaf(reference)
    rules = rules_per_leaf(rule, clock, decays, groups)
    times = Times(_times(definition, after.steps), time, layer)

    remainders = (
        [None] * len(trained)
        if remainder is None
        else leaves.align(remainder, "the state's remainder", "the parameters")
    )
    updates: list[jax.Array | None] = []
    stored: list[Stored | None] = []
    for i, (path, g, p) in enumerate(zip(leaves.paths, gradients, leaves.leaves, strict=True)):
        old = {name: slot[i] for name, slot in slots.items()}
        if not trained[i]:
            check_untrained(path, p, old)
            updates.append(p if destination.parameters else no_update(g, p))
            stored.append(None)
            continue
        check_leaf(path, g, p, old, own[i])
        own_rule, now = rules[i]
        with leaf_in_errors(path):
            how = destination if params is None else destination.for_dtype(jnp.result_type(p))
            inputs = Inputs(g, None if params is None else p, remainders[i] if how.has_remainder else None)
            done = step_leaf(own_rule, own[i], inputs, old, now, times, destination=how)
        updates.append(done.result)
        stored.append(done.stored)
        remainders[i] = remainders[i] if done.remainder is None else done.remainder
    new_state = definition.form.made(after._replace(slots=_trees(definition, leaves, stored)))
    new_remainder = None if remainder is None else leaves.treedef.unflatten(remainders)
    return leaves.treedef.unflatten(updates), new_remainder, new_state


@jax.jit
def _decoded(definition: Definition, slots: Mapping[str, PyTree], params: PyTree) -> dict[str, PyTree]:
    leaves = Leaves(params)
    trained, own = definition.trained(leaves, params), definition.codecs_of(leaves, params)
    stored = {name: leaves.align(tree, f"the state's {name}", "the parameters") for name, tree in slots.items()}
    found = [
        decode(own[i], {name: x[i] for name, x in stored.items()}, compute_dtype(jnp.result_type(p)))
        if trained[i]
        else None
        for i, p in enumerate(leaves.leaves)
    ]
    return {
        name: tree_from_leaves(leaves, [None if x is None else x[name] for x in found])
        for name in definition.rule.slots
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Init(Method):
    """``init(params) -> state``: the state before the first step, sharded like the parameters."""

    definition: Definition

    def __call__(self, params: PyTree) -> State:
        self.definition.rule.check_arrays()
        return marked(self.definition, _init(self.definition, arrays_of(params)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Update(Method):
    """``update(grads, state, params) -> (updates, state)``; `learning_rate` replaces the rate for this step."""

    definition: Definition

    def __call__(
        self,
        updates: PyTree,
        state: State,
        params: PyTree | None = None,
        *,
        learning_rate: ArrayLike | None = None,
        layer: jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, State]:
        del extra_args  # Meant for other links of a chain.
        self.definition.form.check(state)
        params = arrays_of(params)
        record(UpdateCall(self.definition, updates, state, params))
        new, _, after = _update(self.definition, updates, state, params, rate_of_step(learning_rate), layer=layer)
        return new, after

    def write(
        self,
        grads: PyTree,
        state: State,
        params: PyTree,
        *,
        learning_rate: ArrayLike | None = None,
        layer: jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, State]:
        """The new parameters, as ``optax.apply_updates(params, updates)`` gives them, and the new state.

        No update is ever stored: in a program that donates `params` and `state` every leaf is changed in place.
        """
        del extra_args  # Meant for other links of a chain.
        rate = rate_of_step(learning_rate)
        self.definition.form.check(state)
        new, _, after = _update(self.definition, grads, state, params, rate, layer=layer, destination=PARAMETERS)
        return new, after

    def written(
        self,
        grads: PyTree,
        state: State,
        params: PyTree,
        destination: Destination,
        *,
        remainder: PyTree | None = None,
        time: jax.Array | None = None,
        learning_rate: ArrayLike | None = None,
        layer: jax.Array | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, PyTree | None, State]:
        """Makes a step whose results go to `destination`; `remainder` is the tree of what is stored beside parameters.

        `time` is that of `noise.time_offsets` at this step, for a `destination` that dithers.
        """
        self.definition.form.check(state)
        record(UpdateCall(self.definition, grads, state, params))
        return _update(
            self.definition,
            grads,
            state,
            params,
            rate_of_step(learning_rate),
            remainder,
            time,
            layer,
            destination=destination,
        )

    def rates(self, params: PyTree) -> list[float]:
        """The multiplier of the rate of each leaf, None included."""
        groups = self.definition.groups
        return (
            [1.0] * len(Leaves(params).leaves) if groups is None else [group.rate for group in groups.per_leaf(params)]
        )

    def decoded(self, state: State, params: PyTree) -> dict[str, PyTree]:
        """The slots as arrays in the dtype of the arithmetic, in the structure of `params` (or gradients)."""
        return _decoded(self.definition, self.definition.form.read(state).slots, params)
