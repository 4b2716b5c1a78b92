"""The state is optax's own: the structure is the same, and each goes on where the other stopped."""

import copy
import pickle
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CASES

import adam_fn
from adam_fn.algebra.bias import BiasWeights

P = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": [jnp.ones(2), None]}
MASK = {"w": True, "b": False}
SCHEDULE = optax.cosine_decay_schedule(1e-2, 50)
#: Functions of optax and ours, with arguments.
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # Not AMSGrad, whose maximum differs, and not β₁ = 0, where ours has no m.
    **{
        case.name: (case.peer, case.alias, {"learning_rate": 1e-2, **case.options})
        for case in CASES
        if case.peer is not None and case.alias is not adam_fn.amsgrad and case.options.get("b1") != 0
    },
    "schedule": (optax.adam, adam_fn.adam, {"learning_rate": SCHEDULE, "b1": 0.5, "nesterov": True}),
    "schedules": (optax.adamw, adam_fn.adamw, {"learning_rate": SCHEDULE, "weight_decay": SCHEDULE, "mask": MASK}),
    "mask": (optax.adamw, adam_fn.adamw, {"learning_rate": SCHEDULE, "weight_decay": 0.1, "mask": MASK}),
    "lamb": (optax.lamb, adam_fn.lamb, {"learning_rate": 1e-2, "weight_decay": 0.1, "mask": MASK}),
    **{
        name: (getattr(optax, name), getattr(adam_fn, name), {"b2": 0.9})
        for name in (f"scale_by_{x}" for x in ("adam", "adamax", "belief", "yogi", "lion", "radam"))
    },
}


def pair(name: str) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer of optax and ours."""
    theirs, ours, arguments = PAIRS[name]
    return theirs(**arguments), ours(**arguments)


def gradients(t: int) -> Any:
    numbers = np.random.default_rng(t).standard_normal(14, np.float32)
    return {"w": numbers[:12].reshape(3, 4), "b": [numbers[12:], None]}


def go(update: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
    for t in steps:
        updates, state = update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", PAIRS)
def test_each_goes_on_where_the_other_stopped(name: str) -> None:
    """They exchange the state in the middle of a run, without a conversion."""
    theirs, ours = pair(name)
    one, other = jax.jit(theirs.update), jax.jit(ours.update)
    chex.assert_trees_all_equal(ours.init(P), theirs.init(P), strict=True)
    params, state = go(one, P, theirs.init(P), range(7))
    expected, _ = go(one, params, state, range(7, 14))
    found, after = go(other, params, state, range(7, 14))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-6)
    again, _ = go(one, found, after, range(14, 17))
    alone, _ = go(other, found, after, range(14, 17))
    chex.assert_trees_all_close(again, alone, rtol=2e-4, atol=2e-6)


def test_a_checkpoint_of_optax_is_restored_as_it_is(tmp_path: Any) -> None:
    """The run equals, bit for bit, the one that had the state in memory."""
    theirs, ours = pair("schedules")
    params, state = go(jax.jit(theirs.update), P, theirs.init(P), range(5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", state)
        checkpointer.wait_until_finished()
        restored: Any = checkpointer.restore(tmp_path / "saved", ours.init(P))
    for again in (restored, flax.serialization.from_bytes(ours.init(P), flax.serialization.to_bytes(state))):
        adam_fn.checkpoint.check(again, ours, P)
        ends = (go(ours.update, params, x, range(5, 9))[0] for x in (again, state))
        chex.assert_trees_all_equal(*ends)


def test_bias_correction_and_schedule_have_counts_of_their_own() -> None:
    """If a schedule is restarted, the bias correction still goes on."""
    tx = adam_fn.adam(lambda count: 1.0 / (count + 1))
    state = tx.init(jnp.ones(2))
    for _ in range(3):
        _, state = tx.update(jnp.ones(2), state)
    restarted = (state[0], state[1]._replace(count=jnp.zeros((), jnp.int32)))
    updates, after = tx.update(jnp.ones(2), restarted)
    np.testing.assert_allclose(updates, -1.0, rtol=1e-6)
    assert (int(after[0].count), int(after[1].count)) == (4, 1)


@pytest.mark.parametrize(
    ("tx", "fields"),
    [
        (adam_fn.amsgrad(1e-3), ("count", "mu", "nu", "nu_max")),
        (adam_fn.adan(1e-3), ("count", "mu", "nu", "delta", "grad")),
        (adam_fn.laprop(1e-3), ("count", "mu", "nu")),
        (adam_fn.adam(1e-3, storage="16bit"), ("count", "mu_nu")),
        (adam_fn.adam(1e-3, b1=0.0), ("count", "nu")),
        (adam_fn.adam(1e-3, storage="24bit"), ("count", "mu", "nu")),
    ],
)
def test_states_that_optax_lacks_have_the_same_form(tx: Any, fields: tuple[str, ...]) -> None:
    state = tx.init(P)
    assert state[0]._fields == fields
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert jax.tree.structure(other) == jax.tree.structure(state)


def test_only_changing_decay_rates_keep_their_weights() -> None:
    def rates(b1: Any, b2: Any) -> Any:
        return adam_fn.adam(1e-3, b1=b1, b2=b2).init(P)

    assert len(rates(0.9, 0.999)) == 2
    assert isinstance(rates(lambda count: 0.9, 0.999)[-1], BiasWeights)
    assert len(rates(lambda count: 0.9, jnp.asarray(0.999))[-1].weights) == 2
    assert len(adam_fn.nadam(1e-3, momentum_decay=0.004).init(P)[-1].weights) == 1


ADAMW: Any = adam_fn.adamw(1e-3)
STATE: Any = ADAMW.init(P)
BETA = jnp.asarray(0.9)
FORM = r"the state does not have the form of tx.init\(params\), \(ScaleByAdamState, EmptyState, .*\): "


def fields(**changes: Any) -> Any:
    return STATE[0]._replace(**changes), *STATE[1:]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("message", "state", "tx"),
    [
        (FORM + r"\[0\]: ScaleByAdamState expected, got a ScaleByLionState", adam_fn.lion(1e-3).init(P), ADAMW),
        (FORM + r"\[0\]: ScaleByAdamState expected, got a M", adam_fn.amsgrad(1e-3, weight_decay=0.1).init(P), ADAMW),
        (FORM + r"\[2\]: EmptyState expected, got a ScaleByScheduleState", optax.adamw(SCHEDULE).init(P), ADAMW),
        (FORM + r"\[1\]: EmptyState expected, got a MaskedState", optax.adamw(1e-3, mask=MASK).init(P), ADAMW),
        (FORM + "a tuple of 3 expected, got a tuple of 2", STATE[:2], ADAMW),
        (FORM + "a tuple of 3 expected, got a ScaleByAdamState", STATE[0], ADAMW),
        (FORM + r".*restored as plain containers: restore it into tx.init\(params\)", list(STATE), ADAMW),
        (FORM + r".*restore it into tx.init\(params\)", flax.serialization.to_state_dict(STATE), ADAMW),
        (
            FORM + r".* BiasWeights of 1 decay rates expected",
            adam_fn.adamw(1e-3, b1=BETA, b2=BETA).init(P),
            adam_fn.adamw(1e-3, b1=BETA),
        ),
        ("count is bfloat16, expected int32", fields(count=jnp.zeros((), jnp.bfloat16)), ADAMW),
        (r"state's mu of w is float32\[2\], expected float32\[3, 4\]", fields(mu={**P, "w": jnp.ones(2)}), ADAMW),
        ("state's mu must have the structure .*: w is missing", fields(mu={"b": P["b"]}), ADAMW),
        ("state's nu must have .*: w is a dict, not an array", fields(nu={**P, "w": {"a": P["w"]}}), ADAMW),
        ("state has moments of w, which is not trained", STATE, adam_fn.adamw(1e-3, frozen={"w": True, "b": False})),
    ],
)
def test_a_state_of_another_form_is_an_error(message: str, state: Any, tx: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tx.update(gradients(0), state, P)
