"""Where a measurement was made: the device, the cores, the versions, the time."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re

import jax


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device() -> str:
    """The device JAX computes on; for a CPU, its model and the number of cores."""
    first = jax.devices()[0]
    return f"{_processor()}, {cores()} cores" if first.platform == "cpu" else first.device_kind


def slug() -> str:
    """The device as part of a file name."""
    first = jax.devices()[0]
    name = "cpu" if first.platform == "cpu" else first.device_kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages compared, those that are installed."""
    found = {"python": platform.python_version()}
    for package in ("adam_fn", "jax", "jaxlib", "optax", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
