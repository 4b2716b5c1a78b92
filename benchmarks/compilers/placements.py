"""Steps with arrays on several devices or the host: Llama-7B, divided as is usual, `zero1`, and `offload`."""

import functools
import math
import typing
import unittest.mock
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilers.figures import TREE
from compilers.hlo import Program
from compilers.steps import GPT2, ONE, STEPS, Shapes, Tree, devices, first, llama, placed, spent
from jax.sharding import AxisType, Mesh
from measure.scripts import Row
from measure.workloads import held, size

import adam_fn

#: As where there are several devices.
several = functools.partial(unittest.mock.patch, "adam_fn.execute.cpu.single_device", lambda: False)

#: Of the 32 layers, which are alike.
LAYERS = 4
#: Of a target: the topology, and how many devices divide each parameter and each layer.
MESHES: dict[str, dict[str, tuple[str, tuple[int, int]]]] = {
    "v5e": {"FSDP 16": ("4x4", (16, 1)), "FSDP 4 x TP 4": ("4x4", (4, 4)), "FSDP 256": ("16x16", (256, 1))},
    "h200": {"FSDP 8": ("1x1x8", (8, 1))},
}


def division(name: str, shape: Sequence[int]) -> jax.P:
    """The division of a leaf by FSDP and tensor parallelism; the features that a layer takes are in a matrix's rows."""
    if len(shape) == 1:
        return jax.P("fsdp")
    return jax.P("tp", "fsdp") if name.endswith(("o", "down", "embedding")) else jax.P("fsdp", "tp")


def sharded(name: str, way: str, target: str) -> Row:
    """A step of Llama-7B, the state where `jit(tx.init)` puts it; bytes per parameter of a device."""
    division_, kind = way.split(", ")
    topology, sizes = MESHES[target][division_]
    kinds = (AxisType[kind.capitalize()],) * 2
    mesh = Mesh(np.array(devices(target, topology)).reshape(sizes), ("fsdp", "tp"), axis_types=kinds)
    step, tree = STEPS[name], llama(LAYERS)
    params, state, _ = step.arguments(tree)
    params = placed(params, {name: jax.NamedSharding(mesh, division(name, shape)) for name, shape in tree.items()})
    jax.clear_caches()
    with several(), jax.set_mesh(mesh):
        state = placed(state, jax.jit(step.tx.init).lower(params).compile().output_shardings)
        began = spent()
        compiled: typing.Any = adam_fn.make_step(step.tx).lower(params, state, params).compile()
        seconds = spent() - began

    def own(tree: Tree) -> int:
        """The bytes that a device has of all arrays but those of a few numbers."""
        large = (x for x in jax.tree.leaves(tree) if x.size > 16)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in large)

    places = zip(jax.tree.leaves((params, state)), jax.tree.leaves(compiled.output_shardings), strict=True)
    count = own(params) / params["norm"].dtype.itemsize
    program = Program(compiled.as_text() or "")
    return {
        "collectives": len(program.exchanges()),
        "temporaries": program.temporaries(compiled.memory_analysis()) / count,
        "state": own(state) / count,
        "moved": sum(not at.is_equivalent_to(x.sharding, x.ndim) for x, at in places),
        "seconds": seconds,
    }


KINDS = ("reduce-scatter", "all-gather", "all-reduce")


def net_of(target: str) -> Shapes:
    """Two layers with their bias, and a leaf that four devices cannot divide.

    What XLA makes of sums depends on their size: a v6e's all-reduces of 4 MB and less stay, and a v5e's reduce-scatters
    of 16 MB become a pipeline with a tenth more bytes.
    """
    width = 1024 if target == "v6e" else 512
    return {"in": (width, 4 * width), "bias": (4 * width,), "out": (4 * width, width), "odd": (3,)}


def net(params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """The loss of a `net_of`."""
    hidden = jnp.tanh(batch @ params["in"] + params["bias"][None])
    odd = jnp.sum(params["odd"].astype("float32") ** 2)
    return jnp.mean((hidden @ params["out"]).astype("float32") ** 2) + odd * jnp.mean(batch.astype("float32"))


def zero1(name: str, way: str, target: str) -> Row:
    """A step of training, of a batch that is divided over four devices, gradients and all; bytes per parameter."""
    step, every, tree = STEPS[name], devices(target), net_of(target)
    mesh = Mesh(np.array(every), ("data",), axis_types=(AxisType.Auto,))
    params = placed(step.params(tree), jax.NamedSharding(mesh, jax.P()))
    tx = adam_fn.zero1(step.tx, params, mesh, "data")
    state = placed(jax.eval_shape(tx.init, params), adam_fn.state_shardings(tx, params))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    batch = jax.ShapeDtypeStruct((4096, tree["in"][0]), step.dtype, sharding=rows)
    write = adam_fn.make_step(tx)

    def run(params: Tree, state: Tree, batch: jax.Array) -> Tree:
        return write(params, state, jax.grad(net)(params, batch))

    def each(params: Tree, state: Tree, batch: jax.Array) -> Tree:
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return write(params, state, jax.grad(lambda p: net(p, batch) / len(every))(own))

    if way == "shard_map":
        specs = (jax.P(), jax.tree.map(lambda x: x.sharding.spec, state), jax.P("data"))
        run = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    with several():
        compiled: typing.Any = jax.jit(run, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    exchanges = Program(compiled.as_text() or "").exchanges()
    share = compiled.memory_analysis().argument_size_in_bytes - held(params) - held(batch) // len(every)
    return {
        **{kind: sum(moved for other, moved in exchanges if other == kind) / size(tree) for kind in KINDS},
        "others": sum(moved for kind, moved in exchanges if kind not in KINDS) / size(tree),
        "share": share / held(state),
    }


#: Layers whose activations, of a batch of 16,384, need more memory than a step.
DEEP: Shapes = {f"layer{i}": (2048, 2048) for i in range(4)}
#: What else than a leaf has its state on the host, all in float32.
TREES = {TREE: GPT2, "training": DEEP}


def deep(params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """The loss of `DEEP`."""
    for layer in params.values():
        batch = jnp.tanh(batch @ layer)
    return jnp.mean(batch**2)


def peak(memory: typing.Any) -> int:  # noqa: ANN401 (JAX has no public type for it)
    """The device's memory of a program: its arguments, its results and what it needs beside."""
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return given + memory.temp_size_in_bytes


def offload(name: str, way: str, target: str) -> Row:
    """A step with the state on the host beside one with it on the device, alone or after the gradients of `deep`."""
    tree, place = TREES.get(name, ONE), first(target)
    step = STEPS["float32" if name in TREES else name]
    params = placed(step.params(tree), place)
    batch = jax.ShapeDtypeStruct((16384, 2048), step.dtype, sharding=place)

    def compiled(tx: optax.GradientTransformation) -> tuple[typing.Any, float]:
        """The program with the step, and the largest peak of all programs."""
        state = placed(jax.eval_shape(tx.init, params), adam_fn.state_shardings(tx, params))
        run = adam_fn.make_step(tx)
        if way == "one program":
            whole = jax.jit(lambda p, s, b: run(p, s, jax.grad(deep)(p, b)), donate_argnums=(0, 1))
            found = whole.lower(params, state, batch).compile()
            return found, peak(found.memory_analysis())
        found = run.lower(params, state, params).compile()
        memory: typing.Any = found.memory_analysis()
        if way == "make_step":
            return found, peak(memory)
        gradients = jax.jit(jax.grad(deep)).lower(params, batch).compile().memory_analysis()
        resident = memory.argument_size_in_bytes - 2 * held(params)
        return found, max(peak(gradients) + resident, peak(memory) + held(batch))

    _, most = compiled(step.tx)
    moved, now = compiled(adam_fn.offload(step.tx))
    memory = moved.memory_analysis()
    read, stored = Program(moved.as_text() or "").bus()
    found = {"on the host": memory.host_argument_size_in_bytes, "kept there": memory.host_output_size_in_bytes}
    found |= {"read": read, "stored": stored, "peak": now, "saved": most - now}
    return {name: figure / size(tree) for name, figure in found.items()}
