"""The paper's experiments: the harness of examples/paper, figures 1 and 2, section 7, and when claims hold."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import figure1
import figure2
import figure3
import figure4
import harness
import jax
import jax.numpy as jnp
import mnist_mlp
import numpy as np
import optax
import pytest
import section7
from flax import nnx
from harness import Claim, Problem, Sweep
from helpers.runs import Array
from helpers.scripts import assert_png, quick_figure, read_json
from loaders import mnist
from matplotlib.figure import Figure
from support import report

import adam_fn

SCALES = np.array([1.0, 3.0, 0.1])


def quadratic(params: jax.Array, data: jax.Array, rows: jax.Array, key: jax.Array) -> jax.Array:
    """The same cost for all minibatches."""
    return 0.5 * jnp.sum(data * (params - 1) ** 2)


def quadratic_problem(**options: Any) -> Problem[Any, Any]:
    return Problem(np.zeros(3, np.float32), np.float32(SCALES), quadratic, 240, batch=2, **options)


def stepped(
    direction: optax.GradientTransformation, rates: Sequence[float], steps: int, decaying: bool = False
) -> tuple[Array, Array]:
    """The costs before and the parameters after each step ``[rates, steps, …]`` on the quadratic, by a plain loop."""
    params, costs, path = np.zeros((len(rates), 3)), [], []
    state, update = direction.init(params), jax.jit(direction.update)
    for step in range(steps):
        alpha = np.array(rates) / (math.sqrt(step + 1) if decaying else 1)
        costs.append(0.5 * np.sum(SCALES * (params - 1) ** 2, 1))
        u, state = update(np.float32(SCALES * (params - 1)), state)
        params = params - alpha[:, None] * np.asarray(u)
        path.append(params)
    return np.stack(costs, 1), np.stack(path, 1)


def swept(*costs: Sequence[float] | Array, **metrics: float) -> Sweep:
    """A sweep of Adam at the rates 1, 10, 100, … with these costs, and metrics that are the same throughout."""
    shape = len(costs), len(costs[0])
    numbers = {name: np.full(shape, value) for name, value in metrics.items()}
    return Sweep("Adam", {"rate": np.logspace(0, len(costs) - 1, len(costs))}, np.array(costs, np.float64), numbers)


def holds(claims: Sequence[Claim]) -> list[bool | None]:
    return [claim.holds for claim in claims]


class TestSweep:
    @pytest.mark.parametrize("decaying", [False, True])
    def test_a_sweep_steps_each_optimizer_as_it_would_alone(self, decaying: bool) -> None:
        """An epoch has 120 steps, more than one part; a rate at which SGD diverges does not disturb the others."""
        rates, epochs = (0.01, 0.3, 1e30), 2
        problem = quadratic_problem(schedule=harness.inverse_sqrt if decaying else harness.constant)
        for tx, direction, rtol in (
            (optax.sgd(1.0, momentum=0.9, nesterov=True), optax.trace(0.9, nesterov=True), 1e-4),
            (adam_fn.adam(1.0), optax.scale_by_adam(), 1e-3),
        ):
            run = harness.sweep("", lambda point, tx=tx: tx, {"rate": rates}, problem, epochs=epochs, seed=0)
            costs, _ = stepped(direction, rates[:2], 120 * epochs, decaying)
            expected = costs.reshape(2, epochs, 120).mean(2)
            np.testing.assert_allclose(run.costs[:2], expected, rtol=rtol, atol=1e-9)
            assert not np.isfinite(run.costs[2]).any()
            assert harness.best(run).point != 2

    def test_each_point_has_its_own_hyperparameters_and_metrics(self) -> None:
        rates = 0.1, 0.2
        grid = harness.product(b1=(0.0, 0.9), rate=rates)
        assert grid == {"b1": [0.0, 0.0, 0.9, 0.9], "rate": [0.1, 0.2, 0.1, 0.2]}
        problem = quadratic_problem(
            steps=3, evaluate=lambda params, state, data: {"first": params[0], "count": optax.tree.get(state, "count")}
        )
        run = harness.sweep("Adam", lambda point: adam_fn.adam(1.0, b1=point["b1"]), grid, problem, epochs=2, seed=0)
        assert run.costs.shape == (4, 2)
        assert run.metrics["count"].tolist() == [[3, 6]] * 4
        paths = [stepped(optax.scale_by_adam(b1), rates, 6)[1] for b1 in (0.0, 0.9)]
        np.testing.assert_allclose(run.metrics["first"], np.concatenate(paths)[:, [2, 5], 0], rtol=1e-5)

    @pytest.mark.parametrize("kind", ["minibatch", "noise"])
    def test_all_optimizers_see_the_same_minibatches_and_noise_new_in_every_step(self, kind: str) -> None:
        def cost(params: jax.Array, data: jax.Array, rows: jax.Array, key: jax.Array) -> jax.Array:
            return (data[rows].sum() if kind == "minibatch" else jax.random.normal(key)) + 0 * params.sum()

        def seen(tx: optax.GradientTransformation, seed: int = 0) -> Array:
            data: Any = np.random.default_rng(0).standard_normal(60, np.float32)
            problem = Problem(jnp.zeros(2), data, cost, 60, batch=7)
            return harness.sweep("", lambda point: tx, {"rate": (0.1, 0.2)}, problem, epochs=100, seed=seed).costs

        found = seen(adam_fn.adam(1.0))
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found, seen(optax.adagrad(1.0)))
        assert (found != seen(adam_fn.adam(1.0), seed=1)).all()
        assert len(set(found[0])) == 100, "every epoch shuffles anew"
        if kind == "noise":  # Means of 8 steps scatter by 1/√8 with independent noise, by 1 with one draw an epoch.
            assert found[0].std() == pytest.approx(1 / math.sqrt(8), rel=0.3)


class TestBest:
    def test_the_lowest_final_cost_is_the_best(self) -> None:
        runs = swept((1, 5), (9, 2), (3, 3))
        assert harness.best(runs) == (1, 10.0, 2.0, "")
        assert harness.best(runs, "mean") == (0, 1.0, 3.0, "the lowest rate tried")

    def test_a_best_rate_at_the_end_of_the_grid_is_noted(self) -> None:
        assert harness.best(swept((9, 1), (1, 2))).note == "the lowest rate tried"
        assert harness.best(swept((9, 2), (1, 1))).note == "the highest rate tried"
        assert harness.best(swept((9, 2))).note == ""

    def test_a_run_that_diverged_is_never_the_best(self) -> None:
        runs = swept((math.nan, math.nan), (math.inf, 1), (2, 4), (1, -math.inf))
        assert harness.best(runs).point == harness.best(runs, "mean").point == 2
        with pytest.raises(ValueError, match="Adam: every run diverged"):
            harness.best(swept((math.nan, 1), (1, math.inf)))


class TestReport:
    CLAIMS = (
        Claim("Adam is fast", "6.1", "cost 0.1 and " + "0.2 " * 40, True),
        Claim("it is slow", "6.2", "cost 3", False),
        Claim("it is " + "so " * 30, "7", "", None),
    )

    def test_claims_are_printed_as_a_table(self) -> None:
        lines = harness.claims_table(self.CLAIMS).splitlines()
        assert lines[0].split() == ["section", "claim", "of", "the", "paper", "measured", "holds"]
        assert [line.split()[-1] for line in lines if line[:1] in "67"] == ["yes", "no", "decided"]
        assert max(map(len, lines)) <= 140
        assert " ".join(lines).count("0.2") == 40

    def test_a_picture_and_its_numbers_are_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        figure = Figure(layout="constrained")
        figure.subplots().plot([1, 2])
        numbers = {"curve": np.array([1.23456789, np.nan]), "count": np.int64(3), "grid": {"rate": (0.1, math.inf)}}
        harness.write(tmp_path, "stem", figure, numbers, self.CLAIMS)
        assert f"wrote {tmp_path / 'stem.png'} and {tmp_path / 'stem.json'}" in capsys.readouterr().out
        found = read_json(tmp_path / "stem.json")
        assert found["curve"] == [1.23457, None]
        assert (found["count"], found["grid"]) == (3, {"rate": [0.1, None]})
        assert [claim["holds"] for claim in found["claims"]] == [True, False, None]
        assert {"adam_fn", "jax", "optax"} < set(found["versions"])
        assert_png(tmp_path / "stem.png", 1_000, 150_000)

    def test_the_command_line_sets_the_epochs_and_the_folders(self, tmp_path: Path) -> None:
        def parse(*argv: str) -> Any:
            return harness.options("script.py", "What.\n", ("--out", str(tmp_path / "new"), *argv), epochs=30)

        assert (parse().epochs, parse("--quick").epochs, parse("--quick", "--epochs", "7").epochs) == (30, 2, 7)
        assert (tmp_path / "new").is_dir()
        assert harness.decided(parse("--quick"), True) is None
        assert harness.decided(parse(), False) is False
        assert harness.folder(None, "imdb") is None
        assert harness.folder("standin", "imdb") == "standin"
        assert harness.folder("standin", "mnist") == "digits"
        assert harness.folder("data", "imdb") == str(Path("data") / "imdb")


@pytest.mark.parametrize(
    ("drop", "share"), [(figure1.dropped, 0.5), (lambda x, key: figure3.dropout(x, 0.2, key), 0.2)]
)
def test_dropout_drops_single_features(drop: Callable[..., jax.Array], share: float) -> None:
    features = np.random.default_rng(0).uniform(1, 2, (200, 1003)).astype(np.float32)
    dropped, other = (np.asarray(jax.jit(drop)(features, jax.random.key(seed))) for seed in (0, 1))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], features[kept] / (1 - share), rtol=1e-6)
    assert kept.mean() == pytest.approx(1 - share, abs=0.01)
    assert np.ptp(kept.mean(0)) < 0.3 and np.ptp(kept.mean(1)) < 0.2, "no whole column or row is dropped"
    assert (kept != (other != 0)).mean() > 0.3


class TestFigure1:
    def test_costs_equal_those_of_numpy(self) -> None:
        """The parameters are random; dropout changes the cost."""
        rng = np.random.default_rng(0)

        def cost(problem: Problem[Any, Any], w: Array, b: Array) -> float:
            params = {"w": np.float32(w), "b": np.float32(b)}
            return float(jax.jit(problem.cost)(params, problem.data, np.arange(5), jax.random.key(0)))

        _, problem = figure1.mnist_problem("standin", None)
        images, labels = (np.asarray(array)[:5] for array in problem.data)
        w, b = rng.normal(size=(64, 10)), rng.normal(size=10)
        logits = images / 255 @ w + b
        expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(5), labels])
        assert cost(problem, w, b) == pytest.approx(expected, rel=1e-5)
        _, problems = figure1.imdb_problem("standin", None)
        counts, liked = (np.asarray(array)[:5].astype(float) for array in problems[False].data)
        w, b = 0.1 * rng.normal(size=1000), np.array(0.3)
        expected = np.mean(np.log1p(np.exp(-(2 * liked - 1) * (counts @ w + b))))
        assert cost(problems[False], w, b) == pytest.approx(expected, rel=1e-5)
        assert cost(problems[True], w, b) != pytest.approx(expected, rel=1e-3)

    def test_a_quick_run_writes_figure_1(self, tmp_path: Path) -> None:
        panels = quick_figure(figure1, tmp_path)["panels"]
        assert len(panels) == 3
        for sweeps in panels.values():
            assert list(sweeps) == list(figure1.OPTIMIZERS)
            for label, run in sweeps.items():
                assert tuple(run["grid"]["rate"]) == figure1.OPTIMIZERS[label][1]
                assert np.shape(run["costs"]) == (len(run["grid"]["rate"]), 2)


class TestFigure2:
    def test_a_quick_run_writes_figure_2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "POINTS_PER_EPOCH", 11)  # Every step.
        runs = quick_figure(figure2, tmp_path)["runs"]
        assert [(run["dropout"], run["optimizer"]) for run in runs] == [
            (dropout, name) for dropout in (0.5, 0.0) for name in figure2.NAMES
        ]
        assert {run["schedule"] for run in runs} == {"constant"}
        assert all(len(run["curve"]["costs"]) == 22 and len(run["epochs"]) == 2 for run in runs)
        # All optimizers see the same masks, and none without dropout.
        dropped, *others = (run["curve"]["costs"][0] for run in runs)
        assert others[:4] == pytest.approx([dropped] * 4, rel=1e-5)
        assert others[4] != pytest.approx(dropped, rel=1e-4)

    def test_dropout_drops_hidden_units_of_both_layers(self) -> None:
        """A net of ones returns the product of the shares of hidden units that are kept in both layers."""
        model = mnist_mlp.MLP(4, 1024, rngs=nnx.Rngs(0))  # A power of two: the sums are exact.
        for layer, weight, bias in ((model.hidden1, 0, 1), (model.hidden2, 2**-10, 0), (model.out, 2**-10, 0)):
            layer.kernel[...] = jnp.full_like(layer.kernel[...], weight)
            assert layer.bias is not None
            layer.bias[...] = jnp.full_like(layer.bias[...], bias)
        x = jnp.zeros((500, 4))
        np.testing.assert_allclose(np.asarray(model(x)), 1, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(model(x, 0.2)), 1, rtol=1e-5)
        sizes = np.asarray(model(x, 0.2, jax.random.key(0)))[:, 0]
        # The product of two shares of 1024 units, each kept with 0.8 and divided by it: variance 2 * 0.25 / 1024.
        assert sizes.mean() == pytest.approx(1, abs=0.005)
        assert sizes.std() == pytest.approx(math.sqrt(2 * 0.25 / 1024), rel=0.2)


class TestSection7:
    def test_a_quick_run_writes_section_7(self, tmp_path: Path) -> None:
        runs = quick_figure(section7, tmp_path)["runs"]
        assert [run["label"] for run in runs] == ["Adam", "AdaMax"]
        for run in runs:
            metrics: Mapping[str, list[list[float]]] = run["metrics"]
            assert len({tuple(metrics[f"{kind}_cost"][0]) for kind in section7.KINDS}) == 3
            # The first steps of both are the rate itself.
            assert 0.999 < metrics["largest_step"][0][0] / section7.RATES[run["label"]] < section7.BOUND + 0.5

    def test_metrics_are_those_of_the_averages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Averages of 3 steps, with β₂ = 0.5, are compared with averages computed by hand."""
        monkeypatch.setattr(section7, "DECAY", 0.5)
        monkeypatch.setitem(section7.RATES, "Adam", 0.1)
        digits = mnist.digits()
        task, tx = section7.problem(digits, 8, 3, seed=0), section7.optimizer("Adam")
        params, state, seen, update = task.params, tx.init(task.params), [], jax.jit(tx.update)
        for scale in (1.0, -2.0, 3.0):
            updates, state = update(jax.tree.map(lambda p, scale=scale: scale * p, params), state, params)
            params = jax.tree.map(np.add, params, updates)
            seen.append(params)
        found = jax.jit(task.evaluate)(params, state, task.data)
        graph = nnx.split(mnist_mlp.MLP(64, 8, rngs=nnx.Rngs(0)), nnx.Param)[0]
        for kind, weights in {"last": (0, 0, 1), "mean": (1, 1, 1), "average": (0.25, 0.5, 1)}.items():
            average: Any = jax.tree.map(lambda *p, w=weights: np.average(p, 0, w).astype(np.float32), *seen)
            expected = mnist_mlp.evaluate(
                average, jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels), graph=graph
            )
            assert float(found[f"{kind}_cost"]) == pytest.approx(float(expected.cost), rel=1e-5)


class TestClaims:
    def test_claims_of_figure_1_are_decided_by_its_numbers(self) -> None:
        def panel(**costs: float) -> figure1.Panel:
            labels = "Adam", "SGD, Nesterov", "AdaGrad", figure1.CONSTANT
            return figure1.Panel("", {label: swept([2 * costs.get(label, 1.0), 0.0]) for label in labels})

        faster = panel(AdaGrad=2.0, **{figure1.CONSTANT: 2.0})
        slower, slow = panel(**{"SGD, Nesterov": 2.0}), panel(Adam=2.0)
        held = figure1.claims(faster, slower, slower, undecided=False)
        assert holds(held) == [True] * 7
        assert "AdaGrad 2.0000 (0.0000)" in held[1].measured
        between = panel(AdaGrad=1.5, **{figure1.CONSTANT: 1.5, "SGD, Nesterov": 2.0})
        broken = figure1.claims(between, slower, panel(), undecided=False)
        assert holds(broken) == [False, False, False, True, False, False, True]
        assert holds(figure1.claims(slow, slow, slow, undecided=False))[3::3] == [False, False]
        assert holds(figure1.claims(slow, slow, slow, undecided=True)) == [None] * 7

    def test_claims_of_figure_2_are_decided_by_its_numbers(self) -> None:
        def runs(**costs: float) -> list[figure2.Run]:
            epochs = {name: [report.Epoch(1, cost, 0, 0, 0, 1, 1)] for name, cost in costs.items()}
            return [figure2.Run(name, name, 0.1, 0.0, "constant", epochs=epochs[name]) for name in costs]

        both = {0.5: runs(adam=1.0, adagrad=2.0, sgd=math.nan), 0.0: runs(adam=math.nan, adagrad=2.0)}
        assert holds(figure2.claims(both, False)) == [True, False]
        assert "adam 1.0000, adagrad 2.0000, sgd inf" in figure2.claims(both, True)[0].measured

    def test_claims_of_figure_3_are_decided_by_its_numbers(self) -> None:
        falling = 2.0 ** -np.arange(10.0)

        def held(adagrad: Array, noisy: Array, below: float, quick: bool = False) -> list[bool | None]:
            moments = {"root below eps": below, "below eps": 0.6}
            plain = {
                "Adam": swept(0.9 * falling, **moments),
                "SGD, Nesterov": swept(falling),
                "AdaGrad": swept(adagrad),
            }
            dropout = {"Adam": swept(noisy), "SGD, Nesterov": swept(falling), "AdaGrad": swept(falling**0.5)}
            return holds(figure3.claims(figure3.Runs({}, plain, dropout), quick=quick))

        # Falling by a square root, AdaGrad is slow at first as well.
        assert held(0.8 * falling**0.5, 0.9 * falling, 0.1) == [False, True, False, True]
        fast_first = np.minimum(0.8 * falling**0.5, 0.4)
        assert held(fast_first, 1.1 * falling, 0.6) == [True, True, True, False]
        assert held(fast_first, 1.1 * falling, 0.6, quick=True) == [None] * 4

    def test_claims_of_figure_4_are_decided_by_its_numbers(self) -> None:
        shape = len(figure4.B1), len(figure4.B2), len(figure4.CORRECTED), len(figure4.RATES)
        cost = np.full((*shape, 10), 100.0)
        cost[:, 1, 1, 2, -1] = 90.0  # the best: corrected, 1 - β₂ small
        cost[:, 2, 0, 3, 0] = np.inf

        def held(cost: Array, quick: bool = False) -> list[bool | None]:
            return holds(figure4.claims(swept(*cost.reshape(60, 10)), 1, Namespace(quick=quick)))

        assert held(cost) == [True, True, True, True]
        assert held(cost[:, :, ::-1]) == [False, False, False, False]
        assert held(cost[:, ::-1]) == [False, True, True, True], "the first claim is about the largest β₂"
        assert held(np.roll(cost, -1, 1)) == [False, True, False, True], "the third about the smallest"
        late = cost[..., ::-1]
        assert held(late) == [False, False, False, True], "it diverges late, and the best result is an early one"
        assert held(cost, quick=True) == [None] * 4

    def test_claims_of_section_7_are_decided_by_its_numbers(self) -> None:
        def runs(adamax: float, step: float, average: float) -> dict[str, Sweep]:
            names = (f"{kind}_{what}" for kind in section7.KINDS for what in ("cost", "accuracy"))
            metrics = dict.fromkeys(names, 1.0) | {"average_cost": average}
            return {
                label: swept([cost], **metrics, largest_step=step * section7.RATES[label])
                for label, cost in (("Adam", 1.0), ("AdaMax", adamax))
            }

        assert holds(section7.claims(runs(1.0, 1.0, 0.9), False)) == [True] * 4
        assert holds(section7.claims(runs(2.0, 1.005, 1.1), False)) == [False] * 4
        assert "1.0050 α" in section7.claims(runs(2.0, 1.005, 1.1), True)[1].measured
