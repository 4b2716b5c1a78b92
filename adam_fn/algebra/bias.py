"""Bias weights: the divisors that correct moving averages that started at 0.

The weight of a decay rate β is ``1 - βᵗ`` after t steps. For a constant β it is computed from the count alone. If β is
a schedule or an array, the state keeps the weight, as the moving average of the constant 1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

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
    return not _is_number(beta.beta if isinstance(beta, Lagged) else beta)


def _is_number(beta: Beta) -> TypeGuard[float]:
    return isinstance(beta, (int, float))


def corrections_of(
    betas: Sequence[Beta], kept: Sequence[Weight], count: jax.Array, dtype: DTypeLike
) -> list[jax.Array]:
    """The bias corrections after `count` steps, 1 divided by each weight; `kept` are the weights in the state."""
    of_constant = _corrections(tuple(dict.fromkeys(beta for beta in betas if _is_number(beta))), count, dtype)
    left = list(kept)
    found: list[jax.Array] = []
    for beta in betas:
        if is_kept(beta):
            found.append(1 / left.pop(0).main)
        elif isinstance(beta, Lagged):
            found.append(1 / lagged_after(beta.beta, count, dtype))
        else:
            found.append(of_constant[beta])
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


#: The coefficients of ``(exp(-x) - 1 + x)/x²`` for |x| at most ln 2/2, the last one first, to 1e-9.
_SERIES = (-1.989099082e-4, 1.393365e-3, -8.333310925e-3, 4.166646493e-2, -0.1666666668, 0.5000000013)


def _corrections(betas: Sequence[float], count: jax.Array, dtype: DTypeLike) -> dict[float, jax.Array]:
    """``1/(1 - βᵗ)`` for different numbers β, together: one kernel, and less to trace."""
    found: dict[float, jax.Array] = {}
    if 0 in betas:
        found[0] = 1 / jnp.minimum(count, 1).astype(dtype)
    if positive := [beta for beta in betas if beta]:
        counts = jax.lax.broadcast(count, (len(positive),))
        # The division comes before the slices: XLA for CPUs would compute all weights anew for each slice.
        if dtype == jnp.float64:  # (1 + coth(y/2))/2 compiles in less time than 1/(1 - exp(-y)).
            half = jax.lax.mul(jax.lax.convert_element_type(counts, dtype), -np.log(positive) / 2)
            corrections = jax.lax.add(0.5, jax.lax.div(0.5, jax.lax.tanh(half)))
        else:
            corrections = jax.lax.div(np.float32(1), _powers(np.asarray(positive), counts, dtype)[0])
        for i, beta in enumerate(positive):
            found[beta] = jax.lax.index_in_dim(corrections, i, keepdims=False)
    return found


def _powers(betas: np.ndarray, count: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """``1 - βᵗ`` and ``βᵗ`` for numbers β in (0, 1) and counts t from 0 to 2³¹ - 1, to the rounding of the dtype.

    In float32, the logarithm of β is taken in float64, and its product with t is rounded only once for t up to 2¹². The
    multiple of ln 2 in it becomes an exponent, the rest the argument of a polynomial. The device's own power and
    exponential, whose precision varies, are not used.
    """
    rates = -np.log(betas)
    if dtype == jnp.float64:
        y = count.astype(dtype) * rates
        return -jnp.expm1(-y), jnp.exp(-y)
    # `lax` and not `jnp`, whose functions are traced anew for each transformation.
    add, sub, mul, f32 = jax.lax.add, jax.lax.sub, jax.lax.mul, np.float32
    high, t = _leading(rates), jax.lax.convert_element_type(count, f32)
    y = add(mul(t, high), mul(t, (rates - high).astype(f32)))
    y = jax.lax.min(y, f32(126 * math.log(2)))  # Beyond it no digit of βᵗ is left.
    halvings = jax.lax.round(mul(y, f32(1 / math.log(2))))
    x = sub(y, mul(halvings, f32(math.log(2))))
    series: Any = f32(_SERIES[0])
    for term in _SERIES[1:]:
        series = add(mul(x, series), f32(term))
    decayed = sub(x, mul(mul(x, x), series))  # 1 - exp(-x)
    exponent = jax.lax.convert_element_type(sub(f32(127), halvings), np.int32)
    scale = jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent, np.int32(23)), f32)
    return add(sub(f32(1), scale), mul(scale, decayed)), mul(scale, sub(f32(1), decayed))


#: The coefficients of ``L(y/2)/y`` in y², the last one first: ``2 B₂ₙ/(2n)!``, B the Bernoulli numbers.
_LANGEVIN = (2.6765e-11, -1.05684e-9, 1 / 23950080, -1 / 604800, 1 / 15120, -1 / 360, 1 / 6)


def lagged_after(beta: float, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The moving average of the weights of β: ``1 - βᵗ - (1-β) t βᵗ``, accurate to a few roundings.

    ::

        a = (1-β) w l/2,   l = 2/(1-β) - 2/y' + t (1 - L(y/2)),   y = t y',   y' = -ln β

    L is Langevin's function, ``coth(x) - 1/x``. Where y is small, the difference above loses its digits, but the series
    of L keeps them; the first two terms of l are added in float64.
    """
    if beta == 0:
        return jnp.minimum(count, 1).astype(dtype)
    weight, power = _powers(np.asarray(beta), count, dtype)
    rate, part, t = -math.log(beta), 1 - beta, count.astype(dtype)
    difference = 1 + part / 6 + part * part / 12 if part < 1e-5 else 2 / part - 2 / rate
    y = t * rate
    series = jnp.zeros_like(y)
    for term in _LANGEVIN:
        series = series * y * y + term
    small = difference + t * (1 - y * series)
    large = 2 / part - 2 * t * power / jnp.where(weight > 0, weight, 1)
    return jnp.where(y < 2, small, large) * (part / 2) * weight
