"""What is kept of a measurement: records, tables, a plot."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Mapping

import rich.console
import rich.table
from measure.peers import LIMITS, REFERENCE
from measure.timing import Sample
from measure.workloads import Case

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


class Record(typing.TypedDict):
    """One number. `low` and `high` are quartiles over the rounds; `ratio` divides the value by optax's in the same
    case, and `ratio_rounds` is the median of that ratio taken round by round.
    """

    case: str
    title: str
    parameters: int
    peer: str
    metric: str
    value: float
    unit: str
    low: float | None
    high: float | None
    rounds: int | None
    ratio: float | None
    ratio_rounds: float | None
    device: str
    versions: dict[str, str]
    date: str
    quick: bool


@dataclasses.dataclass
class Records:
    """The records of one run."""

    device: str
    versions: dict[str, str]
    date: str
    quick: bool
    rows: list[Record] = dataclasses.field(default_factory=list)

    def _add(self, case: Case, peer: str, metric: str, unit: str, value: float, **others: float | None) -> None:
        about = {"case": case.name, "title": case.title, "parameters": case.parameters, "peer": peer, "metric": metric}
        run = {"device": self.device, "versions": self.versions, "date": self.date, "quick": self.quick}
        spread = dict.fromkeys(("low", "high", "rounds", "ratio", "ratio_rounds"))
        row = {**about, "value": value, "unit": unit, **spread, **others, **run}
        self.rows.append(typing.cast(Record, row))

    def samples(self, case: Case, metric: str, unit: str, samples: dict[str, Sample]) -> None:
        """Medians of timings taken in the same rounds."""
        reference = samples.get(REFERENCE)
        for peer, sample in samples.items():
            low, high = sample.quartiles
            ratio = sample.median / reference.median if reference else None
            rounds = sample.per_round(reference) if reference else None
            spread = {"low": low, "high": high, "rounds": len(sample.values)}
            self._add(case, peer, metric, unit, sample.median, **spread, ratio=ratio, ratio_rounds=rounds)

    def values(self, case: Case, metric: str, unit: str, values: Mapping[str, float]) -> None:
        """Numbers without a spread."""
        reference = values.get(REFERENCE)
        for peer, value in values.items():
            self._add(case, peer, metric, unit, value, ratio=value / reference if reference else None)


def seconds(value: float) -> str:
    """Three significant digits with a unit that fits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    return f"{value * 1e6:.2g} µs"


def nbytes(value: float) -> str:
    """Three significant digits with a binary unit that fits."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def cell(record: Record | None) -> str:
    """A record's value with a unit that fits."""
    if record is None:
        return ""
    units = {"s": seconds, "bytes": nbytes}
    return units.get(record["unit"], lambda value: f"{value:.3g}")(record["value"])


def quartiles(record: Record | None) -> str:
    if record is None or record["low"] is None or record["high"] is None:
        return ""
    return f"{seconds(record['low'])} to {seconds(record['high'])}"


def ratio(record: Record | None) -> str:
    return "" if record is None or record["ratio"] is None else f"{record['ratio']:.3f}"


# Metric, heading, and whether its quartiles and its ratio to optax stand beside it.
COLUMNS = (
    ("step", "step", True, True),
    ("eager update", "eager update", True, True),
    ("eager step", "eager step", True, True),
    ("bandwidth", "GB/s", False, False),
    ("share of copy", "of copy", False, False),
    ("total", "trace+compile", False, True),
    ("temporaries", "temporaries", False, False),
    ("state", "state, B/param", False, False),
    ("compilations per new rate", "compilations per new rate", False, False),
)


def show(console: rich.console.Console, case: Case, records: Records) -> None:
    """One table a case: peers down, metrics across."""
    found = {(row["peer"], row["metric"]): row for row in records.rows if row["case"] == case.name}
    columns = [column for column in COLUMNS if any(metric == column[0] for _, metric in found)]
    table = rich.table.Table(title=f"{case.name}: {case.title}, {case.parameters:,} parameters")
    table.add_column("peer")
    for _, heading, spread, relative in columns:
        for name in (heading, *["quartiles"] * spread, *["/ optax"] * relative):
            table.add_column(name, justify="right")
    for peer in dict.fromkeys(peer for peer, _ in found):
        cells = [peer]
        for metric, _, spread, relative in columns:
            record = found.get((peer, metric))
            cells += [cell(record), *[quartiles(record)] * spread, *[ratio(record)] * relative]
        table.add_row(*cells)
    console.print(table)


def _bars(axis: Axes, rows: list[Record], field: typing.Literal["ratio", "value"], base: float) -> None:
    """Grouped bars, one group a case and one colour a peer, standing on `base`."""
    names = list(dict.fromkeys(record["case"] for record in rows))
    colours = {
        "adam_fn": "#0072b2",
        "adam_fn make_step": "#56b4e9",
        "adam_fn bfloat16 moments": "#009e73",
        "adam_fn 24-bit state": "#cc79a7",
        "adam_fn 16-bit state": "#7f3c8d",
        "optax": "#999999",
        "torch fused": "#e69f00",
        "torch foreach": "#d55e00",
    }
    order = list(colours)
    for index, name in enumerate(names):
        group = sorted((record for record in rows if record["case"] == name), key=lambda row: order.index(row["peer"]))
        width = 0.84 / len(group)
        for place, record in enumerate(group):
            value = typing.cast(float, record[field])
            x = index + (place - (len(group) - 1) / 2) * width
            label = record["peer"]
            seen = label in axis.get_legend_handles_labels()[1]
            axis.bar(x, value - base, width * 0.94, bottom=base, color=colours[label], label="_" if seen else label)
            place_above = value >= base
            axis.annotate(
                f"{value:.2f}" if field == "ratio" else f"{value:.3g}", (x, value), (0, 3 if place_above else -3),
                textcoords="offset points", ha="center", va="bottom" if place_above else "top", fontsize=7, rotation=90,
            )  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=9)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def plot(rows: list[Record], path: pathlib.Path) -> str:
    """Bars of the time relative to optax, and of the bandwidth beside the machine's; returns a line for the screen."""
    try:
        import matplotlib  # noqa: PLC0415 (optional)
    except ImportError:
        return "matplotlib is not installed: no plot"
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    timed = [row for row in rows if row["metric"] in ("step", "eager step") and row["peer"] not in (*LIMITS, REFERENCE)]
    timed = [row for row in timed if row["ratio"] is not None]
    rates = [row for row in rows if row["metric"] == "bandwidth"]
    if not timed:
        return "nothing timed beside optax: no plot"
    figure, axes = pyplot.subplots(2 if rates else 1, 1, figsize=(13, 10 if rates else 5), squeeze=False)
    top = axes[0, 0]
    _bars(top, timed, "ratio", 1.0)
    top.axhline(1.0, color="black", linewidth=1)
    top.set_yscale("log", base=2)
    top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    top.margins(y=0.15)
    top.set_ylabel("time of a step / optax's (lower is better)")
    top.set_title(
        f"Adam, {rows[0]['device']}: " + ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items()), fontsize=10
    )
    top.legend(fontsize=8, ncols=3)
    if rates:
        bottom = axes[1, 0]
        _bars(bottom, [row for row in rates if row["peer"] not in LIMITS], "value", 0.0)
        for peer, style, label in (("copy", "-", "the machine's copy"), ("in place", ":", "the machine in place")):
            for index, value in enumerate(row["value"] for row in rates if row["peer"] == peer):
                bottom.plot([index - 0.46, index + 0.46], [value] * 2, style, color="black", label="_" * index + label)
        bottom.margins(y=0.15)
        bottom.set_ylabel("GB/s of the least traffic (higher is better)")
        bottom.legend(fontsize=8, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return str(path)
