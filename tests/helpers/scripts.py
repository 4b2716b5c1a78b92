"""Running a script as its users do, and reading what it wrote."""

import contextlib
import json
import multiprocessing
import runpy
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Forks each process from a server that has imported the large packages and has not run anything of JAX.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["adam_fn.checkpoint", "flax.nnx", "matplotlib.figure", "optax", "orbax.checkpoint"])


def script(name: str, *options: str) -> None:
    """Runs an example as a user does: of the examples' folders only its own is on the path."""
    path = EXAMPLES / name
    ours = {path.stem for folder in (EXAMPLES, EXAMPLES / "paper") for path in folder.iterdir()}
    elsewhere = [place for place in sys.path if not Path(place).is_relative_to(EXAMPLES)]
    with pytest.MonkeyPatch.context() as patch:
        for module in [module for module in sys.modules if module.partition(".")[0] in ours]:
            patch.delitem(sys.modules, module)
        patch.setattr(sys, "path", [str(path.parent), *elsewhere])
        patch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def running(log: Path, text: str, times: int, *processes: BaseProcess) -> Iterator[None]:
    """Starts the processes, waits until the log says the text so many times, and kills them at the end."""
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count(text) < times:
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes), log.read_text()
            time.sleep(0.01)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def read_json(path: Path) -> dict[str, Any]:
    """Reads JSON as the standard defines it, without NaN."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def assert_png(path: Path, least: int = 10_000, most: int | None = None) -> None:
    """Asserts that the file is a picture of more than `least` and at most `most` bytes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert least < len(content) < (most or len(content) + 1)


def quick_figure(figure: ModuleType, out: Path) -> dict[str, Any]:
    """The numbers that a quick run of the script writes; its picture is small, and it decides no claim."""
    claims = figure.main(("--quick", "--data", "standin", "--out", str(out)))
    assert {claim.holds for claim in claims} == {None}
    assert_png(out / f"{figure.__name__}.png", 1_000, 150_000)
    return read_json(out / f"{figure.__name__}.json")
