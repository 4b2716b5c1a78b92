"""At home in Flax (linen, NNX) and Equinox, each inside its own jitted training step.

A framework sees the form of the state, not the arithmetic: one member is trained for each set of slots.
"""

import pickle
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


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.relu(nn.Dense(16)(x)))


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_in_a_linen_train_state(case: Case) -> None:
    model = LinenMLP()
    params = jax.jit(model.init)(jax.random.key(0), X)
    tx = optax.chain(optax.clip_by_global_norm(1.0), case.make(0.02))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == int(optax.tree.get(state.opt_state, "count")) == 60

    stored = flax.serialization.to_bytes(state.opt_state)
    restored = flax.serialization.from_bytes(tx.init(params), stored)
    chex.assert_trees_all_equal(restored, state.opt_state)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state.opt_state)), state.opt_state)


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 16, rngs=rngs)
        self.second = nnx.Linear(16, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(nnx.relu(self.first(x))))


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_in_an_nnx_optimizer(case: Case) -> None:
    model = nnx.jit(lambda: NnxMLP(nnx.Rngs(0)))()
    weights = {"mask": adam_fn.masks.path("*kernel*"), "frozen": adam_fn.masks.path("first/bias*")}
    optimizer = nnx.Optimizer(model, case.make(0.02, weight_decay=1e-4, mu_dtype="bfloat16", **weights), wrt=nnx.Param)
    assert model.first.bias is not None
    bias = jnp.copy(model.first.bias[...])

    @nnx.jit
    def step(model: NnxMLP, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert model.first.bias is not None
    np.testing.assert_array_equal(model.first.bias[...], bias)
    moments = {"mu": "m1"} if case.alias is adam_fn.ademamix else {}
    assert int(count_of(optimizer.opt_state)[...]) == 60
    assert slots_of(optimizer.opt_state)[moments.get("mu", "mu")].first.kernel[...].dtype == jnp.bfloat16


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", BY_SLOTS, ids=name)
def test_every_form_of_state_trains_an_equinox_module(case: Case) -> None:
    """Modules whose non-array leaves are None, filtered by kind of array or not."""

    class Model(eqx.Module):
        mlp: eqx.nn.MLP
        steps: jax.Array
        label: str

    mlp = eqx.filter_jit(eqx.nn.MLP)(4, 1, 16, 1, key=jax.random.key(0))
    for keep in (eqx.is_inexact_array, eqx.is_array):
        model = Model(mlp, jnp.arange(3), "name")
        tx = case.make(0.02, weight_decay=1e-4, mask=adam_fn.masks.rank(2))
        state = tx.init(eqx.filter(model, keep))

        @eqx.filter_jit
        def step(model: Model, state: Any, keep: Any = keep, tx: Any = tx) -> Any:
            def loss_of(m: Model) -> jax.Array:
                return jnp.mean((jax.vmap(m.mlp)(X) - Y) ** 2)

            loss, grads = eqx.filter_value_and_grad(loss_of)(model)
            updates, state = tx.update(grads, state, eqx.filter(model, keep))
            return eqx.apply_updates(model, updates), state, loss

        losses = []
        for _ in range(60):
            model, state, loss = step(model, state)
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0]
        np.testing.assert_array_equal(model.steps, jnp.arange(3))


def test_equinox_mask_module_is_a_tree() -> None:
    """A module of booleans may be callable; it is a tree all the same."""
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    mask = jax.tree.map(lambda p: p.ndim > 1, model)
    assert callable(mask)
    tx = adam_fn.adamw(1.0, weight_decay=0.1, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = tx.update(zeros, tx.init(model), model)
    np.testing.assert_allclose(updates.weight, -0.1 * model.weight, rtol=1e-6)
    np.testing.assert_array_equal(updates.bias, jnp.zeros(2))
