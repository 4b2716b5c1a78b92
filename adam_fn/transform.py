"""Lifts a rule and its storage to an optax transformation; the only place where trees appear.

One policy for the leaves, everywhere: ``None`` passes through. Integer, boolean and frozen leaves have no moments
(`optax.MaskedNode` stands in their place) and get a zero update. Complex leaves are two reals. A gradient that does
not fit its parameter is an error, raised while tracing, that names the leaf.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn import bias, noise
from adam_fn.bias import Weight
from adam_fn.codec import Codec, Slots, Stored
from adam_fn.codes import WORD, StorageLike, codecs_of
from adam_fn.execute.body import (
    PARAMETERS,
    UPDATES,
    Inputs,
    Times,
    Write,
    as_real,
    compute_dtype,
    decode,
    encode,
    lattice_of,
)
from adam_fn.execute.run import run_leaf
from adam_fn.functions import Functions, Method
from adam_fn.groups import Group, Groups, rules_of
from adam_fn.leaves import Leaves, Mask, PyTree, arrays_of, fixed_mask, named
from adam_fn.observe import Call, marked, note
from adam_fn.rule import Chain, Clock, Range, Rule, checked
from adam_fn.spec import Spec, gather, zeros_like
from adam_fn.states import Memory, State


@jax.jit
def _init(spec: Spec, params: PyTree) -> State:
    leaves = Leaves(params)
    trained = spec.trained(leaves, params)
    if spec.mask is not None:
        leaves.spread("mask", spec.mask, params)  # Of another structure it is an error now and not at the first step.
    blank = [
        {name: zeros_like(jnp.asarray(p)) + slot.initial for name, slot in spec.rule.slots.items()} if train else None
        for p, train in zip(leaves.leaves, trained, strict=True)
    ]
    count = jnp.zeros((), jnp.int32)
    slots = coded(spec, leaves, params, blank, count)
    dtype = weight_dtype(leaves, trained)
    weights = tuple(Weight(jnp.zeros((), dtype), jnp.zeros((), dtype)) for _ in range(spec.form.kept))
    counts = tuple(jnp.zeros((), jnp.int32) for _ in spec.form.links)
    return spec.form.made(Memory(counts, weights, slots))


def weight_dtype(leaves: Leaves, trained: Sequence[bool]) -> np.dtype:
    """The dtype of the bias weights: the widest one of the arithmetic."""
    kinds = [compute_dtype(jnp.result_type(p)) for p in itertools.compress(leaves.leaves, trained)]
    return jnp.dtype(jnp.float64 if jnp.float64 in kinds else jnp.float32)


def coded(
    spec: Spec, leaves: Leaves, params: PyTree, slots: Sequence[Mapping[str, jax.Array] | None], count: jax.Array
) -> dict[str, PyTree]:
    """The trees of a state, of the slots of each leaf (None where there are none)."""
    times = _times(spec, count)
    stored: list[Stored | None] = []
    for path, own, codecs in zip(leaves.paths, slots, spec.codecs_of(leaves, params), strict=True):
        with named(path):
            stored.append(encode(codecs, own, lattice_of(next(iter(own.values()))), times) if own else own)
    return _trees(spec, leaves, stored)


def _times(spec: Spec, count: jax.Array) -> dict[str, jax.Array]:
    return noise.times(count, [slot for _, codec in spec.codecs if not codec.exact for slot in codec.slots])


def _trees(spec: Spec, leaves: Leaves, stored: Sequence[Stored | None]) -> dict[str, PyTree]:
    return {name: gather(leaves, [None if x is None else x[name] for x in stored]) for name, _ in spec.codecs}


def _form(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    return x.shape, x.dtype


@functools.cache
def _expected(
    codecs: tuple[tuple[str, Codec], ...], shape: tuple[int, ...], dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of what is stored of a parameter."""
    if not codecs:
        return {}
    real = jax.eval_shape(as_real, jax.ShapeDtypeStruct(shape, dtype))
    slot = jax.ShapeDtypeStruct(real.shape, compute_dtype(dtype))
    slots = [name for _, codec in codecs for name in codec.slots]
    time = jax.ShapeDtypeStruct((), jnp.int32)

    def stored(slots: Slots, times: Slots) -> dict[str, jax.Array]:
        return encode(dict(codecs), slots, lattice_of(next(iter(slots.values()))), times)

    kept = jax.eval_shape(stored, dict.fromkeys(slots, slot), dict.fromkeys(slots, time))
    return {name: _form(x) for name, x in kept.items()}


def _check_leaf(path: str, g: object, p: object, stored: Stored, codecs: Mapping[str, Codec]) -> None:
    """Raises if a trained leaf's gradient, parameter and state do not belong together."""
    if g is None:
        raise ValueError(f"the gradient of {path} is None, but the parameter is trained; to freeze it, use frozen=")
    gradient, parameter = jax.typeof(g), jax.typeof(p)
    if gradient.shape != parameter.shape:
        raise ValueError(f"the gradient of {path} has shape {gradient.shape}, its parameter {parameter.shape}")
    if gradient.dtype != parameter.dtype:
        for kind in (jnp.floating, jnp.complexfloating):
            if jnp.issubdtype(gradient.dtype, kind) != jnp.issubdtype(parameter.dtype, kind):
                raise ValueError(f"the gradient of {path} is {gradient.dtype}, its parameter {parameter.dtype}")
    expected = _expected(tuple(codecs.items()), parameter.shape, parameter.dtype)
    for name, x in stored.items():
        if not isinstance(x, optax.MaskedNode) and _form(x) != expected[name]:
            found, wanted = (f"{dtype}{list(shape)}" for shape, dtype in (_form(x), expected[name]))
            raise ValueError(
                f"the state's {name} of {path} is {found}, expected {wanted} ({codecs[name]}): was the state made by "
                "this transformation from these parameters? adam_fn.interop.change_storage converts one that was made "
                "with another storage"
            )
        if isinstance(x, optax.MaskedNode):
            raise ValueError(
                f"the state has no {name} of {path}, which is trained: was it frozen when the state was made?"
            )


def _check_untrained(path: str, p: object, stored: Stored) -> None:
    """Raises if a state has moments that this transformation would lose."""
    if p is not None and not all(isinstance(x, optax.MaskedNode) for x in stored.values()):
        raise ValueError(
            f"the state has moments of {path}, which is not trained (it is frozen, or no floating array): "
            "adam_fn.interop.change_storage drops them"
        )


def _as_array(x: Any) -> Any:  # noqa: ANN401
    return jnp.asarray(x) if isinstance(x, (bool, int, float, complex)) else x


def _no_update(g: ArrayLike | None, p: ArrayLike) -> jax.Array | None:
    """The update of a leaf that is not trained: zeros that can be added to it."""
    if g is None:
        return None
    # float0 is what JAX gives as the gradient of an integer; nothing can be added to it, so it becomes False.
    dtype = next((x.dtype for x in map(jax.typeof, (g, p)) if x.dtype != jax.dtypes.float0), jnp.dtype(bool))
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # The keys of random streams.
        return None
    return jnp.zeros(jnp.shape(p), dtype)


def advanced(spec: Spec, memory: Memory) -> tuple[Rule, Memory]:
    """The rule of a step, and the memory after it but for the slots."""
    counts = tuple(jnp.zeros((), jnp.int32) if count is None else count for count in memory.counts)
    rule = Chain(spec.rule.parts()).at(counts)
    new = tuple(None if count is None else jnp.asarray(optax.safe_increment(count)) for count in memory.counts)
    kept: list[Weight] = []
    for part, now, count in zip(spec.rule.parts(), rule.parts(), counts, strict=True):
        betas = [beta(count) if callable(beta) else beta for beta in now.betas]
        kept += bias.advanced(part.betas, betas, memory.weights[len(kept) :])
    others = {field: jnp.asarray(optax.safe_increment(count)) for field, count in memory.others.items()}
    return rule, Memory(new, tuple(kept), {}, others)


@functools.partial(jax.jit, static_argnames="write")
def _update(
    spec: Spec,
    grads: PyTree,
    state: State,
    params: PyTree | None,
    learning_rate: jax.Array | None,
    low: PyTree | None = None,
    time: jax.Array | None = None,
    *,
    write: Write = UPDATES,
) -> tuple[PyTree, PyTree | None, State]:
    """What `write` makes of the updates and of `low`, and the new state; `time`: that of a `write` that dithers."""
    # Numbers become arrays when they are traced; under `disable_jit` here.
    grads, params = (jax.tree.map(_as_array, tree) for tree in (grads, params))
    learning_rate = None if learning_rate is None else jnp.asarray(learning_rate)
    memory = spec.form.read(state)
    reference = grads if params is None else params
    leaves = Leaves(reference)
    gradients = leaves.match(grads, "the gradients", "the parameters")
    trained = spec.trained(leaves, reference)
    own = spec.codecs_of(leaves, reference)
    slots = {name: leaves.match(tree, f"the state's {name}", "the parameters") for name, tree in memory.slots.items()}

    decays = [True] * len(trained) if spec.mask is None else leaves.spread("mask", spec.mask, reference)
    rule, after = advanced(spec, memory)
    clock = Clock(memory.counts, spec.weights(after, weight_dtype(leaves, trained)), learning_rate)
    rules = rules_of(rule, clock, decays, None if spec.groups is None else spec.groups.of(reference))
    times = Times(_times(spec, after.steps), time)

    lows = [None] * len(trained) if low is None else leaves.match(low, "the state's remainder", "the parameters")
    updates: list[jax.Array | None] = []
    stored: list[Stored | None] = []
    for i, (path, g, p) in enumerate(zip(leaves.paths, gradients, leaves.leaves, strict=True)):
        old = {name: slot[i] for name, slot in slots.items()}
        if not trained[i]:
            _check_untrained(path, p, old)
            updates.append(p if write.parameters else _no_update(g, p))
            stored.append(None)
            continue
        _check_leaf(path, g, p, old, own[i])
        own_rule, now = rules[i]
        with named(path):
            how = write if params is None else write.of(jnp.result_type(p))
            inputs = Inputs(g, None if params is None else p, lows[i] if how.has_low else None)
            done = run_leaf(own_rule, own[i], inputs, old, now, times, write=how)
        updates.append(done.result)
        stored.append(done.stored)
        lows[i] = lows[i] if done.low is None else done.low
    new_state = spec.form.made(after._replace(slots=_trees(spec, leaves, stored)))
    new_low = None if low is None else leaves.treedef.unflatten(lows)
    return leaves.treedef.unflatten(updates), new_low, new_state


@jax.jit
def _decoded(spec: Spec, slots: Mapping[str, PyTree], params: PyTree) -> dict[str, PyTree]:
    leaves = Leaves(params)
    trained, own = spec.trained(leaves, params), spec.codecs_of(leaves, params)
    stored = {name: leaves.match(tree, f"the state's {name}", "the parameters") for name, tree in slots.items()}
    found = [
        decode(own[i], {name: x[i] for name, x in stored.items()}, compute_dtype(jnp.result_type(p)))
        if trained[i]
        else None
        for i, p in enumerate(leaves.leaves)
    ]
    return {name: gather(leaves, [None if x is None else x[name] for x in found]) for name in spec.rule.slots}


def rate_of_step(learning_rate: ArrayLike | None) -> jax.Array | None:
    """The rate of one step, as it was given to `update`; an array once `jit` has taken it."""
    if learning_rate is None:
        return None
    if callable(learning_rate):
        raise TypeError(f"the learning_rate of one update must be a number or a 0-d array, got {learning_rate!r}")
    # Of a number a float: one type, one compilation.
    rate = checked("learning_rate", learning_rate, Range(0.0, math.inf))
    if not jnp.issubdtype(jnp.result_type(rate), jnp.floating):
        raise TypeError(f"learning_rate must be floating, got an array of {jnp.result_type(rate)}")
    return cast(jax.Array, rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Init(Method):
    """``init(params) -> state``: the state before the first step, sharded like the parameters."""

    spec: Spec

    def __call__(self, params: PyTree) -> State:
        self.spec.rule.check_arrays()
        return marked(self.spec, _init(self.spec, arrays_of(params)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Update(Method):
    """``update(grads, state, params) -> (updates, state)``; `learning_rate` replaces the rate for this step."""

    spec: Spec

    def __call__(
        self,
        updates: PyTree,
        state: State,
        params: PyTree | None = None,
        *,
        learning_rate: ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, State]:
        del extra_args  # Meant for other links of a chain.
        self.spec.form.check(state)
        params = arrays_of(params)
        note(Call(self.spec, updates, state, params))
        new, _, after = _update(self.spec, updates, state, params, rate_of_step(learning_rate))
        return new, after

    def write(
        self, grads: PyTree, state: State, params: PyTree, *, learning_rate: ArrayLike | None = None
    ) -> tuple[PyTree, State]:
        """The new parameters, as ``optax.apply_updates(params, updates)`` gives them, and the new state.

        No update is ever stored: in a program that donates `params` and `state` every leaf is changed in place.
        """
        rate = rate_of_step(learning_rate)
        self.spec.form.check(state)
        new, _, after = _update(self.spec, grads, state, params, rate, write=PARAMETERS)
        return new, after

    def written(
        self,
        grads: PyTree,
        state: State,
        params: PyTree,
        write: Write,
        *,
        low: PyTree | None = None,
        time: jax.Array | None = None,
        learning_rate: ArrayLike | None = None,
    ) -> tuple[PyTree, PyTree | None, State]:
        """What `write` makes of the updates and of `low`, a tree of what is stored beside the parameters.

        `time`: that of `noise.times` at this step, for a `write` that dithers.
        """
        self.spec.form.check(state)
        note(Call(self.spec, grads, state, params))
        return _update(self.spec, grads, state, params, rate_of_step(learning_rate), low, time, write=write)

    def rates(self, params: PyTree) -> list[float]:
        """What multiplies the rate of each leaf, None included."""
        groups = self.spec.groups
        return [1.0] * len(Leaves(params).leaves) if groups is None else [group.rate for group in groups.of(params)]

    def decoded(self, state: State, params: PyTree) -> dict[str, PyTree]:
        """The slots as arrays in the dtype of the arithmetic, in the structure of `params` (or gradients)."""
        return _decoded(self.spec, self.spec.form.read(state).slots, params)


class Transformation(Functions):
    """An optax transformation with precise types: any pytree is accepted.

    Transformations with equal rules, codecs and masks compare equal, hash alike and share compilations; they pickle if
    their hyperparameters do.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        init: Init  # pyright: ignore[reportIncompatibleVariableOverride]
        update: Update  # pyright: ignore[reportIncompatibleVariableOverride]


def transform(
    rule: Rule,
    *,
    storage: StorageLike | None = None,
    mask: Mask | None = None,
    frozen: Mask | None = None,
    storage_mask: Mask | None = None,
    groups: Groups | Mapping[str, Group] | None = None,
) -> Transformation:
    """A rule as an optax transformation.

    Args:
      rule: what to compute; ``transform(a >> b)`` equals ``optax.chain(transform(a), transform(b))``.
      storage: one of the names in `adam_fn.options.Options`, a `Codec` for every slot, or a mapping from the names of
        slots to codecs; slots that it does not name are stored in float32 (float64 for float64 parameters).
      mask: the leaves to which a `WeightDecay` applies: a tree of booleans with the structure of the parameters or a
        prefix of it, or a function of the parameters that returns one (see `adam_fn.masks`); all by default.
      frozen: the leaves that are not trained: they have no moments and get a zero update; by default all are trained.
      storage_mask: the leaves to which `storage` applies, all by default; the others are stored in float32 (float64 for
        float64 parameters).
      groups: multipliers of `learning_rate` and `weight_decay`, and frozen leaves, by path (see `Groups`).
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"transform takes a rule, such as Adam() >> Rate(1e-3), got {rule!r}")
    codecs = codecs_of(storage, rule.slots)
    if storage_mask is not None and not storage:
        raise ValueError("storage_mask has no effect without storage: pass storage as well")
    if storage_mask is not None and WORD in dict(codecs):
        raise ValueError(
            "storage_mask cannot leave out parameters of a 16-bit storage, whose one word has no place for two float32 "
            'moments: use storage="24bit", or another transformation for these parameters (optax.partition)'
        )
    masks = {"mask": mask, "frozen": frozen, "storage_mask": storage_mask}
    fixed = {name: fixed_mask(name, value) for name, value in masks.items()}
    spec = Spec(rule, codecs, **fixed, groups=None if groups is None else Groups.made_of(groups))
    return Transformation(Init(spec), Update(spec))
