"""States with block codes in use: their bytes, options and masks, in other wrappers, on a mesh, at the edges."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.runs import compilations, full_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Block, Cast, Storage
from adam_fn.block import CODES_PER_OCTAVE
from adam_fn.execute.store import load, store
from adam_fn.layout import SMALL

TX = adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1)


def test_options_of_storage() -> None:
    assert adam_fn.adam(1e-3, storage=Block(8)) == adam_fn.adam(1e-3, storage={"mu": Block(8), "nu": Block(8)})
    assert hash(TX) == hash(pickle.loads(pickle.dumps(TX)))
    assert pickle.loads(pickle.dumps(TX)) == TX
    assert adam_fn.adam(1e-3, mu_dtype="bfloat16") == adam_fn.adam(1e-3, storage=Storage(mu=Cast("bfloat16")))
    slots = adam_fn.amsgrad(1e-3, storage=Storage(nu=Block(8))).init(jnp.ones((64, 64))).slots
    assert slots["nu_max"]["codes"].dtype == jnp.uint8
    assert slots["mu"].dtype == jnp.float32
    with pytest.raises(ValueError, match="mu_dtype and storage both specify how mu is stored"):
        adam_fn.adam(1e-3, mu_dtype="bfloat16", storage=Block(8))
    with pytest.raises(ValueError, match="storage of nu is given, but Lion has no slot nu; its slots are mu"):
        adam_fn.lion(1e-3, storage=Storage(nu=Block(8)))


@pytest.mark.parametrize(
    ("storage", "most"), [(None, 8.0), (Cast("bfloat16"), 4.0), (Block(8), 2.13), (Block(4), 1.13)]
)
def test_state_bytes(storage: Any, most: float) -> None:
    """Of both moments, for each parameter, without an allocation: these parameters would be 4 TB."""
    params = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    found = adam_fn.state_bytes(adam_fn.adam(1e-3, storage=storage), params) / params.size
    assert 0.99 * most <= found <= most + 1e-9


def test_inside_flax_and_optax() -> None:
    params = {"w": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)}
    grads = jax.tree.map(jnp.sin, params)
    injected = optax.inject_hyperparams(lambda learning_rate: adam_fn.adamw(learning_rate, storage=Block(8)))(1e-2)
    plain = adam_fn.adamw(1e-2, storage=Block(8))
    found = []
    for tx, repeats in ((plain, 1), (injected, 1), (optax.MultiSteps(plain, 2).gradient_transformation(), 2)):
        state = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
        for _ in range(2 * repeats):
            state = state.apply_gradients(grads=grads)
        found.append(state.params["w"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, plain, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 64))) ** 2))(model))
    doubled = optax.tree_utils.tree_map_params(plain, lambda x: x, plain.init(params))
    assert jax.tree.structure(doubled) == jax.tree.structure(plain.init(params))
    step = adam_fn.make_step(plain)
    p, state = jax.tree.map(jnp.copy, params), plain.init(params)
    for _ in range(3):
        p, state = step(p, state, grads)
    assert compilations(step) == 1
    updates, after = full_jit(plain.update)(grads, pickle.loads(pickle.dumps(state)), p)
    again, _ = full_jit(plain.update)(grads, state, p)
    np.testing.assert_array_equal(updates["w"], again["w"])
    both = jax.tree.map(lambda *x: jnp.stack(x), (grads, state, p), (updates, after, params))
    found, _ = jax.vmap(plain.update)(*both)
    np.testing.assert_allclose(found["w"][0], again["w"], rtol=1e-6)
    np.testing.assert_allclose(found["w"][1], plain.update(updates, after, params)[0]["w"], rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("a", "b")], ids=str)
def test_on_a_mesh_the_state_follows_and_nothing_is_communicated(spec: PartitionSpec, kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    p = jax.random.normal(jax.random.key(0), (128, 64))
    sharded = jax.device_put(p, NamedSharding(mesh, spec))
    results = []
    for x in (sharded, p):
        state, u = full_jit(TX.init)(x), None
        for _ in range(3):
            u, state = full_jit(TX.update)(jnp.sin(x), state, x)
        results.append((u, state))
    state: Any = results[0][1]
    for slot in state.slots.values():
        for part in slot.values():
            assert part.sharding.is_equivalent_to(sharded.sharding, part.ndim), part.sharding
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    text = jax.jit(TX.update).lower(sharded, state, sharded).compile().as_text() or ""
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


def test_shards_that_hold_no_whole_blocks() -> None:
    """Blocks that lie on two devices: right with automatic axes, though communicated; an error with explicit ones."""
    p: Any = {"w": jax.random.normal(jax.random.key(0), (80, 64))}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
        sharded = jax.device_put(p, NamedSharding(mesh, PartitionSpec("a")))
        if kind == AxisType.Explicit:
            with pytest.raises(Exception, match=r"this is about the leaf w\n"):
                TX.init(sharded)
        else:
            found, expected = (TX.update(x, TX.init(x), x)[0]["w"] for x in (sharded, p))
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_casts(dtype: str) -> None:
    """The state has the dtype and the update is Adam's, of first moments rounded to it each step."""
    g = jax.random.normal(jax.random.key(0), (40, 64, 8))
    tx = adam_fn.adam(1.0, storage=Storage(mu=Cast(dtype)))
    state = tx.init(g[0])
    mu, v = np.zeros((64, 8), dtype), np.zeros((64, 8))
    found, expected = np.zeros(()), np.zeros(())
    for t, x in enumerate(np.asarray(g, np.float64), start=1):
        found, state = tx.update(jnp.asarray(x, jnp.float32), state)
        m, v = 0.9 * np.float64(mu) + 0.1 * x, 0.999 * v + 0.001 * x * x
        expected = -(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        mu = np.asarray(jnp.asarray(m, jnp.float32).astype(dtype))
    assert state.slots["mu"].dtype == jnp.dtype(dtype)
    # A moment next to a tie may be rounded the other way.
    assert (np.abs(found - expected) > 1e-5 * np.abs(expected)).mean() < 0.01
    assert adam_fn.state_bytes(tx, g[0]) == g[0].size * (jnp.dtype(dtype).itemsize + 4) + 4 + 16


def test_second_moments_in_a_dtype_of_short_range() -> None:
    """They work where gradients are large enough, and a warning says that they may not be."""
    for dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
        with pytest.warns(UserWarning, match=f"{dtype} cannot represent small second moments"):
            tx = adam_fn.adam(1.0, nu_dtype=dtype)
        updates, state = tx.update(jnp.full(3, 100.0), tx.init(jnp.ones(3)))
        np.testing.assert_allclose(updates, -1.0, rtol=1e-3)
        assert state.slots["nu"].dtype == jnp.dtype(dtype)


def test_strict_promotion_and_wrong_storage() -> None:
    g = jax.random.normal(jax.random.key(0), (64, 64))
    for bits in (8, 4):
        tx = adam_fn.adamw(1e-3, storage=Block(bits))
        with jax.numpy_dtype_promotion("strict"):
            assert jnp.isfinite(tx.update(g, tx.init(g), g)[0]).all()
    wrong: Any = "bfloat16"
    with pytest.raises(TypeError, match="storage must be a codec, such as Block"):
        adam_fn.adam(1e-3, storage=wrong)
    with pytest.raises(TypeError, match="storage must be a codec, such as Block"):
        adam_fn.transform(adam_fn.Adam(), storage=wrong)
    both = {"mu": Block(8), "nu": Block(8)}
    assert adam_fn.transform(adam_fn.Adam(), storage=Block(8)) == adam_fn.transform(adam_fn.Adam(), storage=both)
    with pytest.raises(ValueError, match=r"the state's mu is not stored as Block\(8\).*different storage"):
        adam_fn.adamw(1e-3, storage=Block(8)).update(g, adam_fn.adamw(1e-3).init(g), g)


def test_masks_are_no_schedules() -> None:
    """`inject_hyperparams` calls every function with the step, unless it is told not to."""
    params = {"embedding": jnp.ones((64, 128)), "w": jnp.ones((64, 128))}
    mask = adam_fn.masks.path("w")
    for mask_ in (mask, adam_fn.masks.rank(2)):
        with pytest.raises(TypeError, match="is a mask, but was called with a step count"):
            optax.inject_hyperparams(adam_fn.adamw)(1e-2, storage=Block(8), storage_mask=mask_).init(params)
    tx = optax.inject_hyperparams(adam_fn.adamw, static_args="storage_mask")(1e-2, storage=Block(8), storage_mask=mask)
    codes: Any = optax.tree.get(tx.init(params), "slots")["mu"]["codes"]
    assert {name: str(x.dtype) for name, x in codes.items()} == {"embedding": "float32", "w": "uint8"}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("alias", "power"), [(adam_fn.amsgrad, 0.5), (adam_fn.adamax, 1.0)])
def test_a_maximum_climbs_to_the_next_code_and_no_further(alias: Any, power: float, bits: int) -> None:
    """The docstring's bound: what a code's step does to the update's denominator."""
    scale = jnp.exp(0.7 * jax.random.normal(jax.random.key(1), (64, 64)))
    pair = [alias(1.0, eps=0.0, storage=Storage(nu=Block(bits))), alias(1.0, eps=0.0)]

    def step(states: Any, t: jax.Array) -> Any:
        g = scale * (1 + 0.2 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), scale.shape))
        out = [tx.update(g, state) for tx, state in zip(pair, states, strict=True)]
        return tuple(state for _, state in out), jnp.stack([jnp.linalg.norm(jnp.asarray(u)) for u, _ in out])

    norms = jax.lax.scan(step, tuple(tx.init(scale) for tx in pair), jnp.arange(1000))[1][-50:].mean(0)
    assert (1 + 1 / CODES_PER_OCTAVE[bits]) ** -power - 1e-3 <= norms[0] / norms[1] <= 1.01


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_numbers_there_are(bits: int) -> None:
    """Nothing becomes 0, changes its sign or becomes infinite; each is at most a code away."""
    x = jnp.full((3, 64, 64), jnp.asarray([1e37, 1e38, 3.4e38])[:, None, None])
    step = 2 ** (1 / CODES_PER_OCTAVE[bits])
    for signed, lowest, highest in ((True, {8: 0.97, 4: 0.72}[bits], 1.0), (False, 1 / step, step)):
        codec, values = Block(bits).of(signed=signed), x.at[:, 0, 0].mul(-1) if signed else x
        found = full_jit(lambda x, c=codec: load(c, store(c, x), jnp.dtype(jnp.float32), x.shape))(values)
        ratio = np.asarray(found) / np.asarray(values)
        assert (lowest * 0.99 <= ratio).all() and (ratio <= highest * 1.01).all()


def test_storage_mask() -> None:
    """What it leaves out is stored, and updated, as without storage=."""
    params = {"embedding": jnp.ones((64, 128)), "w": jnp.ones((64, 128)), "n": jnp.arange(3), "none": None}
    mask = adam_fn.masks.path("*embedding*", invert=True)
    grads = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape) * p, params)
    exact = adam_fn.adamw(1e-2)
    for storage in (Block(8), Block(4), Cast("bfloat16")):
        tx = adam_fn.adamw(1e-2, storage=storage, storage_mask=mask)
        states, updates = [tx.init(params), exact.init(params)], []
        for _ in range(3):
            pairs = [t.update(grads, state, params) for t, state in zip((tx, exact), states, strict=True)]
            updates, states = map(list, zip(*pairs, strict=True))
        np.testing.assert_array_equal(updates[0]["embedding"], updates[1]["embedding"])
        assert (updates[0]["w"] != updates[1]["w"]).any()
        size = params["w"].size
        assert adam_fn.state_bytes(tx, params) == 8 * size + adam_fn.state_bytes(
            adam_fn.adamw(1e-2, storage=storage), {"w": params["w"]}
        )
        assert pickle.loads(pickle.dumps(tx)) == tx != adam_fn.adamw(1e-2, storage=storage)
        with pytest.raises(ValueError, match=r"state's mu of embedding.* expected"):
            adam_fn.adamw(1e-2, storage=storage).update(grads, states[0], params)
    for alias in (adam_fn.swats, adam_fn.lamb):
        found = alias(1e-2, storage=Block(8), storage_mask=mask).init(params)
        assert {str(x.dtype) for x in jax.tree.leaves(found) if x.size >= SMALL // 32} == {
            "float32",
            "uint8",
            "int16",
        }
    with pytest.raises(ValueError, match="no effect without storage"):
        adam_fn.adamw(1e-2, storage_mask=mask)
    with pytest.raises(ValueError, match=r"storage_mask must have the structure .*: v is not a parameter"):
        adam_fn.adamw(1e-2, storage=Block(8), storage_mask={"v": True}).init(params)


def test_swats_with_codes() -> None:
    """It switches where float32 does, and then steps along the momentum, which is coded between steps, from 0."""
    params = {"w": jnp.linspace(-1, 1, 64 * 128).reshape(64, 128)}
    states: list[Any] = []
    for storage in (None, Block(8)):
        tx: Any = adam_fn.swats(1e-2, tolerance=1e-2, storage=storage)
        p: Any = params
        state = tx.init(params)
        for _ in range(6):
            before = state
            updates, state = tx.update(p, state, p)
            if storage and bool(before.switched):
                old = tx.init.wrapper.adam.update.decoded("mu", before.adam, p)["w"]
                np.testing.assert_allclose(updates["w"], -state.sgd_rate * (0.9 * old + 0.1 * p["w"]), rtol=2e-6)
            p = optax.apply_updates(p, updates)
        states.append((p, state))
    (exact, one), (found, two) = states
    assert bool(one.switched) and bool(two.switched)
    np.testing.assert_allclose(found["w"], exact["w"], atol=2e-2)
