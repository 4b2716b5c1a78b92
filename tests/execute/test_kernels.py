"""Kernels on several devices, and how they are asked for. `test_executors` compares them with the other ways."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rule_of
from helpers.ways import TX, ways_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Block, Storage
from adam_fn.execute import kernel
from adam_fn.execute.body import PARAMETERS, Inputs
from adam_fn.execute.mesh import on_mesh
from adam_fn.execute.step import Step
from adam_fn.execute.store import Form, store
from adam_fn.layout import layout
from adam_fn.rule import Clock

MACHINES = {"TPU": kernel.TPU, "GPU": kernel.GPU}


def step_of(machine: kernel.Machine, shape: tuple[int, ...], way: Any = on_mesh) -> tuple[Any, Any]:
    """A step of a leaf by an interpreted kernel, and what it takes: parameter, gradient and state."""
    rule, codecs = rule_of(TX), {name: codec for name, codec in TX.update.spec.codecs}  # noqa: C416
    p = jax.random.normal(jax.random.key(0), shape)
    stored = {name: store(codec, jnp.square(jnp.sin(9 * p))) for name, codec in codecs.items()}
    count = jnp.int32(5)

    def run(p: jax.Array, g: jax.Array, stored: Any) -> Any:
        step, inputs = Step(codecs, PARAMETERS, Form(layout(p.shape))), Inputs(g, p)
        blocks = kernel.suited(machine, inputs)
        assert blocks is not None
        clock = Clock(count, (jnp.float32(0.4), jnp.float32(0.01)), None, jnp.int32(3))
        return way(machine, step, rule.at(count), inputs, stored, clock, blocks=blocks, interpret=True)

    return run, (p, jnp.cos(7 * p), stored)


#: A leaf, how it lies on a mesh of 4 x 2, and whether its blocks then lie on one device each.
PLACES = [
    ((256, 512), ("a", "b"), True),
    ((256, 512), (("a", "b"), None), True),
    ((256, 1024), (None, ("a", "b")), True),
    ((8, 64, 128), ("a", "b"), True),
    ((1 << 15,), (("a", "b"),), True),
    ((100, 512), (None, "b"), True),
    ((192, 256), ("a", None), False),
    ((100, 256), ("a", None), False),
]


#: On a GPU there is no kernel for blocks that are not full.
MACHINES_AND_PLACES = [(machine, *place) for machine in MACHINES for place in PLACES
                       if machine == "TPU" or place[0][-2:][0] != 100]  # fmt: skip


@pytest.mark.parametrize(("machine", "shape", "spec", "apart"), MACHINES_AND_PLACES, ids=str)
def test_each_device_steps_its_own_part(machine: str, shape: Any, spec: Any, apart: bool) -> None:
    """The same as on one device, random numbers included; nothing is communicated where no block is divided."""
    run, (p, g, stored) = step_of(MACHINES[machine], shape)
    expected = jax.jit(run)(p, g, stored)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    p, g = jax.device_put((p, g), place)
    if apart:
        stored = jax.device_put(stored, place)
    compiled = jax.jit(run, out_shardings=place if apart else None).lower(p, g, stored).compile()
    text = compiled.as_text() or ""
    if apart:
        assert not [name for name in ("all-", "collective-", "reduce-scatter") if name in text]
    for found, wanted in zip(*map(jax.tree.leaves, (compiled(p, g, stored), expected)), strict=True):
        if jnp.issubdtype(wanted.dtype, jnp.floating):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("machine", MACHINES)
def test_inside_shard_map(machine: str) -> None:
    """There every device has the random numbers of its own shape, as in the other ways to run a step."""
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    run, given = step_of(MACHINES[machine], (256, 256), kernel.in_kernel)
    spec = PartitionSpec("a")
    # Interpreted, a kernel does not know what varies over the mesh; compiled, it does.
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(*given)
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: jnp.split(x, 2)[i], given)
        own = jax.jit(run)(*part)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(jnp.split(a, 2)[i].astype(float), b.astype(float), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_of_64_bits_in_a_kernel(machine: str) -> None:
    """TPUs have none: not even where `jax_enable_x64` makes them of Python's numbers."""
    run, given = step_of(MACHINES[machine], (256, 256))
    with jax.enable_x64(True):
        text = str(jax.make_jaxpr(run)(*given))
    assert "pallas_call" in text
    assert not re.search(r"[fiu]64\[\d", text[text.index("pallas_call") :])


def test_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tx = adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1, kernel=True)
    found = functools.partial(ways_of, monkeypatch, tx)
    kernels = {"tpu: in_kernel", "cuda: on_mesh"}
    assert found((256, 256)) == {"default: in_rows", "cpu: in_order", *kernels}
    assert found((50257, 768)) == {"default: in_rows", "cpu: in_order", "tpu: in_kernel"}, "GPU tiles must be full"
    assert found((256, 260)) == {"default: in_rows", "cpu: in_order", "tpu: in_blocks"}, "no whole registers"
    assert found((64,)) == set(), "a small leaf"
    assert not kernels & ways_of(monkeypatch, TX, (256, 256)), "and only by name"
    with jax.enable_x64(True):
        assert not kernels & found((256, 256), jnp.float64)


def test_another_device_goes_its_ordinary_way() -> None:
    asked = adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1, kernel=True)
    assert asked != TX
    assert asked == adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1, kernel=True)
    g = jax.random.normal(jax.random.key(0), (256, 256))
    state = asked.init(g)
    for a, b in zip(*map(jax.tree.leaves, (asked.update(g, state, g), TX.update(g, state, g))), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert adam_fn.lamb(1e-3, kernel=True) != adam_fn.lamb(1e-3)
    with pytest.raises(TypeError, match="kernel must be a bool, got 'tpu'"):
        adam_fn.adam(1e-3, kernel="tpu")  # pyright: ignore[reportArgumentType]


def test_no_derivatives_and_no_vmap() -> None:
    tx = adam_fn.adam(1e-2, storage=Block(8), kernel=True)

    def update(g: jax.Array) -> jax.Array:
        return jnp.asarray(tx.update(g, tx.init(g))[0])

    g = jnp.ones((256, 256))
    with pytest.raises(NotImplementedError, match="kernel=True: a kernel has no derivatives"):
        jax.grad(lambda g: update(g).sum())(g)
    with pytest.raises(NotImplementedError, match="kernel=True: a kernel has no vmap"):
        jax.vmap(update)(jnp.stack([g, g]))


def test_a_step_on_a_cpu_inside_shard_map_of_one_device() -> None:
    """In order, where each output is made to depend on the one before: of the same type on a mesh."""
    mesh = jax.make_mesh((1,), ("a",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    tx = adam_fn.adam(1e-2, mu_dtype="bfloat16")
    g = jax.random.normal(jax.random.key(0), (512, 512))

    def step(g: jax.Array) -> Any:
        return tx.update(g, tx.init(g))[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adam_fn.execute.cpu.alone", lambda: True)
        jax.clear_caches()
        spec = PartitionSpec("a")
        found = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(g)
    np.testing.assert_allclose(found, step(g), rtol=1e-6)
