"""The accelerators that steps are compiled for; none of them is there."""

import functools
import typing
from collections.abc import Sequence

import jax
from jax.experimental import topologies

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
    """Those of a topology, such as `4x4` for a TPU and `1x1x8` for a GPU; four by default."""
    jax.devices()  # This also registers the compilers that are installed.
    if target not in GPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{topology or '2x2'}").devices
    config = f'gpu_device_info {{ {ALL} {GPUS[target]} }} platform_name: "CUDA" '
    config += f'device_description_str: "{NAMES[target]}" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}'
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology or "1x1x4").devices


def first(target: str) -> jax.sharding.Sharding:
    """Where the arrays are of a program for one device."""
    return jax.sharding.SingleDeviceSharding(devices(target)[0])
