"""Use inside optax: wrappers, state utilities, no recompilation, vmap, donation."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case, name
from helpers.layouts import BY_SLOTS
from helpers.runs import by_name, compilations, random_gradients, scanned

import adam_fn

PARAMS: dict[str, jax.Array] = {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, 0.5, jnp.float32)}
GRADS = [
    {"kernel": jnp.asarray(g[:12].reshape(3, 4)), "bias": jnp.asarray(g[12:])} for g in random_gradients(6, 16, seed=3)
]
#: One row for each signature.
ALIASES = tuple({case.alias: case for case in reversed(CASES)}.values())


def run(*txs: optax.GradientTransformation, start: Any = PARAMS, grads: Any = GRADS) -> tuple[list[Any], list[Any]]:
    """The parameters of each after all gradients, and its updates; raises if a state changes its type."""
    named = dict(enumerate(txs))
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    (params, _), updates = scanned(by_name(named), dict.fromkeys(named, start), dict.fromkeys(named, stacked))
    return list(params.values()), list(updates.values())


@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_wrappers_of_optax_work_around_every_form_of_state(case: Case) -> None:
    tx = case.make(0.1)
    half = optax.chain(
        optax.masked(tx, {"kernel": True, "bias": False}),
        optax.masked(optax.set_to_zero(), {"kernel": False, "bias": True}),
    )
    (plain, *same, several, masked, split), _ = run(
        tx,
        optax.chain(optax.identity(), tx, optax.scale(1.0)),
        optax.named_chain(("clip", optax.clip(1e9)), ("opt", tx)),
        optax.apply_if_finite(tx, 3),
        optax.masked(tx, {"kernel": True, "bias": True}),
        optax.MultiSteps(tx, 3).gradient_transformation(),
        half,
        optax.partition({"a": tx, "b": case.make(0.0)}, {"kernel": "a", "bias": "b"}),
    )
    for found in same:
        chex.assert_trees_all_close(found, plain, rtol=1e-6)
    for found in (masked, split):
        chex.assert_trees_all_close(found, {"kernel": plain["kernel"], "bias": PARAMS["bias"]}, rtol=1e-6)
    means = [jax.tree.map(lambda *g: sum(g) / 3, *three) for three in (GRADS[:3], GRADS[3:])]
    chex.assert_trees_all_close(several, *run(tx, grads=means)[0], rtol=1e-5, atol=1e-6)


def test_lookahead_works_as_around_adam_of_optax() -> None:
    txs = [optax.lookahead(make(0.1), 2, 0.5) for make in (adam_fn.adam, optax.adam)]
    (found, expected), _ = run(*txs, start=optax.LookaheadParams.init_synced(PARAMS))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_injected_numbers_give_the_same_optimizer_without_recompiling() -> None:
    """Injected rates may be schedules, and a new value needs no new compilation."""
    rate = optax.linear_schedule(0.1, 0.01, 6)
    found, _ = run(*(optax.inject_hyperparams(case.alias)(rate, **case.options) for case in ALIASES))
    expected, _ = run(*(case.make(rate) for case in ALIASES))
    for case, a, b in zip(ALIASES, found, expected, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4, atol=2e-5, custom_message=case.name)  # float32(0.999)

    txs = [optax.inject_hyperparams(case.alias)(0.1, **case.options) for case in ALIASES]
    step = jax.jit(lambda states: [tx.update(GRADS[0], x, PARAMS)[1] for tx, x in zip(txs, states, strict=True)])
    states = step(jax.jit(lambda: [tx.init(PARAMS) for tx in txs])())
    for state in states:
        state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
        state.hyperparams["b2"] = jnp.asarray(0.99, jnp.float32)
    step(states)
    assert compilations(step) == 1


def test_injected_bfloat16_hyperparameters_are_refused_and_float32_ones_are_exact() -> None:
    """In bfloat16, 0.999 would be 1.0. Float32 hyperparameters and static ones are exact."""
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"b1 is a bfloat16 array.*hyperparam_dtype=jnp.float32"):
        optax.inject_hyperparams(adam_fn.adam)(0.1).init(params)
    wide: Any = np.dtype(np.float32)
    found = [optax.inject_hyperparams(case.alias, hyperparam_dtype=wide)(0.1, **case.options) for case in BY_SLOTS]
    # With static betas only the rate loses digits.
    found.append(optax.inject_hyperparams(adam_fn.adam, static_args=("b1", "b2"))(0.125, b2=0.99999))
    expected = [*(case.make(0.1) for case in BY_SLOTS), adam_fn.adam(0.125, b2=0.99999)]
    _, updates = run(*found, *expected, start=params)
    chex.assert_trees_all_close(updates[: len(found)], updates[len(found) :], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_tree_utilities_work_on_every_form_of_state(case: Case) -> None:
    tx = optax.chain(optax.clip(1.0), case.make(0.1, b1=optax.constant_schedule(0.9)))  # The weight of b1 is kept.
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS[0], state, PARAMS)
    name = "m1" if case.alias is adam_fn.ademamix else "mu"
    mu = optax.tree.get(state, name)
    chex.assert_trees_all_equal_shapes(mu, PARAMS)
    assert int(optax.tree.get(state, "count")) == 1

    zeroed = optax.tree.set(state, **{name: jax.tree.map(jnp.zeros_like, mu)})
    chex.assert_trees_all_equal(optax.tree.get(zeroed, name), jax.tree.map(jnp.zeros_like, mu))

    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_close(optax.tree.get(doubled, name), jax.tree.map(lambda x: 2 * x, mu))
    assert int(optax.tree.get(doubled, "count")) == 1
    assert (optax.tree.get(state, "weights") is not None) == (len(case.member.betas) > 0)
    chex.assert_trees_all_equal(optax.tree.get(doubled, "weights"), optax.tree.get(state, "weights"))
    weights = {"mask": {"kernel": True, "bias": False}, "frozen": {"kernel": False, "bias": True}}
    masked = case.make(0.1, weight_decay=0.1, **weights)
    same = optax.tree_utils.tree_map_params(masked, lambda x: x, masked.init(PARAMS))
    chex.assert_trees_all_equal(same, masked.init(PARAMS))


def test_vmap_over_learning_rates_equals_separate_updates() -> None:
    rates = (1e-3, 0.1)

    def first(case: Case, rate: Any) -> Any:
        tx = case.make(rate)
        return tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0]

    @jax.jit
    def run() -> list[Any]:
        batches = [jax.vmap(functools.partial(first, case))(jnp.asarray(rates)) for case in MEMBERS]
        return [(batch, [first(case, rate) for rate in rates]) for case, batch in zip(MEMBERS, batches, strict=True)]

    for case, (batch, apart) in zip(MEMBERS, run(), strict=True):
        expected = jax.tree.map(lambda *x: jnp.stack(x), *apart)
        chex.assert_trees_all_close(batch, expected, rtol=1e-5, atol=1e-9, custom_message=case.name)


@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_make_step_donates_and_works_in_place(case: Case) -> None:
    tx = case.make(0.1)
    (expected,), _ = run(tx)
    step = adam_fn.make_step(tx)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))}
    assert len(pointers) == len(jax.tree.leaves((params, state)))  # init makes distinct buffers
    first = (params, state)
    for g in GRADS:
        params, state = step(params, state, g)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    assert compilations(step) == 1
