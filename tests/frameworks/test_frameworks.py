"""Training in Flax (linen, NNX) and Equinox, inside the jitted training step of each.

A framework sees the form of the state, not the arithmetic: one member is trained for each set of slots.
"""

import pickle
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Case, name
from flax import nnx
from flax.training.train_state import TrainState
from helpers.layouts import BY_SLOTS
from helpers.states import count_of, slots_of

import adam_fn

X = jnp.asarray(np.random.default_rng(0).standard_normal((32, 4)), jnp.float32)
Y = jnp.sum(X, axis=1, keepdims=True)


def learned(step: Callable[..., Any], *carry: Any) -> Any:
    """Runs 60 steps, each of which returns its loss last, checks that they learn, and returns what they carry."""
    losses = []
    for _ in range(60):
        *after, loss = step(*carry)
        carry = tuple(after)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    return carry


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_in_a_linen_train_state(case: Case) -> None:
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    params = jax.jit(model.init)(jax.random.key(0), X)
    tx = optax.chain(optax.clip_by_global_norm(1.0), case.make(0.02))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    (state,) = learned(step, state)
    assert int(state.step) == int(optax.tree.get(state.opt_state, "count")) == 60
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state.opt_state))
    chex.assert_trees_all_equal(restored, state.opt_state)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state.opt_state)), state.opt_state)


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_in_an_nnx_optimizer(case: Case) -> None:
    @nnx.jit
    def create() -> nnx.Sequential:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Linear(4, 16, rngs=rngs), nnx.relu, nnx.Dropout(0.1, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
        )

    model: Any = create()
    weights = {"mask": adam_fn.masks.path("*kernel*"), "frozen": adam_fn.masks.path("layers/0/bias*")}
    optimizer = nnx.Optimizer(model, case.make(0.02, weight_decay=1e-4, mu_dtype="bfloat16", **weights), wrt=nnx.Param)
    bias = jnp.copy(model.layers[0].bias[...])

    @nnx.jit
    def step(model: nnx.Sequential, optimizer: nnx.Optimizer) -> tuple[jax.Array]:
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return (loss,)

    learned(lambda: step(model, optimizer))
    np.testing.assert_array_equal(model.layers[0].bias[...], bias)
    assert int(count_of(optimizer.opt_state)[...]) == 60
    mu = slots_of(optimizer.opt_state)["m1" if case.alias is adam_fn.ademamix else "mu"]
    assert mu.layers[0].kernel[...].dtype == jnp.bfloat16


class Model(eqx.Module):
    mlp: eqx.nn.MLP
    steps: jax.Array
    label: str


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_an_equinox_module(case: Case) -> None:
    """Leaves that are no arrays are None, whether all arrays are kept or only floating ones."""
    mlp = eqx.filter_jit(eqx.nn.MLP)(4, 1, 16, 1, key=jax.random.key(0))
    for keep in (eqx.is_inexact_array, eqx.is_array):
        model = Model(mlp, jnp.arange(3), "name")
        tx = case.make(0.02, weight_decay=1e-4, mask=adam_fn.masks.rank(2))
        state = tx.init(eqx.filter(model, keep))

        @eqx.filter_jit
        def step(model: Model, state: Any, keep: Any = keep, tx: Any = tx) -> Any:
            loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m.mlp)(X) - Y) ** 2))(model)
            updates, state = tx.update(grads, state, eqx.filter(model, keep))
            return eqx.apply_updates(model, updates), state, loss

        model, _ = learned(step, model, state)
        np.testing.assert_array_equal(model.steps, jnp.arange(3))


def test_an_equinox_module_of_booleans_is_a_mask() -> None:
    """Although the module is callable, it is used as a tree."""
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    mask = jax.tree.map(lambda p: p.ndim > 1, model)
    assert callable(mask)
    tx = adam_fn.adamw(1.0, weight_decay=0.1, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = tx.update(zeros, tx.init(model), model)
    np.testing.assert_allclose(updates.weight, -0.1 * model.weight, rtol=1e-6)
    np.testing.assert_array_equal(updates.bias, jnp.zeros(2))
