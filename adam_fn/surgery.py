"""Edits a running state: forgets what it holds for some parameters, moves it, or makes it for new ones.

Every function is pure, works under `jit` and takes any transformation, of this package or of optax, with any storage:
codes are elementwise, so that the state of an element can be replaced or moved as it is stored.

The step count stays, because all parameters share it. An element whose moments start at 0 in the middle of a run would
make first steps of up to ``(1-β₁)/√(1-β₂)`` times the rate, 3.2 with Adam's defaults, because the bias correction
belongs to the old step count. So new second moments start, unless you ask for zeros, at the mean of the others in their
leaf. First steps are then at most as large as the neighbours'. This holds for the optimizers of this package; arrays of
optax's transformations become as they are before the first step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.dtypes import as_real
from adam_fn.execute.compiler import zeros_like
from adam_fn.trees.checks import check_present
from adam_fn.trees.definition import Definition
from adam_fn.trees.layout import map_owned, owners, real_shape, without_placement
from adam_fn.trees.leaves import Leaves, PyTree, check_distinct, element_masks, is_masked, match_patterns
from adam_fn.trees.members import Member
from adam_fn.trees.recording import located
from adam_fn.trees.states import State
from adam_fn.trees.update import Update, coded
from adam_fn.wrappers.averaging import Average

#: The value with which second moments of new elements begin, ``"mean"`` or ``"zero"``; see `reset`.
Second: TypeAlias = Literal["mean", "zero"]


class Rows(NamedTuple):
    """The origin of the rows of a resized parameter.

    Attributes:
      source: for each row along `axis` the old row that it comes from, or -1 if it is new; integers.
      axis: the axis whose entries are rows.
    """

    source: ArrayLike | Sequence[int]
    axis: int = 0


def reset(
    tx: optax.GradientTransformation,
    state: State,
    params: PyTree,
    where: PyTree | str | Callable[[PyTree], PyTree],
    *,
    second: Second = "mean",
) -> State:
    """Forgets what the state holds for some elements, such as those of dormant neurons that were initialised again.

    ::

        dead = {"kernel": activity == 0, "bias": activity == 0}  # of shape [units], for every row
        state = surgery.reset(tx, state, params, dead)

    First moments become what they are before the first step (for second ones, see the top of the module), remainders of
    masters become 0, and averages of the parameters become the parameters. Everything else stays as it is, bit for bit.

    Args:
      tx: the transformation.
      state: its state.
      params: the parameters, after the elements were given new values.
      where: a tree of the parameters' structure of booleans, or of boolean arrays that broadcast to the parameters; or
        a pattern of paths (see `adam_fn.masks.path`), or a function of the parameters that returns such a tree.
      second: ``"mean"``, or ``"zero"`` for second moments as before the first step.

    Raises:
      ValueError: if `where` does not fit the parameters, or selects a part of a leaf for which the state has an array
        of another shape (such as Adafactor's): that can only be reset as a whole.
    """
    leaves = Leaves(params)
    masks = element_masks(leaves, params, where)

    def chosen(masks: Sequence[jax.Array], i: int, old: jax.Array, new: jax.Array) -> jax.Array:
        mask, p = masks[i], leaves.leaves[i]
        check_present("arrays", old, leaves.paths[i])
        if jnp.ndim(mask) and old.shape != real_shape(jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p))):
            raise ValueError(f"the state has an array of shape {old.shape} of {leaves.paths[i]}: reset the whole leaf")
        whole = jnp.broadcast_to(mask, jnp.shape(p)) if jnp.ndim(mask) else mask
        return jnp.where(whole, new, old)

    own = owners(tx, params)

    @jax.jit  # One program, and not one for each operation on each leaf.
    def edited(state: State, params: PyTree, masks: Sequence[jax.Array]) -> State:
        fresh = _fresh(tx, params, state, masks, second)
        return map_owned(functools.partial(chosen, masks), own, state, fresh)

    return edited(state, params, masks)


def resize(
    tx: optax.GradientTransformation,
    state: State,
    old_params: PyTree,
    new_params: PyTree,
    rows: Mapping[str, Rows],
    *,
    second: Second = "mean",
) -> State:
    """The state for parameters whose rows were kept, dropped, permuted, repeated or added.

    ::

        rows = {"embedding/*": Rows([*range(50_000), *[-1] * 257])}        # 257 words more
        rows = {"*": Rows(np.flatnonzero(keep))}                           # the Gaussians that remain
        state = surgery.resize(tx, state, params, new_params, rows)

    A row that is taken twice (a Gaussian that was split) gives both new rows the same moments. New rows begin as
    `reset` would leave them; the mean of the second moments is taken over the rows that are kept.

    Args:
      tx: the transformation.
      state: its state for `old_params`.
      old_params: the parameters before; shapes and dtypes would do.
      new_params: the parameters after, of the same structure.
      rows: where the rows come from, by patterns of paths (see `adam_fn.masks.path`). Leaves that no pattern matches
        keep their shapes.
      second: see `reset`.

    Raises:
      ValueError: if a pattern matches no parameter, if several match one, if a new leaf does not have the shape that
        its rows give, or if the state has an array for it that has no such axis.
    """
    leaves, new = Leaves(old_params), Leaves(new_params)
    found = new.align(old_params, "the old parameters", "the new ones")
    hits = match_patterns(list(rows), new_params)
    moves: list[Rows | None] = []
    for path, p, old, (_, hit) in zip(new.paths, new.leaves, found, hits, strict=True):
        own = [Rows(*move) for move, matched in zip(rows.values(), hit, strict=True) if matched]
        if len(own) > 1:
            raise ValueError(f"several patterns of rows match {path}")
        moves.append(own[0] if own else None)
        shape = list(jnp.shape(old))
        if own:
            shape[own[0].axis] = len(np.shape(own[0].source)) and np.shape(own[0].source)[0]
        if p is not None and tuple(shape) != jnp.shape(p):
            raise ValueError(f"the new {path} has shape {jnp.shape(p)}, expected {tuple(shape)} by its rows")
    masks = [
        jnp.zeros((), bool) if move is None else _along(jnp.asarray(move.source) < 0, move.axis, jnp.ndim(p))
        for move, p in zip(moves, new.leaves, strict=True)
    ]

    def taken(i: int, x: jax.Array) -> jax.Array:
        move, p = moves[i], leaves.leaves[i]
        check_present("arrays", x, leaves.paths[i])
        if move is None:
            return x
        if x.shape != real_shape(jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p))):
            raise ValueError(f"the state has an array of shape {x.shape} of {leaves.paths[i]}, which has no such rows")
        axis = move.axis % jnp.ndim(p) + x.ndim - jnp.ndim(p)
        return jnp.take(x, jnp.maximum(jnp.asarray(move.source), 0), axis)

    own, new_own = owners(tx, old_params), owners(tx, new_params)

    @jax.jit
    def edited(state: State, params: PyTree, masks: Sequence[jax.Array]) -> State:
        moved = map_owned(taken, own, state)
        fresh = _fresh(tx, params, moved, masks, second)
        return map_owned(lambda i, old, new: jnp.where(masks[i], new, old), new_own, moved, fresh)

    return edited(state, new_params, masks)


def adapt(tx: optax.GradientTransformation, state: State, old_params: PyTree, new_params: PyTree) -> State:
    """The state for parameters of another structure: leaves of equal path and shape keep their state, others begin.

    ::

        state = surgery.adapt(tx, state, params, {**params, "adapter": adapter})
        state = surgery.adapt(tx, state, params, params)  # `tx` trains leaves that were frozen before: they begin

    A new leaf begins as at the first step, but with the count of the others: its first step is multiplied by
    ``(1-β₁)/√(1-β₂) · √w₂/w₁``, where w are the bias weights ``1 - βᵗ``. With Adam's defaults this is 3.2 late in a run
    and 0.6 at its smallest. Where that matters, give new leaves a transformation of their own by `optax.partition`.

    Args:
      tx: the transformation.
      state: its state for `old_params`.
      old_params: the parameters before; shapes and dtypes would do.
      new_params: the parameters after.
    """
    old, new = Leaves(old_params), Leaves(new_params)
    check_distinct(old.names)
    check_distinct(new.names)
    held: dict[str, list[jax.Array]] = {}
    others: list[jax.Array] = []

    def hold(i: int, x: jax.Array) -> jax.Array:
        if not is_masked(x):  # It was frozen, and begins now.
            held.setdefault(old.names[i], []).append(x)
        return x

    def other(x: jax.Array) -> jax.Array:
        others.append(x)
        return x

    map_owned(hold, owners(tx, old_params), state, other=other)
    fresh = tx.init(new_params)
    blanks: list[jax.Array] = []
    map_owned(lambda _, x: x, own := owners(tx, new_params), fresh, other=lambda x: blanks.append(x) or x)
    if [(x.shape, x.dtype) for x in blanks] != [(x.shape, x.dtype) for x in others]:
        raise ValueError("what the state holds besides moments is not the same for the new parameters")

    def kept(i: int, x: jax.Array) -> jax.Array:
        own = held.get(new.names[i])
        if own and (own[0].shape, own[0].dtype) == (x.shape, x.dtype):
            return own.pop(0)
        return x

    return map_owned(kept, own, fresh, other=lambda _: others.pop(0))


def _along(row: jax.Array, axis: int, rank: int) -> jax.Array:
    """A vector over the rows of a leaf, reshaped to broadcast to the leaf."""
    return jnp.expand_dims(row, tuple(i for i in range(rank) if i != axis % rank))


def _fresh(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    masks: Sequence[jax.Array],
    second: Second,
) -> PyTree:
    """The state that elements begin with where `masks` are true."""
    if second not in ("mean", "zero"):
        raise ValueError(f'second must be "mean" or "zero", got {second!r}')
    leaves = Leaves(params)

    def begun(definition: Definition, new: PyTree, old: PyTree) -> PyTree:
        if not definition.codecs:
            return new
        kept = Member(definition, old).kept(params)
        inside = Leaves(kept)
        places = [i for i, x in enumerate(leaves.align(kept, "the parameters", "the state")) if not is_masked(x)]
        slots = {
            name: inside.align(tree, f"the state's {name}", "the parameters")
            for name, tree in Update(definition).decoded(old, kept).items()
        }
        values = [
            None
            if p is None
            else _first_slots(definition, p, masks[i], {name: x[k] for name, x in slots.items()}, second)
            for k, (i, p) in enumerate(zip(places, inside.leaves, strict=True))
        ]
        memory = definition.form.read(new)
        stored = coded(definition, inside, kept, values, definition.form.read(old).steps)
        return definition.form.made(
            memory._replace(slots={name: stored.get(name, x) for name, x in memory.slots.items()})
        )

    return located(without_placement(tx), params).map(begun, tx.init(params), state)


def _first_slots(
    definition: Definition, p: jax.Array, mask: jax.Array, old: Mapping[str, jax.Array], second: Second
) -> dict[str, jax.Array]:
    """The values with which the slots of new elements of a leaf begin."""
    zeros = zeros_like(p)
    averages = [x for part, names in definition.rule.named_parts() if isinstance(part, Average) for x in names.values()]
    known = jnp.broadcast_to(~mask, zeros.shape)
    found: dict[str, jax.Array] = {}
    for name, slot in definition.rule.slots.items():
        if name in averages:
            found[name] = as_real(p).astype(zeros.dtype)
            continue
        if slot.signed or second == "zero":
            found[name] = zeros + slot.initial
            continue
        # If the whole leaf begins anew, its own old mean.
        number = jnp.sum(known)
        mean = jnp.where(number > 0, jnp.sum(jnp.where(known, old[name], 0)) / jnp.maximum(number, 1), old[name].mean())
        found[name] = zeros + mean
    return found
