"""The ways to run a step: the same codes by each, in place, wherever the leaf lies."""

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
from helpers.states import clock_at, count_of, slots_of, stored_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn.algebra.rule import Clock
from adam_fn.execute import cpu, run
from adam_fn.execute.body import Times, body
from adam_fn.execute.destination import PARAMETERS, UPDATES, Destination, Inputs
from adam_fn.execute.sources import PARAMETER, sources
from adam_fn.storage.low_bit_codes import codecs_of
from adam_fn.storage.noise import time_offsets
from adam_fn.wrappers.masters import MasterDestination
from adam_fn.wrappers.rounding import RoundedDestination

STORAGES = ("bfloat16", "24bit", "16bit", "float32")
WRITES: tuple[Destination, ...] = (
    PARAMETERS,
    UPDATES,
    MasterDestination(16, parameters=True),
    MasterDestination(8),
    RoundedDestination(parameters=True),
)
#: Every storage with every write; the members of the family take them in turn.
KINDS = list(itertools.product(STORAGES, WRITES))
WAYS = {"body": body, "order": cpu.ordered, "apart": run.apart}
TX = adam_fn.adamw(1e-2, storage="24bit", weight_decay=0.1)


def stepped(tx: adam_fn.Transformation, shape: tuple[int, ...], write: Destination, steps: int = 3) -> list[Any]:
    """Some steps of a leaf, each by every way from what the first way left."""
    rule, codecs = rule_of(tx), dict(tx.update.definition.codecs)
    narrow = write.for_dtype(np.dtype(jnp.bfloat16)) is write and write not in (PARAMETERS, UPDATES)
    p = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16 if narrow else jnp.float32)
    low = jnp.zeros(shape, f"int{write.bits}") if isinstance(write, MasterDestination) else None
    stored = stored_of(tx, tx.init(p))

    def every(count: jax.Array, clock: Clock, p: jax.Array, low: Any, stored: Any) -> Any:
        g = jax.random.normal(jax.random.key(count), shape) * jnp.exp(jax.random.normal(jax.random.key(7), shape))
        inputs = Inputs(jax.lax.optimization_barrier(g.astype(p.dtype)), p, low)
        starts = time_offsets(count, [*rule.slots, "parameters"])
        now = Times(starts, starts["parameters"] if isinstance(write, RoundedDestination) else None)
        ways = WAYS if low is not None else {"body": body, "order": cpu.ordered}
        arrays = rule.at(count), codecs, write, inputs, stored, clock, now
        return [way(*arrays) for way in ways.values()]

    compiled, found = full_jit(every), []
    for t in range(steps):
        done = compiled(jnp.int32(t), clock_at(rule, t), p, low, stored)
        found.append(done)
        stored, low = done[0].stored, done[0].remainder
        p = done[0].result if write.parameters else p
    return found


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_executor_computes_the_same_steps(case: Case) -> None:
    """A product contracted with a sum in one program and not in the other may move a code in a thousand."""
    for storage, write in KINDS[MEMBERS.index(case) % 5 :: 5]:
        for first, *others in stepped(case.make(1e-2, storage=storage), (2, 24, 128), write):
            assert any(np.ptp(np.asarray(x, np.float32)) > 0 for x in first.stored.values())
            for other in others:
                for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype)
                    wide, other_wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
                    if a.dtype == jnp.float32:
                        np.testing.assert_allclose(other_wide, wide, rtol=2e-5, atol=1e-6, err_msg=f"{storage} {write}")
                    elif a is first.remainder:  # The last bit of a master is one of float32.
                        assert (np.abs(wide - other_wide) > 2).mean() < 2e-2
                    else:
                        assert (wide != other_wide).mean() < 2e-3, f"{storage} {write} {a.dtype}"


def test_which_way_each_device_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(tx: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> set[str]:
        seen: set[str] = set()

        def record(*args: Any, **ways: Any) -> Any:
            if ("cpu" in ways and isinstance(ways["cpu"], functools.partial)) or "tpu" in ways:  # Not of a codec.
                seen.update(ways)
            return ways["default"](*args)

        monkeypatch.setattr(run.jax.lax, "platform_dependent", record)
        monkeypatch.setattr(cpu, "single_device", lambda: True)
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        jax.clear_caches()
        jax.eval_shape(tx.update, leaf, jax.eval_shape(tx.init, leaf), leaf)
        return seen

    assert found(TX, (256, 256)) == {"default", "cpu"}
    assert found(TX, (64, 64)) == set(), "one way only"
    assert found(adam_fn.adam(1e-3), (1024, 1024)) == set()
    assert found(adam_fn.adam(1e-3, mu_dtype="bfloat16"), (1024, 1024)) == {"default", "cpu"}
    assert found(adam_fn.master_weights(adam_fn.adam(1e-3)), (64, 64), jnp.bfloat16) == {"default", "tpu"}
    assert found(adam_fn.master_weights(TX), (256, 256), jnp.bfloat16) == {"default", "cpu", "tpu"}


def test_what_the_new_state_is_computed_from() -> None:
    def found(tx: adam_fn.Transformation) -> dict[str, set[str]]:
        rule, codecs = rule_of(tx), dict(tx.update.definition.codecs)
        clock = clock_at(rule, 1)
        now = Times(time_offsets(jnp.int32(1), list(rule.slots)))

        def step(p: Any, stored: Any) -> Any:
            return body(rule, codecs, UPDATES, Inputs(jnp.ones(3), p), stored, clock, now).stored

        return sources(step, jnp.ones(3), stored_of(tx, tx.init(jnp.ones(3))))

    assert found(adam_fn.adamw(1e-2)) == {"mu": {"mu"}, "nu": {"nu"}}
    assert found(TX) == {"mu": {"mu", "nu"}, "nu": {"nu"}}, "m is in units of v"
    assert found(adam_fn.adamw(1e-2, storage="16bit")) == {"mu_nu": {"mu_nu"}}
    l2 = adam_fn.adam(1e-2, weight_decay=0.1, decay="l2")
    assert found(l2) == {"mu": {"mu", PARAMETER}, "nu": {"nu", PARAMETER}}
    assert found(adam_fn.adan(1e-2))["grad"] == {"grad"}, "of which the compiler does not know that it is never read"


@pytest.mark.parametrize("storage", STORAGES[:3])
@pytest.mark.parametrize("kind", ["parameters", "bfloat16", "masters", "rounding", "updates"])
def test_temporaries_on_a_cpu(storage: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most .02 of the leaf; every array is changed in its place."""
    tx: Any = adam_fn.adamw(1e-3, storage=storage, weight_decay=0.1)
    tx = {"masters": adam_fn.master_weights, "rounding": adam_fn.stochastic_rounding}.get(kind, lambda tx: tx)(tx)
    leaf = jax.ShapeDtypeStruct((2048, 2048), "float32" if kind in ("parameters", "updates") else "bfloat16")
    state = jax.eval_shape(tx.init, leaf)
    step = jax.jit(tx.update, donate_argnums=1) if kind == "updates" else adam_fn.make_step(tx)
    monkeypatch.setattr(cpu, "single_device", lambda: True)
    jax.clear_caches()
    memory = step.lower(leaf, state, leaf).compile(compiling.FULL).memory_analysis()
    assert memory is not None
    # Both halves of a master are computed from both, and the parameter is the first to be overwritten.
    assert memory.temp_size_in_bytes <= (0.52 if kind == "masters" else 0.02) * leaf.size * 4
    if kind != "updates":
        assert memory.alias_size_in_bytes > memory.output_size_in_bytes - 1000  # In place, save for pointers.


MESHES = [
    (AxisType.Auto, "bfloat16"),
    (AxisType.Auto, "16bit"),
    (AxisType.Explicit, "24bit"),
    (AxisType.Explicit, "16bit"),
]


@pytest.mark.parametrize(("kind", "storage"), MESHES, ids=str)
def test_sharded_steps_are_those_of_one_device_bit_for_bit(kind: AxisType, storage: Any) -> None:
    """Without any communication; with masters, stochastic rounding and neither; of every rank and division."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    specs = {
        "vector": ((96,), PartitionSpec("a")),
        "columns": ((6, 64), PartitionSpec(None, "b")),
        "both": ((32, 64), PartitionSpec("a", "b")),
        "stack": ((2, 4, 8, 6), PartitionSpec("b", "a")),
    }
    one = {x: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) for x, (shape, _) in specs.items()}
    several = {x: jax.device_put(one[x], NamedSharding(mesh, spec)) for x, (_, spec) in specs.items()}
    for wrap in (lambda tx: tx, adam_fn.master_weights, adam_fn.stochastic_rounding):
        tx: Any = wrap(adam_fn.adamw(1e-2, storage=storage, weight_decay=0.1))
        results = []
        for params in (several, one):
            state, step = jax.jit(tx.init)(params), adam_fn.make_step(tx)
            p = jax.tree.map(jnp.copy, params)
            if params is several:
                text = step.lower(p, state, params).compile(compiling.FULL).as_text() or ""
                assert not [word for word in ("all-", "collective-", "reduce-scatter") if word in text]
                for slot in slots_of(state).values():
                    assert all(slot[x].sharding.is_equivalent_to(p.sharding, p.ndim) for x, p in params.items())
            for _ in range(3):
                p, state = step(p, state, jax.tree.map(jnp.sin, params))
            results.append((p, state))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_shards_of_any_length_step_as_leaves_of_their_shape() -> None:
    """Any length of a shard; a shard is stepped as a leaf of its shape would be."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    p = jax.random.normal(jax.random.key(0), (16, 300))
    for storage in ("24bit", "16bit"):
        tx = adam_fn.adamw(1e-2, storage=storage)

        def step(p: jax.Array, tx: Any = tx) -> Any:
            return tx.update(jnp.sin(p), tx.init(p), p)[0]

        spec = PartitionSpec("a")
        found = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(p)
        np.testing.assert_allclose(found, jnp.concatenate([step(x) for x in jnp.split(p, 8)]), rtol=1e-6)


def test_derivatives_and_batches_of_large_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    p = jax.random.normal(jax.random.key(0), (512, 512))

    def change(rate: jax.Array, g: jax.Array) -> jax.Array:
        tx = adam_fn.adamw(rate, storage="24bit")
        updates, state = tx.update(g, tx.init(p), p)
        return jnp.vdot(jnp.asarray(tx.update(jnp.sin(g), state, p)[0]), p) + jnp.vdot(jnp.asarray(updates), p)

    def both() -> Any:
        derivatives = jax.jit(jax.grad(change, (0, 1)))(jnp.float32(1e-2), p)
        batch = jax.jit(jax.vmap(lambda p, g: TX.update(g, TX.init(p), p)))(jnp.stack([p, -p]), jnp.stack([p, 2 * p]))
        return derivatives, batch

    monkeypatch.setattr(cpu, "single_device", lambda: True)
    jax.clear_caches()
    found = both()
    monkeypatch.setattr(cpu, "LARGE", 1 << 40)
    jax.clear_caches()
    expected = both()
    assert jnp.abs(found[0][1]).max() > 0
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = np.asarray(x, float), np.asarray(y, float)
        assert (np.abs(a - b) > 1e-4 * np.abs(b) + 1e-6).mean() < 1e-4


def test_coded_moments_are_the_same_without_jit() -> None:
    g = jax.random.normal(jax.random.key(0), (300, 300))
    tx = adam_fn.adam(1e-2, storage="24bit")
    state = tx.init(g)
    expected, after = tx.update(g, state)
    with jax.disable_jit():
        found, again = tx.update(g, state)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(slots_of(after)["mu"]) != np.asarray(slots_of(again)["mu"])).mean() < 1e-3


@pytest.mark.parametrize("count", [0, 2**24, 2**31 - 2, 2**31 - 1])
def test_a_coded_step_from_zero_moments_is_exact_at_any_count(count: int) -> None:
    """Of moments that are 0 nothing is lost by their storage, and the dither has a time for every count."""
    g, found = jax.random.normal(jax.random.key(0), (300, 300)), []
    for storage in ("24bit", "float32"):
        tx = adam_fn.adam(1e-2, storage=storage)
        adam, rate = tx.init(g)
        updates, after = tx.update(g, (adam._replace(count=jnp.int32(count)), rate))
        assert int(count_of(after)) == min(count + 1, 2**31 - 1)
        found.append(updates)
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_what_make_step_leaves_alone() -> None:
    """Leaves without a gradient, frozen ones and integers stay as they are; a state of another one is an error."""
    params: Any = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.arange(3), "none": None, "frozen": jnp.ones(2)}
    tx = adam_fn.adam(1e-1, frozen=adam_fn.masks.path("frozen"), storage="24bit")
    grads = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": None, "none": None, "frozen": jnp.ones(2)}
    updates, after = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, {**updates, "n": jnp.zeros(3, int)})
    found, state = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    for a, b in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, after)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, float), np.asarray(b, float))
    with pytest.raises(TypeError, match="was the state made by this transformation"):
        adam_fn.make_step(tx)(found, optax.adamw(1e-3).init(params), grads)
    plain = adam_fn.adam(1e-1, frozen=adam_fn.masks.path("frozen")).init(params)
    with pytest.raises(ValueError, match=r"state's mu of w is float32\[3, 2\], expected int8\[3, 2\]"):
        adam_fn.make_step(tx)(found, plain, grads)


def test_codecs_are_static() -> None:
    """Equal transformations share programs, whatever their storage."""
    for storage in STORAGES:
        assert adam_fn.adam(1e-3, storage=storage) == adam_fn.adam(1e-3, storage=storage)
        assert hash(codecs_of(storage, adam_fn.Adam().slots)) == hash(codecs_of(storage, adam_fn.Adam().slots))
    compiled = functools.partial(jax.jit(lambda tx, g: tx.update(g, tx.init(g))[0], static_argnums=0))
    for _ in range(2):
        compiled(adam_fn.adam(1e-3, storage="16bit"), jnp.ones(3))
    assert compiled.func._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
