"""SWATS: Adam that switches to SGD."""

import dataclasses
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.arithmetic import one_minus
from adam_fn.execute.body import as_dtype, compute_dtype
from adam_fn.leaves import PyTree
from adam_fn.options import MomentOptions, alias, optimizer
from adam_fn.rule import Hyper, Rate
from adam_fn.rules.adam import Adam
from adam_fn.transform import State, Transformation
from adam_fn.wrapper import Wrapper, check_state, inner, is_trained, map_trained


class SwatsState(NamedTuple):
    """The state of `swats`.

    Attributes:
      adam: that of Adam. After the switch its m is SGD's momentum, which starts again at 0.
      average: the raw moving average of the rates γ, a scalar of the dtype of the bias weights (float32).
      switched: bool scalar, whether SGD has taken over.
      sgd_rate: the rate Λ that was found, a scalar; 0 before the switch.
      adam_rate: Adam's rate at the switch, a scalar; 0 before.
    """

    adam: State
    average: jax.Array
    switched: jax.Array
    sgd_rate: jax.Array
    adam_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class Swats(Wrapper):
    """See `swats`. `adam` is the transformation of `rule` and `rate`."""

    adam: Transformation
    rule: Adam
    rate: Rate
    tolerance: ArrayLike

    def init(self, params: PyTree) -> SwatsState:
        adam = self.adam.init(params)
        average, sgd_rate, adam_rate = (jnp.zeros((), jnp.asarray(adam.weights).dtype) for _ in range(3))
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
        check_state(state, SwatsState, "swats")
        steps, adam = self.adam.update(updates, state.adam, params, learning_rate=learning_rate)
        count = state.adam.count
        rate = self.rate.at(count).learning_rate if learning_rate is None else learning_rate
        momentum = self.adam.update.decoded("mu", adam, updates if params is None else params)
        rates = self.adam.update.rates(updates if params is None else params)
        part = one_minus(self.rule.at(count).b2)
        return _switch(updates, steps, state, adam, momentum, rates, part, rate, self.tolerance)


@jax.jit
def _switch(
    grads: PyTree,
    steps: PyTree,
    old: SwatsState,
    adam: State,
    momentum: PyTree,
    rates: list[float],
    part: ArrayLike,
    rate: ArrayLike,
    tolerance: ArrayLike,
) -> tuple[PyTree, SwatsState]:
    """Adam's steps or SGD's, and the search for SGD's rate; `rates` are the leaves' multipliers, `part` is 1 - β₂."""
    leaves, treedef = jax.tree.flatten(steps, is_leaf=lambda x: x is None)
    rows = zip(leaves, treedef.flatten_up_to(grads), rates, strict=True)
    pairs = [(u, g, own) for u, g, own in rows if is_trained(u)]
    dtype = old.average.dtype

    # The rate at which SGD's step, projected onto Adam's, is Adam's.
    along = -sum((own * inner(u, g) for u, g, own in pairs), jnp.zeros((), dtype))
    length = sum((inner(u, u) for u, *_ in pairs), jnp.zeros((), dtype))
    found = (length / jnp.where(along == 0, 1, along)).astype(dtype)
    defined = (along != 0) & jnp.isfinite(found)
    searching = defined & ~old.switched
    average = jnp.where(searching, old.average + part * (found - old.average), old.average)
    mean = average / jnp.asarray(adam.weights)[1, 0]
    # At the first step the mean is the rate itself.
    now = searching & (old.adam.count > 0) & (jnp.abs(mean - found) < tolerance) & (mean > 0)
    sgd_rate = jnp.where(now, mean, old.sgd_rate)
    adam_rate = jnp.where(now, jnp.asarray(rate, dtype), old.adam_rate)

    sgd = -sgd_rate * (rate / jnp.where(old.switched, adam_rate, 1))

    def choose(u: jax.Array, mu: jax.Array | optax.MaskedNode, own: float) -> jax.Array:
        if isinstance(mu, optax.MaskedNode):  # A frozen leaf.
            return u
        return jnp.where(old.switched, as_dtype((sgd * own * mu).astype(compute_dtype(u.dtype)), u.dtype), u)

    updates = map_trained(choose, steps, momentum, treedef.unflatten(rates))
    restarted = jax.tree.map(lambda mu: jnp.where(now, jnp.zeros_like(mu), mu), adam.slots["mu"])
    adam = adam._replace(slots={**adam.slots, "mu": restarted})
    return updates, SwatsState(adam, average, old.switched | now, sgd_rate, adam_rate)


@alias
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
    """SWATS (Keskar and Socher, arXiv 1712.07628): Adam, which switches to SGD with momentum when it has found a rate.

    ::

        u = -α m̂/(√v̂ + ε), as Adam;   γ = u·u / (-u·g)  if u·g ≠ 0, over all parameters
        λ ← β₂λ + (1-β₂)γ;   switch after step k > 1 when |λ/(1-β₂ᵏ) - γ| < tolerance and λ > 0, with Λ = λ/(1-β₂ᵏ)
        then  m ← β₁m + (1-β₁)g from m = 0,   u = -Λ m

    All leaves switch at once. ``state.switched`` and ``state.sgd_rate`` (Λ) tell whether and to what. A schedule of the
    rate, or `update(..., learning_rate=x)`, goes on after the switch: SGD's rate is ``Λ α_t/α_switch``. The paper's L2
    decay is a link before this one, ``optax.chain(transform(Decay(λ)), swats())``.

    Args:
      learning_rate: Adam's α, a number, a 0-d array or a schedule.
      b1: the decay rate of the momentum, Adam's and SGD's, in (0, 1).
      b2: the decay rate of the second moment and of λ, in [0, 1).
      eps: in units of the gradient.
      tolerance: of the rate, in units of a rate; 1e-9 in the paper. With noisy gradients that hardly ever holds (and
        1e-9 is float32's rounding of a rate of 0.02): 1e-5 is common, and switches earlier.
      eps_hat: ε is added to the uncorrected √v.
      options: see `adam_fn.options.MomentOptions`; m is the momentum.
    """
    if isinstance(tolerance, (int, float)) and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    rule = Adam(b1, b2, eps, eps_hat=eps_hat)
    if "mu" not in rule.slots:
        raise ValueError(f"swats needs the momentum: b1 must be in (0, 1), got {b1}")
    rate = Rate(learning_rate)
    adam = optimizer(rule, learning_rate, **options)
    return Swats(adam, rule, rate, tolerance).transformation()
