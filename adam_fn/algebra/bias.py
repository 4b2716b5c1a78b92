"""Bias weights: the divisors that correct moving averages that started at 0.

The weight of a decay rate β is ``1 - βᵗ`` after t steps. For a constant β it is computed from the count alone. If β is
a schedule or an array, the state keeps the weight, as the moving average of the constant 1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from adam_fn.algebra.arithmetic import OneMinus, Scalar, beta_value, one_minus


class Lagged(NamedTuple):
    """An element of `Rule.betas` whose weight is the moving average of the weight of `beta`, the element before it."""

    beta: Any


class Weight(NamedTuple):
    """A bias weight in a state: the moving average of the constant 1, and the part that the last rounding dropped."""

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
    """Whether the state keeps the weight of a decay rate."""
    return not isinstance(beta.beta if isinstance(beta, Lagged) else beta, (int, float))


def weights_of(betas: Sequence[Beta], kept: Sequence[Weight], count: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """The bias weights after `count` steps, an int32 scalar; `kept` are the weights that the state keeps."""
    constant = [beta.beta if isinstance(beta, Lagged) else beta for beta in betas if not is_kept(beta)]
    powers = _powers(tuple(dict.fromkeys(constant)), count, dtype)
    found: list[jax.Array] = []
    left = list(kept)
    for beta in betas:
        if is_kept(beta):
            found.append(left.pop(0).main)
        elif isinstance(beta, Lagged):
            found.append(lagged_after(beta.beta, powers[beta.beta], count, dtype))
        else:
            found.append(powers[beta][0])
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
    """One step of a moving average that carries its rounding error along (Knuth's two-sum).

    Without the second word, 10,000 equal increments of ``1 - 0.999999`` would all round the same way.
    """
    dtype = weight.main.dtype
    beta = beta if isinstance(beta, (int, float)) else jax.tree.map(lambda x: jnp.asarray(x, dtype), beta)
    old, rest = weight
    change = one_minus(beta) * (target - old) + beta_value(beta) * rest
    value = old + change
    shown = value - old
    return Weight(value, (old - (value - shown)) + (change - shown))


def _leading(x: ArrayLike) -> np.ndarray:
    """The 12 leading bits of numbers: their products with integers of 12 bits are exact in float32."""
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)


_LN2 = np.float32(_leading(math.log(2)))
#: The coefficients of ``(exp(-x) - 1 + x)/x²`` for |x| at most ln 2/2, the last one first, to 1e-9.
_SERIES = (-1.989099082e-4, 1.393365e-3, -8.333310925e-3, 4.166646493e-2, -0.1666666668, 0.5000000013)


def _powers(betas: Sequence[float], count: jax.Array, dtype: DTypeLike) -> dict[float, tuple[jax.Array, jax.Array]]:
    """``1 - βᵗ`` and ``βᵗ`` for numbers β in [0, 1) and a count t from 0 to 2³¹ - 1, to the rounding of the dtype.

    In float32, the logarithm of β is taken in Python's float64, and its product with t is rounded only once for t up to
    2²⁴. The multiple of ln 2 in it becomes an exponent, the rest the argument of a polynomial. The device's own power
    and exponential, whose precision varies, are not used.
    """
    rates = np.asarray([-math.log(beta) for beta in betas if beta])
    found: dict[float, tuple[jax.Array, jax.Array]] = {}
    if len(rates):
        count_of_each = jax.lax.broadcast(count, rates.shape)  # Together: one kernel on a GPU, and less to trace.
        if dtype == jnp.float64:
            y = count_of_each.astype(dtype) * rates
            pairs = -jnp.expm1(-y), jnp.exp(-y)
        else:
            pairs = _float32_powers(rates, count_of_each)
        for i, beta in enumerate(beta for beta in betas if beta):
            weight, power = (jax.lax.index_in_dim(x, i, keepdims=False) for x in pairs)
            found[beta] = weight, power
    if 0 in betas:
        weight = jnp.minimum(count, 1).astype(dtype)
        found[0] = weight, 1 - weight
    return found


def _float32_powers(rates: np.ndarray, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 - exp(-t · rate)`` and ``exp(-t · rate)``, for one count for each rate."""
    # `lax` and not `jnp`, whose functions are traced anew for each transformation.
    add, sub, mul, f32 = jax.lax.add, jax.lax.sub, jax.lax.mul, np.float32
    high = _leading(rates)
    t, early = (jax.lax.convert_element_type(x, f32) for x in (count, jax.lax.bitwise_and(count, np.int32(0xFFF))))
    y = add(mul(sub(t, early), high), add(mul(early, high), mul(t, (rates - high).astype(f32))))
    y = jax.lax.min(y, f32(126 * math.log(2)))  # Beyond it no digit of βᵗ is left.
    halvings = jax.lax.round(mul(y, f32(1 / math.log(2))))
    x = sub(sub(y, mul(halvings, _LN2)), mul(halvings, f32(math.log(2) - float(_LN2))))
    series: Any = f32(_SERIES[0])
    for term in _SERIES[1:]:
        series = add(mul(x, series), f32(term))
    decayed = sub(x, mul(mul(x, x), series))  # 1 - exp(-x)
    exponent = jax.lax.convert_element_type(sub(f32(127), halvings), np.int32)
    scale = jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent, np.int32(23)), f32)
    return add(sub(f32(1), scale), mul(scale, decayed)), mul(scale, sub(f32(1), decayed))


#: The coefficients of ``L(y/2)/y`` in y², the last one first: ``2 B₂ₙ/(2n)!``, B the Bernoulli numbers.
_LANGEVIN = (2.6765e-11, -1.05684e-9, 1 / 23950080, -1 / 604800, 1 / 15120, -1 / 360, 1 / 6)


def lagged_after(beta: float, powers: tuple[jax.Array, jax.Array], count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The moving average of the weights of β: ``1 - βᵗ - (1-β) t βᵗ``, accurate to a few roundings.

    ::

        a = (1-β) w l/2,   l = 2/(1-β) - 2/y' + t (1 - L(y/2)),   y = t y',   y' = -ln β

    L is Langevin's function, ``coth(x) - 1/x``. Where y is small, the difference above loses its digits, but the series
    of L keeps them; the first two terms of l are added in float64.
    """
    weight, power = powers
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
