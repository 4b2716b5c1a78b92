"""The records of the measurements of `speed.py`, and the tables of a device."""

from collections.abc import Mapping, Sequence

import numpy as np
from measure import peers, scripts, workloads
from measure.scripts import NONE, Row, named, table

REFERENCE = "optax"
OURS = [peer.name for peer in peers.JAX_PEERS if peer.name not in (REFERENCE, "adam_fn make_step")]


class Records:
    """The rows of one run, a number each.

    `low` and `high` are quartiles over the rounds; `ratio` divides the value by optax's in the same case.
    """

    def __init__(self, quick: bool) -> None:
        self.run = {**scripts.about(), "quick": quick}
        self.rows: list[Row] = []

    def add(self, case: workloads.Case, metric: str, unit: str, values: Mapping[str, float | Sequence[float]]) -> None:
        """Adds a number for each peer, or the numbers of the same rounds, of which the median counts."""
        about = {"case": case.name, "title": case.title, "parameters": case.parameters}
        found = {peer: [float(x) for x in np.percentile(value, [25, 50, 75])] for peer, value in values.items()}
        for peer, (low, median, high) in found.items():
            number = {"value": median, "unit": unit, "low": low, "high": high, "rounds": np.size(values[peer])}
            ratio = median / found[REFERENCE][1] if found.get(REFERENCE, [0, 0, 0])[1] else None
            self.rows.append({**about, "peer": peer, "metric": metric, **number, "ratio": ratio, **self.run})


UNITS = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
}


def cell(record: Row) -> str:
    """A record's value with a unit that fits."""
    value, units = record["value"], UNITS.get(record["unit"])
    if units is None:
        return f"{value:.3g}"
    size, unit = next((x for x in units if value >= x[0]), units[-1])
    return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"


class Device:
    """The records of a device."""

    def __init__(self, records: Sequence[Row]) -> None:
        self.records = records
        self.found = {(record["case"], record["peer"], record["metric"]): record for record in records}

    def cases(self, metric: str) -> dict[str, str]:
        """Names and titles of the cases that have a metric, in the order measured."""
        return {record["case"]: record["title"] for record in self.records if record["metric"] == metric}

    def value(self, case: str, peer: str, metric: str) -> str:
        """The measured value; in units of optax's if the metric begins with a slash."""
        record = self.found.get((case, peer, metric.removeprefix("/")))
        if record is None or not metric.startswith("/"):
            return cell(record) if record else NONE
        return NONE if record["ratio"] is None else f"{record['ratio']:.2f}"

    def table(self, head: str, metrics: Mapping[str, str], columns: Sequence[tuple[str, str, str]]) -> str:
        """A line for every case and peer of ours that has one of the metrics, each with the end of its lines' names.

        A column is a head, a peer (ours if empty) and a metric (the line's if empty), maybe with a slash before it.
        """
        lines = []
        for metric, end in metrics.items():
            for case, title in self.cases(metric).items():
                for own in (peer for peer in OURS if (case, peer, metric) in self.found):
                    wanted = ((peer or own, f"{x}{metric}" if x in ("", "/") else x) for _, peer, x in columns)
                    name = ", ".join([title, *own.split(" ", 1)[1:]])
                    lines.append([f"{name}{end}", *(self.value(case, *each) for each in wanted)])
        return table([head, *(head for head, _, _ in columns)], lines)

    def text(self) -> str:
        """The tables that have rows, and the device on which they were measured."""
        runs = dict.fromkeys(f"{named(record['versions'])} ({record['date'][:10]})" for record in self.records)
        about = f"**{self.records[0]['device']}**, with {'; '.join(runs)}, by `benchmarks/speed.py`:"
        rates = [[row["peer"], cell(row)] for row in self.records if row["metric"] == "compilations per new rate"]
        tables = {
            "step": self.table("step", {"step": ""}, STEP),
            "total": self.table("program", {"total": ""}, PROGRAM),
            "eager update": self.table(
                "outside jit", {"eager update": ": update", "eager step": ": update and apply"}, EAGER
            ),
            "compilations per new rate": table(["another learning rate", "compilations"], rates),
        }
        return "\n\n".join([about, *(text for metric, text in tables.items() if self.cases(metric))])


STEP = (
    ("adam_fn", "", ""),
    ("optax", "optax", ""),
    ("adam_fn / optax", "", "/"),
    *((f"{peer} / optax", peer, "/") for peer in ("torch fused", "torch foreach")),
    ("adam_fn GB/s", "", "bandwidth"),
    *((f"{peer} GB/s", peer, "bandwidth") for peer in ("optax", "copy", "in place")),
)
PROGRAM = (
    ("trace + compile, adam_fn", "", ""),
    ("optax", "optax", ""),
    ("adam_fn / optax", "", "/"),
    ("temporaries, adam_fn", "", "temporaries"),
    ("optax", "optax", "temporaries"),
    ("state, adam_fn, bytes/parameter", "", "state"),
    ("optax", "optax", "state"),
)
EAGER = (
    *((peer, peer, "") for peer in ("adam_fn", "adam_fn make_step", "optax", "torch fused", "torch foreach")),
    ("adam_fn / optax", "", "/"),
)
