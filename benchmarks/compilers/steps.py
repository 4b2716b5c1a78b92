"""The steps that are compiled: transformations, the trees of parameters, and accelerators that are not there."""

import dataclasses
import functools
import itertools
import os
import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import optax
from compilers.figures import BASE
from jax.experimental import topologies
from measure import workloads
from measure.peers import Tree, plain_step

import adam_fn

RATE = 1e-3
BF16 = "bfloat16"
Tx = optax.GradientTransformation
Shapes = Mapping[str, tuple[int, ...]]

ONE: Shapes = {"leaf": (65536, 1024)}
SMALL: Shapes = {"leaf": (256, 512)}
GPT2: Shapes = workloads.gpt2(50257, 1024, 768, 12)


def llama(layers: int) -> Shapes:
    """The leaves of Llama-7B with some of its 32 layers."""
    width, hidden = 4096, 11008
    found: dict[str, tuple[int, ...]] = {"embedding": (32000, width), "head": (width, 32000), "norm": (width,)}
    for i in range(layers):
        found |= {f"{i}.{name}": (width, width) for name in ("q", "k", "v", "o")}
        found |= {f"{i}.gate": (width, hidden), f"{i}.up": (width, hidden), f"{i}.down": (hidden, width)}
        found |= {f"{i}.norm1": (width,), f"{i}.norm2": (width,)}
    return found


def placed(tree: Tree, place: Tree) -> Tree:
    """Shapes with a sharding, the same for all or a tree of them."""
    if isinstance(place, jax.sharding.Sharding):
        place = jax.tree.map(lambda _: place, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)


def spent() -> float:
    """Seconds that this process has computed, with those that it started: other work on the machine does not count."""
    return sum(os.times()[:4])


#: What XLA's GPU compiler asks of a device: what all have, and what each has.
ALL = """
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
"""
GPUS = {
    "h200": """
    shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
    memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
    cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
    """,
    "a100": """
    shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 core_count: 108 fpus_per_core: 64
    memory_bandwidth: 2039040000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85100068864
    cuda_compute_capability { major: 8 feature_extension: NONE }
    """,
}
NAMES = {"h200": "NVIDIA H200 141GB HBM3e", "a100": "NVIDIA A100-SXM4-80GB"}


@functools.cache
def devices(target: str, topology: str = "") -> Sequence[typing.Any]:  # `jax.Device` is no type to pyright.
    """The devices of a topology, such as `4x4` for a TPU and `1x1x8` for a GPU; four by default."""
    jax.devices()  # This also registers the compilers that are installed.
    if target not in GPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{topology or '2x2'}").devices
    config = f'gpu_device_info {{ {ALL} {GPUS[target]} }} platform_name: "CUDA" '
    config += f'device_description_str: "{NAMES[target]}" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}'
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology or "1x1x4").devices


def first(target: str) -> jax.sharding.Sharding:
    """The sharding of the arrays of a program for one device."""
    return jax.sharding.SingleDeviceSharding(devices(target)[0])


#: (params, state, grads) -> (params, state), in place.
WAYS: dict[str, Callable[[Tx], typing.Any]] = {"make_step": adam_fn.make_step, "update, apply": plain_step}


@dataclasses.dataclass(frozen=True)
class Step:
    """A transformation, the dtype of its parameters and gradients, and the ways in which one leaf is compiled."""

    tx: Tx
    dtype: str = "float32"
    ways: tuple[str, ...] = ("make_step",)

    def params(self, tree: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in tree.items()}

    def arguments(self, tree: Shapes) -> tuple[Tree, Tree, Tree]:
        """Parameters, state and gradients without their values."""
        params = self.params(tree)
        return params, jax.eval_shape(self.tx.init, params), params


STORAGES = typing.get_args(adam_fn.StorageName)
#: What is made of a transformation, and the dtype of its parameters.
WRITES: dict[str, tuple[Callable[[Tx], Tx], str]] = {
    "": (lambda tx: tx, "float32"),
    "bfloat16 parameters, ": (lambda tx: tx, BF16),
    "masters, ": (adam_fn.master_weights, BF16),
    "8-bit masters, ": (functools.partial(adam_fn.master_weights, bits=8), BF16),
    "stochastic rounding, ": (adam_fn.stochastic_rounding, BF16),
}
ALIASES = ("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "radam", "adabelief", "yogi", "laprop")
ALIASES += ("adopt", "ademamix", "adan", "adam_atan2", "lion", "swats", "lamb")
MEMBERS: dict[str, Callable[..., Tx]] = {name: getattr(adam_fn, name) for name in ALIASES}
MEMBERS["cautious"] = lambda rate, **options: adam_fn.cautious(adam_fn.adam(rate, **options))


def family(member: str) -> dict[str, Step]:
    """A member with every storage and every write."""
    made = {storage: MEMBERS[member](RATE, storage=storage) for storage in STORAGES}
    every = itertools.product(WRITES.items(), made.items())
    return {f"{write}{storage}": Step(wrap(tx), dtype) for (write, (wrap, dtype)), (storage, tx) in every}


STEPS = {
    BASE: Step(optax.adamw(RATE), ways=("update, apply",)),
    "optax, all bfloat16": Step(optax.adamw(RATE), BF16, ("update, apply",)),
    **{name: step for name, step in family("adamw").items() if not ("masters" in name and name.endswith(BF16))},
    **{
        f"{name}, {storage}": family(name.lower())[storage]
        for name in ("AMSGrad", "Adan", "AdEMAMix", "Lion")
        for storage in ("float32", "24bit", "16bit")
    },
}
STEPS |= {storage: dataclasses.replace(STEPS[storage], ways=tuple(WAYS)) for storage in STORAGES}
del STEPS["Lion, 16bit"]  # The same as with 24 bits.
#: Those that are compiled for whole trees.
WHOLE = (BASE, *STORAGES, "masters, 16bit")
