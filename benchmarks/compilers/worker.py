"""Compiles steps for accelerators that are not there; `compiled.py` runs it in an environment that has the compiler.

Prints a line of JSON for the versions and for every program. Nothing that it compiles is run.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import time
import typing
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilers import several
from compilers.hlo import Program
from compilers.several import placed
from jax.experimental import topologies
from measure import workloads

import adam_fn
from adam_fn import Block, Cast

RATE = 1e-3
BF16 = "bfloat16"
Tx = optax.GradientTransformation
Row = dict[str, object]
Shapes = Mapping[str, tuple[int, ...]]
Jitted = typing.Any  # What `jax.jit` made of a function, or `make_step`; its types differ.
Device = typing.Any  # `jax.Device` is no type to pyright.

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
#: What XLA's GPU compiler asks of a device, besides what all have.
COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
}
GPUS = {
    "h200": (
        "NVIDIA H200 141GB HBM3e",
        COMMON
        | {
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "core_count": 132,
            "fpus_per_core": 128,
            "memory_bandwidth": 4800000000000,
            "l2_cache_size": 52428800,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 151397597184,
            "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
        },
        "{ major: 9 minor: 10 patch: 0 }",
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        COMMON
        | {
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
            "core_count": 108,
            "fpus_per_core": 64,
            "memory_bandwidth": 2039040000000,
            "l2_cache_size": 41943040,
            "clock_rate_ghz": 1.41,
            "device_memory_size": 85100068864,
            "cuda_compute_capability": "{ major: 8 feature_extension: NONE }",
        },
        "{ major: 8 minor: 9 patch: 4 }",
    ),
}


def devices(target: str) -> Sequence[Device]:
    """Four of a kind that need not be there."""
    jax.devices()  # This also registers the compilers that are installed.
    if target in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices
    name, numbers, dnn = GPUS[target]
    info = " ".join(f"{key} {value}" if "{" in str(value) else f"{key}: {value}" for key, value in numbers.items())
    config = (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA" dnn_version_info {dnn} device_description_str: "{name}"'
    )
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x4").devices


def versions() -> dict[str, str]:
    """Those of the packages that have a part in what is compiled."""
    packages = ("adam_fn", "jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- the steps ---


def applied(tx: Tx) -> Callable[..., object]:
    """A step around any optax transformation: (params, state, grads) -> (params, state)."""

    def step(params: optax.Params, state: optax.OptState, grads: optax.Updates) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


#: What is compiled of a transformation; `update` takes the gradients first, and they become the updates.
WAYS: dict[str, Callable[[Tx], Jitted]] = {
    "make_step": adam_fn.make_step,
    "update": lambda tx: jax.jit(tx.update, donate_argnums=(0, 1)),
    "update, apply": lambda tx: jax.jit(applied(tx), donate_argnums=(0, 1)),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A transformation, the dtypes that it is given, and the ways in which its step is compiled.

    Attributes:
      kernel: whether it is asked to run each leaf as one kernel.
    """

    make: Callable[..., Tx]
    params: str = "float32"
    grads: str = ""
    ways: tuple[str, ...] = ("make_step", "update")
    kernel: bool = False

    def tx(self) -> Tx:
        return self.make(kernel=True) if self.kernel else self.make()

    def shapes(self, tree: Shapes) -> tuple[object, object, object]:
        """Parameters, state and gradients without their values."""
        params, grads = (
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in tree.items()}
            for dtype in (self.params, self.grads or self.params)
        )
        return params, jax.eval_shape(self.tx().init, params), grads


def ours(member: Callable[..., Tx] = adam_fn.adam, **options: typing.Any) -> Callable[..., Tx]:  # noqa: ANN401
    """A member of the family, open to further options."""
    return functools.partial(member, RATE, **options)


def masters(kernel: bool = False) -> Tx:
    return adam_fn.master_weights(adam_fn.adam(RATE, storage=Block(8), kernel=kernel))


def rounded(kernel: bool = False) -> Tx:
    return optax.chain(adam_fn.adam(RATE, storage=Block(8), kernel=kernel), adam_fn.stochastic_rounding(0))


EVERY = tuple(WAYS)
STEPS = {
    "optax float32": Step(lambda: optax.adam(RATE), ways=("update, apply",)),
    "optax, all bfloat16": Step(lambda: optax.adam(RATE), BF16, ways=("update, apply",)),
    "float32": Step(ours()),
    "bfloat16 parameters": Step(ours(), BF16),
    "all bfloat16": Step(ours(mu_dtype=BF16, nu_dtype=BF16), BF16),
    "Block(8)": Step(ours(storage=Block(8))),
    "Block(4)": Step(ours(storage=Block(4))),
    "masters, Block(8)": Step(masters, BF16, ways=EVERY),
    "stochastic rounding, Block(8)": Step(rounded, BF16, "float32", EVERY),
    "AMSGrad, Block(8)": Step(ours(adam_fn.amsgrad, storage=Block(8))),
    "Adan, Block(8)": Step(ours(adam_fn.adan, storage=Block(8))),
    "Lion, Block(8)": Step(ours(adam_fn.lion, storage=Block(8))),
}
KERNELS = ("all bfloat16", "Block(8)", "Block(4)", "masters, Block(8)", "AMSGrad, Block(8)", "Adan, Block(8)")
STEPS |= {f"{name}, kernel": dataclasses.replace(STEPS[name], kernel=True) for name in KERNELS}
LEAF: Shapes = {"leaf": (65536, 1024)}
GPT2: Shapes = workloads.gpt2(50257, 1024, 768, 12)
GPT2_STEPS = ("optax float32", "float32", "all bfloat16", "Block(8)", "Block(4)", "masters, Block(8)")
GPT2_STEPS += ("all bfloat16, kernel", "Block(8), kernel", "Block(4), kernel", "masters, Block(8), kernel")

# --- the family ---

ALIASES = ("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "radam", "adabelief", "yogi", "laprop")
ALIASES += ("adopt", "ademamix", "adan", "adam_atan2", "lion", "swats", "lamb")
MEMBERS: dict[str, Callable[..., Tx]] = {name: getattr(adam_fn, name) for name in ALIASES}
MEMBERS["cautious"] = lambda rate, **options: adam_fn.cautious(adam_fn.adam(rate, **options))
STORAGES: dict[str, adam_fn.Codec | None] = {
    "float32": None,
    "bfloat16": Cast(BF16),
    "Block(8)": Block(8),
    "Block(4)": Block(4),
}
#: What is made of a transformation, the parameters' dtype and the gradients'.
WRITES: dict[str, tuple[Callable[[Tx], Tx], str, str]] = {
    "float32": (lambda tx: tx, "float32", "float32"),
    "bfloat16": (lambda tx: tx, BF16, BF16),
    "masters 16": (adam_fn.master_weights, BF16, BF16),
    "masters 8": (functools.partial(adam_fn.master_weights, bits=8), BF16, BF16),
    "stochastic rounding": (lambda tx: optax.chain(tx, adam_fn.stochastic_rounding(0)), BF16, "float32"),
}
SMALL: Shapes = {"leaf": (1024, 512)}


def family(member: str) -> dict[str, Step]:
    """A member with every storage and every write, each as XLA runs it and as a kernel."""

    def step(storage: str, write: str, kernel: bool) -> Step:
        wrap, params, grads = WRITES[write]
        make = ours(MEMBERS[member], storage=STORAGES[storage])
        return Step(lambda **options: wrap(make(**options)), params, grads, kernel=kernel)

    every = itertools.product(STORAGES, WRITES, (False, True))
    return {
        f"{storage}, {write}{', kernel' if kernel else ''}": step(storage, write, kernel)
        for storage, write, kernel in every
    }


# --- compilation ---


#: For programs that need only compile: a TPU's take a tenth of the time.
HASTY: typing.Any = {"exec_time_optimization_effort": -1.0}


def measured(function: Jitted, arguments: Sequence[object], parameters: int, largest: int) -> Row:
    """What a jitted function's program needs and runs: bytes per parameter, but the temporaries in float32 leaves."""
    jax.clear_caches()
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text() or ""
    memory, program = compiled.memory_analysis(), Program(text)
    given = memory.argument_size_in_bytes
    peak = given + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    # GPU compilers have no analysis of costs, TPU compilers no kernels for scalars, and do not know those of Pallas;
    # a loop's bytes they count once.
    unknown = "tpu_custom_call" in text
    moved = None if unknown else (compiled.cost_analysis() or {}).get("bytes accessed")
    cycles = program.cycles()
    return {
        "temporaries": memory.temp_size_in_bytes / 4 / parameters,
        "peak": peak / parameters,
        "beside arguments": (peak - given) / parameters,
        "passes": program.passes(largest // 4),
        "kernels": None if cycles else program.count(),
        "bytes": None if moved and program.loops() else (program.bytes() if moved is None else moved) / parameters,
        "cycles": None if unknown else cycles or None,
        "seconds": seconds,
    }


def size(tree: Shapes) -> tuple[int, int]:
    """The parameters of all leaves and of the largest."""
    sizes = [int(np.prod(shape)) for shape in tree.values()]
    return sum(sizes), max(sizes)


def sharded(step: Step, every: Sequence[Device]) -> Row:
    """A step of leaves that are sharded on the first, the last and both axes of a mesh of 2 x 2."""
    mesh = jax.sharding.Mesh(np.array(every).reshape(2, 2), ("x", "y"))
    specs = {"first": (("x", "y"), None), "last": (None, ("x", "y")), "both": ("x", "y")}
    places = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in specs.items()}
    params, state, grads = step.shapes(dict.fromkeys(specs, (2048, 1024)))
    params, grads = placed(params, places), placed(grads, places)
    tx = step.tx()
    init = jax.jit(tx.init).lower(params).compile(HASTY)
    state = placed(state, init.output_shardings)
    run = WAYS["make_step"](tx)
    if step.kernel and every[0].platform == "tpu":  # JAX cannot divide kernels there.
        inside = jax.tree.map(lambda x: x.sharding.spec, (params, state, grads))
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=inside, out_specs=inside[:2]), donate_argnums=(0, 1))
    with unittest.mock.patch("adam_fn.execute.run.alone", lambda: False):  # As where there are four devices.
        compiled = run.lower(params, state, grads).compile(HASTY)
    return {"collectives": Program(compiled.as_text() or "").collectives()}


def together(steps: Mapping[str, Step], device: Device) -> list[str]:
    """Compiles the steps in one program, or one by one if that fails; which failed, and why."""
    # Kernels for TPUs ask which TPU it is.
    mesh = jax.sharding.Mesh(np.array([device]), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    arguments = {name: placed(step.shapes(SMALL), place) for name, step in steps.items()}

    def run(params_and_states: Mapping[str, tuple[object, object]], grads: Mapping[str, object]) -> object:
        made = {name: WAYS["make_step"](steps[name].tx()) for name in grads}
        return {name: made[name](*params_and_states[name], grads[name]) for name in grads}

    def attempt(names: Sequence[str]) -> None:
        given = {name: arguments[name][:2] for name in names}, {name: arguments[name][2] for name in names}
        with jax.set_mesh(mesh):
            jax.jit(run, donate_argnums=0).lower(*given).compile(HASTY)

    try:
        attempt(list(steps))
    except Exception as error:
        if len(steps) == 1:
            return [f"{next(iter(steps))}: {first_line(error)}"]
        return [each for name, step in steps.items() for each in together({name: step}, device)]
    return []


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


# --- what is asked for ---


def jobs(target: str, with_family: bool) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """What can be compiled for a target: what identifies it, and a function that does it."""
    every = devices(target)
    place = jax.sharding.SingleDeviceSharding(every[0])

    def single(step: Step, way: str, tree: Shapes) -> Row:
        arguments = placed(step.shapes(tree), place)
        return measured(WAYS[way](step.tx()), arguments[::-1] if way == "update" else arguments, *size(tree))

    def member(name: str) -> Row:
        began = time.perf_counter()
        steps = family(name)
        failed = together(steps, every[0])
        return {"programs": len(steps), "failed": failed, "seconds": time.perf_counter() - began}

    for name, step in STEPS.items():
        for way in step.ways:
            yield {"part": "leaf", "step": name, "way": way}, functools.partial(single, step, way, LEAF)
    for name in GPT2_STEPS:
        way = STEPS[name].ways[0]
        yield {"part": "GPT-2 small", "step": name, "way": way}, functools.partial(single, STEPS[name], way, GPT2)
    for name, step in STEPS.items():
        if step.ways[0] == "make_step":
            yield {"part": "sharded", "step": name, "way": "make_step"}, functools.partial(sharded, step, every)
    yield from several.jobs(every)
    for name in MEMBERS if with_family else ():
        yield {"part": "family", "step": name, "way": "make_step"}, functools.partial(member, name)


def wanted(target: str, options: argparse.Namespace) -> list[tuple[Row, Callable[[], Row]]]:
    """The jobs whose name contains one of the texts asked for, and the optax steps that they are compared with."""
    every = list(jobs(target, target in options.family))

    def named(row: Row) -> bool:
        name = f"{row['part']}: {row['step']}, {row['way']}"
        return not options.only or any(text in name for text in options.only)

    parts = {row["part"] for row, _ in every if named(row)}
    return [job for job in every if named(job[0]) or (job[0]["part"] in parts and job[0]["step"] == "optax float32")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", default=[], choices=[*TPUS, *GPUS])
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--family", action="append", default=[], metavar="TARGET")
    options = parser.parse_args()

    def say(row: Row) -> None:
        print(json.dumps(row), flush=True)

    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # Where dtypes differ.
    say({"versions": versions()})
    for target in options.target:
        # The first compilation also starts the compiler; it belongs to nobody.
        place = jax.sharding.SingleDeviceSharding(devices(target)[0])
        jax.jit(jnp.sin).lower(placed(jax.ShapeDtypeStruct((8, 128), "float32"), place)).compile()
        for name, run in wanted(target, options):
            about = {"target": target, **name}
            say({"begin": about})
            try:
                say({**about, **run()})
            except Exception as error:
                say({**about, "error": first_line(error)})


if __name__ == "__main__":
    main()
