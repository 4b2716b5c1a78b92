"""The state lives where the parameters live, on a mesh of eight host devices."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.layouts import BY_SLOTS, KINDS, SPECS, assert_placed, mesh_of
from helpers.states import slots_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn

TXS: dict[str, optax.GradientTransformation] = {
    **{case.name: case.make(weight_decay=0.1) for case in BY_SLOTS},
    "16bit": adam_fn.adamw(1e-3, storage="16bit"),
    "24bit": adam_fn.adam(1e-3, storage="24bit", frozen=adam_fn.masks.path("last", "both")),
    "rounding": adam_fn.stochastic_rounding(adam_fn.adam(1e-3)),
    "masters": adam_fn.master_weights(adam_fn.cautious(adam_fn.adam(1e-3))),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), adam_fn.adam(1e-3), adam_fn.average_params(0.9)),
    "lamb": adam_fn.lamb(1e-2, weight_decay=0.1),
    "swats": adam_fn.swats(1e-2, tolerance=1e3),
}


def _expected(x: jax.Array, place: Any) -> Any:
    """The expected place: that asked for, but counts and weights may be anywhere."""
    return x if x.ndim == 0 else place


@KINDS
def test_every_state_lives_where_the_parameters_live(kind: AxisType) -> None:
    """`state_shardings` and `jit` agree on the place, the state stays there, and the steps are those of one device."""
    mesh, rng = mesh_of(kind, (4, 2)), np.random.default_rng(0)
    values = {key: rng.standard_normal((16, 8)).astype(np.float32) for key in SPECS}
    params = {key: jax.device_put(x, NamedSharding(mesh, SPECS[key])) for key, x in values.items()}
    params["complex"] = jax.lax.complex(params["last"], params["last"])
    asked = {name: adam_fn.state_shardings(tx, params) for name, tx in TXS.items()}

    @jax.jit
    def step(scale: Any, states: Any, params: Any) -> Any:
        grads = jax.tree.map(lambda x: scale * jnp.sin(x), params)
        return {name: tx.update(grads, states[name], params) for name, tx in TXS.items()}

    results: list[Any] = []
    for p in (params, jax.device_get(params)):
        done: dict[str, Any] = {}
        states = begun = jax.jit(lambda p: {name: tx.init(p) for name, tx in TXS.items()})(p)
        for scale in (1.0, 0.5, -0.1, 0.3):
            done = step(scale, states, p)
            states = {name: state for name, (_, state) in done.items()}
        results.append({name: x for name, x in done.items() if "bit" not in name})
        if p is params:
            for state in (begun, states):
                assert_placed(state, jax.tree.map(_expected, state, asked))
            eager = TXS["adam"].update(params, begun["adam"], params)
            del done["24bit"]  # The zeros of its frozen leaves may be anywhere.
            for updates, _ in (*done.values(), eager):
                assert_placed(updates, params)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.quick("16bit-AxisType.Auto")
@KINDS
@pytest.mark.parametrize("storage", [None, "24bit", "16bit"])
def test_each_shard_steps_as_it_would_alone_inside_shard_map(kind: AxisType, storage: Any) -> None:
    """The steps are equal bit for bit; the state may be made inside or outside of `shard_map`."""
    mesh = mesh_of(kind)
    spec = PartitionSpec("data")
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
