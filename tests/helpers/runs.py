"""Helpers of several test files: deterministic gradients, and whole trajectories in one compiled scan."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import compiling
from numpy.typing import NDArray

Array = NDArray[Any]

#: `jax.jit` as users compile, where a test asks how well or to which last bit a program is compiled (see conftest.py).
full_jit = functools.partial(jax.jit, compiler_options=compiling.FULL)


def random_gradients(steps: int, size: int, spread: float = 3.0, seed: int = 0) -> Array:
    """Normal gradients ``[steps, size]`` in float32 whose scales span ``exp(±spread)``."""
    rng = np.random.default_rng(seed)
    scales = np.exp(np.linspace(-spread, spread, size))
    return (rng.standard_normal((steps, size)) * scales).astype(np.float32)


def step_bound(b1: float, b2: float, steps: int) -> Array:
    """Adam's largest updates: α (1-β₁)/(1-β₁ᵗ) √((1-β₂ᵗ)/(1-β₂)) √((1-rᵗ)/(1-r)), r = β₁²/β₂, with α = 1."""
    r, t = b1**2 / b2, np.arange(1, steps + 1)
    return (1 - b1) / (1 - b1**t) * np.sqrt((1 - b2**t) / (1 - b2)) * np.sqrt((1 - r**t) / (1 - r))


def by_name(txs: Mapping[Any, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One transformation made of several, each for the tree with its name: one program to compile."""

    def init(params: Any) -> Any:
        return {name: tx.init(params[name]) for name, tx in txs.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        done = {name: tx.update(updates[name], state[name], params[name]) for name, tx in txs.items()}
        return tuple({name: pair[i] for name, pair in done.items()} for i in range(2))

    return optax.GradientTransformation(init, update)


def trajectory(
    tx: optax.GradientTransformation, grads: Array, params: Array, dtype: Any = jnp.float32, jit: Any = jax.jit
) -> tuple[Array, Array]:
    """``(params, updates)``, each ``[steps, size]``, of one jitted scan over the gradients."""

    @jit
    def run(params: jax.Array, grads: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: tuple[jax.Array, optax.OptState], g: jax.Array) -> Any:
            p, state = carry
            updates, state = tx.update(g, state, p)
            u = jnp.asarray(updates)
            p = p + u
            return (p, state), (p, u)

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    after, updates = run(jnp.asarray(params, dtype), jnp.asarray(grads, dtype))
    return np.asarray(after), np.asarray(updates)


def together(txs: Sequence[optax.GradientTransformation]) -> optax.GradientTransformation:
    """One transformation that applies the i-th to the i-th row: one program to compile instead of one for each."""

    def init(params: Any) -> Any:
        return [tx.init(params[i]) for i, tx in enumerate(txs)]

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        pairs = [tx.update(updates[i], state[i], params[i]) for i, tx in enumerate(txs)]
        return jnp.stack([jnp.asarray(u) for u, _ in pairs]), [s for _, s in pairs]

    return optax.GradientTransformation(init, update)


def trajectories(
    txs: Sequence[optax.GradientTransformation],
    grads: Array,
    params: Array,
    dtype: Any = jnp.float32,
    jit: Any = jax.jit,
) -> tuple[Array, Array]:
    """`trajectory` of each, in one program: ``(params, updates)``, each ``[len(txs), steps, size]``."""
    shape = (len(grads), len(txs), grads.shape[-1])
    found = trajectory(together(txs), np.broadcast_to(grads[:, None], shape), np.stack([params] * len(txs)), dtype, jit)
    return np.swapaxes(found[0], 0, 1), np.swapaxes(found[1], 0, 1)


def relative_error(found: Array, expected: Array) -> float:
    """The relative L2 error, or the absolute one if zero is expected."""
    return float(np.linalg.norm(np.float64(found) - expected) / (np.linalg.norm(expected) or 1.0))


def compilations(function: Any) -> int:
    """The number of programs that a jitted function holds."""
    return function._cache_size()


def scanned(tx: Any, params: Any, grads: Any, state: Any = None, jit: Any = jax.jit, **extra: Any) -> Any:
    """``((params, state), updates)``: the last of both and all updates, of one jitted scan over stacked gradients."""

    @jit
    def run(params: Any, state: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            p, state = carry
            updates, state = tx.update(g, state, p, **extra)
            return (optax.apply_updates(p, updates), state), updates

        return jax.lax.scan(step, (params, tx.init(params) if state is None else state), grads)

    return run(params, state, grads)
