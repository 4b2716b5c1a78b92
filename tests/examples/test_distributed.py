"""Training in real processes: equal to one process, ended when a process is lost, and resumed afterwards."""

import functools
import os
import re
import socket
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

import chex
import distributed_mnist
import jax
import jax.numpy as jnp
import mnist_mlp
import numpy as np
import pytest
from flax import nnx
from helpers import compiling
from helpers.scripts import SERVER, running
from helpers.states import slots_of
from loaders import mnist

OPTIONS = ("--data", "digits", "--quick", "--epochs", "4", "--timeout", "6")


def process(log: Path, *options: str) -> None:
    """Runs a process of a job, with four host devices and its output in `log`."""
    os.environ["XLA_FLAGS"] = compiling.flags(devices=4)
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    distributed_mnist.main([*OPTIONS, "--out", str(log.parent), *options])


def train(*options: str) -> distributed_mnist.Trained:
    """Trains in this process."""
    return distributed_mnist.train(mnist.digits(), distributed_mnist.parse([*OPTIONS, *options]))


def launch(*options: str) -> object:
    """The exit status of the launcher, which runs in this process."""
    with pytest.raises(SystemExit) as ended:
        distributed_mnist.main([*OPTIONS, "--local", "2", *options])
    return ended.value.code


def test_a_job_that_loses_a_process_ends_and_resumes_as_one_process_would(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Process 1 of 2 is killed after its first epoch; then two new ones finish the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    saved = ("--checkpoint", str(tmp_path / "run"))
    each = ("--coordinator", coordinator, "--processes", "2", *saved)
    logs = [tmp_path / "process 0", tmp_path / "process 1"]
    job = [SERVER.Process(target=process, args=(log, *each, "--process", str(i))) for i, log in enumerate(logs)]
    with running(logs[0], "ZeRO-1 1/4:", 1, *job):
        job[1].kill()
        job[0].join(timeout=120)
        assert job[0].exitcode not in (None, 0)
    said = logs[0].read_text()
    assert re.search(r"tasks are unhealthy[^\n]*:\n1\n", said), said
    assert "wrote" not in said

    status = launch("--out", str(tmp_path), *saved)
    said = capfd.readouterr()
    assert status == 0, said
    assert re.search(r"resumed from .* after epoch [123]/4", said.out), said
    assert "4 of the 8 devices" in said.out
    assert said.out.count("ZeRO-1 4/4:") == 1  # Only one process prints it.
    assert (tmp_path / "distributed_mnist.png").exists()

    alone = train()
    # No epochs are left: these are the parameters and the state that two processes saved.
    both = train(*saved)
    assert len(both.run.step_costs) == len(alone.run.step_costs) == 4 * (1437 // 128)
    assert alone.run.step_costs[-1] < 0.9 * alone.run.step_costs[0]
    np.testing.assert_allclose(both.run.step_costs, alone.run.step_costs, rtol=3e-6)
    # After 44 steps of up to 1e-3 they differ by 3e-8.
    chex.assert_trees_all_close(both.params, alone.params, rtol=1e-5, atol=1e-6)
    state: Any = both.state
    moment = slots_of(state)["mu"]["hidden1"]["kernel"]
    assert moment.addressable_shards[0].data.size == moment.size // 8
    np.testing.assert_allclose(both.run.epochs[-1].test_cost, alone.run.epochs[-1].test_cost, rtol=1e-5)


def test_the_launcher_names_the_process_that_was_lost_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the script, process 1 kills itself while process 0 waits."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nif '--process=1' in sys.argv:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(distributed_mnist, "__file__", str(script))
    assert launch() == 1
    said = capfd.readouterr()
    assert "error: process 1 of 2 was lost: killed by SIGKILL" in said.err
    (pid,) = re.findall(r"process 0 of 2: started here, pid (\d+)", said.out)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_rows_that_pad_the_test_images_do_not_count() -> None:
    graph, params = nnx.split(mnist_mlp.MLP(64, 8, rngs=nnx.Rngs(0)), nnx.Param)
    images, labels = (jnp.asarray(x[:5]) for x in mnist.digits()[3:])
    expected = mnist_mlp.evaluate(nnx.to_pure_dict(params), images, labels, graph=graph)
    filled = jnp.pad(images, [(0, 3), (0, 0)]), jnp.pad(labels, (0, 3), constant_values=-1)
    found = distributed_mnist.evaluate(nnx.to_pure_dict(params), *filled, graph=graph)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_processes_with_other_options_data_or_checkpoints_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[np.uint32] = []
    digits = mnist.digits()
    job = ("--coordinator", "h:1", "--processes", "2", "--checkpoint", str(tmp_path), "--process")

    def gather(own: np.uint32) -> np.ndarray:
        """The numbers that the first process sent and that this one sends."""
        sent.append(own)
        return np.array([sent[0], own])

    def check(*options: str, data: mnist.Dataset = digits) -> None:
        distributed_mnist.check_same(data, distributed_mnist.parse([*OPTIONS, *job, *options]))

    monkeypatch.setattr(distributed_mnist.multihost_utils, "process_allgather", gather)
    check("0")
    check("1", "--out", "elsewhere")
    refused = functools.partial(pytest.raises, ValueError, match=r"processes \[1\] have other options or data")
    with refused():
        check("1", "--batch", "64")
    with refused():
        check("1", data=digits._replace(name="another"))
    (tmp_path / "3").mkdir()
    with refused():
        check("1")


def test_a_step_that_fails_waits_for_the_runtime_to_name_the_lost_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    error = jax.errors.JaxRuntimeError("connection closed by peer")
    monkeypatch.setattr(distributed_mnist, "train", unittest.mock.Mock(side_effect=error))
    monkeypatch.setattr(distributed_mnist, "check_same", unittest.mock.Mock())
    monkeypatch.setattr(time, "sleep", waited.append)
    for processes, waits in ((1, []), (2, [12])):  # A single process has no other to lose.
        monkeypatch.setattr(jax, "process_count", unittest.mock.Mock(return_value=processes))
        with pytest.raises(jax.errors.JaxRuntimeError):
            distributed_mnist.main([*OPTIONS, "--out", str(tmp_path)])
        assert waited == waits
    assert "error: process 0 of 2: connection closed by peer" in capsys.readouterr().err
