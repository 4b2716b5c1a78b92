"""The examples of one process: what they print, write and learn from scikit-learn's digits, and a new optimizer."""

import contextlib
import dataclasses
import math
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diagnostics
import flax_train_state
import jax
import jax.numpy as jnp
import mnist_mlp
import new_optimizer
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.scripts import SERVER, assert_png, read_json, running
from loaders import mnist
from new_optimizer import QHAdam

import adam_fn

QUICK = ("--data", "digits", "--quick")
CHANCE = math.log(10)  # the cost of a guess among ten classes, in nats
EPOCHS, KILLS = 16, 4


def train(dataset: mnist.Dataset, options: mnist_mlp.Options, log: Path) -> None:
    """Trains in a process with a cache of its own: if killed, it may leave half an entry behind."""
    jax.config.update("jax_compilation_cache_dir", str(log.parent / "cache"))
    with log.open("a") as file, contextlib.redirect_stdout(file):
        mnist_mlp.train(dataset, "adam", options)


class TestMnistMlp:
    def test_learns_and_writes_its_curves_and_numbers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "folder"
        options = ("--data", "digits", "--width", "128", "--epochs", "8", "--learning-rate", "3e-3")
        (run,) = mnist_mlp.main((*options, "--out", str(out)))
        said = capsys.readouterr().out
        assert "Adam 8/8: training cost" in said
        assert f"wrote {out / 'mnist_mlp.png'} and {out / 'mnist_mlp.json'}" in said
        assert_png(out / "mnist_mlp.png")
        assert run.step_costs[0] == pytest.approx(CHANCE, abs=0.5)
        assert run.epochs[-1].train_cost < 0.1 * run.epochs[0].train_cost
        assert run.epochs[-1].test_accuracy > 0.93
        numbers = read_json(out / "mnist_mlp.json")
        assert numbers["dataset"] == "scikit-learn's digits"
        assert (numbers["train_images"], numbers["test_images"]) == (1437, 360)
        assert numbers["layers"] == [64, 128, 128, 10]
        assert {"batch", "seed", "device", "versions"} < set(numbers)
        (written,) = numbers["runs"]
        assert (written["optimizer"], written["learning_rate"]) == ("adam", 3e-3)
        assert len(run.step_costs) == 8 * (1437 // 128)
        np.testing.assert_allclose(written["step_costs"], run.step_costs, rtol=1e-5)
        epochs = [[*epoch.values()] for epoch in written["epochs"]]
        np.testing.assert_allclose(epochs, [dataclasses.astuple(epoch) for epoch in run.epochs], rtol=1e-5)
        hits = 360 * np.array([epoch.test_accuracy for epoch in run.epochs])  # Every test image is evaluated.
        np.testing.assert_allclose(hits, hits.round(), atol=1e-3)

    def test_every_optimizer_learns_at_its_own_rate(self, tmp_path: Path) -> None:
        """The compared optimizers start from one initialisation and see the same images; the others learn as well."""
        options = (*QUICK, "--epochs", "16", "--schedule", "constant")
        compared = mnist_mlp.main((*options, "--compare", "--out", str(tmp_path)))
        assert [run.optimizer for run in compared] == list(mnist_mlp.COMPARED)
        first = compared[0].step_costs[0]
        np.testing.assert_allclose([run.step_costs[0] for run in compared], first, rtol=1e-6)
        assert len({run.step_costs[-1] for run in compared}) > len(compared) // 2, "the optimizers must differ"
        assert_png(tmp_path / "mnist_compare.png")
        written = read_json(tmp_path / "mnist_compare.json")["runs"]
        assert [run["label"] for run in written] == [run.label for run in compared]

        others = mnist_mlp.OPTIMIZERS.keys() - mnist_mlp.COMPARED
        runs = *compared, *(mnist_mlp.train(mnist.digits(), name, mnist_mlp.parse(options)) for name in others)
        for run in runs:
            assert run.learning_rate == mnist_mlp.OPTIMIZERS[run.optimizer].rate
            assert len(run.epochs) == 16
            assert run.epochs[-1].train_cost < 0.8 * CHANCE, run.label
            assert run.epochs[-1].test_accuracy > 0.5, run.label

    def test_a_killed_run_goes_on_from_its_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A run that is killed again and again ends like one that is not; it does not continue another run."""
        digits = mnist.digits()
        options = (*QUICK, "--epochs", str(EPOCHS), "--dropout", "0.2", "--out", str(tmp_path / "out"))
        expected = mnist_mlp.train(digits, "adam", mnist_mlp.parse(options))
        other = mnist_mlp.train(digits, "adam", mnist_mlp.parse((*options, "--epochs", "1", "--seed", "1")))
        assert other.step_costs[0] != expected.step_costs[0]
        saving = (*options, "--checkpoint", str(tmp_path / "run"))
        log, chance = tmp_path / "log", random.Random(0)
        log.touch()
        for _ in range(KILLS):
            process = SERVER.Process(target=train, args=(digits, mnist_mlp.parse(saving), log))
            with running(log, "test accuracy", log.read_text().count("test accuracy") + 2, process):
                time.sleep(chance.random() / 10)
            assert process.exitcode == -signal.SIGKILL
        capsys.readouterr()
        for last in (False, True):
            run = mnist_mlp.train(digits, "adam", mnist_mlp.parse(saving))
            resumed, *lines = capsys.readouterr().out.splitlines()
            done = EPOCHS - sum("test accuracy" in line for line in lines)
            assert resumed == f"Adam: resumed from {tmp_path / 'run' / 'adam'} after epoch {done}/{EPOCHS}"
            assert (done == EPOCHS) == last
            assert run.step_costs == expected.step_costs
            assert [epoch.test_cost for epoch in run.epochs] == [epoch.test_cost for epoch in expected.epochs]
        for other, complaint in (
            (("--seed", "1"), "adam has checkpoints of another run, whose seed is 0"),
            (("--width", "65", "--dropout", "0"), "whose width is 64, dropout is 0.2"),
        ):
            with pytest.raises(SystemExit, match=complaint):
                mnist_mlp.main((*saving, *other))
        monkeypatch.setitem(mnist_mlp.OPTIMIZERS, "adam", mnist_mlp.OPTIMIZERS["yogi"]._replace(rate=1e-3))
        with pytest.raises(SystemExit, match="rules: Adam, expected Yogi"):
            mnist_mlp.main(saving)

    def test_a_run_that_diverges_is_written_as_null(self, tmp_path: Path) -> None:
        options = ("--optimizer", "sgd-nesterov", "--learning-rate", "1e30", "--schedule", "constant")
        (run,) = mnist_mlp.main((*QUICK, *options, "--out", str(tmp_path)))
        assert math.isnan(run.epochs[-1].train_cost)
        assert len(run.epochs) == 2
        numbers = read_json(tmp_path / "mnist_mlp.json")
        assert numbers["runs"][0]["epochs"][-1]["train_cost"] is None
        assert_png(tmp_path / "mnist_mlp.png")

    def test_step_updates_in_place(self) -> None:
        graph, variables = nnx.split(mnist_mlp.MLP(4, 8, rngs=nnx.Rngs(0)), nnx.Param)
        params, tx = nnx.to_pure_dict(variables), adam_fn.adam(1e-3)
        state = tx.init(params)
        given = jax.tree.leaves((params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")))
        data, batches = (jnp.zeros((6, 4), jnp.uint8), jnp.arange(6)), jnp.arange(6).reshape(2, 3)
        mnist_mlp.train_step(params, state, data, batches, np.int32(1), graph=graph, tx=tx)
        assert all(leaf.is_deleted() for leaf in given)

    def test_epochs_leave_different_images_out(self) -> None:
        first, second = (
            np.asarray(mnist_mlp.shuffled(jax.random.key(seed), size=100, batch=16, steps=6)) for seed in (0, 1)
        )
        for batches in (first, second):
            assert batches.shape == (6, 16)
            assert len({*batches.flat} & {*range(100)}) == 96
        assert set(first.flat) != set(second.flat)

    @pytest.mark.parametrize("name", mnist_mlp.SCHEDULES)
    def test_schedules_stay_within_the_rate(self, name: str) -> None:
        counts = jnp.arange(100)
        for steps in (1, 2, 100):
            schedule = mnist_mlp.SCHEDULES[name](0.5, steps)
            rates = np.asarray(schedule(counts) if callable(schedule) else np.full(100, schedule))[:steps]
            assert ((rates >= 0) & (rates <= 0.5)).all()
            assert steps < 100 or rates.max() == pytest.approx(0.5)
        assert name == "constant" or rates[-1] < 0.2 * 0.5

    @pytest.mark.parametrize(
        ("name", "shrinks"),
        [("adam", 0.1 * 0.01), ("amsgrad", 0.1 * 0.01), ("sgd-nesterov", 0.1 * 1.9 * 0.01)],
    )
    def test_weight_decay_shrinks_parameters_at_a_zero_gradient(self, name: str, shrinks: float) -> None:
        params = jnp.array([2.0, -4.0])
        tx = mnist_mlp.build(name, 0.1, 0.01)
        updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        np.testing.assert_allclose(np.asarray(updates), -shrinks * np.asarray(params), rtol=1e-5)


class TestFlaxTrainState:
    def test_learns_and_prints_every_epoch(self, capsys: pytest.CaptureFixture[str]) -> None:
        costs, accuracies = flax_train_state.main(("--data", "digits", "--width", "500", "--epochs", "8"))
        assert len(costs) == 8 * (1437 // 128)
        assert costs[0] == pytest.approx(CHANCE, abs=0.5)
        assert np.mean(costs[-11:]) < 0.15 * costs[0]
        assert accuracies[-1] > 0.9
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.startswith("epoch 1/8: training cost")
        assert last.endswith(f"test accuracy {accuracies[-1]:.2%}")

    def test_chain_clips_and_warms_up(self) -> None:
        tx = flax_train_state.optimizer(steps=100, rate=0.1)
        params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
        grads = jax.tree.map(lambda p: 1e6 * p, params)

        def step(state: Any, _: None) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, tx.init(params), length=11)
        # A constant gradient makes Adam's step the rate itself, whatever the gradient's size is.
        np.testing.assert_allclose(-updates["bias"][:, 0], 0.1 * np.arange(11) / 10, rtol=1e-4)
        np.testing.assert_allclose(updates["kernel"][:, 0, 0], 1.01 * updates["bias"][:, 0], rtol=1e-4)  # It decays.
        clipped = (1 / math.sqrt(6)) * (1 - 0.9**11)  # Six equal entries of a gradient of norm 1.
        np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], clipped, rtol=1e-4)


class TestDiagnostics:
    def test_a_run_is_drawn_and_written(self, tmp_path: Path) -> None:
        course = diagnostics.main((*QUICK, "--out", str(tmp_path)))
        assert_png(tmp_path / "diagnostics.png")
        numbers = read_json(tmp_path / "diagnostics.json")
        assert numbers["steps"] == sorted(set(numbers["steps"]))
        assert set(numbers["scalars"]) >= {"cost", "signal_to_noise", "effective_step", "quantisation_error/nu"}
        assert "signal_to_noise/hidden1/kernel" in course.scalars
        assert np.diff(course.scalars["cost"][[0, -1]]) < 0
        np.testing.assert_allclose(course.scalars["learning_rate"], 1e-3, rtol=1e-6)
        steps = 1e-3 * course.scalars["signal_to_noise"]
        np.testing.assert_allclose(course.scalars["effective_step"], steps, rtol=1e-5)

    def test_means_are_taken_over_stretches_of_steps(self) -> None:
        found = diagnostics.means(np.arange(5000.0) + 1)
        assert found[0] == 1
        assert np.all(np.diff(found) > 0)
        assert found[-1] < 5000
        assert diagnostics.means(np.ones(7)).tolist() == [1] * 7


class OneWeight(QHAdam):
    """QHAdam that wrongly corrects the second moment by the first one's bias weight."""

    @property
    def betas(self) -> Sequence[float]:
        return self.b1, self.b1


def test_the_new_optimizer_follows_its_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_optimizer.largest_error(100) < 1e-6
    monkeypatch.setattr(new_optimizer, "QHAdam", OneWeight)
    assert new_optimizer.largest_error(10) > 1e-2
