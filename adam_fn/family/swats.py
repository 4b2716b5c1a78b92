"""SWATS: Adam that switches to SGD."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.arithmetic import ema, incremented, one_minus
from adam_fn.algebra.hyper import Beta, Hyper, rate_of_step
from adam_fn.algebra.rate_and_decay import Rate
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.algebra.values import method_of
from adam_fn.execute.compiler import run_at_most_once
from adam_fn.family.adam import Adam
from adam_fn.options import MomentOptions, lists_options, optimizer, with_complex
from adam_fn.trees.definition import Definition, weight_dtype
from adam_fn.trees.leaves import Leaves, PyTree
from adam_fn.trees.recording import UpdateCall, record, unrecorded
from adam_fn.trees.states import Memory, State
from adam_fn.trees.transform import Transformation
from adam_fn.trees.update import Update
from adam_fn.wrappers.base import WIDE, TreeTransformation, alike_over_devices, check_state, inner, is_trained


class SwatsState(NamedTuple):
    """The state of `swats`.

    Attributes:
      adam: the state of Adam. After the switch its m is SGD's momentum, which starts again at 0; v stays as it is.
      average: the raw moving average of the rates γ, a scalar in the dtype of the bias weights (float32).
      switched: whether SGD has taken over, a bool scalar.
      sgd_rate: the rate Λ that was found, a scalar; 0 before the switch.
      adam_rate: Adam's rate at the switch, a scalar; 0 before.
    """

    adam: State
    average: jax.Array
    switched: jax.Array
    sgd_rate: jax.Array
    adam_rate: jax.Array


_DTYPES = {"average": WIDE, "switched": (bool,), "sgd_rate": WIDE, "adam_rate": WIDE}


@dataclasses.dataclass(frozen=True)
class Switching(Adam):
    """Adam whose m will be the momentum of SGD, which v does not bound."""

    def first_moment_slot(self, b1: Beta) -> Slot:
        return Slot()


@dataclasses.dataclass(frozen=True)
class Momentum(Rule):
    """SGD's momentum: ``m ← βm + (1-β)g``, ``u = m``; the slot is Adam's m."""

    beta: Beta

    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"mu": Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        mu = ema(self.beta, slots["mu"], g)
        return mu, {"mu": mu}


class _Call(NamedTuple):
    """The arguments of a step."""

    grads: PyTree
    state: SwatsState
    params: PyTree
    rate: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Swats(TreeTransformation):
    """The implementation of `swats`; `adam` is the transformation of `rule` and `rate`."""

    adam: Transformation
    rule: Adam
    rate: Rate
    tolerance: ArrayLike

    @property
    def _spec(self) -> Definition:
        return method_of(self.adam.update).definition

    def init(self, params: PyTree) -> SwatsState:
        adam = self.adam.init(params)
        leaves = Leaves(params)
        dtype = weight_dtype(leaves, self._spec.trained(leaves, params))
        average, sgd_rate, adam_rate = (jnp.zeros((), dtype) for _ in range(3))
        return SwatsState(adam, average, jnp.zeros((), bool), sgd_rate, adam_rate)

    def update(
        self,
        updates: PyTree,
        state: SwatsState,
        params: PyTree = None,
        *,
        learning_rate: ArrayLike | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, SwatsState]:
        del extra_args  # Meant for other links of a chain.
        check_state(state, SwatsState, "swats", **_DTYPES)
        record(UpdateCall(self._spec, updates, state.adam, params))
        return self._step(_Call(updates, state, params, rate_of_step(learning_rate)), write=False)

    def write(
        self, grads: PyTree, state: SwatsState, params: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, SwatsState]:
        check_state(state, SwatsState, "swats", **_DTYPES)
        return self._step(_Call(grads, state, params, None), write=True)

    def _step(self, call: _Call, *, write: bool) -> tuple[PyTree, SwatsState]:
        return _step(self._spec, self.rule, self.rate, self.tolerance, call, write=write)


@functools.partial(jax.jit, static_argnames="write")
def _step(
    definition: Definition, rule: Adam, rate: Rate, tolerance: ArrayLike, call: _Call, *, write: bool
) -> tuple[PyTree, SwatsState]:
    """Adam's step or SGD's: the updates, or with `write` the new parameters, and the new state."""
    alpha = jnp.asarray(
        rate.at(definition.form.read(call.state.adam).steps).learning_rate if call.rate is None else call.rate
    )
    alpha, call = alike_over_devices((alpha, call))  # Each device of a `shard_map` may switch on its own.
    with unrecorded():
        return _either(write, definition, rule, alpha, tolerance, call)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _either(
    write: bool, definition: Definition, rule: Adam, alpha: jax.Array, tolerance: ArrayLike, call: _Call
) -> tuple[PyTree, SwatsState]:
    """Runs one of two loops, each once or not at all.

    XLA copies whatever leaves a conditional, but changes in place what a loop carries.
    """
    state = call.state
    like = jax.eval_shape(functools.partial(_adam, write), definition, rule, alpha, tolerance, call)[0]
    blank = jax.tree.map(jnp.zeros_like, like)

    def own(result: PyTree, state: SwatsState) -> _Call:
        return call._replace(state=state, params=result if write else call.params)

    def adam(carry: tuple[PyTree, SwatsState]) -> tuple[PyTree, SwatsState]:
        return _adam(write, definition, rule, alpha, tolerance, own(*carry))

    def sgd(carry: tuple[PyTree, SwatsState]) -> tuple[PyTree, SwatsState]:
        return _sgd(write, definition, rule, alpha, own(*carry))

    carry = (call.params if write else blank, state)
    return run_at_most_once(state.switched, sgd, run_at_most_once(~state.switched, adam, carry))


@_either.defjvp
def _either_jvp(write: bool, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
    """Differentiates a choice between both steps instead: a while loop has no reverse-mode derivative.

    Nor would `jax.lax.cond` have one inside a `vmap` that is differentiated: JAX's rule for it inserts a
    `stop_gradient`, which cannot be transposed.
    """

    def either(definition: Definition, rule: Adam, alpha: jax.Array, tolerance: ArrayLike, call: _Call) -> PyTree:
        sgd, adam = _sgd(write, definition, rule, alpha, call), _adam(write, definition, rule, alpha, tolerance, call)
        return jax.tree.map(functools.partial(jnp.where, call.state.switched), sgd, adam)

    return jax.jvp(either, primals, tangents)


@jax.custom_jvp
def _restarted(now: jax.Array, mu: PyTree) -> PyTree:
    """Sets m to 0 at the switch.

    It is written as a loop, so that XLA need not wait for the sums over all leaves before it writes m.
    """
    return run_at_most_once(now, functools.partial(jax.tree.map, jnp.zeros_like), mu)


@_restarted.defjvp
def _restarted_jvp(primals: tuple[jax.Array, PyTree], tangents: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    now, mu = primals
    return jax.jvp(functools.partial(jax.tree.map, lambda x: jnp.where(now, jnp.zeros_like(x), x)), (mu,), tangents[1:])


def _sgd(write: bool, definition: Definition, rule: Adam, alpha: jax.Array, call: _Call) -> tuple[PyTree, SwatsState]:
    """A step after the switch. Of Adam's moments, only m is read and changed."""
    grads, state, params, _ = call
    codecs = tuple((name, codec) for name, codec in definition.codecs if name == "mu")
    sgd = Update(dataclasses.replace(definition, rule=Momentum(rule.b1) >> Rate(0.0), codecs=codecs))
    # `adam_rate` is not 0 after the switch; but `vmap` and derivatives compute this step before it as well.
    switched_at = jnp.where(state.switched, state.adam_rate, 1)
    memory, own = definition.form.read(state.adam), sgd.definition.form
    before = own.made(Memory((memory.steps, None), (), {"mu": memory.slots["mu"]}))
    step = sgd.write if write else sgd
    result, after = step(grads, before, params, learning_rate=state.sgd_rate * (alpha / switched_at))
    counts = tuple(None if count is None else incremented(count) for count in memory.counts)
    adam = memory._replace(counts=counts, slots={**memory.slots, **own.read(after).slots})
    return result, state._replace(adam=definition.form.made(adam))


def _adam(
    write: bool, definition: Definition, rule: Adam, alpha: jax.Array, tolerance: ArrayLike, call: _Call
) -> tuple[PyTree, SwatsState]:
    """Adam's step, and the search for SGD's rate."""
    grads, state, params, given = call
    update = Update(definition)
    steps, adam = update(grads, state.adam, params, learning_rate=given)
    rates = update.rates(grads if params is None else params)
    leaves, treedef = jax.tree.flatten(steps, is_leaf=lambda x: x is None)
    rows = zip(leaves, treedef.flatten_up_to(grads), rates, strict=True)
    pairs = [(u, g, own) for u, g, own in rows if is_trained(u)]
    dtype = state.average.dtype

    # The rate at which SGD's step, projected onto Adam's, equals Adam's.
    along = -sum((own * inner(u, g) for u, g, own in pairs), jnp.zeros((), dtype))
    length = sum((inner(u, u) for u, *_ in pairs), jnp.zeros((), dtype))
    found = (length / jnp.where(along == 0, 1, along)).astype(dtype)
    defined = (along != 0) & jnp.isfinite(found)
    count, memory = definition.form.read(state.adam).steps, definition.form.read(adam)
    part = one_minus(rule.at(count).b2)
    average = jnp.where(defined, state.average + part * (found - state.average), state.average)
    mean = average * definition.corrections(memory, dtype)[1]
    # At the first step the mean is the rate itself.
    now = defined & (count > 0) & (jnp.abs(mean - found) < tolerance) & (mean > 0)
    sgd_rate = jnp.where(now, mean, state.sgd_rate)
    adam_rate = jnp.where(now, jnp.asarray(alpha, dtype), state.adam_rate)

    restarted = _restarted(now, memory.slots["mu"])
    adam = definition.form.made(memory._replace(slots={**memory.slots, "mu": restarted}))
    result = optax.apply_updates(cast(optax.Params, params), steps) if write else steps
    return result, SwatsState(adam, average, now, sgd_rate, adam_rate)


@lists_options
def swats(
    learning_rate: Hyper = 1e-3,
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-9,
    tolerance: ArrayLike = 1e-9,
    *,
    eps_hat: bool = False,
    **options: Unpack[MomentOptions],
) -> optax.GradientTransformationExtraArgs:
    """SWATS (Keskar and Socher, arXiv 1712.07628): Adam, then SGD with momentum as soon as its rate is found.

    ::

        u = -α m̂/(√v̂ + ε), as Adam;   γ = u·u / (-u·g)  if u·g ≠ 0, over all parameters
        λ ← β₂λ + (1-β₂)γ;   switch after step k > 1 when |λ/(1-β₂ᵏ) - γ| < tolerance and λ > 0, with Λ = λ/(1-β₂ᵏ)
        then  m ← β₁m + (1-β₁)g from m = 0,   u = -Λ m

    All leaves switch at once. ``state.switched`` tells whether they have, and ``state.sgd_rate`` is Λ. A schedule for
    the rate, or `update(..., learning_rate=x)`, stays in effect after the switch: SGD's rate is ``Λ α_t/α_switch``. For
    the paper's L2 decay, put a link before this one, ``optax.chain(transform(Decay(λ)), swats())``.

    Args:
      learning_rate: Adam's α, a number, a 0-d array or a schedule.
      b1: the decay rate of the momentum, Adam's and SGD's, in (0, 1).
      b2: the decay rate of the second moment and of λ, in [0, 1).
      eps: in units of the gradient.
      tolerance: how far γ may be from its average at the switch, in units of a rate; 1e-9 in the paper. With noisy
        gradients it is hardly ever that near (and 1e-9 is float32's rounding of a rate of 0.02): 1e-5 is common, and
        switches earlier.
      eps_hat: whether ε is added to the uncorrected √v.
      options: see `adam_fn.options.Options`; m is the momentum.
    """
    if isinstance(tolerance, (int, float)) and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    rule = with_complex(Switching(b1, b2, eps, eps_hat=eps_hat), options.get("complex", "parts"))
    if "mu" not in rule.slots:
        raise ValueError(f"b1 must be in (0, 1), because swats needs a momentum; got {b1}")
    rate = Rate(learning_rate)
    adam = optimizer(rule, learning_rate, **options)
    if "mu" not in dict(method_of(adam.update).definition.codecs):
        raise ValueError("swats needs mu by itself, since after the switch nothing else is changed: store it by a Cast")
    return Swats(adam, rule, rate, tolerance).transformation()
