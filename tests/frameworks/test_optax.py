"""At home in optax: wrappers, state utilities, no recompilation, vmap, donation."""

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
from helpers.runs import compilations, random_gradients

import adam_fn

PARAMS: dict[str, jax.Array] = {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, 0.5, jnp.float32)}
GRADS = [
    {"kernel": jnp.asarray(g[:12].reshape(3, 4)), "bias": jnp.asarray(g[12:])} for g in random_gradients(6, 16, seed=3)
]
#: One row for each signature.
ALIASES = tuple({case.alias: case for case in reversed(CASES)}.values())


def all_of(*txs: optax.GradientTransformation, start: Any = PARAMS) -> tuple[Any, Any]:
    """The parameters and state of each before the first step, and the jitted step of all: one program to compile."""

    def one(tx: optax.GradientTransformation, g: Any, params: Any, state: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(lambda g, pairs: [one(tx, g, *pair) for tx, pair in zip(txs, pairs, strict=True)])
    return jax.jit(lambda: [(start, tx.init(start)) for tx in txs])(), step


def run(*txs: optax.GradientTransformation, start: Any = PARAMS, grads: Any = GRADS) -> list[Any]:
    """The parameters of each after the steps of all gradients."""
    pairs, step = all_of(*txs, start=start)
    for g in grads:
        pairs = step(g, pairs)
    assert compilations(step) == 1, "a state of another type than before"
    return [params for params, _ in pairs]


@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_wrappers_of_optax_around_ours_do_what_they_say(case: Case) -> None:
    tx = case.make(0.1)
    half = optax.chain(
        optax.masked(tx, {"kernel": True, "bias": False}),
        optax.masked(optax.set_to_zero(), {"kernel": False, "bias": True}),
    )
    plain, *same, several, masked, split = run(
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
    chex.assert_trees_all_close(several, *run(tx, grads=means), rtol=1e-5, atol=1e-6)


def test_lookahead() -> None:
    txs = [optax.lookahead(make(0.1), 2, 0.5) for make in (adam_fn.adam, optax.adam)]
    found, expected = run(*txs, start=optax.LookaheadParams.init_synced(PARAMS))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_injected_numbers_give_the_same_optimizer_without_recompiling() -> None:
    """Numbers given as arrays are the same optimizer; a new value is no new compilation; rates can be schedules."""
    rate = optax.linear_schedule(0.1, 0.01, 6)
    found = run(*(optax.inject_hyperparams(case.alias)(rate, **case.options) for case in ALIASES))
    for case, a, b in zip(ALIASES, found, run(*(case.make(rate) for case in ALIASES)), strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4, atol=2e-5, custom_message=case.name)  # float32(0.999)

    pairs, step = all_of(*(optax.inject_hyperparams(case.alias)(0.1, **case.options) for case in ALIASES))
    pairs = step(GRADS[0], pairs)
    for _, state in pairs:
        state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
        state.hyperparams["b2"] = jnp.asarray(0.99, jnp.float32)
    step(GRADS[0], pairs)
    assert compilations(step) == 1


def test_inject_hyperparams_with_bfloat16_parameters() -> None:
    """Bfloat16 hyperparameters would make 0.999 a 1.0: refused; as float32, and static ones, they are exact."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    wide: Any = np.dtype(np.float32)
    pairs: list[tuple[Any, Any]] = [
        (optax.inject_hyperparams(case.alias, hyperparam_dtype=wide)(0.1, **case.options), case.make(0.1))
        for case in BY_SLOTS
    ]
    for case in BY_SLOTS:
        with pytest.raises(ValueError, match=r"b1 is a bfloat16 array.*hyperparam_dtype=jnp.float32"):
            optax.inject_hyperparams(case.alias)(0.1, **case.options).init(params)
    # With static betas nothing is lost but digits of the rate.
    static = optax.inject_hyperparams(adam_fn.adam, static_args=("b1", "b2"))(0.125, b2=0.99999)
    pairs.append((static, adam_fn.adam(0.125, b2=0.99999)))

    @jax.jit
    def updates(grads: Any, states: Any) -> Any:
        return [
            [tx.update(grads, x, params) for tx, x in zip(*both, strict=True)]
            for both in zip(pairs, states, strict=True)
        ]

    states = jax.jit(lambda: [[tx.init(params) for tx in pair] for pair in pairs])()
    for g in GRADS:
        done = updates(g, states)
        states = [[state for _, state in pair] for pair in done]
        for (found, _), (expected, _) in done:
            chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_tree_utilities(case: Case) -> None:
    tx = optax.chain(optax.clip(1.0), case.make(0.1, b1=optax.constant_schedule(0.9)))  # Whose weight is kept.
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
    masked = case.make(
        0.1, weight_decay=0.1, mask={"kernel": True, "bias": False}, frozen={"kernel": False, "bias": True}
    )
    same = optax.tree_utils.tree_map_params(masked, lambda x: x, masked.init(PARAMS))
    chex.assert_trees_all_equal(same, masked.init(PARAMS))
    named = optax.tree_utils.tree_map_params(
        tx, lambda _, label: label, state, {"kernel": "k", "bias": "b"}, transform_non_params=lambda _: None
    )
    assert optax.tree.get(named, name) == {"kernel": "k", "bias": "b"}


def test_vmap_over_learning_rates() -> None:
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
    (expected,) = run(tx)
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
