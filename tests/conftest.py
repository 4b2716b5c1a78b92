"""Strict JAX for every test: eight host devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import gc
import itertools
import os
import tempfile
from collections.abc import Iterator

from helpers import compiling

# Three quarters of the suite's time is compiling, which without XLA's optimizations takes half as long. Where a test
# asks how well or to which last bit a program is compiled, it compiles as users do, with `full_jit`.
os.environ["XLA_FLAGS"] = f"{compiling.flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}"
# Small programs are cached too: most are small, and the workers compile many of the same.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes so many small objects that collecting them as often as usual takes a twelfth of the suite's time.
gc.set_threshold(200_000, 10, 100)

TESTS = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Gives the workers, which inherit this environment, one cache of compiled programs."""
    if not hasattr(config, "workerinput") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        place = tempfile.TemporaryDirectory()
        config.add_cleanup(place.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = place.name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets ``@pytest.mark.quick("case")`` mark only the cases of a test whose ids begin with "case"."""
    for item in items:
        mark = item.get_closest_marker("quick")
        cases = mark.args if mark else ()
        if cases and not item.name.partition("[")[2].startswith(cases):
            item.own_markers = [x for x in item.own_markers if x.name != "quick"]


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Clears JAX's caches now and then: otherwise a worker ends with gigabytes of programs."""
    yield
    if next(TESTS) % 250 == 0:
        jax.clear_caches()
        gc.collect()
