"""Steps whose state is not all where its parameters are: `zero1` on four devices, `offload` on one."""

import functools
import time
import typing
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilers.hlo import Program
from measure import workloads

import adam_fn
from adam_fn import Block

RATE = 1e-3
BF16 = "bfloat16"
Tx = optax.GradientTransformation
Row = dict[str, object]
Job = tuple[Row, Callable[[], Row]]
Shapes = Mapping[str, tuple[int, ...]]
Device = typing.Any  # `jax.Device` is no type to pyright.
Compiled = typing.Any  # Of `jax.jit(...).lower(...).compile()`.


def placed(tree: object, place: object) -> typing.Any:  # noqa: ANN401 (any pytree)
    """Shapes with a sharding, the same for all or a tree of them."""
    if isinstance(place, jax.sharding.Sharding):
        place = jax.tree.map(lambda _: place, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)


def shapes(tree: Shapes, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in tree.items()}


def held(tree: object) -> int:
    """The bytes of all arrays of a tree, as they are between devices and hosts."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def elements(tree: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in tree.values())


# --- ZeRO, stage 1 ---

ZERO1: dict[str, tuple[Tx, str]] = {
    "float32": (adam_fn.adamw(RATE), "float32"),
    "Block(8)": (adam_fn.adamw(RATE, storage=Block(8)), "float32"),
    "masters, Block(8)": (adam_fn.master_weights(adam_fn.adamw(RATE, storage=Block(8))), BF16),
    "Block(8), kernel": (adam_fn.adamw(RATE, storage=Block(8), kernel=True), "float32"),
}
KINDS = ("reduce-scatter", "all-gather", "all-reduce")


def net_of(device: Device) -> Shapes:
    """Two layers with their bias, and a leaf that four devices cannot divide.

    What XLA makes of sums depends on their size: a v6e's all-reduces of 4 MB and less stay, and a v5e's reduce-scatters
    of 16 MB become a pipeline with a tenth more bytes.
    """
    width = 1024 if "v6" in device.device_kind else 512
    return {"in": (width, 4 * width), "bias": (4 * width,), "out": (4 * width, width), "odd": (3,)}


def net(params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """The loss of a `net_of`."""
    hidden = jnp.tanh(batch @ params["in"] + params["bias"][None])
    odd = jnp.sum(params["odd"].astype("float32") ** 2)
    return jnp.mean((hidden @ params["out"]).astype("float32") ** 2) + odd * jnp.mean(batch.astype("float32"))


def zero1(tx: Tx, dtype: str, way: str, every: Sequence[Device]) -> Row:
    """A step of training, of a batch that is divided over four devices: gradients and all."""
    mesh = jax.sharding.Mesh(np.array(every), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = net_of(every[0])
    params = placed(shapes(tree, dtype), jax.NamedSharding(mesh, jax.P()))
    tx = adam_fn.zero1(tx, params, mesh, "data")
    state = placed(jax.eval_shape(tx.init, params), adam_fn.state_shardings(tx, params))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    batch = jax.ShapeDtypeStruct((4096, tree["in"][0]), dtype, sharding=rows)
    step = adam_fn.make_step(tx)

    def run(params: typing.Any, state: object, batch: jax.Array) -> object:  # noqa: ANN401
        return step(params, state, jax.grad(net)(params, batch))

    def each(params: typing.Any, state: object, batch: jax.Array) -> object:  # noqa: ANN401
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return step(params, state, jax.grad(lambda p: net(p, batch) / len(every))(own))

    if way == "shard_map":
        specs = (jax.P(), jax.tree.map(lambda x: x.sharding.spec, state), jax.P("data"))
        run = jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    began = time.perf_counter()
    with unittest.mock.patch("adam_fn.execute.run.alone", lambda: False):  # As where there are four devices.
        compiled = jax.jit(run, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    exchanges = Program(compiled.as_text() or "").exchanges()
    memory: typing.Any = compiled.memory_analysis()
    own = memory.argument_size_in_bytes - held(params) - held(batch) // len(every)
    moved = {kind: sum(size for other, size in exchanges if other == kind) / elements(tree) for kind in KINDS}
    return {
        **moved,
        "other exchanges": sum(size for kind, size in exchanges if kind not in KINDS) / elements(tree),
        "exchanges": {kind: sum(kind == other for other, _ in exchanges) for kind, _ in sorted(exchanges)},
        "state": own / held(state),
        "seconds": time.perf_counter() - began,
    }


# --- the state on the host ---

LEAF: Shapes = {"leaf": (65536, 1024)}
GPT2: Shapes = workloads.gpt2(50257, 1024, 768, 12)
OFFLOAD: dict[str, tuple[Tx, str]] = {
    "float32": (adam_fn.adamw(RATE), "float32"),
    "masters": (adam_fn.master_weights(adam_fn.adamw(RATE)), BF16),
    "Block(8)": (adam_fn.adamw(RATE, storage=Block(8)), "float32"),
    "float32, kernel": (adam_fn.adamw(RATE, kernel=True), "float32"),
}
#: Layers whose activations, of a batch of 16,384, need more memory than a step.
DEEP: Shapes = {f"layer{i}": (2048, 2048) for i in range(4)}


def deep(params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """The loss of `DEEP`."""
    for layer in params.values():
        batch = jnp.tanh(batch @ layer)
    return jnp.mean(batch**2)


def peak(compiled: Compiled) -> int:
    """The device's memory of a program: its arguments, its results and what it needs beside."""
    memory = compiled.memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return given + memory.temp_size_in_bytes


def offload(tx: Tx, dtype: str, tree: Shapes, way: str, device: Device) -> Row:
    """A step with the state on the host beside one with it on the device, alone or after the gradients of `deep`."""
    place = jax.sharding.SingleDeviceSharding(device)
    params = placed(shapes(tree, dtype), place)
    batch = jax.ShapeDtypeStruct((16384, 2048), dtype, sharding=place)
    count = elements(tree)
    began = time.perf_counter()

    def compiled(tx: Tx) -> tuple[Compiled, float]:
        """The program with the step, and the largest peak of all there are."""
        jax.clear_caches()
        state = placed(jax.eval_shape(tx.init, params), adam_fn.state_shardings(tx, params))
        step = adam_fn.make_step(tx)
        if way == "one program":
            run = jax.jit(lambda p, s, b: step(p, s, jax.grad(deep)(p, b)), donate_argnums=(0, 1))
            found = run.lower(params, state, batch).compile()
            return found, peak(found)
        found = step.lower(params, state, params).compile()
        if way == "make_step":
            return found, peak(found)
        gradients = jax.jit(jax.grad(deep)).lower(params, batch).compile()
        memory: typing.Any = found.memory_analysis()
        resident = memory.argument_size_in_bytes - 2 * held(params)
        return found, max(peak(gradients) + resident, peak(found) + held(batch))

    _, most = compiled(tx)
    moved, now = compiled(adam_fn.offload(tx))
    memory = moved.memory_analysis()
    read, stored = Program(moved.as_text() or "").bus()
    return {
        "on the host": memory.host_argument_size_in_bytes / count,
        "kept there": memory.host_output_size_in_bytes / count,
        "read": read / count,
        "stored": stored / count,
        "peak": now / count,
        "saved": (most - now) / count,
        "seconds": time.perf_counter() - began,
    }


def jobs(every: Sequence[Device]) -> Iterator[Job]:
    """What can be compiled: what identifies it, and a function that does it."""
    for name, (tx, dtype) in ZERO1.items():
        # JAX cannot divide kernels for TPUs.
        ways = ("shard_map",) if "kernel" in name and every[0].platform == "tpu" else ("jit", "shard_map")
        for way in ways:
            yield {"part": "zero1", "step": name, "way": way}, functools.partial(zero1, tx, dtype, way, every)
    for name, (tx, dtype) in OFFLOAD.items():
        run = functools.partial(offload, tx, dtype, LEAF, "make_step", every[0])
        yield {"part": "offload", "step": name, "way": "make_step"}, run
    for name, tree, way in (
        ("GPT-2 small", GPT2, "make_step"),
        ("training", DEEP, "one program"),
        ("training", DEEP, "two programs"),
    ):
        run = functools.partial(offload, *OFFLOAD["float32"], tree, way, every[0])
        yield {"part": "offload", "step": name, "way": way}, run
