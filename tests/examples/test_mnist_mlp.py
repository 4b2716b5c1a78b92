"""Both examples on scikit-learn's digits: what they print, write and learn."""

import math
from pathlib import Path
from typing import Any

import flax_train_state
import jax
import jax.numpy as jnp
import mnist_mlp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.scripts import assert_png, read_json
from loaders import mnist

import adam_fn

QUICK = ("--data", "digits", "--quick")
CHANCE = math.log(10)  # the cost of a guess among ten classes, in nats


class TestMnistMlp:
    def test_learns_and_writes_its_curves_and_numbers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "folder"
        options = ("--data", "digits", "--width", "128", "--epochs", "8", "--learning-rate", "3e-3")
        (run,) = mnist_mlp.main((*options, "--out", str(out)))
        said = capsys.readouterr().out
        assert "Adam 8/8: training cost" in said
        assert "test accuracy" in said
        assert f"wrote {out / 'mnist_mlp.png'} and {out / 'mnist_mlp.json'}" in said
        assert_png(out / "mnist_mlp.png")
        costs = [epoch.train_cost for epoch in run.epochs]
        assert run.step_costs[0] == pytest.approx(CHANCE, abs=0.5)
        assert costs[-1] < 0.1 * costs[0]
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
        assert [epoch["epoch"] for epoch in written["epochs"]] == list(range(1, 9))
        for entry, epoch in zip(written["epochs"], run.epochs, strict=True):
            assert entry["test_accuracy"] == pytest.approx(epoch.test_accuracy, rel=1e-5)
            assert entry["train_cost"] == pytest.approx(epoch.train_cost, rel=1e-5)
            assert entry["images_per_second"] > 0
            hits = 360 * epoch.test_accuracy  # every test image is evaluated, so it is a whole number
            assert hits == pytest.approx(round(hits), abs=1e-3)

    def test_every_optimizer_learns_at_its_own_rate(self, tmp_path: Path) -> None:
        """The compared ones, from one initialisation on the same images, and the others."""
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

    def test_goes_on_from_its_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ended in the middle of epoch 3, it goes on from epoch 2 and ends as if nothing had been."""
        digits, options = mnist.digits(), (*QUICK, "--epochs", "4", "--dropout", "0.2", "--out", str(tmp_path / "out"))
        expected = mnist_mlp.train(digits, "adam", mnist_mlp.parse(options))
        saving = (*options, "--checkpoint", str(tmp_path / "run"))
        evaluate, calls = mnist_mlp.evaluate, iter((False, False, True))

        def ends(*args: Any, **kwargs: Any) -> mnist_mlp.Metrics:
            if next(calls):
                raise KeyboardInterrupt
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(mnist_mlp, "evaluate", ends)
        with pytest.raises(KeyboardInterrupt):
            mnist_mlp.main(saving)
        monkeypatch.undo()
        capsys.readouterr()
        for line, epochs in ((f"Adam: resumed from {tmp_path / 'run' / 'adam'} after epoch 2/4", 2), ("4/4", 0)):
            run = mnist_mlp.train(digits, "adam", mnist_mlp.parse(saving))
            resumed, *lines = capsys.readouterr().out.splitlines()
            assert resumed.endswith(line)
            assert sum("training accuracy" in line for line in lines) == epochs
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

    def test_another_seed_has_another_initialisation(self) -> None:
        first, other = (
            mnist_mlp.train(mnist.digits(), "adam", mnist_mlp.parse((*QUICK, "--epochs", "1", "--seed", seed)))
            for seed in ("3", "4")
        )
        assert first.step_costs[0] != other.step_costs[0]

    def test_a_run_that_diverges_is_written_as_null(self, tmp_path: Path) -> None:
        options = ("--optimizer", "sgd-nesterov", "--learning-rate", "1e30", "--schedule", "constant")
        (run,) = mnist_mlp.main((*QUICK, *options, "--out", str(tmp_path)))
        assert math.isnan(run.epochs[-1].train_cost)
        assert len(run.epochs) == 2
        numbers = read_json(tmp_path / "mnist_mlp.json")
        assert numbers["layers"] == [64, 64, 64, 10]
        assert numbers["runs"][0]["epochs"][-1]["train_cost"] is None
        assert_png(tmp_path / "mnist_mlp.png")

    def test_step_updates_in_place(self) -> None:
        graph, variables = nnx.split(mnist_mlp.MLP(4, 8, rngs=nnx.Rngs(0)), nnx.Param)
        params, tx = nnx.to_pure_dict(variables), adam_fn.adam(1e-3)
        state = tx.init(params)
        moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
        data = jnp.zeros((6, 4), jnp.uint8), jnp.arange(6)
        batches = jnp.arange(6).reshape(2, 3)
        new = mnist_mlp.train_step(params, state, data, batches, np.int32(1), graph=graph, tx=tx)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, moments)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))

    def test_epochs_leave_different_images_out(self) -> None:
        first, second = (
            np.asarray(mnist_mlp.shuffled(jax.random.key(seed), size=100, batch=16, steps=6)) for seed in (0, 1)
        )
        for batches in (first, second):
            assert batches.shape == (6, 16)
            assert len(np.unique(batches)) == 96
            assert (batches.min() >= 0) and (batches.max() < 100)
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
    def test_weight_decay_at_a_zero_gradient(self, name: str, shrinks: float) -> None:
        params = jnp.array([2.0, -4.0])
        tx = mnist_mlp.build(name, 0.1, 0.01)
        updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
        np.testing.assert_allclose(np.asarray(updates), -shrinks * np.asarray(params), rtol=1e-5)


class TestFlaxTrainState:
    def test_every_epoch_prints_its_cost_and_accuracy(self, capsys: pytest.CaptureFixture[str]) -> None:
        flax_train_state.main(QUICK)
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("epoch 1/2: training cost")
        assert "test accuracy" in second

    def test_learns(self) -> None:
        costs, accuracies = flax_train_state.main(("--data", "digits", "--width", "500", "--epochs", "8"))
        assert len(costs) == 8 * (1437 // 128)
        assert costs[0] == pytest.approx(CHANCE, abs=0.5)
        assert np.mean(costs[-11:]) < 0.15 * costs[0]
        assert accuracies[-1] > 0.9

    def test_chain_clips_and_warms_up(self) -> None:
        tx = flax_train_state.optimizer(steps=100, rate=0.1)
        params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
        state, update = tx.init(params), jax.jit(tx.update)
        grads = jax.tree.map(lambda p: 1e6 * p, params)
        sizes, decayed = [], []
        for _ in range(11):
            updates, state = update(grads, state, params)
            sizes.append(-np.asarray(updates["bias"])[0])
            decayed.append(-np.asarray(updates["kernel"])[0, 0])
        # A constant gradient makes Adam's step the rate itself, whatever the gradient's size is.
        np.testing.assert_allclose(sizes, 0.1 * np.arange(11) / 10, rtol=1e-4)
        mu = optax.tree.get(state, "mu")
        clipped = (1 / math.sqrt(6)) * (1 - 0.9**11)  # six equal entries of a gradient of norm 1
        np.testing.assert_allclose(np.asarray(mu["bias"]), clipped, rtol=1e-4)
        np.testing.assert_allclose(decayed, 1.01 * np.asarray(sizes), rtol=1e-4)  # the kernel decays, the bias does not
