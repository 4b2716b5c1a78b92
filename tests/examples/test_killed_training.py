"""A real process, killed with SIGKILL again and again, ends where an undisturbed one does: bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("killed_training.py")
KILLS = 20
STEPS = 500
EVERY = 3


def process(place: Path, name: str, every: int) -> subprocess.Popen[str]:
    """Training with its checkpoints in a folder of that name; what it prints is read line by line."""
    # One device starts sooner. A cache of its own: a killed process may leave half an entry behind.
    env = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
    command = [sys.executable, str(SCRIPT), str(place / name), str(STEPS), str(every)]
    with (place / "errors").open("a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)


def finished(place: Path, name: str, every: int) -> list[str]:
    """The lines of a process that nobody kills."""
    with process(place, name, every) as run:
        lines = run.communicate(timeout=120)[0].splitlines()
    assert run.returncode == 0, (place / "errors").read_text()
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
        with process(tmp_path, "killed", EVERY) as run:
            assert run.stdout is not None
            said = [run.stdout.readline() for _ in range(1 + chance.randrange(5))]  # "start" and up to 4 times "save"
            time.sleep(chance.choice([0, chance.random() / 10]))
            run.send_signal(signal.SIGKILL)
            run.stdout.read()
        assert run.returncode == -signal.SIGKILL, (tmp_path / "errors").read_text()
        starts.append(start(said[0]))
    assert starts == sorted(starts), "a complete checkpoint was lost"
    assert starts[0] == 0 < starts[-1] < STEPS
    last = finished(tmp_path, "killed", STEPS)
    assert start(last[0]) >= starts[-1]
    assert last[-1] == expected[-1]
    assert last[-1].startswith("end ")
