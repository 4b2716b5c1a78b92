"""Large leaves with codes are updated tile by tile on a CPU: with little memory, and as if in one piece."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Block, Cast, Storage, execute
from adam_fn.noise import Part, random_bits

SHAPES = [(1 << 20,), (3, 3, 512, 256), (1024, 1030)]
TX = adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1)


def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is cut."""
    monkeypatch.setattr(execute, "LARGE", 1 << 40)
    jax.clear_caches()


def _loops(function: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("platform_index")


@pytest.mark.parametrize(
    ("storage", "dtype", "shapes"),
    [
        (Block(8), "float32", SHAPES),
        (Block(4), "float32", SHAPES[:1]),
        (Storage(mu=Cast("bfloat16"), nu=Block(8)), "bfloat16", [(1024, 1024)]),
    ],
    ids=str,
)
def test_tiles_are_the_whole(
    storage: Any, dtype: str, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps in place, and an update: the same to the last code, save for contracted products."""
    tx = adam_fn.adamw(1e-2, storage=storage, weight_decay=0.1)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    start = {str(i): jax.random.normal(keys[i], shape, dtype) for i, shape in enumerate(shapes)}
    found = []
    for cut in (True, False):
        if not cut:
            _whole(monkeypatch)
        assert _loops(tx.update, start, tx.init(start), start) == cut * len(shapes)
        step = adam_fn.make_step(tx)
        params, state = jax.tree.map(jnp.copy, start), tx.init(start)
        for i in range(3):
            params, state = step(params, state, jax.tree.map(lambda p: jnp.sin(20 * p + i), start))  # noqa: B023
        update = tx.update(start, state, params)[0] if len(shapes) == 1 else None
        found.append((update, params, state))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        assert one.dtype == two.dtype
        a, b = (np.asarray(x, np.float64) for x in (one, two))
        assert (a != b).mean() < 1e-4 or one.dtype == jnp.float32
        if one.dtype == jnp.float32:
            # Another code of one of 2^20 elements is another update of that element.
            assert (np.abs(a - b) > 1e-5 * np.abs(b).max()).mean() < 1e-4
            np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * np.abs(b).max())


@pytest.mark.parametrize("shape", [(1 << 24,), (4096, 4096), (50304, 384)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_temporaries_are_a_tenth_of_the_leaf(shape: tuple[int, ...], bits: int) -> None:
    tx = adam_fn.adamw(1e-3, storage=Block(bits), weight_decay=0.1)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, leaf)
    memory = adam_fn.make_step(tx).lower(leaf, state, leaf).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * leaf.size * 4
    assert memory.alias_size_in_bytes > memory.output_size_in_bytes - 1000  # In place, save for a table of pointers.


def test_which_leaves_are_cut() -> None:
    """Large ones with codes; not others, which have nothing to gain."""

    def loops(tx: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        return _loops(tx.update, leaf, jax.eval_shape(tx.init, leaf), leaf)

    assert all(loops(TX, shape) == 1 for shape in SHAPES)
    assert loops(TX, (1 << 19,)) == loops(TX, (1031, 1033)) == loops(TX, ((1 << 20) + 1,)) == 0
    assert loops(TX, (8, 1 << 20)) == 0, "tiles of one row would be gathered where the rows are shared among devices"
    assert loops(TX, (1024, 1024), jnp.complex64) == 0
    assert loops(adam_fn.adam(1e-3), (1024, 1024)) == loops(adam_fn.adam(1e-3, mu_dtype="bfloat16"), (1024, 1024)) == 0


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1024, 1024), PartitionSpec("a")),
        ((512, 8192), PartitionSpec(None, "b")),
        ((512, 8192), PartitionSpec("a", "b")),
        ((1 << 20,), PartitionSpec(("a", "b"))),
    ],
    ids=str,
)
def test_a_cut_leaf_on_a_mesh(shape: tuple[int, ...], spec: PartitionSpec) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    p = jax.random.normal(jax.random.key(0), shape)
    sharded = jax.device_put(p, NamedSharding(mesh, spec))
    results = []
    for start in (sharded, p):
        state, grads, x = jax.jit(TX.init)(start), jnp.sin(start), jnp.copy(start)
        step = adam_fn.make_step(TX)
        if not results:
            text = step.lower(x, state, grads).compile().as_text() or ""
            assert not [name for name in ("all-", "collective-", "reduce-scatter") if name in text]
        for _ in range(2):
            x, state = step(x, state, grads)
        results.append((x, state))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert (np.asarray(a) != np.asarray(b)).mean() < 1e-4
    parts = [results[0][0], *jax.tree.leaves(results[0][1].slots)]
    assert all(part.sharding.is_equivalent_to(sharded.sharding, part.ndim) for part in parts)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_large_leaves_with_explicit_axes_and_in_shard_map(kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    p = jax.device_put(jnp.ones((2048, 4096)), NamedSharding(mesh, PartitionSpec("a")))
    if kind == AxisType.Explicit:
        state = jax.jit(TX.init)(p)
        u, _ = jax.jit(TX.update)(p, state, p)
        alone = jnp.ones(p.shape)
        np.testing.assert_allclose(u, TX.update(alone, TX.init(alone), alone)[0], rtol=1e-6)
    else:

        def step(p: jax.Array) -> Any:
            return TX.update(p, TX.init(p), p)[0]

        u = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a")))(p)
    assert u.sharding.is_equivalent_to(p.sharding, 2)
    np.testing.assert_allclose(u, -1e-2 * 1.1, rtol=0.2)


def test_derivatives_and_batches_of_cut_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    p = jax.random.normal(jax.random.key(0), (1024, 1024))

    def change(rate: jax.Array, g: jax.Array) -> jax.Array:
        tx = adam_fn.adamw(rate, storage=Storage(mu=Block(8)))
        updates, state = tx.update(g, tx.init(p), p)
        return jnp.vdot(jnp.asarray(tx.update(jnp.sin(g), state, p)[0]), p) + jnp.vdot(jnp.asarray(updates), p)

    def both() -> Any:
        derivatives = jax.jit(jax.grad(change, (0, 1)))(jnp.float32(1e-2), p)
        batch = jax.jit(jax.vmap(lambda p, g: TX.update(g, TX.init(p), p)))(jnp.stack([p, -p]), jnp.stack([p, 2 * p]))
        return derivatives, batch

    found = both()
    _whole(monkeypatch)
    expected = both()
    assert jnp.abs(found[0][1]).max() > 0
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-4, atol=1e-6)


def test_without_jit_and_at_any_count() -> None:
    g = jax.random.normal(jax.random.key(0), (1024, 1024))
    tx = adam_fn.adam(1e-2, storage=Block(8))
    state = tx.init(g)
    expected, _ = tx.update(g, state)
    with jax.disable_jit():
        found, _ = tx.update(g, state)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for count in (-1, -(2**31), 2**31 - 1):
        found, _ = tx.update(g, state._replace(count=jnp.int32(count)))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_bits_of_a_part_are_those_of_the_whole() -> None:
    whole = random_bits(1, 2, 3, (6, 8, 5))
    for axis, stride in ((0, 3), (1, 4)):
        shape = [6, 8, 5]
        shape[axis] //= stride
        for start in range(stride):
            found = random_bits(1, 2, 3, shape, Part(axis, stride, jnp.int32(start)))
            np.testing.assert_array_equal(found, whole[(slice(None),) * axis + (slice(start, None, stride),)])


class Merged(Block):
    """Stores rows one after the other, against the law of `group`."""

    def encode(self, x: jax.Array, noise: Any = None) -> Any:
        stored: Any = super().encode(x, noise)
        return {name: part.reshape(-1, part.shape[-1]) for name, part in stored.items()}

    def decode(self, stored: Any, dtype: Any, shape: tuple[int, ...]) -> jax.Array:
        return super().decode({"codes": stored["codes"].reshape(*shape[:-1], -1, 32),
                               "scales": stored["scales"].reshape(*shape[:-1], -1)}, dtype, shape)  # fmt: skip


def test_a_codec_that_merges_axes_is_not_cut() -> None:
    g = jax.random.normal(jax.random.key(0), (1024, 1024))
    tx = adam_fn.adam(1e-2, storage=Storage(mu=Merged(8)))
    assert _loops(tx.update, g, tx.init(g)) == 0


def test_what_make_step_leaves_alone() -> None:
    """Leaves without a gradient, frozen ones and integers stay as they are; a state of another one is an error."""
    params: Any = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.arange(3), "none": None, "frozen": jnp.ones(2)}
    tx = adam_fn.adam(1e-1, frozen=adam_fn.masks.path("frozen"))
    grads = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": None, "none": None, "frozen": jnp.ones(2)}
    updates, after = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, {**updates, "n": jnp.zeros(3, int)})
    found, state = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    for a, b in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, after)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, float), np.asarray(b, float))
    with pytest.raises(TypeError, match="not a state of this one"):
        adam_fn.make_step(tx)(found, optax.adam(1e-3).init({"w": jnp.ones(2)}), grads)
