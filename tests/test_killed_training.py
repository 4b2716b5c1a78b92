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


def process(folder: Path, every: int, cache: Path) -> subprocess.Popen[str]:
    # One device starts sooner. A cache of its own: a killed process may leave half an entry behind.
    env = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, str(SCRIPT), str(folder), str(STEPS), str(every)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finished(folder: Path, every: int, cache: Path) -> list[str]:
    """The lines of a process that nobody kills."""
    with process(folder, every, cache) as run:
        lines = (run.communicate(timeout=120)[0]).splitlines()
    assert run.returncode == 0, "\n".join(lines)
    return lines


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "killed"
    expected = finished(tmp_path / "undisturbed", STEPS, cache)
    assert expected[0] == "start 0"
    chance = random.Random(0)
    starts = []
    for _ in range(KILLS):
        with process(folder, EVERY, cache) as run:
            assert run.stdout is not None
            said = [run.stdout.readline() for _ in range(1 + chance.randrange(5))]  # "start" and up to 4 times "save"
            time.sleep(chance.choice([0, chance.random() / 10]))
            run.send_signal(signal.SIGKILL)
            said.append(run.stdout.read())
        assert run.returncode == -signal.SIGKILL, "".join(said)
        starts.append(int(said[0].removeprefix("start ")))
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[-1] < STEPS
    last = finished(folder, STEPS, cache)
    assert int(last[0].removeprefix("start ")) >= starts[-1] > 0
    assert last[-1] == expected[-1]
    assert last[-1].startswith("end ")
