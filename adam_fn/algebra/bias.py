"""Bias weights: what a moving average that started at 0 is divided by.

That of a decay rate β is ``1 - βᵗ`` after t steps. For a constant β it is computed from the count alone; where β is a
schedule or an array it is kept in the state, as the moving average of the constant 1 that it is.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import OneMinus, Scalar, beta_value, one_minus


class Lagged(NamedTuple):
    """In `Rule.betas`: the weight of the moving average of the weight of `beta`, which has the place before it."""

    beta: Any


class Weight(NamedTuple):
    """A bias weight that is kept: the moving average of the constant 1, and what the last rounding dropped of it."""

    main: jax.Array
    rest: jax.Array


class BiasWeights(NamedTuple):
    """The last element of a state whose decay rates are schedules or arrays.

    Attributes:
      weights: one for each of these decay rates, float32 scalars (float64 with float64 parameters).
    """

    weights: tuple[Weight, ...]


#: An element of `Rule.betas`.
Beta: TypeAlias = Any


def is_kept(beta: Beta) -> bool:
    """Whether the weight of a decay rate has a place in the state."""
    return not isinstance(beta.beta if isinstance(beta, Lagged) else beta, (int, float))


def weights_of(betas: Sequence[Beta], kept: Sequence[Weight], count: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """The bias weights of decay rates after `count` steps, an int32 scalar; `kept`: those that the state keeps."""
    found: list[jax.Array] = []
    left = list(kept)
    for beta in betas:
        if is_kept(beta):
            found.append(left.pop(0).main)
        elif isinstance(beta, Lagged):
            found.append(lagged_after(beta.beta, count, dtype))
        else:
            found.append(weight_after(beta, count, dtype))
    return found


def advance_weights(betas: Sequence[Beta], now: Sequence[Beta], kept: Sequence[Weight]) -> list[Weight]:
    """The weights that the state keeps after a step with the values `now` of the decay rates."""
    found: list[Weight] = []
    for beta, value in zip(betas, now, strict=True):
        if is_kept(beta):
            old = kept[len(found)]
            found.append(weigh(value.beta, old, found[-1].main) if isinstance(value, Lagged) else weigh(value, old))
    return found


def weigh(beta: Scalar | OneMinus, weight: Weight, target: jax.Array | float = 1.0) -> Weight:
    """A step of a moving average with the rounding errors carried along (Knuth's two-sum).

    Without the second word, 10,000 equal increments of ``1 - 0.999999`` would all round the same way.
    """
    dtype = weight.main.dtype
    beta = beta if isinstance(beta, (int, float)) else jax.tree.map(lambda x: jnp.asarray(x, dtype), beta)
    old, rest = weight
    change = one_minus(beta) * (target - old) + beta_value(beta) * rest
    value = old + change
    shown = value - old
    return Weight(value, (old - (value - shown)) + (change - shown))


def _leading(x: float) -> np.float32:
    """The 12 leading bits of a number: products with 11 others are exact in float32."""
    return (np.float32(x).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)


_LN2 = _leading(math.log(2))
#: The coefficients of ``(exp(-x) - 1 + x)/x²`` for |x| at most ln 2/2, the last one first, to 1e-9.
_SERIES = (-1.989099082e-4, 1.393365e-3, -8.333310925e-3, 4.166646493e-2, -0.1666666668, 0.5000000013)


def weight_after(beta: float, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``1 - βᵗ``, see `_powers`."""
    return _powers(beta, count, dtype)[0]


def _powers(beta: float, count: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """``1 - βᵗ`` and ``βᵗ`` for a number β in [0, 1) and a count t from 0 to 2³¹ - 1, to the rounding of the dtype.

    The logarithm of β is known in float64, and its product with t is exact up to 2²⁴ but for the last rounding. The
    multiple of ln 2 in it becomes an exponent, and what remains the argument of a polynomial. No power or exponential
    of the device, which has a precision of its own, takes part.
    """
    if beta == 0:
        weight = jnp.minimum(count, 1).astype(dtype)
        return weight, 1 - weight
    rate = -math.log(beta)
    if dtype == jnp.float64:
        y = rate * count.astype(dtype)
        return -jnp.expm1(-y), jnp.exp(-y)
    return _float32_powers(rate, count)


def _float32_powers(rate: float, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 - exp(-t · rate)`` and ``exp(-t · rate)``."""
    # Not `jnp`, whose functions are traced anew for each transformation.
    add, sub, mul, select = jax.lax.add, jax.lax.sub, jax.lax.mul, jax.lax.select
    f32, one = np.float32, np.float32(1)
    high = _leading(rate)
    t, early = (jax.lax.convert_element_type(x, f32) for x in (count, count & np.int32(0xFFF)))
    y = add(mul(sub(t, early), high), add(mul(early, high), mul(t, f32(rate - float(high)))))
    halvings = jax.lax.min(jax.lax.round(mul(y, f32(1 / math.log(2)))), f32(126))
    x = sub(sub(y, mul(halvings, _LN2)), mul(halvings, f32(math.log(2) - float(_LN2))))
    series: Any = f32(_SERIES[0])
    for term in _SERIES[1:]:
        series = add(mul(x, series), f32(term))
    decayed = sub(x, mul(mul(x, x), series))  # 1 - exp(-x)
    exponent = sub(np.int32(127), jax.lax.convert_element_type(halvings, np.int32))
    scale = jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent, np.int32(23)), f32)
    weight = add(sub(one, scale), mul(scale, decayed))
    zero = jax.lax.full_like(y, 0)
    # Where no digit of βᵗ is left the polynomial may have become infinite.
    return (
        select(jax.lax.gt(y, f32(25)), jax.lax.full_like(y, 1), weight),
        select(jax.lax.gt(y, f32(85)), zero, mul(scale, sub(one, decayed))),
    )


#: The coefficients of ``L(y/2)/y`` in y², the last one first: ``2 B₂ₙ/(2n)!``, B the Bernoulli numbers.
_LANGEVIN = (2.6765e-11, -1.05684e-9, 1 / 23950080, -1 / 604800, 1 / 15120, -1 / 360, 1 / 6)


def lagged_after(beta: float, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The moving average of the weights of β: ``1 - βᵗ - (1-β) t βᵗ``, to a few roundings.

    ::

        a = (1-β) w l/2,   l = 2/(1-β) - 2/y' + t (1 - L(y/2)),   y = t y',   y' = -ln β

    L is Langevin's function, ``coth(x) - 1/x``. Where y is small the difference above has no digits, but the series of
    L has; the sum of the first two terms is known in float64.
    """
    weight, power = _powers(beta, count, dtype)
    if beta == 0:
        return weight
    rate, part, t = -math.log(beta), 1 - beta, count.astype(dtype)
    difference = 1 + part / 6 + part * part / 12 if part < 1e-5 else 2 / part - 2 / rate
    y = t * rate
    series = jnp.zeros_like(y)
    for term in _LANGEVIN:
        series = series * y * y + term
    small = difference + t * (1 - y * series)
    large = 2 / part - 2 * t * power / jnp.where(weight > 0, weight, 1)
    return jnp.where(y < 2, small, large) * (part / 2) * weight
