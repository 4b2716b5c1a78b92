"""The laws of the algebra, for every rule (law 6, about the scale of the gradients, is in paper/test_text.py)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS
from helpers.runs import random_gradients, together, trajectory

import adam_fn

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
    """2. ``transform(a >> b)`` is ``chain(transform(a), transform(b))``, for each rule with itself and two others."""
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


def test_rules_are_pytrees_of_their_array_hyperparameters() -> None:
    rule = adam_fn.Adam(b1=jnp.asarray(0.8)) >> adam_fn.Rate(0.1)
    leaves, treedef = jax.tree.flatten(rule)
    assert [float(x) for x in leaves] == [pytest.approx(0.8)]
    assert jax.tree.unflatten(treedef, leaves) == rule
    assert dataclasses.is_dataclass(rule)
