"""Figure 2 of the Adam paper (arXiv 1412.6980, section 6.2): the training cost of an MLP on MNIST, with dropout.

    python examples/paper/figure2.py           # 6 epochs of each optimizer, with dropout and without
    python examples/paper/figure2.py --quick

Two hidden layers of 1000 ReLUs, minibatches of 128, one initialisation, the same minibatches and dropout masks for all:
AdaGrad, RMSProp, SGD with Nesterov momentum, AdaDelta and Adam. The training is that of `mnist_mlp.py --compare`, with
constant rates. The training cost is the mean over each epoch's minibatches, with the dropout noise where there is any.

Where this departs from the paper: its curves end at 200 epochs, its rates come from a dense grid and ours from the
table of mnist_mlp.py, half of the hidden units and no pixels are dropped, and there is no L2 term. Figure 2(b), the
comparison with the sum-of-functions optimizer (SFO) on the cost without dropout, is left out; the panel without dropout
compares the same five methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import harness
import mnist_mlp
import numpy as np
from harness import Claim
from loaders import mnist
from matplotlib.figure import Figure
from support.report import Run, cost_axis, means

NAMES = ("adagrad", "rmsprop", "sgd-nesterov", "adadelta", "adam")
DROPOUT = 0.5

Runs = Mapping[float, Sequence[Run]]  # by dropout


def last(run: Run) -> float:
    """The training cost of the last epoch; ∞ for a run that diverged."""
    cost = run.epochs[-1].train_cost
    return cost if np.isfinite(cost) else np.inf


def numbers_of(run: Run) -> dict[str, object]:
    """The run without its steps' costs, of which the plot shows the means over tenths of an epoch."""
    epochs, costs = means(run)
    return {**asdict(run), "step_costs": None, "curve": {"epochs": epochs, "costs": costs}}


def claims(runs: Runs, undecided: bool) -> list[Claim]:
    found: list[Claim] = []
    for dropout, section, words in (
        (DROPOUT, "6.2, figure 2(a)", "with dropout"),
        (0.0, "6.2", "without dropout (which the paper's figure does not show)"),
    ):
        ordered = sorted(runs[dropout], key=last)
        measured = ", ".join(f"{run.label} {last(run):.4f}" for run in ordered)
        found.append(
            Claim(
                f"MLP, {words}: Adam converges better than the other methods",
                section,
                f"training cost in epoch {len(ordered[0].epochs)}: {measured}; better: the lowest",
                None if undecided else ordered[0].optimizer == "adam",
            )
        )
    return found


def draw(runs: Runs, title: str) -> Figure:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axes, (dropout, group) in zip(figure.subplots(1, 2), runs.items(), strict=True):
        for run in group:
            axes.plot(*means(run), label=run.legend, **harness.style(run.label))
        axes.set_title(f"dropout {dropout:g} on the hidden layers" if dropout else "without dropout", fontsize=10)
        cost_axis(axes)
        axes.legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Claim]:
    options = harness.options("figure2.py", __doc__, argv, epochs=6)
    with harness.errors_in_one_line("figure2.py"):
        dataset = mnist.load(harness.folder(options.data, "mnist"))
    given = mnist_mlp.parse(["--compare", "--schedule", "constant", *(["--quick"] if options.quick else [])])
    given = given._replace(epochs=options.epochs, seed=options.seed)
    runs: dict[float, list[Run]] = {}
    for dropout in (DROPOUT, 0.0):
        print(f"dropout {dropout:g}")
        runs[dropout] = [mnist_mlp.train(dataset, name, given._replace(dropout=dropout)) for name in NAMES]
    found = claims(runs, options.quick)
    layers = [dataset.pixels, given.width, given.width, mnist_mlp.CLASSES]
    title = f"MLP {'-'.join(map(str, layers))} on {dataset.name}, batch {given.batch}, constant rates"
    numbers = {
        "dataset": dataset.name,
        "layers": layers,
        "epochs": given.epochs,
        "batch": given.batch,
        "seed": given.seed,
        "schedule": given.schedule,
        "quick": options.quick,
        "runs": [{"dropout": dropout, **numbers_of(run)} for dropout, group in runs.items() for run in group],
    }
    harness.write(options.out, "figure2", draw(runs, title), numbers, found)
    print(f"\n{harness.claims_table(found)}")
    return found


if __name__ == "__main__":
    main()
