"""Section 7 of the Adam paper (arXiv 1412.6980): AdaMax, and the average of the parameters over time.

    python examples/paper/section7.py           # 10 epochs of Adam and of AdaMax
    python examples/paper/section7.py --quick

The MLP of section 6.2 (`mnist_mlp.py`: two hidden layers of 1000 ReLUs, minibatches of 128, no dropout) at the paper's
constant rates, 0.001 for Adam and 0.002 for AdaMax. After each epoch the test cost and accuracy of the parameters
themselves, of their bias-corrected exponential average with β₂ = 0.999 (section 7.2) and of their mean over all steps
(Polyak and Ruppert). Also the largest step of any parameter, in units of the rate: section 7.1 bounds AdaMax's by 1.

Where this departs from the paper: it shows no experiment with either, so the problem and the criteria are ours. Its
bound of AdaMax's step is that of a gradient that does not grow; for any gradients it is (1-β₁)/(1-β₁/β₂) = 1.009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import harness
import jax
import jax.numpy as jnp
import mnist_mlp
import optax
from flax import nnx
from harness import Claim, Metrics, Problem, Sweep
from loaders import mnist
from loaders.mnist import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mnist_mlp import Parameters
from support.report import COLORS, epoch_axis, log_axis

import adam_fn

RATES = {"Adam": 1e-3, "AdaMax": 2e-3}
DECAY = 0.999  # β₂
BOUND = (1 - 0.9) / (1 - 0.9 / DECAY)  # of AdaMax's step over its rate, for any gradients
WITHIN = 1.1  # AdaMax "works as well": a training cost of at most so many times Adam's
KINDS = {"last": "parameters", "average": "average, β₂ = 0.999", "mean": "mean of all steps"}
LINES = {"last": ("-", COLORS[0]), "average": ("--", COLORS[5]), "mean": (":", COLORS[6])}


class Steps(NamedTuple):
    largest: jax.Array


def largest_step() -> optax.GradientTransformation:
    """A link of a chain that passes the updates through and keeps the largest of all so far."""

    def update(updates: optax.Updates, state: Steps, params: optax.Params | None = None) -> tuple[optax.Updates, Steps]:
        sizes = [jnp.abs(update).max() for update in jax.tree.leaves(updates)]
        return updates, Steps(jnp.maximum(state.largest, jnp.stack(sizes).max()))

    return optax.GradientTransformation(lambda params: Steps(jnp.zeros(())), cast(optax.TransformUpdateFn, update))


def optimizer(label: str) -> optax.GradientTransformation:
    make = {"Adam": adam_fn.adam, "AdaMax": adam_fn.adamax}[label]
    return optax.chain(make(RATES[label]), largest_step(), adam_fn.average_params(DECAY), adam_fn.average_params(None))


def problem(dataset: Dataset, width: int, steps: int | None, seed: int) -> Problem[Parameters, Mapping[str, jax.Array]]:
    graph, variables = nnx.split(mnist_mlp.MLP(dataset.pixels, width, rngs=nnx.Rngs(seed)), nnx.Param)

    def cost(params: Parameters, data: Mapping[str, jax.Array], rows: jax.Array, key: jax.Array) -> jax.Array:
        return mnist_mlp.cost_and_metrics(params, graph, data["images"][rows], data["labels"][rows])[0]

    def evaluate(params: Parameters, state: optax.OptState, data: Mapping[str, jax.Array]) -> Metrics:
        _, steps, average, mean = cast(tuple[optax.OptState, Steps, optax.OptState, optax.OptState], state)
        kinds = {
            "last": params,
            "average": adam_fn.averaged_params(average, params),
            "mean": adam_fn.averaged_params(mean, params),
        }
        found: dict[str, jax.Array] = {"largest_step": steps.largest}
        for kind, tested in kinds.items():
            metrics = mnist_mlp.cost_and_metrics(tested, graph, data["test_images"], data["test_labels"])[1]
            found |= {f"{kind}_cost": metrics.cost, f"{kind}_accuracy": metrics.accuracy}
        return found

    arrays = {
        "images": jnp.asarray(dataset.train_images),
        "labels": jnp.asarray(dataset.train_labels),
        "test_images": jnp.asarray(dataset.test_images),
        "test_labels": jnp.asarray(dataset.test_labels),
    }
    params: Parameters = nnx.to_pure_dict(variables)
    return Problem(params, arrays, cost, len(dataset.train_labels), steps=steps, evaluate=evaluate)


def claims(runs: Mapping[str, Sweep], undecided: bool) -> list[Claim]:
    final = {label: float(run.costs[0, -1]) for label, run in runs.items()}
    accuracy = {label: float(run.metrics["last_accuracy"][0, -1]) for label, run in runs.items()}
    steps = {label: float(run.metrics["largest_step"][0, -1]) / RATES[label] for label, run in runs.items()}
    found = [
        Claim(
            "AdaMax is a variant that works as well as Adam",
            "7.1",
            "training cost in the last epoch (test accuracy): "
            + ", ".join(f"{label} {final[label]:.4f} ({accuracy[label]:.2%})" for label in runs)
            + f"; as well: a cost at most {WITHIN - 1:.0%} higher",
            None if undecided else final["AdaMax"] <= WITHIN * final["Adam"],
        ),
        Claim(
            "AdaMax's steps are bounded: |Δ| ≤ α",
            "7.1",
            f"largest step of any parameter: {steps['AdaMax']:.4f} α (Adam: {steps['Adam']:.4f} α); the strict bound "
            f"is {BOUND:.4f} α",
            # The first step is α itself, and rounds.
            None if undecided else steps["AdaMax"] <= 1 + 1e-5,
        ),
    ]
    for label, run in runs.items():
        costs = {kind: run.metrics[f"{kind}_cost"][0] for kind in KINDS}
        accuracies = {kind: run.metrics[f"{kind}_accuracy"][0] for kind in KINDS}
        said = ", ".join(f"{words} {costs[kind][-1]:.4f} ({accuracies[kind][-1]:.2%})" for kind, words in KINDS.items())
        better = int((costs["average"] < costs["last"]).sum())
        found.append(
            Claim(
                f"{label}: averaging the parameters generalises better than the last iterate",
                "7.2",
                f"test cost (accuracy) after the last epoch: {said}; the β₂ average is better after {better} of "
                f"{len(costs['last'])} epochs",
                None if undecided else bool(costs["average"][-1] < costs["last"][-1]),
            )
        )
    return found


def draw(runs: Mapping[str, Sweep], title: str) -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    first, *rest = cast(Sequence[Axes], figure.subplots(1, 3))
    for label, run in runs.items():
        numbers = range(1, run.costs.shape[1] + 1)
        first.plot(numbers, run.costs[0], label=f"{label}, α = {RATES[label]:g}", **harness.style(label))
    first.set_title("training", fontsize=10)
    first.set(ylabel="training cost (cross entropy, nats)")
    for axes, (label, run) in zip(rest, runs.items(), strict=True):
        numbers = range(1, run.costs.shape[1] + 1)
        for kind, words in KINDS.items():
            dashes, color = LINES[kind]
            axes.plot(numbers, run.metrics[f"{kind}_cost"][0], color=color, linestyle=dashes, lw=1.6, label=words)
        axes.set_title(f"test, {label}", fontsize=10)
        axes.set(ylabel="test cost (cross entropy, nats)")
    for axes in (first, *rest):
        log_axis(axes)
        epoch_axis(axes, next(iter(runs.values())).costs.shape[1])
        axes.legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Claim]:
    options = harness.options("section7.py", __doc__, argv, epochs=10)
    with harness.errors_in_one_line("section7.py"):
        dataset = mnist.load(harness.folder(options.data, "mnist"))
    width = 64 if options.quick else 1000
    task = problem(dataset, width, 20 if options.quick else None, options.seed)
    runs: dict[str, Sweep] = {}
    for label in RATES:
        # The averages must see the true steps, so the rate is inside, and the harness's is 1.
        runs[label] = harness.sweep(
            label, lambda point, label=label: optimizer(label), {"rate": (1.0,)}, task, epochs=options.epochs,
            seed=options.seed,
        )  # fmt: skip
        costs = ", ".join(f"{words} {runs[label].metrics[f'{kind}_cost'][0, -1]:.4f}" for kind, words in KINDS.items())
        print(f"{label}: training cost {runs[label].costs[0, -1]:.4f}; test cost: {costs}", flush=True)
    found = claims(runs, options.quick)
    layers = [dataset.pixels, width, width, mnist_mlp.CLASSES]
    title = f"MLP {'-'.join(map(str, layers))} on {dataset.name}, batch {task.batch}, constant rates"
    numbers = {
        "dataset": dataset.name,
        "layers": layers,
        "epochs": options.epochs,
        "batch": task.batch,
        "seed": options.seed,
        "quick": options.quick,
        "rates": RATES,
        "average_decay": DECAY,
        "runs": [run.numbers() for run in runs.values()],
    }
    harness.write(options.out, "section7", draw(runs, title), numbers, found)
    print(f"\n{harness.claims_table(found)}")
    return found


if __name__ == "__main__":
    main()
