"""What a run on MNIST leaves behind: the numbers of each epoch, a table, a plot and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito's colours, told apart with any colour vision; black first for the optimizer that leads the comparison.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999")
STYLES = ("-", "-", "--", "--", "-", "--", "-", "--")
POINTS_PER_EPOCH = 10


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images. Costs are cross entropies in nats, accuracies fractions.

    `train_cost` and `train_accuracy` are means over the minibatches, each taken before its update.
    """

    epoch: int
    train_cost: float
    train_accuracy: float
    test_cost: float
    test_accuracy: float
    seconds: float
    images_per_second: float


@dataclass
class Run:
    """One training run; `seconds` of its epochs leave compilation and evaluation out."""

    optimizer: str
    label: str
    learning_rate: float
    weight_decay: float
    schedule: str
    compile_seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)
    step_costs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The run whose `asdict` is given."""
        return cls(**{**record, "epochs": [Epoch(**epoch) for epoch in record["epochs"]]})

    @property
    def legend(self) -> str:
        decay = f", decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.label}, rate {self.learning_rate:g}{decay}"


def epoch_line(run: Run, epochs: int) -> str:
    epoch = run.epochs[-1]
    return (
        f"{run.label} {epoch.epoch}/{epochs}: training cost {epoch.train_cost:.4f}, "
        f"training accuracy {epoch.train_accuracy:.2%}, test accuracy {epoch.test_accuracy:.2%}, "
        f"{epoch.images_per_second:,.0f} images/s"
    )


def table(runs: Sequence[Run]) -> str:
    """The last epoch of each run, one line a run."""
    head = ("optimizer", "rate", "decay", "schedule", "training cost", "test accuracy", "best", "seconds", "images/s")
    rows: list[tuple[str, ...]] = [head]
    for run in runs:
        last = run.epochs[-1]
        seconds = sum(epoch.seconds for epoch in run.epochs)
        images = sum(epoch.seconds * epoch.images_per_second for epoch in run.epochs)
        rows.append(
            (
                run.label,
                f"{run.learning_rate:g}",
                f"{run.weight_decay:g}",
                run.schedule,
                f"{last.train_cost:.4f}",
                f"{last.test_accuracy:.2%}",
                f"{max(epoch.test_accuracy for epoch in run.epochs):.2%}",
                f"{seconds:.1f}",
                f"{images / seconds:,.0f}",
            )
        )
    return align(rows, right=set(range(len(head))) - {0, 3})


def align(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows of cells as lines of text, the first row underlined; the columns `right` (numbers) stand right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, about: Mapping[str, object], runs: Sequence[Run]) -> None:
    """`about` and every number of the runs, to six digits; what is not finite (a run that diverged) becomes null."""
    dump(path, {**about, "runs": [asdict(run) for run in runs]})


def dump(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file of plain values and NumPy arrays: six digits, null for what is not finite."""
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def plot_run(path: Path, run: Run, title: str) -> None:
    """Training cost (every minibatch and its mean) beside training and test accuracy."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    cost, accuracy = figure.subplots(1, 2)
    per_epoch = len(run.step_costs) // len(run.epochs)
    cost.plot(
        (np.arange(len(run.step_costs)) + 0.5) / per_epoch, run.step_costs, color="#BBBBBB", lw=0.5, label="minibatch"
    )
    cost.plot(*means(run), color=COLORS[5], lw=1.8, label="mean")
    cost_axis(cost)
    cost.legend()
    numbers = [epoch.epoch for epoch in run.epochs]
    train = [100 * epoch.train_accuracy for epoch in run.epochs]
    test = [100 * epoch.test_accuracy for epoch in run.epochs]
    accuracy.plot(numbers, train, "o--", color=COLORS[1], label="training (mean over the epoch)")
    accuracy.plot(numbers, test, "o-", color=COLORS[5], label=f"test (last: {test[-1]:.2f} %)")
    accuracy.set(ylabel="accuracy (%)")
    accuracy.grid(alpha=0.3)
    epoch_axis(accuracy, len(run.epochs))
    accuracy.legend()
    figure.suptitle(f"{title}\n{run.legend}, {run.schedule} schedule", fontsize=11)
    figure.savefig(path, dpi=120)


def plot_comparison(path: Path, runs: Sequence[Run], title: str) -> None:
    """The training costs of all runs in one log plot (figure 2 of arXiv 1412.6980), the test errors beside it."""
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    cost, error = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, run in enumerate(runs):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)], "lw": 1.6}
        cost.plot(*means(run), label=run.legend, **style)
        numbers = [epoch.epoch for epoch in run.epochs]
        error.plot(numbers, [100 * (1 - epoch.test_accuracy) for epoch in run.epochs], marker="o", ms=3.5, **style)
    cost_axis(cost)
    error.set(ylabel="test error (%)")
    epoch_axis(error, len(runs[0].epochs))
    log_axis(error)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title}, {runs[0].schedule} schedule", fontsize=11)
    figure.savefig(path, dpi=120)


def cost_axis(axes: Axes) -> None:
    axes.set(xlabel="epochs over the training images", ylabel="training cost (cross entropy, nats)")
    log_axis(axes)


class _Plain(LogFormatter):
    """Labels as 0.02, not 2e-02; between the powers of ten where there is room for them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_Plain(minor_thresholds=(2, 0.5)))
    axes.yaxis.set_minor_formatter(_Plain(minor_thresholds=(2, 0.5)))
    axes.grid(alpha=0.3, which="both")


def epoch_axis(axes: Axes, epochs: int) -> None:
    margin = 0.04 * epochs
    axes.set(xlabel="epoch", xlim=(1 - margin, epochs + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def means(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the cost over tenths of an epoch, and where each tenth is centred, in epochs."""
    per_epoch = len(run.step_costs) // len(run.epochs)
    parts = np.array_split(np.asarray(run.step_costs), min(len(run.step_costs), POINTS_PER_EPOCH * len(run.epochs)))
    ends = np.cumsum([len(part) for part in parts])
    centres = ends - np.array([len(part) for part in parts]) / 2
    return centres / per_epoch, np.array([part.mean() for part in parts])
