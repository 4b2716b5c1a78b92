"""The state is optax's own: of the same structure, and each goes on where the other stopped."""

import copy
import pickle
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import adam_fn
from adam_fn.algebra.bias import BiasWeights

P = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": [jnp.ones(2), None]}
MASK = {"w": True, "b": False}
SCHEDULE = optax.cosine_decay_schedule(1e-2, 50)
#: Names in both packages, with arguments.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {"learning_rate": 1e-2}),
    "adam with a schedule": ("adam", {"learning_rate": SCHEDULE, "b1": 0.5, "nesterov": True}),
    "adamw": ("adamw", {"learning_rate": 1e-2}),
    "adamw with a mask": ("adamw", {"learning_rate": SCHEDULE, "weight_decay": 0.1, "mask": MASK}),
    "adamw with schedules": ("adamw", {"learning_rate": SCHEDULE, "weight_decay": SCHEDULE, "mask": MASK}),
    "nadam": ("nadam", {"learning_rate": 1e-2}),
    "nadamw": ("nadamw", {"learning_rate": 1e-2, "mask": MASK}),
    "adamax": ("adamax", {"learning_rate": SCHEDULE}),
    "adamaxw": ("adamaxw", {"learning_rate": 1e-2, "weight_decay": SCHEDULE}),
    "radam": ("radam", {"learning_rate": 1e-2, "b2": 0.9}),
    "yogi": ("yogi", {"learning_rate": 1e-2}),
    "adabelief": ("adabelief", {"learning_rate": 1e-2}),
    "lion": ("lion", {"learning_rate": SCHEDULE}),
    "lamb": ("lamb", {"learning_rate": 1e-2, "weight_decay": 0.1, "mask": MASK}),
    "adopt": ("contrib.adopt", {"learning_rate": 1e-2}),
    "ademamix": ("contrib.ademamix", {"learning_rate": 1e-2, "weight_decay": 0.1}),
    **{f"scale_by_{x}": (f"scale_by_{x}", {}) for x in ("adam", "adamax", "belief", "yogi", "lion")},
    "scale_by_radam": ("scale_by_radam", {"b2": 0.9}),
}
EVERY = pytest.mark.parametrize("name", PAIRS)


def pair(name: str) -> tuple[optax.GradientTransformation, Any]:
    """Optax's and ours."""
    path, arguments = PAIRS[name]
    theirs: Any = optax
    for part in path.split("."):
        theirs = getattr(theirs, part)
    return theirs(**arguments), getattr(adam_fn, path.split(".")[-1])(**arguments)


def gradients(t: int) -> Any:
    numbers = np.random.default_rng(t).standard_normal(14, np.float32)
    return {"w": numbers[:12].reshape(3, 4), "b": [numbers[12:], None]}


def go(update: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
    for t in steps:
        updates, state = update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@EVERY
def test_the_structure_is_that_of_optax(name: str) -> None:
    theirs, ours = (tx.init(P) for tx in pair(name))
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@EVERY
def test_each_goes_on_where_the_other_stopped(name: str) -> None:
    """In the middle of a run, with the moments and counts of the other, as they are."""
    theirs, ours = pair(name)
    one, other = jax.jit(theirs.update), jax.jit(ours.update)
    params, state = go(one, P, theirs.init(P), range(7))
    expected, _ = go(one, params, state, range(7, 14))
    found, after = go(other, params, state, range(7, 14))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected)
    again, _ = go(one, found, after, range(14, 17))
    alone, _ = go(other, found, after, range(14, 17))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), again, alone)


@pytest.mark.parametrize("how", ["orbax", "flax", "pickle"])
def test_a_checkpoint_of_optax_is_restored_as_it_is(how: str, tmp_path: Any) -> None:
    """Bit for bit the run that had the state in memory."""
    theirs, ours = pair("adamw with schedules")
    params, state = go(jax.jit(theirs.update), P, theirs.init(P), range(5))
    if how == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", state)
            checkpointer.wait_until_finished()
            restored: Any = checkpointer.restore(tmp_path / "saved", ours.init(P))
    elif how == "flax":
        restored = flax.serialization.from_bytes(ours.init(P), flax.serialization.to_bytes(state))
    else:
        restored = pickle.loads(pickle.dumps(state))
    adam_fn.checkpoint.check(restored, ours, P)
    expected, _ = go(ours.update, params, state, range(5, 9))
    jax.tree.map(np.testing.assert_array_equal, go(ours.update, params, restored, range(5, 9))[0], expected)


def test_a_running_train_state_and_optimizer_change_their_transformation() -> None:
    theirs, ours = pair("adamw")
    run: Any = train_state.TrainState.create(apply_fn=lambda: None, params={"w": P["w"]}, tx=theirs)
    grads = {"w": jnp.ones((3, 4))}
    run = run.apply_gradients(grads=grads)
    other = run.replace(tx=ours).apply_gradients(grads=grads)
    expected = run.apply_gradients(grads=grads)
    np.testing.assert_allclose(other.params["w"], expected.params["w"], rtol=1e-6, atol=1e-7)

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, theirs, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    optimizer.tx = ours
    optimizer.update(model, grads)
    assert int(optimizer.opt_state[0].count[...]) == 2


def test_bias_correction_and_schedule_have_counts_of_their_own() -> None:
    """A schedule that somebody starts again starts again; the bias correction goes on."""
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
    for tree in state[0][1:]:
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, P)
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert jax.tree.structure(other) == jax.tree.structure(state)


def test_only_changing_decay_rates_keep_their_weights() -> None:
    def rates(b1: Any, b2: Any) -> Any:
        return adam_fn.adam(1e-3, b1=b1, b2=b2).init(P)

    assert len(rates(0.9, 0.999)) == 2
    assert isinstance(rates(lambda count: 0.9, 0.999)[-1], BiasWeights)
    assert len(rates(lambda count: 0.9, jnp.asarray(0.999))[-1].weights) == 2
    assert len(adam_fn.nadam(1e-3, momentum_decay=0.004).init(P)[-1].weights) == 1


def test_a_state_of_another_form_is_an_error() -> None:
    tx = adam_fn.adamw(1e-3)
    state: Any = tx.init(P)

    def error(wrong: Any, text: str) -> None:
        with pytest.raises(TypeError, match=text):
            tx.update(gradients(0), wrong, P)

    error(list(state), r"restore it into tx.init\(params\)")
    error(flax.serialization.to_state_dict(state), r"restore it into tx.init\(params\)")
    error(state[:2], "a tuple of 3 expected, got a tuple of 2")
    error(adam_fn.lion(1e-3).init(P), "ScaleByAdamState expected, got a ScaleByLionState")
    error(adam_fn.adamw(SCHEDULE).init(P), "EmptyState expected, got a ScaleByScheduleState")
    error(adam_fn.adamw(1e-3, mask=MASK).init(P), "EmptyState expected, got a MaskedState")
    error((state[0]._replace(count=jnp.zeros((), jnp.bfloat16)), *state[1:]), "count is bfloat16, expected int32")


def test_a_state_with_moments_of_a_frozen_leaf_is_refused() -> None:
    state = adam_fn.adam(1e-3).init(P)
    tx = adam_fn.adam(1e-3, frozen={"w": True, "b": False})
    with pytest.raises(ValueError, match="the state has moments of w, which is not trained"):
        tx.update(gradients(0), state, P)
