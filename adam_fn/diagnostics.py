"""Diagnostics of a running optimizer: pure, compiled functions of a transformation and its state.

::

    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    logger.log(adam_fn.diagnostics.summary(tx, state, params, updates))

`tx` is any transformation that contains one optimizer of this package: by itself, in `optax.chain`, `masked`,
`partition`, `inject_hyperparams`, `MultiSteps` or `apply_if_finite`, or in a wrapper of this package; `state` is the
state of `tx` **after** a step, and `params` has the parameters' structure. Two optimizers in `tx`, or none, raise a
ValueError: pass the one you mean, and its state. (These functions cannot look inside a `tx.update` that was wrapped in
`jax.jit` on its own.) For an `nnx.Optimizer` and its model, pass ``nnx.as_pure`` of ``optimizer.opt_state`` and of
``nnx.state(model, wrt)``.

Slots stored in codes are decoded. Trees have the structure of the parameters, with `optax.MaskedNode` for leaves that
are not trained (integers, frozen ones) and None for None; complex leaves are two reals, of shape ``(2, *shape)``.
Arrays have the dtype of the arithmetic (float32, float64 for float64 parameters) and the parameters' sharding. Norms
neither overflow nor underflow unless the numbers themselves do.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.norms import norm, norm_ratio, reals, rms, share
from adam_fn.algebra.rate_and_decay import Rate, WeightDecay
from adam_fn.trees.leaves import PyTree, by_path
from adam_fn.trees.members import Member, hyperparameter, members_of, optimizer_of, signal_to_noise_of, storage_errors
from adam_fn.wrappers.base import check_transformation

P = ParamSpec("P")
T = TypeVar("T")


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """The size in bytes of the state that `tx` keeps for `params`, as it is stored; nothing is allocated.

    `params` may be arrays or `jax.ShapeDtypeStruct`. Sharded arrays count in full.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Compiles a function for each transformation; an error explains that `lax.cond` hides an optimizer."""
    names = set(inspect.signature(function).parameters) & {"tx", "ahead", "threshold", "per_leaf"}
    compiled = jax.jit(function, static_argnames=tuple(sorted(names)))

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        check_transformation(args[0] if args else kwargs.get("tx"), function.__name__, wraps=False)
        try:
            return compiled(*args, **kwargs)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                f"{function.__name__} cannot see an optimizer that runs inside lax.cond (as in optax.MultiSteps and "
                "apply_if_finite): pass the inner transformation and its state"
            ) from error

    return wrapped


@_compiled
def learning_rate(tx: optax.GradientTransformation, state: PyTree, params: PyTree, *, ahead: int = 0) -> jax.Array:
    """The learning rate α of the step that led to `state`, with schedules evaluated; a float32 scalar.

    This is the rate of this package's `Rate`, also under `optax.inject_hyperparams`. Links of optax that scale the
    updates do not count, nor does ``update(..., learning_rate=x)``. After `swats` has switched it is Adam's rate.

    Args:
      tx: the transformation.
      state: its state, after a step.
      params: the parameters, for their structure.
      ahead: 0 for the last step (for the first, if none was made), 1 for the next one, and so on.

    Raises:
      ValueError: if `tx` has no `Rate`, or more than one.
    """
    found = hyperparameter(members_of(tx, state, params, ahead), Rate, "learning_rate", ahead)
    if found is None:
        raise ValueError("expected one Rate in the transformation, found 0")
    return found


@_compiled
def weight_decay(tx: optax.GradientTransformation, state: PyTree, params: PyTree, *, ahead: int = 0) -> jax.Array:
    """The weight decay λ of the step that led to `state`, with schedules evaluated; a float32 scalar, 0 without decay.

    The transformation decides whether it is multiplied by the rate, and which leaves decay. The arguments are those of
    `learning_rate`.
    """
    found = hyperparameter(members_of(tx, state, params, ahead), WeightDecay, "weight_decay", ahead)
    return jnp.zeros(()) if found is None else found


@_compiled
def moments(tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> dict[str, PyTree]:
    """The moments as numbers: for each slot (``"mu"``, ``"nu"``, …) a tree of arrays.

    ::

        diagnostics.moments(tx, state, params)["nu"]["layers"][0]["kernel"]

    These are the arrays that the next step computes with: those in ``state[0]``, decoded if they are stored in codes or
    in bfloat16. They are the raw averages, without bias correction. `params` are only used for structure, shapes and
    dtypes. The top of the module says what becomes of leaves that are not trained, of complex leaves and of errors.
    """
    member = optimizer_of(members_of(tx, state, params))
    return member.decoded(member.kept(params))


def _required(members: Sequence[Member], params: PyTree) -> PyTree:
    member = optimizer_of(members)
    ratio = signal_to_noise_of(member, params)
    if ratio is None:
        raise ValueError(f"{member.definition.rule} has no m̂/√v̂: its slots are {sorted(member.memory.slots)}")
    return ratio


@_compiled
def signal_to_noise(tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """The signal-to-noise ratio ``m̂/√v̂`` of every element (arXiv 1412.6980, section 2.1), a tree of arrays.

    Near ±1, successive gradients agree; near an optimum they do not, and the ratio falls, and the step with it. v̂ is
    the number that the optimizer divides by: AMSGrad's maximum, AdaBelief's ``(g - m)²``. For AdaMax the ratio is
    ``m̂/v``; for LaProp it is m̂ and for ADOPT m, which are averages of ratios. It is 0 before the first step, and for
    elements whose gradients so far were all 0. After `swats` has switched it says nothing: m is then SGD's momentum.

    Raises:
      ValueError: for Lion, which stores no second moment, and for ``b1 = 0``, where no first moment is stored. See the
        module for the rest.
    """
    return _required(members_of(tx, state, params), params)


@_compiled
def effective_step(
    tx: optax.GradientTransformation, state: PyTree, params: PyTree, *, learning_rate: ArrayLike | None = None
) -> PyTree:
    """The effective step ``Δ = α m̂/√v̂`` of every element (arXiv 1412.6980, section 2.1), a tree of arrays.

    It is the step that follows from the moments alone, without ε, weight decay, trust ratio and mask. The step actually
    taken is in the updates; see `update_to_weight`.

    Args:
      tx: the transformation.
      state: its state, after a step.
      params: the parameters, for their structure.
      learning_rate: α, if ``update(..., learning_rate=x)`` set it; the transformation's rate by default.
    """
    members = members_of(tx, state, params)
    return _scaled(_required(members, params), _rate(members, learning_rate, required=True))


def _rate(members: Sequence[Member], given: ArrayLike | None, *, required: bool = False) -> jax.Array | None:
    if given is not None:
        return jnp.asarray(given, float)
    found = hyperparameter(members, Rate, "learning_rate", 0)
    if found is None and required:
        raise ValueError("expected one Rate in the transformation, found 0: pass learning_rate")
    return found


def _scaled(ratio: PyTree, rate: jax.Array | None) -> PyTree:
    return jax.tree.map(lambda x: x * cast(jax.Array, rate).astype(x.dtype), ratio)


@_compiled
def at_bound(tx: optax.GradientTransformation, state: PyTree, params: PyTree, *, threshold: float = 0.99) -> PyTree:
    """The share of each leaf's elements at the step bound, ``|m̂|/√v̂ ≥ threshold``, a tree of scalars in [0, 1].

    The bound is ``|Δ| ≤ α`` of arXiv 1412.6980, section 2.1: a steady gradient reaches it, and one that grows or is
    sparse exceeds it. The share is 1 at the first step, and 0 for an empty leaf. A share that stays high suggests that
    the rate could be larger: the gradients keep pointing the same way.
    """
    return jax.tree.map(lambda x: share([x], threshold), _required(members_of(tx, state, params), params))


@jax.jit
def update_to_weight(updates: PyTree, params: PyTree) -> PyTree:
    """The ratio ``‖u‖/‖p‖`` of the L2 norms of update and parameter, for each leaf; a tree of scalars.

    About 1e-3 is common. The ratio is 0 if the update is 0, and inf if only the parameter is 0; integer leaves become
    `optax.MaskedNode`. `params` may be the parameters before or after the step.
    """
    return jax.tree.map(lambda u, p: norm_ratio(norm([u]), norm([p])), reals(updates), reals(params))


@_compiled
def quantisation_error(
    tx: optax.GradientTransformation, state: PyTree, grads: PyTree, params: PyTree
) -> dict[str, PyTree]:
    """The error of storing the slots in one step with `grads`: relative L2 errors, for each slot a tree of scalars.

    The error of a leaf is ``‖s' - s‖/‖s‖``, where s is the slot after the step, in the dtype of the arithmetic, and s'
    is ``decode(encode(s))``, the slot as it is read back. Both come from the same stored state, so this is the error of
    one step, not an accumulated one: these errors are as often positive as negative, and over many steps they cancel.
    Slots that are stored in the dtype of the arithmetic have none and are left out. The function computes two steps.

    Args:
      tx: the transformation.
      state: its state before the step, or any other.
      grads: the gradients, as `tx.update` gets them.
      params: the parameters.

    Raises:
      ValueError: within `lax.cond` (`optax.MultiSteps`, `apply_if_finite`): pass the inner transformation. See the
        module for the rest.
    """
    return {
        name: jax.tree.map(lambda s, e: norm_ratio(norm([e]), norm([s])), exact, error)
        for name, (exact, error) in storage_errors(tx, grads, state, params).items()
    }


def _named(key: str, tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by ``key/path``."""
    return {f"{key}/{path}" if path else key: x for path, x in by_path(tree).items()}


@_compiled
def summary(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    updates: PyTree | None = None,
    grads: PyTree | None = None,
    *,
    learning_rate: ArrayLike | None = None,
    per_leaf: bool = False,
) -> dict[str, jax.Array]:
    """Collects all of this in a flat dictionary of float32 scalars; the keys depend only on the kind of the arguments.

    ==========================  =====================================================================
    ``learning_rate``           α of the step that led to `state`
    ``next_learning_rate``      α of the next one
    ``weight_decay``            λ of that step, 0 without decay
    ``signal_to_noise``         root mean square of m̂/√v̂ over all trained elements
    ``effective_step``          root mean square of α m̂/√v̂
    ``at_bound``                share of the elements with ``|m̂|/√v̂ ≥ 0.99``
    ``update_to_weight``        ``‖u‖/‖p‖`` over all trained elements, with `updates`
    ``quantisation_error/mu``   ``‖s' - s‖/‖s‖`` of a step by `grads` from `state`, for each coded slot
    ==========================  =====================================================================

    Keys that do not apply to `tx` are left out: the rates if it has no `Rate`; for Lion, the ratio and all that is
    computed from it.

    Args:
      tx: the transformation.
      state: its state, after the step.
      params: the parameters, before or after the step.
      updates: what `tx.update` returned.
      grads: gradients, for `quantisation_error`, which costs two steps.
      learning_rate: α, if ``update(..., learning_rate=x)`` set it.
      per_leaf: adds the values of each leaf, as ``signal_to_noise/layers/0/kernel``, with the paths of `adam_fn.masks`.
    """
    members = members_of(tx, state, params)
    optimizer = optimizer_of(members)
    found: dict[str, jax.Array] = {}

    def add(key: str, function: Callable[..., jax.Array], *trees: PyTree) -> None:
        found[key] = function(*map(jax.tree.leaves, trees))
        if per_leaf:
            found.update(_named(key, jax.tree.map(lambda *x: function(*([y] for y in x)), *trees)))

    rate = _rate(members, learning_rate)
    if rate is not None:
        found["learning_rate"] = rate
        ahead = hyperparameter(members_of(tx, state, params, 1), Rate, "learning_rate", 1)
        found["next_learning_rate"] = rate if ahead is None else ahead
    decay = hyperparameter(members, WeightDecay, "weight_decay", 0)
    found["weight_decay"] = jnp.zeros(()) if decay is None else decay
    ratio = signal_to_noise_of(optimizer, params)
    if ratio is not None:
        add("signal_to_noise", rms, ratio)
        if rate is not None:
            add("effective_step", rms, _scaled(ratio, rate))
        add("at_bound", lambda x: share(x, 0.99), ratio)
    if updates is not None:
        kept = optimizer.kept(params)
        add("update_to_weight", lambda u, p: norm_ratio(norm(u), norm(p)), reals(optimizer.kept(updates)), reals(kept))
    if grads is not None:
        for name, (exact, error) in storage_errors(tx, grads, state, params).items():
            add(f"quantisation_error/{name}", lambda s, e: norm_ratio(norm(e), norm(s)), exact, error)
    return {key: x.astype(np.float32) for key, x in found.items()}
