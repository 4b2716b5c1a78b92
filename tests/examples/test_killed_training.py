"""A real process, killed with SIGKILL again and again, ends where an undisturbed one does: bit for bit."""

import contextlib
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killed_training

KILLS = 20
STEPS = 500
EVERY = 3

#: A server that has imported what is large forks each process; none of them has run anything of JAX's before.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["jax", "optax", "orbax.checkpoint", "adam_fn.checkpoint"])


@contextlib.contextmanager
def process(place: Path, name: str, every: int) -> Iterator[tuple[BaseProcess, Any]]:
    """Training with its checkpoints in a folder of that name, and where it says its lines."""
    said, its_end = SERVER.Pipe(duplex=False)
    # A cache of its own: a killed process may leave half an entry behind.
    arguments = (str(place / name), STEPS, every, str(place / "cache"), its_end)
    run = SERVER.Process(target=killed_training.main, args=arguments)
    run.start()
    its_end.close()
    try:
        with said:
            yield run, said
    finally:
        run.kill()
        run.join()


def finished(place: Path, name: str, every: int) -> list[str]:
    """The lines of a process that nobody kills."""
    lines = []
    with process(place, name, every) as (run, said):
        with contextlib.suppress(EOFError):
            while said.poll(timeout=120):
                lines.append(said.recv())
        run.join(timeout=120)
        assert run.exitcode == 0
    return lines


def start(line: str) -> int:
    """The step from which a process says that it goes on."""
    word, step = line.split()
    assert word == "start"
    return int(step)


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    expected = finished(tmp_path, "undisturbed", STEPS)
    assert start(expected[0]) == 0
    chance = random.Random(0)
    starts = []
    for _ in range(KILLS):
        with process(tmp_path, "killed", EVERY) as (run, said):
            lines = [said.recv() for _ in range(1 + chance.randrange(5))]  # "start" and up to 4 times "save"
            time.sleep(chance.choice([0, chance.random() / 10]))
            run.kill()
            run.join()
            assert run.exitcode == -signal.SIGKILL
        starts.append(start(lines[0]))
    assert starts == sorted(starts), "a complete checkpoint was lost"
    assert starts[0] == 0 < starts[-1] < STEPS
    last = finished(tmp_path, "killed", STEPS)
    assert start(last[0]) >= starts[-1]
    assert last[-1] == expected[-1]
    assert last[-1].startswith("end ")
