"""One policy for the leaves: None, integers, frozen, complex, scalars, empty arrays; errors that name the path."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS, Case, name
from helpers.runs import random_gradients, scanned, trajectories
from helpers.states import slots_of

import adam_fn


@pytest.mark.quick("0.1-16bit-adam")
@pytest.mark.parametrize("case", MEMBERS, ids=name)
@pytest.mark.parametrize(("weight_decay", "storage"), [(None, None), (0.1, "16bit")])
def test_every_kind_of_leaf_keeps_its_shape_and_dtype(case: Case, weight_decay: float | None, storage: Any) -> None:
    """The steps are traced for every member, and computed for Adam."""
    tx = case.make(1e-3, weight_decay=weight_decay, storage=storage)
    start = {
        "w": jnp.ones((3, 2)),
        "scalar": jnp.asarray(2.0),
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "int": jnp.arange(3),
        "bool": jnp.asarray([True, False]),
        "half": jnp.ones(2, jnp.bfloat16),
    }
    grads = {**start, "int": np.zeros(3, jax.dtypes.float0), "bool": None}

    def two_steps() -> Any:
        params, state = start, tx.init(start)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            assert updates["none"] is None
            assert updates["bool"] is None  # Like its gradient.
            params: Any = optax.apply_updates(params, {**updates, "bool": jnp.zeros(2, bool)})
        return params, state

    params, state = two_steps() if case.name == "adam" else jax.eval_shape(two_steps)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
    if case.name == "adam":
        np.testing.assert_array_equal(params["int"], start["int"])
        assert (params["w"] < start["w"]).all()
        assert params["scalar"] < start["scalar"]
    for slot in slots_of(state).values():
        assert slot["none"] is None
        assert slot["int"] == slot["bool"] == optax.MaskedNode()
        assert (slot["half"].dtype == jnp.float32) == (storage is None)
        assert slot["empty"].shape == (0, 4)


@pytest.mark.parametrize("frozen", [{"a": False, "b": True}, adam_fn.masks.path("b/*")])
def test_frozen_leaves_have_no_moments_and_a_zero_update(frozen: Any) -> None:
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2), "d": jnp.ones(2)}}
    tx = adam_fn.adamw(1e-3, frozen=frozen)
    updates, state = tx.update({**params, "b": {"c": None, "d": jnp.ones(2)}}, tx.init(params), params)
    assert (updates["a"] < 0).all()
    assert updates["b"]["c"] is None
    np.testing.assert_array_equal(updates["b"]["d"], jnp.zeros(2))
    assert len(jax.tree.leaves(slots_of(state))) == 2


def test_complex_is_two_reals() -> None:
    """The second moment is that of each part, as in torch, and not |g|²."""
    grads, params = random_gradients(5, 8), np.linspace(-1, 1, 8).astype(np.float32)
    txs = [case.make() for case in MEMBERS]
    _, expected = trajectories(txs, grads, params)
    complex_grads = (grads[:, :4] + 1j * grads[:, 4:]).astype(np.complex64)
    complex_params = (params[:4] + 1j * params[4:]).astype(np.complex64)
    _, found = trajectories(txs, complex_grads, complex_params, jnp.complex64)
    assert found.dtype == np.complex64
    for case, a, b in zip(MEMBERS, np.concatenate([np.real(found), np.imag(found)], axis=-1), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9, err_msg=case.name)


def _bad(message: str, **changes: Any) -> Any:
    grads = {"w": jnp.ones((3, 1)), "deep": [jnp.ones(2), jnp.ones(2)], **changes}
    return pytest.param({key: value for key, value in grads.items() if value is not ...}, message)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        _bad(r"gradient of w has shape \(3,\), its parameter \(3, 1\)", w=jnp.ones(3)),
        _bad(r"gradient of deep/1 has shape \(\), its parameter \(2,\)", deep=[jnp.ones(2), 1.0]),
        _bad(r"gradient of w is None", w=None),
        _bad(r"gradient of w is complex64, its parameter float32", w=jnp.ones((3, 1), jnp.complex64)),
        _bad(r"gradient of w is int32, its parameter float32", w=jnp.ones((3, 1), jnp.int32)),
        _bad(r"gradients must have the structure of the parameters: w is missing", w=...),
        _bad(r"gradients must have the structure of the parameters: extra is not there", extra=jnp.ones(1)),
        _bad(r"gradients must have the structure of the parameters: deep/1 is missing", deep=[jnp.ones(2)]),
        _bad(r"the structure of the parameters: w is a dict, not an array", w={"a": jnp.ones((3, 1))}),
    ],
)
def test_gradients_that_do_not_fit_are_named(grads: Any, message: str) -> None:
    params = {"w": jnp.ones((3, 1)), "deep": [jnp.ones(2), jnp.ones(2)]}
    tx = adam_fn.adam(1e-3)
    state = tx.init(params)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, state, params)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, grads, state, params)


def test_update_works_without_parameters_or_jit_and_with_plain_numbers() -> None:
    """The state has NumPy arrays, as after a checkpoint; only weight decay needs the parameters."""
    params = {"w": jnp.ones((3, 1)), "none": None, "number": 1.0, "numpy": np.ones(2, np.float32)}
    tx = adam_fn.adam(0.1)
    state = jax.device_get(tx.init(params))
    updates = [tx.update(params, state, params)[0], tx.update(params, state)[0]]
    with jax.disable_jit():
        updates.append(tx.update(params, state, params)[0])
    for u in jax.tree.leaves(updates):
        np.testing.assert_allclose(u, np.full_like(u, -0.1), rtol=1e-6)
    with pytest.raises(ValueError, match="weight decay needs the parameters"):
        adam_fn.adamw(1e-3).update(params, adam_fn.adamw(1e-3).init(params))


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1 * (count + 1)], ids=["number", "schedule"])
def test_rules_without_a_memory_have_no_empty_arrays(rate: Any) -> None:
    """Checkpointers refuse arrays of no size."""
    tx = adam_fn.transform(adam_fn.Rate(rate))
    (_, state), updates = scanned(tx, jnp.ones(3), jnp.ones((2, 3)))
    np.testing.assert_allclose(updates[1], np.full(3, -0.2 if callable(rate) else -0.1), rtol=1e-6)
    assert state == (optax.ScaleByScheduleState(jnp.asarray(2)) if callable(rate) else optax.EmptyState())
