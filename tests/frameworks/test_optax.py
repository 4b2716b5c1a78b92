"""At home in optax: wrappers, state utilities, no recompilation, vmap, donation."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from cases import CASES, MEMBERS, Case, name
from helpers import compiling
from helpers.runs import compilations, random_gradients
from helpers.states import count_of

import adam_fn

PARAMS: dict[str, jax.Array] = {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, 0.5, jnp.float32)}
GRADS = [
    {"kernel": jnp.asarray(g[:12].reshape(3, 4)), "bias": jnp.asarray(g[12:])} for g in random_gradients(6, 16, seed=3)
]


def all_of(*txs: optax.GradientTransformation) -> tuple[Any, Any]:
    """The parameters and state of each before the first step, and the jitted step of all: one program to compile."""

    def one(tx: optax.GradientTransformation, g: Any, params: Any, state: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(lambda g, pairs: [one(tx, g, *pair) for tx, pair in zip(txs, pairs, strict=True)])
    return jax.jit(lambda: [(PARAMS, tx.init(PARAMS)) for tx in txs])(), step


def run(*txs: optax.GradientTransformation) -> list[Any]:
    """The parameters after the six steps of each."""
    pairs, step = all_of(*txs)
    for g in GRADS:
        pairs = step(g, pairs)
    assert compilations(step) == 1, "a state of another type than before"
    return [params for params, _ in pairs]


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_wrappers_of_optax_around_ours_do_what_they_say(case: Case) -> None:
    """Each wrapper around ours does what the wrapper says, compared with ours alone."""
    tx = case.make(0.1)
    half = optax.chain(
        optax.masked(tx, {"kernel": True, "bias": False}),
        optax.masked(optax.set_to_zero(), {"kernel": False, "bias": True}),
    )
    plain, *same, multi, injected, masked, split = run(
        tx,
        optax.chain(optax.identity(), tx, optax.scale(1.0)),
        optax.named_chain(("clip", optax.clip(1e9)), ("opt", tx)),
        optax.apply_if_finite(tx, 3),
        optax.masked(tx, {"kernel": True, "bias": True}),
        optax.MultiSteps(tx, 1).gradient_transformation(),
        optax.inject_hyperparams(case.alias)(0.1, **case.options),
        half,
        optax.partition({"a": tx, "b": case.make(0.0)}, {"kernel": "a", "bias": "b"}),
    )
    for found in same:
        chex.assert_trees_all_close(found, plain, rtol=1e-6)
    chex.assert_trees_all_close(multi, plain, rtol=1e-5)
    chex.assert_trees_all_close(injected, plain, rtol=2e-5)
    for found in (masked, split):
        chex.assert_trees_all_close(found, {"kernel": plain["kernel"], "bias": PARAMS["bias"]}, rtol=1e-6)


def test_multi_steps_averages() -> None:
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *GRADS[:3])

    def three(case: Case) -> tuple[Any, list[Any]]:
        tx = case.make(0.1)
        multi = optax.MultiSteps(tx, 3)
        state, found = multi.init(PARAMS), []
        for g in GRADS[:3]:
            updates, state = multi.update(g, state, PARAMS)
            found.append(updates)
        return tx.update(mean, tx.init(PARAMS), PARAMS)[0], found

    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for expected, found in jax.jit(lambda: [three(case) for case in MEMBERS])():
        chex.assert_trees_all_equal(found[0], zeros)
        chex.assert_trees_all_equal(found[1], zeros)
        chex.assert_trees_all_close(found[2], expected, rtol=1e-4, atol=1e-7)


def test_apply_if_finite_skips() -> None:
    tx = optax.apply_if_finite(adam_fn.adam(0.1), 5)
    state: Any = tx.init(PARAMS)
    after: Any
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS[0])
    updates, after = tx.update(bad, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_injected_numbers_give_the_same_optimizer_without_recompiling() -> None:
    """Numbers given as arrays are the same optimizer; a new value is no new compilation; rates can be schedules."""
    rate = optax.linear_schedule(0.1, 0.01, 6)
    found = run(*(optax.inject_hyperparams(case.alias)(rate, **case.options) for case in CASES))
    for case, a, b in zip(CASES, found, run(*(case.make(rate) for case in CASES)), strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4, atol=2e-5, custom_message=case.name)  # float32(0.999)

    pairs, step = all_of(*(optax.inject_hyperparams(case.alias)(0.1, **case.options) for case in CASES))
    pairs = step(GRADS[0], pairs)
    for _, state in pairs:
        state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
        state.hyperparams["b2"] = jnp.asarray(0.99, jnp.float32)
    step(GRADS[0], pairs)
    assert compilations(step) == 1


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_inject_hyperparams_with_bfloat16_parameters(case: Case) -> None:
    """Bfloat16 hyperparameters would make 0.999 a 1.0: refused; as float32 they are exact."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"b1 is a bfloat16 array.*hyperparam_dtype=jnp.float32"):
        optax.inject_hyperparams(case.alias)(0.1, **case.options).init(params)
    injected = optax.inject_hyperparams(case.alias, hyperparam_dtype=np.dtype(np.float32))(0.1, **case.options)
    state, plain = injected.init(params), case.make(0.1).init(params)
    for g in GRADS:
        updates, state = jax.jit(injected.update)(g, state, params)
        expected, plain = case.make(0.1).update(g, plain, params)
        chex.assert_trees_all_close(updates, expected, rtol=2e-5, atol=1e-6)


def test_the_rate_alone_injected_with_bfloat16_parameters() -> None:
    """With static betas nothing is lost but digits of the rate."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    static = ("b1", "b2")
    injected = optax.inject_hyperparams(adam_fn.adam, static_args=static)(0.125, b2=0.99999)
    plain = adam_fn.adam(0.125, b2=0.99999)
    state, other = injected.init(params), plain.init(params)
    for g in GRADS:
        updates, state = jax.jit(injected.update)(g, state, params)
        expected, other = plain.update(g, other, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("case", MEMBERS, ids=name)
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


@pytest.mark.parametrize("case", [case for case in CASES if case.peer is not None], ids=name)
def test_the_state_is_that_of_optax(case: Case) -> None:
    """Its types, fields and counts; with a schedule too, before and after a step."""
    for rate in (0.1, optax.constant_schedule(0.1)):
        tx, peer = case.make(rate), case.make_peer(rate)
        state: Any = tx.init(PARAMS)
        theirs: Any = peer.init(PARAMS)
        for g in GRADS[:2]:
            if case.alias is adam_fn.amsgrad or "mu" not in case.member.slots:
                # Another maximum; and with β₁ = 0 there is no m.
                assert type(state[0]).__name__ == "MomentsState"
                assert (state[0].count, *state[1:]) == (theirs[0].count, *theirs[1:])
            else:
                chex.assert_trees_all_equal_structs(state, theirs)
                chex.assert_trees_all_equal_shapes_and_dtypes(state, theirs)
                chex.assert_trees_all_close(state, theirs, rtol=1e-4, atol=1e-7)  # optax loses digits of 1 - 0.999.
            state, theirs = (x.update(g, s, PARAMS)[1] for x, s in ((tx, state), (peer, theirs)))


SCHEDULE = optax.constant_schedule(0.1)
MASK = {"kernel": True, "bias": False}
FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mask": (adam_fn.adamw, optax.adamw, {"mask": MASK}),
    "scheduled decay": (adam_fn.adamw, optax.adamw, {"weight_decay": SCHEDULE}),
    "scheduled decay and mask": (adam_fn.adamw, optax.adamw, {"weight_decay": SCHEDULE, "mask": MASK}),
    "lamb": (adam_fn.lamb, optax.lamb, {}),
    "lamb, scheduled decay and mask": (adam_fn.lamb, optax.lamb, {"weight_decay": SCHEDULE, "mask": MASK}),
    "bfloat16": (adam_fn.adamw, optax.adamw, {"mu_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("what", FORMS)
def test_the_state_is_that_of_optax_with_options(what: str) -> None:
    ours, theirs, options = FORMS[what]
    for rate in (0.1, SCHEDULE):
        tx, peer = ours(rate, **options), theirs(rate, **options)
        chex.assert_trees_all_equal_structs(tx.init(PARAMS), peer.init(PARAMS))
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(PARAMS), peer.init(PARAMS))
        # Each goes on from the other's state.
        expected = [tx.update(GRADS[0], tx.init(PARAMS), PARAMS), peer.update(GRADS[0], peer.init(PARAMS), PARAMS)]
        found = [tx.update(GRADS[0], peer.init(PARAMS), PARAMS), peer.update(GRADS[0], tx.init(PARAMS), PARAMS)]
        chex.assert_trees_all_equal(found, expected)


def test_lookahead() -> None:
    tx = optax.lookahead(adam_fn.adam(0.1), sync_period=2, slow_step_size=0.5)
    peer = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    params: list[Any] = [optax.LookaheadParams.init_synced(PARAMS)] * 2
    states = [tx.init(params[0]), peer.init(params[1])]
    for g in GRADS:
        for i, each in enumerate((tx, peer)):
            updates, states[i] = each.update(g, states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
    chex.assert_trees_all_close(params[0], params[1], rtol=1e-4, atol=1e-6)


def test_schedule_free() -> None:
    found = []
    for make in (adam_fn.adam, optax.adam):
        tx = optax.contrib.schedule_free(make(0.1, b1=0.0), learning_rate=0.1, b1=0.9)
        params, state = PARAMS, tx.init(PARAMS)
        for g in GRADS:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        found.append(optax.contrib.schedule_free_eval_params(state, params))
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_second_call_does_not_recompile() -> None:
    """`run` asserts it."""
    run(*(case.make(optax.cosine_decay_schedule(0.1, 10)) for case in CASES))


def test_leaf_is_traced_once_for_equal_leaves() -> None:
    jax.clear_caches()
    params = {str(i): jnp.ones(7) for i in range(20)} | {f"m{i}": jnp.ones((7, 2)) for i in range(20)}
    tx = adam_fn.adam(1e-3)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert text.count("func.func private @step_leaf") == 2


def test_vmap_over_learning_rates() -> None:
    rates = (1e-3, 1e-2, 0.1)

    def first(case: Case, rate: Any) -> Any:
        tx = case.make(rate)
        return tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0]

    @jax.jit
    def run() -> list[Any]:
        batches = [jax.vmap(functools.partial(first, case))(jnp.asarray(rates)) for case in CASES]
        return [(batch, [first(case, rate) for rate in rates]) for case, batch in zip(CASES, batches, strict=True)]

    for case, (batch, apart) in zip(CASES, run(), strict=True):
        expected = jax.tree.map(lambda *x: jnp.stack(x), *apart)
        chex.assert_trees_all_close(batch, expected, rtol=1e-5, atol=1e-9, custom_message=case.name)


def test_vmap_over_parameters_and_state() -> None:
    tx = adam_fn.adamw(0.1)
    stacked = jnp.stack([jnp.ones(4), 2 * jnp.ones(4)])
    states = jax.vmap(tx.init)(stacked)
    updates, states = jax.vmap(tx.update)(stacked, states, stacked)
    expected, _ = tx.update(stacked[1], tx.init(stacked[1]), stacked[1])
    np.testing.assert_allclose(updates[1], expected, rtol=1e-6)
    assert count_of(states).shape == (2,)


@pytest.mark.parametrize("case", MEMBERS, ids=name)
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
    text = step.lower(params, state, GRADS[0]).compile(compiling.FULL).as_text() or ""
    donated = text.split("input_output_alias={")[1].split("entry_computation_layout")[0].count("alias)")
    assert donated == len(jax.tree.leaves((params, state)))
    assert compilations(step) == 1


@pytest.mark.quick
def test_gradient_transformation_protocol() -> None:
    tx = adam_fn.adam(1e-3)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(PARAMS)
    updates, _ = tx.update(GRADS[0], state, PARAMS, loss=1.0, value_fn=lambda p: 0.0)  # ignored
    chex.assert_trees_all_equal_structs(updates, PARAMS)
    with jax.disable_jit():
        same, _ = tx.update(GRADS[0], state, PARAMS)
    chex.assert_trees_all_close(same, updates, rtol=1e-5)
