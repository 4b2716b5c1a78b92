"""Lifts a rule and its storage to an optax transformation; the only place where trees appear.

One policy for the leaves, everywhere: ``None`` passes through. Integer, boolean and frozen leaves have no moments
(`optax.MaskedNode` stands in their place) and get a zero update. Complex leaves are two reals. A gradient that does
not fit its parameter is an error, raised while tracing, that names the leaf.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn.arithmetic import Weight
from adam_fn.codec import Cast, Codec, Stored
from adam_fn.execute.body import PARAMETERS, UPDATES, Inputs, Write, as_real, compute_dtype
from adam_fn.execute.run import run_leaf
from adam_fn.execute.store import load, store, stored_spec
from adam_fn.groups import Group, Groups, rules_of
from adam_fn.leaves import Leaves, Mask, PyTree, fixed_mask, named
from adam_fn.observe import Call, note
from adam_fn.rule import Clock, Range, Rule, checked
from adam_fn.spec import Spec, gather, scatter, zeros_like


class State(NamedTuple):
    """The state of a transformation.

    Attributes:
      count: the number of updates made so far, an int32 scalar; schedules see it.
      weights: the bias weights, float32 (float64 with float64 parameters) of shape ``[n, 2]``: the weight, which is
        ``1 - β**count`` for a constant β, and its rounding remainder.
        ``()`` for a rule that has none (checkpointers refuse empty arrays).
      slots: by name (``"mu"``, ``"nu"``, …) a tree with the structure of the parameters: the raw, uncorrected moments.
        The moments of a complex parameter are two reals, of shape ``(2, *shape)``.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weights: jax.Array | tuple[()]
    slots: dict[str, PyTree]


@jax.jit
def _init(spec: Spec, params: PyTree) -> State:
    leaves = Leaves(params)
    trained = spec.trained(leaves, params)
    if spec.mask is not None:
        leaves.spread("mask", spec.mask, params)  # Of another structure it is an error now and not at the first step.
    own = spec.codecs_of(leaves, params)
    slots = {}
    for name, codec in spec.codecs:
        initial = spec.rule.slots[name].initial
        stored: list[Stored | None] = []
        for path, p, train, codecs in zip(leaves.paths, leaves.leaves, trained, own, strict=True):
            with named(path):
                stored.append(store(codecs[name], zeros_like(jnp.asarray(p)) + initial) if train else None)
        slots[name] = gather(leaves, codec, stored)
    double = any(compute_dtype(jnp.result_type(p)) == jnp.float64 for p in itertools.compress(leaves.leaves, trained))
    shape = (spec.rule.weights, 2)
    weights = jnp.zeros(shape, jnp.float64 if double else jnp.float32) if shape[0] else ()
    return State(jnp.zeros((), jnp.int32), weights, slots)


def _form(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    return x.shape, x.dtype


@functools.cache
def _expected(codec: Codec, shape: tuple[int, ...], dtype: np.dtype) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of what is stored for a slot of a parameter."""
    real = jax.eval_shape(as_real, jax.ShapeDtypeStruct(shape, dtype))
    return [_form(x) for x in jax.tree.leaves(stored_spec(codec, real.shape, compute_dtype(dtype)))]


def _check_leaf(path: str, g: object, p: object, stored: Mapping[str, Stored], codecs: Mapping[str, Codec]) -> None:
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
    for name, codec in codecs.items():
        found = [_form(x) for x in jax.tree.leaves(stored[name])]
        expected = _expected(codec, parameter.shape, parameter.dtype)
        if found != expected:
            raise ValueError(
                f"the state's {name} of {path} has (shape, dtype) {found}, expected {expected}: was the state made by "
                "this transformation from these parameters?"
            )


def _no_update(g: ArrayLike | None, p: ArrayLike) -> jax.Array | None:
    """The update of a leaf that is not trained: zeros that can be added to it."""
    if g is None:
        return None
    # float0 is what JAX gives as the gradient of an integer; nothing can be added to it, so it becomes False.
    dtype = next((x.dtype for x in map(jax.typeof, (g, p)) if x.dtype != jax.dtypes.float0), jnp.dtype(bool))
    return jnp.zeros(jnp.shape(p), dtype)


@functools.partial(jax.jit, static_argnames="write")
def _update(
    spec: Spec,
    grads: PyTree,
    state: State,
    params: PyTree | None,
    learning_rate: jax.Array | None,
    low: PyTree | None = None,
    *,
    write: Write = UPDATES,
) -> tuple[PyTree, PyTree | None, State]:
    """What `write` makes of the updates and of `low`, and the new state."""
    reference = grads if params is None else params
    leaves = Leaves(reference)
    gradients = leaves.match(grads, "the gradients", "the parameters")
    trained = spec.trained(leaves, reference)
    own = spec.codecs_of(leaves, reference)
    slots = {name: scatter(leaves, codec, state.slots[name], f"the state's {name}") for name, codec in spec.codecs}

    rule = spec.rule.at(state.count)
    decays = [True] * len(trained) if spec.mask is None else leaves.spread("mask", spec.mask, reference)
    old_weights = [Weight(*row) for row in state.weights]
    if len(old_weights) != rule.weights:
        raise ValueError(f"the state has {len(old_weights)} bias weights, but {spec.rule} has {rule.weights}")
    weights = rule.weigh(old_weights, state.count)
    clock = Clock(state.count, tuple(weight.value for weight in weights), learning_rate)
    rules = rules_of(rule, clock, decays, None if spec.groups is None else spec.groups.of(reference))
    is_random = any(codec.random for _, codec in spec.codecs)

    lows = [None] * len(trained) if low is None else leaves.match(low, "the state's remainder", "the parameters")
    updates: list[jax.Array | None] = []
    stored: list[dict[str, Stored] | None] = []
    for i, (path, g, p) in enumerate(zip(leaves.paths, gradients, leaves.leaves, strict=True)):
        if not trained[i]:
            updates.append(p if write.parameters else _no_update(g, p))
            stored.append(None)
            continue
        old = {name: slot[i] for name, slot in slots.items()}
        _check_leaf(path, g, p, old, own[i])
        own_rule, now = rules[i]
        now = dataclasses.replace(now, index=jnp.int32(i)) if is_random else now
        with named(path):
            how = write if params is None else write.of(jnp.result_type(p))
            inputs = Inputs(g, None if params is None else p, lows[i] if isinstance(lows[i], jax.Array) else None)
            done = run_leaf(own_rule, own[i], inputs, old, now, write=how, kernel=spec.kernel)
        updates.append(done.result)
        stored.append(done.stored)
        lows[i] = lows[i] if done.low is None else done.low
    new_slots = {
        name: gather(leaves, codec, [None if x is None else x[name] for x in stored]) for name, codec in spec.codecs
    }
    new_weights = jnp.stack([jnp.stack(weight) for weight in weights]) if weights else state.weights
    new_low = None if low is None else leaves.treedef.unflatten(lows)
    new_state = State(jnp.asarray(optax.safe_increment(state.count)), new_weights, new_slots)
    return leaves.treedef.unflatten(updates), new_low, new_state


@functools.partial(jax.jit, static_argnums=1)
def _decoded(spec: Spec, slot: str, state: State, params: PyTree) -> PyTree:
    leaves = Leaves(params)
    stored = scatter(leaves, dict(spec.codecs)[slot], state.slots[slot], f"the state's {slot}")
    found: list[jax.Array | optax.MaskedNode | None] = []
    for p, x, train, codecs in zip(
        leaves.leaves, stored, spec.trained(leaves, params), spec.codecs_of(leaves, params), strict=True
    ):
        if train:
            shape = jax.eval_shape(as_real, p).shape
            found.append(load(codecs[slot], x, compute_dtype(jnp.result_type(p)), shape))
        else:
            found.append(None if p is None else optax.MaskedNode())
    return leaves.treedef.unflatten(found)


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


@dataclasses.dataclass(frozen=True)
class Init:
    """``init(params) -> State``: the state before the first step, sharded like the parameters."""

    spec: Spec

    def __call__(self, params: PyTree) -> State:
        note(self.spec)
        return _init(self.spec, params)


@dataclasses.dataclass(frozen=True)
class Update:
    """``update(grads, state, params) -> (updates, state)``; `learning_rate` replaces the rate for this step."""

    spec: Spec

    def __call__(
        self,
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        learning_rate: ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, State]:
        del extra_args  # Meant for other links of a chain.
        state = self._checked(state)
        note(Call(self.spec, updates, state, params))
        new, _, after = _update(self.spec, updates, state, params, rate_of_step(learning_rate))
        return new, after

    def write(
        self, grads: PyTree, state: optax.OptState, params: PyTree, *, learning_rate: ArrayLike | None = None
    ) -> tuple[PyTree, State]:
        """The new parameters, as ``optax.apply_updates(params, updates)`` gives them, and the new state.

        No update is ever stored: in a program that donates `params` and `state` every leaf is changed in place.
        """
        rate = rate_of_step(learning_rate)
        new, _, after = _update(self.spec, grads, self._checked(state), params, rate, write=PARAMETERS)
        return new, after

    def with_low(
        self,
        grads: PyTree,
        state: optax.OptState,
        params: PyTree,
        low: PyTree,
        write: Write,
        learning_rate: ArrayLike | None = None,
    ) -> tuple[PyTree, PyTree, State]:
        """What `write` makes of the updates and of `low`, a tree of what is stored beside the parameters."""
        state = self._checked(state)
        note(Call(self.spec, grads, state, params))
        return _update(self.spec, grads, state, params, rate_of_step(learning_rate), low, write=write)

    def rates(self, params: PyTree) -> list[float]:
        """What multiplies the rate of each leaf, None included."""
        groups = self.spec.groups
        return [1.0] * len(Leaves(params).leaves) if groups is None else [group.rate for group in groups.of(params)]

    def decoded(self, slot: str, state: State, params: PyTree) -> PyTree:
        """A slot of the state as arrays in the dtype of the arithmetic, in the structure of `params` (or gradients)."""
        return _decoded(self.spec, slot, state, params)

    def _checked(self, state: optax.OptState) -> State:
        if not isinstance(state, State) or set(state.slots) != set(dict(self.spec.codecs)):
            found = f"State with the slots {sorted(state.slots)}" if isinstance(state, State) else type(state).__name__
            expected = sorted(dict(self.spec.codecs))
            raise TypeError(
                f"expected an adam_fn.State with the slots {expected}, got a {found}, which this transformation did "
                "not make; adam_fn.interop converts states of optax, torch and Keras"
            )
        return state


class Transformation(optax.GradientTransformationExtraArgs):
    """An optax transformation with precise types: `init` returns a `State`, and any pytree is accepted.

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
    storage: Codec | Mapping[str, Codec] | None = None,
    mask: Mask | None = None,
    frozen: Mask | None = None,
    storage_mask: Mask | None = None,
    groups: Groups | Mapping[str, Group] | None = None,
    kernel: bool = False,
) -> Transformation:
    """A rule as an optax transformation.

    Args:
      rule: what to compute; ``transform(a >> b)`` equals ``optax.chain(transform(a), transform(b))``.
      storage: a `Codec` for every slot, or a mapping from slot names to codecs; slots that it does not name are stored
        in float32 (float64 for float64 parameters).
      mask: the leaves to which a `WeightDecay` applies: a tree of booleans with the structure of the parameters or a
        prefix of it, or a function of the parameters that returns one (see `adam_fn.masks`); all by default.
      frozen: the leaves that are not trained: they have no moments and get a zero update; by default all are trained.
      storage_mask: the leaves to which `storage` applies, all by default; the others are stored in float32 (float64 for
        float64 parameters).
      groups: multipliers of `learning_rate` and `weight_decay`, and frozen leaves, by path (see `Groups`).
      kernel: whether a TPU or a GPU runs the step of each leaf as one kernel (see `adam_fn.options.Options`).
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"transform takes a rule, such as Adam() >> Rate(1e-3), got {rule!r}")
    if isinstance(storage, Codec):
        storage = dict.fromkeys(rule.slots, storage)
    if storage is not None and not isinstance(storage, Mapping):
        raise TypeError(
            f"storage must be a codec, such as Block(8), or a mapping from slot names to codecs, got {storage!r}"
        )
    for name, codec in (storage or {}).items():
        if not isinstance(codec, Codec):
            raise TypeError(f"storage[{name!r}] must be a codec, such as Block(8) or Cast('bfloat16'), got {codec!r}")
    unknown = set(storage or {}) - set(rule.slots)
    if unknown:
        raise ValueError(f"storage names {sorted(unknown)}, but the slots of {rule} are {sorted(rule.slots)}")
    codecs = tuple(
        (name, (storage or {}).get(name, Cast()).of(signed=slot.signed)) for name, slot in rule.slots.items()
    )
    if storage_mask is not None and not storage:
        raise ValueError("storage_mask has no effect without storage: pass storage as well")
    if not isinstance(kernel, bool):
        raise TypeError(f"kernel must be a bool, got {kernel!r}")
    masks = {"mask": mask, "frozen": frozen, "storage_mask": storage_mask}
    fixed = {name: fixed_mask(name, value) for name, value in masks.items()}
    spec = Spec(rule, codecs, **fixed, groups=None if groups is None else Groups.made_of(groups), kernel=kernel)
    return Transformation(Init(spec), Update(spec))
