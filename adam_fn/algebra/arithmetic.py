"""The arithmetic that rules share: moving averages, roots and quotients, accurate and finite."""

import functools
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: A hyperparameter while a rule computes, which is a number or a 0-d array.
Scalar: TypeAlias = float | jax.Array


class OneMinus(NamedTuple):
    """A β kept as 1 - β, exact near 1. Schedules with a method ``one_minus(count)`` give one."""

    rest: jax.Array


def one_minus(beta: "Scalar | OneMinus") -> Scalar:
    """``1 - β``, in Python's float64 when β is a number: ``1 - float32(0.99999)`` is off by 1.4e-3."""
    return beta.rest if isinstance(beta, OneMinus) else 1 - beta


def beta_value(beta: "Scalar | OneMinus") -> Scalar:
    """β as a number. It loses digits near 1: use it only where they do not matter."""
    return 1 - beta.rest if isinstance(beta, OneMinus) else beta


# The functions here use `lax`: functions of `jnp`, operators included, are traced anew for each transformation.


def _like(x: jax.Array, value: Scalar) -> jax.Array | np.ndarray:
    """A scalar in the dtype of `x`."""
    return np.asarray(value, x.dtype) if isinstance(value, (int, float)) else lax.convert_element_type(value, x.dtype)


def multiply(x: jax.Array, factor: Scalar) -> jax.Array:
    """``x · factor``, in the dtype of `x`."""
    return lax.mul(x, _like(x, factor))


def ema(beta: Scalar | OneMinus, old: jax.Array, new: jax.Array | float) -> jax.Array:
    """One step of the moving average ``β·old + (1 - β)·new``, accurate for every β in [0, 1].

    It is computed from the nearer end, ``old + (1 - β)(new - old)`` or ``new - β(new - old)``: the rounding of β then
    scales with the small coefficient, and β = 0 gives `new` exactly.
    Arrays of two dtypes are a TypeError.
    """
    new = jnp.asarray(new, old.dtype) if isinstance(new, (int, float)) else new
    change = lax.sub(new, old)
    if isinstance(beta, (int, float)):
        late = beta >= 0.5
        return lax.add(old, multiply(change, 1 - beta)) if late else lax.sub(new, multiply(change, beta))
    late = one_minus(beta) <= 0.5
    return jnp.where(late, old, new) + jnp.where(late, one_minus(beta), -beta_value(beta)) * change


def incremented(count: jax.Array) -> jax.Array:
    """The next step count, an int32; it stops at 2³¹ - 1."""
    return lax.add(lax.min(count, np.int32(2**31 - 2)), np.int32(1))


@jax.custom_jvp
def safe_sqrt(x: jax.Array) -> jax.Array:
    """``√x`` whose derivative at 0 is 0, so that gradients through an optimizer stay finite at g = 0."""
    return lax.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = safe_sqrt(primals[0])
    return root, jnp.where(root == 0, 0, tangents[0] / jnp.where(root == 0, 1, 2 * root))


def quotient(numerator: jax.Array, denominator: jax.Array, eps: Scalar) -> jax.Array:
    """``numerator/(denominator + ε)``; the numerator itself where the sum is 0 (all gradients so far were 0)."""
    denominator = add_constant(denominator, eps)
    if isinstance(eps, float) and eps > 0:
        return lax.div(numerator, denominator)
    return numerator / jnp.where(denominator == 0, 1, denominator)


def clip_finite(x: jax.Array, times: float) -> jax.Array:
    """Clips finite elements so that x - y and ``(times · x)²`` stay finite; inf and nan become nan, for guards to see.

    The bound is ``2¹²⁶`` in float32 for ``times = 0``, and ``2⁶³/times`` for others.
    """
    exponent = jnp.finfo(x.dtype).maxexp - 2
    bound = np.asarray(2.0 ** (exponent // 2) / times if times else 2.0**exponent, x.dtype)
    return lax.add(lax.clamp(-bound, x, bound), lax.sub(x, x))


def largest_ratio(b1: object, b2: object) -> float | None:
    """The largest ``|m|/√v`` of any gradients: ``(1-β₁)/√((1-β₂)(1-β₁²/β₂))``; None if it is unbounded (β₁² ≥ β₂).

    It follows from Cauchy and Schwarz, as the strict form of the bound of arXiv 1412.6980, section 2.1, without bias
    correction. Betas that are not numbers count as 0.9 and 0.999; beyond the bound codes saturate.
    """
    if not isinstance(b1, float) or not isinstance(b2, float):
        b1, b2 = 0.9, 0.999
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2)) if b1 * b1 < b2 else None


@functools.cache
def largest_ratios_of_adan(b1: float, b2: float, b3: float) -> tuple[float | None, float | None, float | None]:
    """The largest ``|m|/√n``, ``|δ|/√n`` and ``|g|/√n`` of Adan, whatever the gradients are; None if unbounded.

    All three are filters of ``h = g + β₂(g - g₋)``, whose squares n averages, and ``|Σ c h| ≤ √(n Σ c²/w)`` by Cauchy
    and Schwarz, where ``w = (1-β₃)β₃ᵗ`` is the weight in n of a gradient of t steps ago. The first h is g itself.
    """
    pole = b2 / (1 + b2)
    if max(b1, b2, pole) ** 2 >= b3 or not b2:
        return None, None, None
    k = np.arange(min(10**6, math.ceil(40 / math.log(b3 / max(b1, b2, pole) ** 2))))

    def average(beta: float) -> np.ndarray:
        """Σ βʲ pole^(k-j) over j ≤ k"""
        return (beta ** (k + 1) - pole ** (k + 1)) / (beta - pole) if beta != pole else (k + 1) * beta**k

    def bound(later: np.ndarray, first: np.ndarray) -> float:
        weights = (1 - b3) * b3**k
        sums = np.concatenate([[0.0], np.cumsum(later**2 / weights)[:-1]])
        return float(np.sqrt(np.max(sums + first**2 / weights)))

    g = pole**k
    delta = [(1 - b2) / b2 * (b2**k - share * average(b2)) for share in (1 / (1 + b2), 1.0)]
    return bound((1 - b1) * average(b1) / (1 + b2), (1 - b1) * average(b1)), bound(*delta), bound(g / (1 + b2), g)


def add_constant(x: jax.Array, constant: Scalar) -> jax.Array:
    """``x + constant``, without the addition where the constant is the number 0 (XLA has to keep ``x + 0``)."""
    return x if isinstance(constant, float) and constant == 0 else lax.add(x, _like(x, constant))
