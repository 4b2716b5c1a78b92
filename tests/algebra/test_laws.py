"""The laws of the algebra, over every rule and codec."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case
from helpers.runs import full_jit, random_gradients, trajectories, trajectory
from helpers.states import clock_at

import adam_fn
from adam_fn.algebra.rule import Clock
from adam_fn.execute.body import Times, body
from adam_fn.execute.destination import UPDATES, Inputs
from adam_fn.execute.run import step_leaf
from adam_fn.storage.low_bit_codes import codecs_of

SIZE = 64
GRADS = random_gradients(8, SIZE)
PARAMS = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)


@pytest.mark.quick
def test_rules_commute_with_permutations_of_the_elements() -> None:
    """1. A rule commutes with every permutation of the elements, bit for bit."""
    order = np.random.default_rng(2).permutation(SIZE)
    txs = [case.make() for case in CASES]
    plain = trajectories(txs, GRADS, PARAMS, jit=full_jit)
    permuted = trajectories(txs, GRADS[:, order], PARAMS[order], jit=full_jit)
    for i, case in enumerate(CASES):
        for a, b in zip(plain, permuted, strict=True):
            np.testing.assert_array_equal(a[i][:, order], b[i], err_msg=case.name)


@pytest.mark.quick
def test_a_composed_rule_equals_the_chain_of_its_transformations() -> None:
    """2. ``transform(a >> b)`` is ``chain(transform(a), transform(b))``, for every pair of rules in either order."""
    rules = [case.member for case in MEMBERS] + [adam_fn.Decay(0.1), adam_fn.Rate(0.1)]
    pairs = list(itertools.product(rules, rules))
    pairs[-2] = (adam_fn.Rate(0.1), adam_fn.Decay(0.1, independent=True))  # The other order is an error.

    @jax.jit
    def run(params: jax.Array, grads: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        found = []
        for a, b in pairs:
            ab = adam_fn.transform(a >> b)
            chain = optax.chain(adam_fn.transform(a), adam_fn.transform(b))
            updates = []
            for tx in (ab, chain):
                state, u = tx.init(params), params
                for g in grads:
                    u, state = tx.update(g, state, params)
                updates.append(jnp.asarray(u))
            found.append((updates[0], updates[1]))
        return found

    for (a, b), (one, two) in zip(pairs, run(jnp.asarray(PARAMS), jnp.asarray(GRADS[:2])), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, err_msg=f"{a} >> {b}")


@pytest.mark.quick
def test_composition_is_associative_and_keeps_slots_apart() -> None:
    a, b, c = adam_fn.Adam(), adam_fn.Adam(0.5), adam_fn.Rate(0.1)
    assert (a >> b) >> c == a >> (b >> c)
    assert set((a >> b).slots) == {"mu", "nu", "mu_1", "nu_1"}
    assert len((a >> b).betas) == 4


@pytest.mark.quick
def test_float32_storage_is_the_identity() -> None:
    """4. The laws of narrow codecs are those of `test_codecs.py`."""
    plain = trajectories([case.make() for case in MEMBERS], GRADS, PARAMS, jit=full_jit)
    stored = trajectories([case.make(storage="float32") for case in MEMBERS], GRADS, PARAMS, jit=full_jit)
    for i, case in enumerate(MEMBERS):
        for a, b in zip(plain, stored, strict=True):
            np.testing.assert_array_equal(a[i], b[i], err_msg=case.name)


def test_executors_agree() -> None:
    """5. The compiled leaf and the uncompiled `body` are the same arithmetic."""

    def step(run: Any, case: Case, g: jax.Array, stored: Any, clock: Clock, *write: Any, **options: Any) -> Any:
        codecs, inputs = dict(codecs_of(None, case.rule.slots)), Inputs(g, jnp.asarray(PARAMS))
        times = Times(dict.fromkeys(stored, jnp.zeros((), jnp.int32)))
        return run(case.rule.at(clock.count), codecs, *write, inputs, stored, clock, times, **options)

    @full_jit
    def compiled(g: jax.Array, stored: list[Any], clocks: list[Clock]) -> list[Any]:
        found = [
            step(step_leaf, *each, destination=UPDATES)
            for each in zip(CASES, [g] * len(CASES), stored, clocks, strict=True)
        ]
        return [(done.result, done.stored) for done in found]

    stored = [{key: jnp.full(SIZE, slot.initial) for key, slot in case.rule.slots.items()} for case in CASES]
    for t, g in enumerate(GRADS[:3]):
        clocks = [clock_at(case.rule, t) for case in CASES]
        found = compiled(jnp.asarray(g), stored, clocks)
        for case, one, old, clock in zip(CASES, found, stored, clocks, strict=True):
            other = step(body, case, jnp.asarray(g), old, clock, UPDATES)
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves((other.result, other.stored)), strict=True):
                np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-8, err_msg=case.name)
        stored = [new for _, new in found]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_invariant_to_the_scale_of_the_gradients(scale: float) -> None:
    """6. As eps goes to 0, gradients times c > 0 leave the updates unchanged."""
    cases = [case for case in MEMBERS if case.scale_free is not None]
    txs = [case.make(**(case.scale_free or {})) for case in cases]
    _, plain = trajectories(txs, GRADS, PARAMS, jit=full_jit)
    _, scaled = trajectories(txs, GRADS * np.float32(scale), PARAMS, jit=full_jit)
    for case, a, b in zip(cases, plain, scaled, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-9, err_msg=case.name)  # of a rate of 1e-3
        assert np.abs(a).max() > 0


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.9), (0.9, 0.99)])
def test_growing_gradients_reach_the_step_bound_and_none_exceed_it(b1: float, b2: float) -> None:
    """6. |Δ_t| ≤ α (1-β₁)/(1-β₁ᵗ) √((1-β₂ᵗ)/(1-β₂)) √((1-rᵗ)/(1-r)), r = β₁²/β₂: reached by growing gradients."""
    steps = 60
    t = np.arange(1, steps + 1)
    growing = np.repeat(((b1 / b2) ** (steps - t))[:, None], 4, axis=1) * [1, -1, 1e-3, 1e3]
    grads = np.concatenate([growing, np.eye(steps)[:, -1:], random_gradients(steps, 59)], axis=1).astype(np.float32)
    _, updates = trajectory(adam_fn.adam(1.0, b1, b2, eps=0.0), grads, np.zeros(64, np.float32), jit=full_jit)
    r = b1**2 / b2
    bound = (1 - b1) / (1 - b1**t) * np.sqrt((1 - b2**t) / (1 - b2)) * np.sqrt((1 - r**t) / (1 - r))
    assert (np.abs(updates).max(axis=1) <= bound * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.abs(updates[-1, :4]), bound[-1], rtol=1e-5)


def test_rules_are_pytrees_of_their_array_hyperparameters() -> None:
    rule = adam_fn.Adam(b1=jnp.asarray(0.8)) >> adam_fn.Rate(0.1)
    leaves, treedef = jax.tree.flatten(rule)
    assert [float(x) for x in leaves] == [pytest.approx(0.8)]
    assert jax.tree.unflatten(treedef, leaves) == rule
    assert dataclasses.is_dataclass(rule)
