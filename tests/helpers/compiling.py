"""XLA's options in the tests. Nothing here imports JAX, which reads its flags when it is imported."""

#: XLA's defaults, as users compile.
FULL = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
#: Compiles in half the time.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def flags(devices: int) -> str:
    """XLA's flags for that many devices on the host, compiling in half the time."""
    # On a busy machine a device may wait for a core longer than XLA's default, after which it ends the process.
    patience = dict.fromkeys(
        ("xla_cpu_collective_timeout_seconds", "xla_cpu_collective_call_terminate_timeout_seconds"), 600
    )
    named = {"xla_force_host_platform_device_count": devices, **patience, **QUICK}
    return " ".join(f"--{name}={value}" for name, value in named.items())
