"""The state lives where the parameters live, on a mesh of eight host devices."""

import itertools
from typing import Any

import chex
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


def _same_sharding(trees: Any, params: dict[str, jax.Array]) -> None:
    for tree, (key, p) in itertools.product(trees, params.items()):
        assert tree[key].sharding.is_equivalent_to(p.sharding, 2), (key, tree[key].sharding)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@KINDS
def test_state_follows_the_parameters(kind: AxisType) -> None:
    """Under jit and eager, with automatic and explicit axes: the same codes, and nothing is communicated."""
    params, txs = _params(kind), {case.name: case.make(storage="16bit", weight_decay=0.1) for case in BY_SLOTS}
    init = jax.jit(lambda params: {name: tx.init(params) for name, tx in txs.items()})

    @jax.jit
    def update(states: Any, params: Any) -> Any:
        return {name: tx.update(params, states[name], params) for name, tx in txs.items()}

    states = init(params)
    compiled = update.lower(states, params).compile()
    assert not [word for word in COLLECTIVES if word in (compiled.as_text() or "")]
    found = compiled(states, params)
    states["eager"] = txs["adam"].init(params)
    found["eager"] = txs["adam"].update(params, states["eager"], params)
    alone = jax.device_get(params)
    expected = update(init(alone), alone)
    different = 0
    for name, (updates, after) in found.items():
        _same_sharding([updates, *slots_of(after).values(), *slots_of(states[name]).values()], params)
        wanted, codes = expected["adam" if name == "eager" else name]
        chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
        pairs = zip(*map(jax.tree.leaves, (slots_of(after), slots_of(codes))), strict=True)
        different += sum(np.sum(np.asarray(x) != np.asarray(y)) for x, y in pairs)
    assert different <= 2  # Of thousands: XLA may round what it cuts in another way.


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
        return {name: tx.update(grads, states[name], params) for name, tx in WRAPPERS.items()}

    results = []
    for p in (params, jax.device_get(params)):
        after, states = {}, jax.jit(lambda p: {name: tx.init(p) for name, tx in WRAPPERS.items()})(p)
        for scale in (1.0, 0.5, -0.1, 0.3):
            after = step(scale, states, p)
            states = {name: state for name, (_, state) in after.items()}
        results.append(after)
    for updates, state in results[0].values():
        _same_sharding([updates, *slots_of(state).values()], params)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-8)


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
    begun = jax.shard_map(lambda p: train(p, tx.init(p)), mesh=mesh, in_specs=spec, out_specs=(spec, specs))
    found, after = run(p, state)
    chex.assert_trees_all_equal((found, after), jax.jit(begun)(p))
    alone = jax.jit(lambda p: train(p, tx.init(p)))
    for shard, *own in zip(*(np.split(np.asarray(x), 8) for x in (p, found, *slots_of(after).values())), strict=True):
        expected, moments = alone(shard)
        chex.assert_trees_all_equal(own, [expected, *slots_of(moments).values()])
