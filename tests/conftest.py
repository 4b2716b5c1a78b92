"""Strict JAX for every test: eight host devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import gc
import itertools
import os
from collections.abc import Iterator

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Now and then, or a worker ends with gigabytes of programs."""
    yield
    if next(TESTS) % 50 == 0:
        jax.clear_caches()
        gc.collect()
