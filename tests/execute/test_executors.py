"""The ways to run a leaf: the same codes by each, with little memory, wherever the leaf lies."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS, Case, name, rule_of
from helpers import compiling
from helpers.runs import full_jit
from helpers.ways import CODED, KERNELS, MACHINES, TX, check, stepped, ways_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Block, Cast, Storage
from adam_fn.execute import cpu, kernel, tiles
from adam_fn.execute.body import PARAMETERS, UPDATES, Inputs
from adam_fn.execute.sources import PARAMETER, sources
from adam_fn.execute.step import Step, in_one, whole
from adam_fn.execute.store import Form
from adam_fn.layout import layout
from adam_fn.noise import Part, random_bits
from adam_fn.rule import Clock
from adam_fn.write import Masters

#: Every storage with every write; the members of the family take them in turn.
KINDS = list(itertools.product((Block(8), Block(4), Cast("bfloat16"), None),
                               (PARAMETERS, UPDATES, Masters(16, parameters=True), Masters(8))))  # fmt: skip


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_rule_by_every_way(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("TILE", "PADDED"):
        monkeypatch.setattr(tiles, size, 4096)  # One block of 32 rows of 128.
    i = MEMBERS.index(case)
    bits, write = ((8, PARAMETERS), (4, UPDATES))[i % 2]
    plain = tuple(way for way in CODED if way not in KERNELS)
    check(stepped(case.make(1e-2, storage=Block(bits)), (2, 96, 128), write, plain), f"{bits} bits")
    storage, write = KINDS[i % len(KINDS)]
    # The kernels of the two machines, which differ in their blocks only, take turns.
    ways = ("rows" if isinstance(storage, Block) else "whole", list(KERNELS)[i % 2])
    check(stepped(case.make(1e-2, storage=storage), (2, 96, 128), write, ways), f"{storage} {write}")


SHAPES = [(100, 128), (2, 64, 8, 128), (300, 256), (8192,), (9, 7, 128), (5000,), (4097, 1), (1, 8192), (20, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_by_every_way(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are no multiple of 32, several axes, vectors; and the masters of bfloat16 parameters."""
    for size in ("TILE", "PADDED"):
        monkeypatch.setattr(tiles, size, 4096)
    blocks = layout(shape)
    assert blocks is not None
    leaf = Inputs(jnp.zeros(shape), None)
    unfit = {name for name, machine in MACHINES.items() if kernel.suited(machine, leaf) is None}
    assert unfit == {"TPU kernel", "GPU kernel"} if shape in SHAPES[4:] else "TPU kernel" not in unfit
    ways = tuple(way for way in CODED if way not in unfit and (blocks.even or way not in ("blocks", "tiles")))
    check(stepped(TX, shape, Masters(16, parameters=True), ways), "masters")
    if shape in SHAPES[:4]:
        uncoded = adam_fn.adamw(1e-2, storage=Storage(nu=Block(8)), weight_decay=0.1)
        check(stepped(uncoded, shape, UPDATES, ways), "one slot without codes")


def test_noise_is_of_the_leaf_and_not_of_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile with the numbers of its own place would round other elements up: the check would see it."""
    for size in ("TILE", "PADDED"):
        monkeypatch.setattr(tiles, size, 4096)
    tx = adam_fn.adam(1e-2, storage=Storage(nu=Block(4)))
    right = stepped(tx, (256, 64), PARAMETERS, ("rows", "tiles"))
    check(right, "")
    monkeypatch.setattr(tiles.Part, "along", lambda *_: None)
    with pytest.raises(AssertionError):
        check(stepped(tx, (256, 64), PARAMETERS, ("rows", "tiles")), "")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_masters_without_scales_by_every_way(dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4096)
    tx, shape = adam_fn.adamw(1e-2, storage=Cast(dtype), weight_decay=0.1), (160, 64)
    step = Step(dict(tx.update.spec.codecs), Masters(16, parameters=True), Form(None))
    keys = iter(jax.random.split(jax.random.key(0), 3))
    g, p = (jax.random.normal(next(keys), shape).astype(jnp.bfloat16) for _ in range(2))
    low = jax.random.randint(next(keys), shape, -(2**15), 2**15, jnp.int32).astype(jnp.int16)
    slots = {name: (0.1 * jnp.abs(g)).astype(dtype or jnp.float32) for name in step.codecs}
    clock = Clock(jnp.int32(0), (jnp.float32(0.1), jnp.float32(0.001)), None, None)
    ways = (functools.partial(way, step) for way in (whole, in_one, tiles.in_tiles))
    first, *others = (full_jit(way)(rule_of(tx), Inputs(g, p, low), slots, clock) for way in ways)
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)) > 2).mean() < 1e-2
            if a.dtype != jnp.int16:
                np.testing.assert_allclose(np.asarray(b, np.float32), np.asarray(a, np.float32), rtol=1e-2)


def test_which_way_each_device_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = functools.partial(ways_of, monkeypatch)
    rows = "default: in_rows"
    assert found(TX, (256, 256)) == {rows, "tpu: in_blocks", "cpu: in_order"}
    assert found(TX, (50304, 768)) == {rows, "tpu: in_tiles", "cpu: in_order"}
    assert found(TX, (50257, 768)) == {rows, "tpu: in_padded_tiles", "cpu: in_order"}
    assert found(TX, (768, 50257)) == {rows, "tpu: in_tiles", "cpu: in_order"}
    assert found(TX, (64, 64)) == {rows, "tpu: in_blocks"}
    assert found(TX, (100, 96)) == set(), "one way only"
    assert found(adam_fn.adam(1e-3), (1024, 1024)) == set()
    assert found(adam_fn.adam(1e-3, mu_dtype="bfloat16"), (1024, 1024)) == {"default: whole", "cpu: in_order"}


def test_what_new_slots_are_computed_from() -> None:
    def found(tx: adam_fn.Transformation) -> dict[str, set[str]]:
        rule = rule_of(tx)
        clock = Clock(jnp.int32(1), (jnp.ones(()),) * rule.weights)
        return sources(rule, Inputs(jnp.ones(3), jnp.ones(3)), rule.slots, clock)

    assert found(adam_fn.adamw(1e-2)) == {"mu": {"mu"}, "nu": {"nu"}}
    l2 = adam_fn.adam(1e-2, weight_decay=0.1, decay="l2")
    assert found(l2) == {"mu": {"mu", PARAMETER}, "nu": {"nu", PARAMETER}}
    assert found(adam_fn.adan(1e-2))["grad"] == set()


@pytest.mark.parametrize("shape", [(4096, 4096), (50304, 384), (1 << 22,)], ids=str)
@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "bfloat16", "masters", "updates"])
def test_temporaries_on_a_cpu(shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four int16 arrays of a number a block, 1/16 of the leaf; every leaf is changed in its place."""
    storage = {"4 bits": Block(4), "bfloat16": Cast("bfloat16")}.get(kind, Block(8))
    tx: Any = adam_fn.adamw(1e-3, storage=storage, weight_decay=0.1)
    dtype = "bfloat16" if kind in ("bfloat16", "masters") else "float32"
    if kind == "masters":
        tx = adam_fn.master_weights(tx)
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(tx.init, leaf)
    step = jax.jit(tx.update, donate_argnums=1) if kind == "updates" else adam_fn.make_step(tx)
    monkeypatch.setattr(cpu, "alone", lambda: True)
    jax.clear_caches()
    memory = step.lower(leaf, state, leaf).compile(compiling.FULL).memory_analysis()
    assert memory is not None
    # Both halves of a master are computed from both, which takes float32 arrays in between.
    assert memory.temp_size_in_bytes <= (2.1 if kind == "masters" else 0.063) * leaf.size * 4
    if kind == "updates":
        return
    assert memory.alias_size_in_bytes > memory.output_size_in_bytes - 1000  # In place, save for a table of pointers.


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
def test_a_large_leaf_on_a_mesh(shape: tuple[int, ...], spec: PartitionSpec) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    p = jax.random.normal(jax.random.key(0), shape)
    sharded = jax.device_put(p, NamedSharding(mesh, spec))
    results = []
    for start in (sharded, p):
        state, grads, x = jax.jit(TX.init)(start), jnp.sin(start), jnp.copy(start)
        step = adam_fn.make_step(TX)
        if not results:
            text = step.lower(x, state, grads).compile(compiling.FULL).as_text() or ""
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


def test_derivatives_and_batches_of_large_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(cpu, "LARGE", 1 << 40)
    jax.clear_caches()
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
    for axis, length in ((0, 3), (1, 4)):
        shape = [6, 8, 5]
        rows, shape[axis] = shape[axis], length
        for start in range(0, rows, length):
            starts = [jnp.int32(start) if i == axis else 0 for i in range(3)]
            found = random_bits(1, 2, 3, shape, Part(whole.shape, starts))
            np.testing.assert_array_equal(found, jax.lax.slice_in_dim(whole, start, start + length, axis=axis))


@dataclasses.dataclass(frozen=True)
class Half(adam_fn.Codec):
    """A codec of a user's own: half of the number."""

    def encode(self, x: jax.Array, scale: Any = None, chance: Any = None) -> jax.Array:
        return (x / 2).astype(jnp.bfloat16)

    def decode(self, codes: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        return 2 * codes.astype(dtype)


def test_a_codec_of_a_users_own() -> None:
    g = jax.random.normal(jax.random.key(0), (512, 512))
    states = []
    for storage in (Half(), Cast("bfloat16")):
        tx = adam_fn.adam(1e-2, storage=storage)
        state, u = tx.init(g), g
        for _ in range(3):
            u, state = tx.update(g, state)
        states.append(u)
    np.testing.assert_allclose(states[0], states[1], rtol=1e-6)


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
    with pytest.raises(TypeError, match="which this transformation did not make"):
        adam_fn.make_step(tx)(found, optax.adam(1e-3).init({"w": jnp.ones(2)}), grads)
