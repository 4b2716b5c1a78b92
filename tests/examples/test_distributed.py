"""Training on real processes: the course of one process, the end when one is lost, and the way on from there."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_mnist
import jax
import jax.numpy as jnp
import mnist_mlp
import numpy as np
import pytest
from flax import nnx
from helpers import compiling
from helpers.states import slots_of
from loaders import mnist

SCRIPT = Path(distributed_mnist.__file__)
OPTIONS = ("--data", "digits", "--quick", "--epochs", "4", "--timeout", "6")


def start(place: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    """The script with four host devices; what it says goes to the file of that name."""
    env = {**os.environ, "XLA_FLAGS": compiling.flags(devices=4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), *OPTIONS, "--out", str(place), *options]
    with (place / name).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def wait_for(pattern: str, log: Path, job: list[subprocess.Popen[bytes]]) -> re.Match[str]:
    deadline = time.monotonic() + 120
    while (found := re.search(pattern, log.read_text())) is None:
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process in job), log.read_text()
        time.sleep(0.02)
    return found


def test_a_job_that_loses_a_process_ends_and_goes_on_as_one_process_would(tmp_path: Path) -> None:
    """Process 1 of 2 is killed after its first epoch; then two new ones finish the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    saved = ("--checkpoint", str(tmp_path / "run"))
    each = ("--coordinator", coordinator, "--processes", "2", *saved)
    job = [start(tmp_path, f"killed{i}", *each, "--process", str(i)) for i in range(2)]
    try:
        wait_for(r"ZeRO-1 1/4:", tmp_path / "killed0", job)
        job[1].kill()
        assert job[0].wait(timeout=120) != 0
    finally:
        for process in job:
            process.kill()
            process.wait()
    said = (tmp_path / "killed0").read_text()
    assert re.search(r"tasks are unhealthy[^\n]*:\n1\n", said), said
    assert "wrote" not in said

    with start(tmp_path, "resumed", "--local", "2", *saved) as launcher:
        assert launcher.wait(timeout=120) == 0, (tmp_path / "resumed").read_text()
    said = (tmp_path / "resumed").read_text()
    assert re.search(r"resumed from .* after epoch [123]/4", said), said
    assert "4 of the 8 devices" in said
    assert said.count("ZeRO-1 4/4:") == 1  # Of one process alone.
    assert (tmp_path / "distributed_mnist.png").exists()

    alone = distributed_mnist.main([*OPTIONS, "--out", str(tmp_path / "alone")])
    # Nothing is left to be done: these are the parameters and the state that two processes saved.
    both = distributed_mnist.main([*OPTIONS, "--out", str(tmp_path / "both"), *saved])
    assert len(both.run.step_costs) == len(alone.run.step_costs) == 4 * (1437 // 128)
    assert alone.run.step_costs[-1] < 0.9 * alone.run.step_costs[0]
    np.testing.assert_allclose(both.run.step_costs, alone.run.step_costs, rtol=3e-6)
    # After 44 steps of up to 1e-3 they differ by 3e-8.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both.params, alone.params)
    state: Any = both.state
    moment = slots_of(state)["mu"]["hidden1"]["kernel"]
    assert moment.addressable_shards[0].data.size == moment.size // 8
    np.testing.assert_allclose(both.run.epochs[-1].test_cost, alone.run.epochs[-1].test_cost, rtol=1e-5)


def test_the_launcher_names_the_process_that_was_lost_and_ends_the_others(tmp_path: Path) -> None:
    with start(tmp_path, "log", "--local", "2") as launcher:
        pids = [
            int(wait_for(rf"process {i} of 2: started here, pid (\d+)", tmp_path / "log", [launcher])[1])
            for i in (0, 1)
        ]
        os.kill(pids[1], signal.SIGKILL)
        assert launcher.wait(timeout=60) == 1
    said = (tmp_path / "log").read_text()
    assert "error: process 1 of 2 was lost: killed by SIGKILL" in said, said
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "100"], "--batch 100 cannot be divided by the 8 devices"),
        (["--coordinator", "localhost:1"], "--coordinator, --processes and --process are given together"),
        (["--cluster", "--local", "2"], "--local, --cluster and --coordinator exclude one another"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        distributed_mnist.main([*OPTIONS, "--out", str(tmp_path), *options])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_rows_that_fill_up_the_test_images_do_not_count() -> None:
    graph = nnx.graphdef(nnx.eval_shape(lambda: mnist_mlp.MLP(64, 8, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    sizes = {"hidden1": (64, 8), "hidden2": (8, 8), "out": (8, 10)}
    params = {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32), "bias": jnp.zeros(shape[1])}
        for name, shape in sizes.items()
    }
    images, labels = (jnp.asarray(x[:5]) for x in mnist.digits()[3:])
    expected = mnist_mlp.evaluate(params, images, labels, graph=graph)
    filled = jnp.pad(images, [(0, 3), (0, 0)]), jnp.pad(labels, (0, 3), constant_values=-1)
    np.testing.assert_allclose(distributed_mnist.evaluate(params, *filled, graph=graph), expected, rtol=1e-6)


def test_processes_with_other_options_data_or_checkpoints_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they send one another differs where it matters, and only there."""
    sent: list[int] = []
    data = mnist.digits()

    def gather(x: np.uint32) -> np.ndarray:
        sent.append(int(x))
        return np.array([x, x])

    def digest(*options: str, data: mnist.Dataset = data) -> int:
        distributed_mnist.check_same(data, distributed_mnist.parse([*OPTIONS, *options]))
        return sent[-1]

    monkeypatch.setattr(distributed_mnist.multihost_utils, "process_allgather", gather)
    saved = ("--checkpoint", str(tmp_path))
    assert digest() == digest("--out", "elsewhere")
    a, b = (digest("--coordinator", "h:1", "--processes", "2", "--process", str(i)) for i in range(2))
    assert a == b
    others = [digest(), digest("--batch", "64"), digest(data=data._replace(name="another")), digest(*saved)]
    (tmp_path / "3").mkdir()
    others.append(digest(*saved))
    assert len(set(others)) == 5
    monkeypatch.setattr(distributed_mnist.multihost_utils, "process_allgather", lambda x: np.array([x, x + 1, x]))
    with pytest.raises(ValueError, match=r"processes \[1\] have other options or data than process 0"):
        digest()


def test_a_step_that_fails_waits_for_the_runtime_to_name_the_lost_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []

    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("connection closed by peer")

    monkeypatch.setattr(distributed_mnist, "train", fail)
    monkeypatch.setattr(time, "sleep", waited.append)
    options = [*OPTIONS, "--out", str(tmp_path)]
    with pytest.raises(jax.errors.JaxRuntimeError):
        distributed_mnist.main(options)
    assert not waited  # There is no other process.
    monkeypatch.setattr(distributed_mnist, "check_same", lambda *_: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError):
        distributed_mnist.main(options)
    assert waited == [12]
    assert "error: process 0 of 2: connection closed by peer" in capsys.readouterr().err
