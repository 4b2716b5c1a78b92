"""The recorded trajectories, and adam_fn on the same problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from recorded.record_trajectories import FOLDER, PULL, RECORDED, Array, Problem


class Record(NamedTuple):
    params: Mapping[str, Array]
    text: Mapping[str, str]


def load(framework: str) -> Record:
    with np.load(FOLDER / f"{framework}.npz") as file:
        params = {key.removeprefix("params/"): file[key] for key in file.files if key.startswith("params/")}
        return Record(params, {key: str(file[key]) for key in file.files if not key.startswith("params/")})


def distance(ours: Array, theirs: Array) -> float:
    """The largest difference at any recorded step, as a fraction of the largest parameter there."""
    assert ours.shape == theirs.shape
    return float(np.max(np.max(np.abs(ours - theirs), axis=1) / np.max(np.abs(theirs), axis=1)))


def relative_error(ours: Array, theirs: Array) -> float:
    """The largest relative L2 error at any recorded step.

    For float32: storing p + u rounds each parameter by up to half a unit at every step, and a parameter that only
    decays rounds the same way a thousand times. No optimizer can help that; the largest difference would measure it.
    """
    assert ours.shape == theirs.shape
    return float(np.max(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)))


def follow(tx: optax.GradientTransformation, this: Problem, dtype: DTypeLike, *, is_complex: bool = False) -> Array:
    """The parameters after the steps RECORDED, [5, ..., 64], from one compiled scan in `dtype`."""

    def as_real(p: jax.Array) -> jax.Array:
        return jnp.stack([p.real, p.imag], axis=-1).reshape(*p.shape[:-1], -1) if is_complex else p

    def as_params(p: jax.Array) -> jax.Array:
        return jax.lax.complex(p[..., ::2], p[..., 1::2]) if is_complex else p

    @jax.jit
    def run(start: jax.Array, target: jax.Array, scale: jax.Array, noise: jax.Array, active: jax.Array) -> jax.Array:
        def step(carry: tuple[Any, Any], now: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
            p, state = carry
            g = scale * now[1] * (now[0] + PULL * (as_real(p) - target))
            updates, state = tx.update(as_params(g), state, p)
            p = jax.tree.map(jnp.add, p, updates)
            return (p, state), as_real(p)

        p = as_params(start)
        return jax.lax.scan(step, (p, tx.init(p)), (noise, active))[1]

    path = run(*(jnp.asarray(x, dtype) for x in this))
    assert path.dtype == dtype
    return np.asarray(path, np.float64)[np.array(RECORDED) - 1]
