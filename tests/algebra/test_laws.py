"""The laws of the algebra, over every rule and codec."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case
from helpers.runs import full_jit, random_gradients, step_bound, together, trajectories, trajectory
from helpers.states import clock_at

import adam_fn
from adam_fn.algebra.rule import Clock
from adam_fn.execute.body import Times, body
from adam_fn.execute.destination import UPDATES, Inputs
from adam_fn.execute.run import step_leaf
from adam_fn.storage.names import codecs_of

SIZE = 64
GRADS = random_gradients(8, SIZE)
PARAMS = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)


@pytest.mark.quick
def test_rules_commute_with_permutations_of_the_elements() -> None:
    """1. A rule commutes with every permutation of the elements, bit for bit."""
    order = np.random.default_rng(2).permutation(SIZE)
    grads, params = np.stack([GRADS, GRADS[:, order]]), np.stack([PARAMS, PARAMS[order]])
    rows = np.broadcast_to(grads[:, :, None], (2, len(GRADS), len(CASES), SIZE))
    starts = np.broadcast_to(params[:, None], (2, len(CASES), SIZE))
    tx = together([case.make() for case in CASES])
    for plain, permuted in trajectory(tx, rows, starts, jit=lambda run: jax.jit(jax.vmap(run))):
        for i, case in enumerate(CASES):
            np.testing.assert_array_equal(plain[:, i, order], permuted[:, i], err_msg=case.name)


@pytest.mark.quick
def test_a_composed_rule_equals_the_chain_of_its_transformations() -> None:
    """2. ``transform(a >> b)`` is ``chain(transform(a), transform(b))``, of each rule with itself and two others."""
    rules = [*(case.member for case in MEMBERS), adam_fn.Rate(0.1), adam_fn.Decay(0.1, independent=True)]
    pairs = [(a, rules[(i + j) % len(rules)]) for i, a in enumerate(rules[:-1]) for j in (0, 1, 5)]
    pairs += [(adam_fn.Decay(0.1), rule) for rule in rules[:-1:4]]

    @jax.jit
    def run(params: jax.Array, grads: jax.Array) -> Any:
        def last(tx: optax.GradientTransformation) -> Any:
            updates, state = params, tx.init(params)
            for g in grads:
                updates, state = tx.update(g, state, params)
            return updates

        return [
            (last(adam_fn.transform(a >> b)), last(optax.chain(adam_fn.transform(a), adam_fn.transform(b))))
            for a, b in pairs
        ]

    for (a, b), (one, two) in zip(pairs, run(PARAMS, GRADS[:2]), strict=True):
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
    txs = [case.make(storage=storage) for case in MEMBERS for storage in (None, "float32")]
    _, updates = trajectories(txs, GRADS, PARAMS)
    for case, plain, stored in zip(MEMBERS, updates[::2], updates[1::2], strict=True):
        np.testing.assert_array_equal(plain, stored, err_msg=case.name)


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
            for each in zip(MEMBERS, [g] * len(MEMBERS), stored, clocks, strict=True)
        ]
        return [(done.result, done.stored) for done in found]

    stored = [{key: jnp.full(SIZE, slot.initial) for key, slot in case.rule.slots.items()} for case in MEMBERS]
    for t, g in enumerate(GRADS[:2]):
        clocks = [clock_at(case.rule, t) for case in MEMBERS]
        found = compiled(jnp.asarray(g), stored, clocks)
        for case, one, old, clock in zip(MEMBERS, found, stored, clocks, strict=True):
            other = step(body, case, jnp.asarray(g), old, clock, UPDATES)
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves((other.result, other.stored)), strict=True):
                np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-8, err_msg=case.name)
        stored = [new for _, new in found]


def test_invariant_to_the_scale_of_the_gradients() -> None:
    """6. As eps goes to 0, gradients times c > 0 leave the updates unchanged."""
    cases = [case for case in MEMBERS if case.scale_free is not None]
    grads = np.concatenate([GRADS * np.float32(scale) for scale in (1, 1e-6, 1e6)], axis=1)
    _, found = trajectories([case.make(**(case.scale_free or {})) for case in cases], grads, np.tile(PARAMS, 3))
    for case, updates in zip(cases, found, strict=True):
        plain, *scaled = np.split(updates, 3, axis=1)
        np.testing.assert_allclose(scaled, [plain] * 2, rtol=0, atol=1e-9, err_msg=case.name)  # of a rate of 1e-3
        assert np.abs(plain).max() > 0


def test_growing_gradients_reach_the_step_bound_and_none_exceed_it() -> None:
    """6. Reached by growing gradients."""
    steps, betas = 60, [(0.9, 0.999), (0.5, 0.9), (0.9, 0.99)]
    others = np.concatenate([np.eye(steps)[:, -1:], random_gradients(steps, 59)], axis=1)
    grads = [
        np.concatenate([np.outer((b1 / b2) ** -np.arange(1.0, steps + 1), [1, -1, 1e-3, 1e3]), others], axis=1)
        for b1, b2 in betas
    ]
    tx = together([adam_fn.adam(1.0, b1, b2, eps=0.0) for b1, b2 in betas])
    _, updates = trajectory(tx, np.stack(grads, axis=1), np.zeros((3, 64)))
    for i, (b1, b2) in enumerate(betas):
        bound = step_bound(b1, b2, steps)
        assert (np.abs(updates[:, i]).max(axis=1) <= bound * (1 + 1e-5)).all()
        np.testing.assert_allclose(np.abs(updates[-1, i, :4]), bound[-1], rtol=1e-5)


def test_rules_are_pytrees_of_their_array_hyperparameters() -> None:
    rule = adam_fn.Adam(b1=jnp.asarray(0.8)) >> adam_fn.Rate(0.1)
    leaves, treedef = jax.tree.flatten(rule)
    assert [float(x) for x in leaves] == [pytest.approx(0.8)]
    assert jax.tree.unflatten(treedef, leaves) == rule
    assert dataclasses.is_dataclass(rule)
