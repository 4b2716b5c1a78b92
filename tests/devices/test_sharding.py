"""The state lives where the parameters live, on a mesh of eight host devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layouts import BY_SLOTS, SPECS
from helpers.states import slots_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn


def _params(kind: AxisType) -> dict[str, jax.Array]:
    mesh, rng = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind)), np.random.default_rng(0)
    return {
        key: jax.device_put(np.float32(rng.standard_normal((16, 8))), NamedSharding(mesh, spec))
        for key, spec in SPECS.items()
    }


def _same_sharding(tree: Any, params: dict[str, jax.Array]) -> None:
    for key, p in params.items():
        assert tree[key].sharding.is_equivalent_to(p.sharding, 2), (key, tree[key].sharding)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@KINDS
def test_state_follows_the_parameters(kind: AxisType) -> None:
    """Under jit and eager, with automatic and explicit axes: the same codes, and nothing is communicated."""
    params = _params(kind)
    txs = {case.name: case.make(storage="16bit", weight_decay=0.1) for case in BY_SLOTS}

    @jax.jit
    def init(params: Any) -> Any:
        return {name: tx.init(params) for name, tx in txs.items()}

    @jax.jit
    def update(grads: Any, states: Any, params: Any) -> Any:
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    states = init(params)
    compiled = update.lower(params, states, params).compile()
    found = compiled(params, states, params)
    adam = txs["adam"]
    states["eager"] = adam.init(params)
    found["eager"] = adam.update(params, states["eager"], params)
    trees = [x for updates, after in found.values() for x in (updates, *slots_of(after).values())]
    for tree in (*trees, *(slot for state in states.values() for slot in slots_of(state).values())):
        _same_sharding(tree, params)
    alone = jax.device_get(params)
    expected = update(alone, init(alone), alone)
    expected["eager"] = expected["adam"]
    different = []
    for name, (updates, after) in found.items():
        for key in params:
            np.testing.assert_allclose(updates[key], expected[name][0][key], rtol=1e-6, err_msg=name)
            different += [
                np.sum(x[key] != slots_of(expected[name][1])[slot][key]) for slot, x in slots_of(after).items()
            ]
    assert sum(different) <= 2, different  # Of thousands: XLA may round what it cuts in another way.
    assert not [word for word in COLLECTIVES if word in (compiled.as_text() or "")]


WRAPPERS: dict[str, Any] = {
    "swats": adam_fn.swats(1e-2, tolerance=1e3),
    "lamb": adam_fn.lamb(1e-2, weight_decay=0.1),
    "cautious": adam_fn.cautious(adam_fn.adam(1e-2)),
    "average": adam_fn.average_params(0.9),
}


@KINDS
def test_sums_over_leaves_are_over_all_shards(kind: AxisType) -> None:
    params = _params(kind)

    @jax.jit
    def step(scale: Any, states: Any, params: Any) -> Any:
        grads = jax.tree.map(lambda x: scale * jnp.sin(x), params)
        done = {name: tx.update(grads, states[name], params) for name, tx in WRAPPERS.items()}
        return {name: x for name, (x, _) in done.items()}, {name: x for name, (_, x) in done.items()}

    results = []
    for p in (params, jax.device_get(params)):
        updates, states = p, jax.jit(lambda p: {name: tx.init(p) for name, tx in WRAPPERS.items()})(p)
        for scale in (1.0, 0.5, -0.1, 0.3):
            updates, states = step(scale, states, p)
        results.append((updates, states))
    updates, states = results[0]
    for name in WRAPPERS:
        for tree in (updates[name], *slots_of(states[name]).values()):
            _same_sharding(tree, params)
    for (path, a), b in zip(jax.tree.leaves_with_path(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8, err_msg=jax.tree_util.keystr(path))


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

    p = jax.device_put(np.sin(np.arange(16 * 600, dtype=np.float32)).reshape(16, 600), NamedSharding(mesh, spec))
    state = jax.jit(tx.init)(p)
    specs = jax.tree.map(lambda x: spec if x.shape == p.shape else PartitionSpec(), state)
    run = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=(spec, specs), out_specs=(spec, specs)))
    found, after = run(p, state)
    begun = jax.jit(jax.shard_map(lambda p: train(p, tx.init(p)), mesh=mesh, in_specs=spec, out_specs=(spec, specs)))(p)
    jax.tree.map(np.testing.assert_array_equal, (found, after), begun)
    alone = jax.jit(lambda p: train(p, tx.init(p)))
    for i, shard in enumerate(np.split(np.asarray(p), 8)):
        own, moments = alone(shard)
        np.testing.assert_array_equal(np.split(np.asarray(found), 8)[i], own)
        for name, slot in slots_of(moments).items():
            np.testing.assert_array_equal(np.split(np.asarray(slots_of(after)[name]), 8)[i], slot)
