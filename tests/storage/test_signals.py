"""The effect of narrow moments on learning: every member of the family, on signals and on noise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MEMBERS, Case, name
from helpers.runs import scanned

import adam_fn

STORAGES = ("bfloat16", "24bit", "16bit")
SIZE, STEPS, LAST = 256, 1200, 200
KINDS = ("random", "steady", "noisy", "quiet")
#: Relative errors of the last updates on random gradients, and of the distance moved on steady ones.
ERROR = {"bfloat16": 0.016, "24bit": 0.08, "16bit": 0.21}
STEP = {"bfloat16": 0.003, "24bit": 0.01, "16bit": 0.025}
#: Larger errors, of members that take the maximum of a dithered v, or a sign.
LARGER = {("lion", "random"): 0.1, ("adamax", "16bit"): 0.09, ("amsgrad", "16bit"): 0.05}


@functools.cache
def gradients() -> jax.Array:
    """Gradients ``[steps, kinds, elements]``, each element with a scale of lognormal(0.7)."""

    def at(t: jax.Array) -> jax.Array:
        scales = jnp.exp(0.7 * jax.random.normal(jax.random.key(3), (SIZE,)))
        random = jax.random.normal(jax.random.fold_in(jax.random.key(7), t), (SIZE,))
        quiet = jnp.where((jnp.arange(SIZE) % 4 == 0) & (t >= 10), 0.0, random)
        return scales[None] * jnp.stack([random, jnp.ones(SIZE), 1 + random, quiet])

    return jax.jit(jax.vmap(at))(jnp.arange(STEPS))


def runs(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The distances that the parameters moved, and the last updates, for every storage and float32; in one program."""
    txs = {x: case.make(1e-2, storage=x) for x in ("float32", *STORAGES)}

    def run(grads: jax.Array) -> Any:
        ends = {kind: scanned(tx, jnp.zeros((len(KINDS), SIZE)), grads) for kind, tx in txs.items()}
        return {kind: (p, updates[-LAST:]) for kind, ((p, _), updates) in ends.items()}

    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(run)(gradients()))


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_member_steps_with_every_storage_as_with_float32(case: Case) -> None:
    """Updates on random gradients, distances on steady and noisy ones, and rest after the end are compared."""
    found = runs(case)
    way, updates = found["float32"]
    for storage in STORAGES:
        p, u = found[storage]
        bound = LARGER.get((case.name, "random"), ERROR[storage])
        error = np.linalg.norm(u[:, 0] - updates[:, 0]) / np.linalg.norm(updates[:, 0])
        assert error < bound, (storage, error)
        bound = LARGER.get((case.name, storage), STEP[storage])
        for kind in (1, 2):
            step = p[kind].mean() / way[kind].mean()
            assert abs(step - 1) < bound, (storage, KINDS[kind], step)
        # Where gradients ended after ten steps nothing moves any more, and nothing has moved too far.
        silent = np.s_[:, 3, ::4]
        near = 0.03 + 0.2 * (storage == "16bit")
        assert np.abs(p[3, ::4] - way[3, ::4]).max() < near * np.abs(way[3]).max(), storage
        if case.name not in ("lion", "ademamix", "adabelief"):
            assert np.abs(u[silent]).max() <= np.abs(updates[silent]).max() + 1e-12, storage
        assert np.isfinite(u).all()


def test_neighbours_with_gradients_of_any_scale_step_as_they_would_alone() -> None:
    """Gradients of elements beside each other range from 1e-15 to 1e3."""
    scales = 10.0 ** jnp.linspace(-15, 3, 19)[:, None]
    tx = {x: adam_fn.adam(1.0, eps=0.0, storage=x) for x in ("float32", "24bit", "16bit")}

    def step(carry: Any, t: jax.Array) -> Any:
        g = scales * jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (1, 256))
        new = {x: tx[x].update(g, state) for x, state in carry.items()}
        return {x: state for x, (_, state) in new.items()}, {x: u for x, (u, _) in new.items()}

    blank = jnp.zeros((19, 256))
    start = {x: t.init(blank) for x, t in tx.items()}
    _, us = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(800)))()
    exact = np.asarray(us["float32"][-200:], np.float64)
    for storage, bound in (("24bit", 0.05), ("16bit", 0.18)):
        error = np.linalg.norm(us[storage][-200:] - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
        assert (error < bound).all(), (storage, error)
