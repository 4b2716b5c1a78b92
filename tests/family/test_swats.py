"""After the switch SWATS is SGD: nothing of Adam is computed or changed, and nothing is copied for the choice."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiling
from helpers.runs import random_gradients
from helpers.states import count_of, slots_of

import adam_fn
from adam_fn.algebra.bias import BiasWeights
from adam_fn.algebra.dtypes import as_real

STORED: dict[str, Any] = {
    "float32": {},
    "16bit": {"storage": "16bit"},
    "bfloat16": {"nu_dtype": "bfloat16"},
    "scheduled": {"b2": optax.constant_schedule(0.999)},
}


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        *((stored, "float32") for stored in STORED),
        *itertools.product(("float32", "16bit"), ("bfloat16", "float64", "complex64")),
    ],
)
def test_after_the_switch_all_of_adam_but_the_momentum_stays(stored: str, dtype: str) -> None:
    """The second moment and the kept bias weights stay bit for bit; m goes on for every trained leaf."""
    with jax.enable_x64(dtype == "float64"):
        w = jnp.linspace(-1, 1, 64 * 128, dtype=dtype).reshape(64, 128)
        params = {"w": w, "frozen": jnp.ones(3, dtype), "none": None, "whole": jnp.arange(3)}
        grads = {**params, "whole": np.zeros(3, jax.dtypes.float0)}
        tx: Any = adam_fn.swats(1e-2, tolerance=1e3, frozen=adam_fn.masks.path("frozen"), **STORED[stored])
        before = tx.init(params)
        for _ in range(4):
            _, before = tx.update(grads, before, params)
        assert bool(before.switched)
        updates, after = tx.update({**grads, "w": 3.0 * w}, before, params)
        assert int(count_of(after.adam)) == int(count_of(before.adam)) + 1
        assert isinstance(after.adam[-1], BiasWeights) == (stored == "scheduled")
        kept, old = ((slots_of(x.adam)["nu"], x.adam[-1]) for x in (after, before))
        for one, other in zip(*map(jax.tree.leaves, (kept, old)), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
        decoded = tx.init.owner.adam.update.decoded
        old, new = (decoded(each.adam, params)["mu"]["w"] for each in (before, after))
        g, u = (as_real(x).astype(old.dtype) for x in (3 * w, updates["w"]))
        expected = 0.9 * old + 0.1 * g
        # The momentum has no bound: any narrow storage keeps it in bfloat16.
        np.testing.assert_allclose(new, expected, rtol=2**-7 if stored == "16bit" else 1e-5, atol=1e-7)
        rounding = 1e-2 if dtype == "bfloat16" else 2e-6
        np.testing.assert_allclose(u, -before.sgd_rate * expected, rtol=rounding, atol=1e-9)
        assert updates["w"].dtype == dtype
        np.testing.assert_array_equal(updates["frozen"], np.zeros(3))


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)


@pytest.mark.parametrize("stored", STORED)
def test_sgd_computes_no_root(stored: str) -> None:
    params = {"w": jnp.ones((64, 128))}
    tx: Any = adam_fn.swats(1e-2, **STORED[stored])
    traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    loops = [x for x in _equations(traced) if x.primitive.name == "while"]
    roots = [sum(y.primitive.name == "sqrt" for y in _equations(x.params["body_jaxpr"].jaxpr)) for x in loops]
    everywhere = sum(x.primitive.name == "sqrt" for x in _equations(traced))
    # The loops of Adam, of the momentum's restart and of SGD.
    assert len(roots) == 3
    assert roots[0] == everywhere > 0
    assert roots[1:] == [0, 0]


@pytest.mark.parametrize("stored", STORED)
def test_the_choice_between_the_steps_needs_no_memory(stored: str) -> None:
    """Temporaries are two leaves, for the step and its sums; a conditional would copy each leaf once more."""
    p = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    tx = adam_fn.swats(1e-2, **STORED[stored])
    state = jax.eval_shape(tx.init, p)
    compiled = adam_fn.make_step(tx).lower(p, state, p).compile(compiling.FULL)
    sizes: Any = compiled.memory_analysis()
    assert sizes.temp_size_in_bytes < 2.6 * 4 * p.size, sizes  # A narrow m is copied, but not on a single device.
    assert sizes.alias_size_in_bytes > sizes.output_size_in_bytes - 1000


def _trained(scale: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
    """The loss and the parameters after 12 steps, and whether SWATS had switched after each of them."""
    tx: Any = adam_fn.swats(1e-2, b2=0.9, tolerance=1e-4)
    grads = jnp.asarray(1 + random_gradients(12, 5, 0.5))

    def step(carry: Any, g: jax.Array) -> Any:
        p, state = carry
        updates, state = tx.update(p + scale * g, state, p)
        return (p + updates, state), state.switched

    carry, first = step((start, tx.init(start)), grads[0])  # Only a step tells `shard_map` what differs by device.
    (p, _), switched = jax.lax.scan(step, carry, grads[1:])
    return jnp.sum(p**2), (p, jnp.append(switched, first))


def test_members_of_a_vmap_or_shard_map_switch_on_their_own() -> None:
    """Each steps as it would alone; derivatives under `vmap` are the same, too."""
    scales, starts = jnp.asarray([0.3, 3.0]), jnp.broadcast_to(jnp.linspace(-1.0, 2.0, 5), (2, 5))
    with_slopes = jax.value_and_grad(_trained, argnums=1, has_aux=True)
    (losses, (params, switched)), slopes = jax.jit(jax.vmap(with_slopes))(scales, starts)
    assert len({int(x.sum()) for x in switched}) > 1
    of_all = jax.jit(jax.grad(lambda starts: jax.vmap(_trained)(scales, starts)[0].sum()))(starts)

    def member(scale: jax.Array, start: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[None], _trained(scale[0], start[0])[1])

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=spec, out_specs=spec))(scales, starts)
    alone, plain = jax.jit(with_slopes), jax.jit(_trained)  # By a choice between both steps, and by loops.
    for i, each in enumerate(zip(scales, starts, strict=True)):
        (loss, (p, when)), slope = alone(*each)
        np.testing.assert_allclose([losses[i], plain(*each)[0]], loss, rtol=1e-6)
        assert np.isfinite(slope).all()
        np.testing.assert_allclose([slopes[i], of_all[i]], [slope, slope], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose([params[i], sharded[0][i]], [p, p], rtol=1e-6)
        np.testing.assert_array_equal([switched[i], sharded[1][i]], [when, when])
