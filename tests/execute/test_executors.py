"""The executors of a step: each computes the same codes, in place, wherever the leaf lies."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS, Case, name, rule_of
from helpers import compiling
from helpers.runs import full_jit
from helpers.states import clock_at, stored_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn.algebra.rule import Clock
from adam_fn.execute import cpu, run
from adam_fn.execute.body import Times, body
from adam_fn.execute.destination import PARAMETERS, UPDATES, Destination, Inputs
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
WAYS = {"body": body, "passes": cpu.in_passes, "apart": run.apart}
TX = adam_fn.adamw(1e-2, storage="24bit", weight_decay=0.1)


def stepped(tx: adam_fn.Transformation, shape: tuple[int, ...], write: Destination, steps: int = 3) -> list[Any]:
    """The results of some steps of a leaf, each by every executor from what the first executor left."""
    rule, codecs = rule_of(tx), dict(tx.update.definition.codecs)
    narrow = write.for_dtype(np.dtype(jnp.bfloat16)) is write and write not in (PARAMETERS, UPDATES)
    values = np.random.default_rng(0).standard_normal((steps + 2, *shape))
    p, *grads = jnp.asarray([values[0], *values[2:] * np.exp(values[1])], jnp.bfloat16 if narrow else jnp.float32)
    low = jnp.zeros(shape, f"int{write.bits}") if isinstance(write, MasterDestination) else None
    stored = stored_of(tx, tx.init(p))

    def every(count: jax.Array, clock: Clock, g: jax.Array, p: jax.Array, low: Any, stored: Any) -> Any:
        inputs = Inputs(g, p, low)
        starts = time_offsets(count, [*rule.slots, "parameters"])
        now = Times(starts, starts["parameters"] if isinstance(write, RoundedDestination) else None)
        ways = WAYS if low is not None else {"body": body, "passes": cpu.in_passes}
        arrays = rule.at(count), codecs, write, inputs, stored, clock, now
        return [way(*arrays) for way in ways.values()]

    compiled, found = jax.jit(every), []
    for t, g in enumerate(grads):
        done = compiled(jnp.int32(t), clock_at(rule, t), g, p, low, stored)
        found.append(done)
        stored, low = done[0].stored, done[0].remainder
        p = done[0].result if write.parameters else p
    return found


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_executor_computes_the_same_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code in a thousand may differ, where only one of the programs contracts a product and a sum."""
    monkeypatch.setattr(cpu, "single_device", lambda: True)
    for storage, write in KINDS[MEMBERS.index(case) % 10 :: 10]:
        for first, *others in stepped(case.make(1e-2, storage=storage), (2, 24, 128), write):
            assert any(np.ptp(np.asarray(x, np.float32)) > 0 for x in first.stored.values())
            for other in others:
                for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype)
                    wide, other_wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
                    if a.dtype == jnp.float32:
                        np.testing.assert_allclose(other_wide, wide, rtol=2e-5, atol=1e-6, err_msg=f"{storage} {write}")
                    elif a is first.remainder:  # A master's last bits are those of float32.
                        assert (np.abs(wide - other_wide) > 2).mean() < 2e-2
                    else:
                        assert (wide != other_wide).mean() < 2e-3, f"{storage} {write} {a.dtype}"


def test_each_platform_uses_its_executor() -> None:
    """Barriers separate passes on a CPU and two computations on a TPU, and elsewhere the scalars that leaves share."""

    def barriers(tx: Any, size: int, dtype: str = "float32", leaves: int = 1) -> set[str]:
        leaf = [jax.ShapeDtypeStruct((size, size), dtype)] * leaves
        traced = jax.jit(tx.update).trace(leaf, jax.eval_shape(tx.init, leaf), leaf)
        texts = {x: traced.lower(lowering_platforms=(x,)).as_text() for x in ("cpu", "cuda", "tpu")}
        return {platform for platform, text in texts.items() if "optimization_barrier" in text}

    assert barriers(TX, 256) == {"cpu"}
    assert barriers(TX, 64) == set()
    assert barriers(adam_fn.adam(1e-3), 1024) == set()
    assert barriers(adam_fn.adam(1e-3), 64, leaves=2) == {"cuda", "tpu"}
    assert barriers(adam_fn.adam(1e-3, mu_dtype="bfloat16"), 1024) == {"cpu"}
    assert barriers(adam_fn.master_weights(adam_fn.adam(1e-3)), 64, "bfloat16") == {"tpu"}
    assert barriers(adam_fn.master_weights(TX), 256, "bfloat16") == {"cpu", "tpu"}


@pytest.mark.parametrize("storage", STORAGES[:3])
@pytest.mark.parametrize("kind", ["parameters", "bfloat16", "masters", "rounding", "update and apply"])
def test_temporaries_on_a_cpu_are_small(storage: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are at most 0.02 of the leaf, plus a copy of the old state if the caller applies the updates."""
    make = adam_fn.adan if storage == "bfloat16" else adam_fn.adamw  # The order of Adan's passes matters.
    tx: Any = make(1e-3, storage=storage, weight_decay=0.1)
    tx = {"masters": adam_fn.master_weights, "rounding": adam_fn.stochastic_rounding}.get(kind, lambda tx: tx)(tx)
    leaf = jax.ShapeDtypeStruct((2048, 2048), "bfloat16" if kind in ("bfloat16", "masters", "rounding") else "float32")
    state = jax.eval_shape(tx.init, leaf)

    def applied(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(applied, donate_argnums=(0, 1)) if kind == "update and apply" else adam_fn.make_step(tx)
    monkeypatch.setattr(cpu, "single_device", lambda: True)
    jax.clear_caches()
    memory = step.lower(leaf, state, leaf).compile(compiling.FULL).memory_analysis()
    assert memory is not None
    copied = {
        # Both halves of a master are computed from both, and the parameter is the first to be overwritten.
        "masters": leaf.size * 2,
        "update and apply": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }
    assert memory.temp_size_in_bytes <= copied.get(kind, 0) + 0.02 * leaf.size * 4
    assert memory.alias_size_in_bytes > memory.output_size_in_bytes - 1000  # In place, except for pointers.


@pytest.mark.parametrize("large", [False, True], ids=["body", "passes"])
@pytest.mark.parametrize(("kind", "storage"), [(AxisType.Auto, "16bit"), (AxisType.Explicit, "24bit")], ids=str)
def test_sharded_steps_are_those_of_one_device_bit_for_bit(
    kind: AxisType, storage: Any, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays live where the parameters do, without communication; with masters, stochastic rounding and neither."""
    if large:
        monkeypatch.setattr(cpu, "LARGE", 0)
    jax.clear_caches()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    specs = {
        "vector": ((96,), PartitionSpec("a")),
        "both": ((32, 64), PartitionSpec("a", "b")),
        "stack": ((2, 4, 8, 6), PartitionSpec("b", "a")),
    }
    values = np.random.default_rng(0).standard_normal(32 * 64)
    one = {x: jnp.asarray(values[: np.prod(shape)].reshape(shape), jnp.bfloat16) for x, (shape, _) in specs.items()}
    several = {x: jax.device_put(one[x], NamedSharding(mesh, spec)) for x, (_, spec) in specs.items()}
    plain = adam_fn.adamw(1e-2, storage=storage, weight_decay=0.1)
    sgd, masters, rounding = optax.sgd(2.0**-8), adam_fn.master_weights, adam_fn.stochastic_rounding
    txs: list[Any] = [plain, masters(plain), rounding(plain), masters(sgd, 8), rounding(sgd)]
    places = {p.shape: p.sharding for p in several.values()}

    @full_jit
    def step(pairs: Any, grads: Any) -> Any:
        return [adam_fn.make_step(tx)(params, state, grads) for tx, (params, state) in zip(txs, pairs, strict=True)]

    results = []
    for params in (several, one):
        pairs = jax.jit(lambda params: [(params, tx.init(params)) for tx in txs])(params)
        compiled = step.lower(pairs, params).compile()
        found = [word for word in ("all-", "collective-", "reduce-scatter") if word in (compiled.as_text() or "")]
        assert not found
        for scale in (1.0, -0.5, 0.25):
            pairs = compiled(pairs, jax.tree.map(lambda p: scale * p, params))  # noqa: B023
        results.append(pairs)
    for x in jax.tree.leaves(([tx.init(several) for tx in txs], results[0])):
        assert x.ndim == 0 or x.sharding.is_equivalent_to(places[x.shape], x.ndim)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_passes_have_the_derivatives_and_batches_of_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    p = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)

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


def test_make_step_leaves_untrained_leaves_alone() -> None:
    """Leaves without a gradient, frozen ones and integers stay as they are; another optimizer's state is an error."""
    params: Any = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.arange(3), "none": None, "frozen": jnp.ones(2)}
    grads = {**params, "n": None}
    plain, tx = (adam_fn.adam(1e-1, frozen=adam_fn.masks.path("frozen"), storage=x) for x in (None, "24bit"))
    updates, after = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, {**updates, "n": jnp.zeros(3, int)})
    found, state = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    chex.assert_trees_all_equal((found, state), (expected, after), strict=True)
    with pytest.raises(ValueError, match=r"state's mu of w is float32\[3, 2\], expected int8\[3, 2\]"):
        adam_fn.make_step(tx)(found, plain.init(params), grads)
