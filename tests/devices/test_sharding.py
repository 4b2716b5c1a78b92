"""The state lives where the parameters live, on a mesh of eight host devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MEMBERS
from helpers.layouts import SPECS
from helpers.states import slots_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn


def _params(kind: AxisType) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    return {key: jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, spec)) for key, spec in SPECS.items()}


def _same_sharding(tree: Any, params: dict[str, jax.Array]) -> None:
    for key, p in params.items():
        assert tree[key].sharding.is_equivalent_to(p.sharding, 2), (key, tree[key].sharding)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@KINDS
def test_state_follows_the_parameters(kind: AxisType) -> None:
    """Under jit and eager, with automatic and explicit axes: the same codes, and nothing is communicated."""
    params = {key: jnp.sin(p * 2 + jnp.arange(8)[None]) for key, p in _params(kind).items()}
    txs = {case.name: case.make(storage="16bit", weight_decay=0.1) for case in MEMBERS}  # All codecs are among them.

    def init(params: Any) -> Any:
        return {name: tx.init(params) for name, tx in txs.items()}

    @jax.jit
    def update(grads: Any, states: Any, params: Any) -> Any:
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    states = jax.jit(init)(params)
    compiled = update.lower(params, states, params).compile()
    found = compiled(params, states, params)
    adam = txs["adam"]
    states["eager"] = adam.init(params)
    found["eager"] = adam.update(params, states["eager"], params)
    for updates, after in found.values():
        _same_sharding(updates, params)
        for slot in slots_of(after).values():
            _same_sharding(slot, params)
    for state in states.values():
        for slot in slots_of(state).values():
            _same_sharding(slot, params)
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    expected = update(alone, jax.jit(init)(alone), alone)
    expected["eager"] = expected["adam"]
    different = []
    for name, (updates, after) in found.items():
        for key in params:
            np.testing.assert_allclose(updates[key], expected[name][0][key], rtol=1e-6, err_msg=name)
            different += [
                np.sum(x[key] != slots_of(expected[name][1])[slot][key]) for slot, x in slots_of(after).items()
            ]
    assert sum(different) <= 2, different  # Of thousands: XLA may round what it cuts in another way.
    text = compiled.as_text() or ""
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


WRAPPERS: dict[str, Any] = {
    "swats": adam_fn.swats(1e-2, tolerance=1e3),
    "lamb": adam_fn.lamb(1e-2, weight_decay=0.1),
    "cautious": adam_fn.cautious(adam_fn.adam(1e-2)),
    "average": adam_fn.average_params(0.9),
}


@KINDS
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sums_over_leaves_are_over_all_shards(wrapper: str, kind: AxisType) -> None:
    params = _params(kind)
    tx = WRAPPERS[wrapper]
    values = {key: np.random.default_rng(i).standard_normal((16, 8)) for i, key in enumerate(params)}
    sharded = {key: jax.device_put(jnp.asarray(values[key], jnp.float32), p.sharding) for key, p in params.items()}
    alone = {key: jnp.asarray(value, jnp.float32) for key, value in values.items()}
    found = []
    for p in (sharded, alone):
        state = jax.jit(tx.init)(p)
        for scale in (1.0, 0.5, -0.1, 0.3):
            updates, state = jax.jit(tx.update)(jax.tree.map(lambda x: scale * jnp.sin(x), p), state, p)  # noqa: B023
        found.append((updates, state))
    _same_sharding(found[0][0], params)
    for tree in slots_of(found[0][1]).values():
        _same_sharding(tree, params)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-8)


def test_complex_parameters_on_a_mesh() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    p = jax.device_put(jnp.ones((16, 2), jnp.complex64), NamedSharding(mesh, PartitionSpec("a")))
    state = jax.jit(adam_fn.adam(1e-3).init)(p)
    assert slots_of(state)["mu"].shape == (2, 16, 2)
    assert slots_of(state)["mu"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "a")), 3)


@pytest.mark.quick("16bit-AxisType.Auto")
@KINDS
@pytest.mark.parametrize("storage", [None, "24bit", "16bit"])
def test_each_shard_steps_as_it_would_alone_inside_shard_map(kind: AxisType, storage: Any) -> None:
    """Each shard is stepped as it would be alone, bit for bit; the state may be made inside or outside."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    spec = PartitionSpec("a")
    tx = adam_fn.adamw(1e-2, storage=storage)

    def train(p: jax.Array, state: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            p, state = carry
            updates, state = tx.update(2 * p, state, p)
            return (p + updates, state), None

        return jax.lax.scan(step, (p, state), None, length=3)[0]

    p = jax.device_put(jnp.sin(jnp.arange(16 * 600.0)).reshape(16, 600), NamedSharding(mesh, spec))
    state = jax.jit(tx.init)(p)
    specs = jax.tree.map(lambda x: spec if x.shape == p.shape else PartitionSpec(), state)
    run = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=(spec, specs), out_specs=(spec, specs)))
    found, after = run(p, state)
    begun = jax.jit(jax.shard_map(lambda p: train(p, tx.init(p)), mesh=mesh, in_specs=spec, out_specs=(spec, specs)))(p)
    jax.tree.map(np.testing.assert_array_equal, (found, after), begun)
    for i, shard in enumerate(np.split(np.asarray(p), 8)):
        own, moments = jax.jit(train)(jnp.asarray(shard), tx.init(jnp.asarray(shard)))
        np.testing.assert_array_equal(np.split(np.asarray(found), 8)[i], own)
        for name, slot in slots_of(moments).items():
            np.testing.assert_array_equal(np.split(np.asarray(slots_of(after)[name]), 8)[i], slot)
