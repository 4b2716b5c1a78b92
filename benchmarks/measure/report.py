"""What is kept of the measurements of `speed.py`, and the tables of a device."""

from collections.abc import Iterable, Mapping, Sequence

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
        """By peer a number, or what was found in each of the same rounds, of which the median counts."""
        about = {"case": case.name, "title": case.title, "parameters": case.parameters}
        found = {peer: [float(x) for x in np.percentile(value, [25, 50, 75])] for peer, value in values.items()}
        for peer, (low, median, high) in found.items():
            number = {"value": median, "unit": unit, "low": low, "high": high, "rounds": np.size(values[peer])}
            ratio = median / found[REFERENCE][1] if found.get(REFERENCE, [0, 0, 0])[1] else None
            self.rows.append({**about, "peer": peer, "metric": metric, **number, "ratio": ratio, **self.run})


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


def cell(record: Row) -> str:
    """A record's value with a unit that fits."""
    units = {"s": seconds, "bytes": nbytes}
    return units.get(record["unit"], lambda value: f"{value:.3g}")(record["value"])


def latest(records: Iterable[Row]) -> list[Row]:
    """Of every device and case the newest run, quick ones left out."""
    records = [record for record in records if not record["quick"]]
    newest: dict[tuple[str, str], str] = {}
    for record in records:
        key = record["device"], record["case"]
        newest[key] = max(newest.get(key, ""), record["date"])
    order = [case.name for case in workloads.cases(quick=False)]
    kept = [record for record in records if record["date"] == newest[record["device"], record["case"]]]
    return sorted(kept, key=lambda record: order.index(record["case"]) if record["case"] in order else len(order))


class Device:
    """The records of the device that the first of them is of."""

    def __init__(self, records: Iterable[Row]) -> None:
        records = list(records)
        self.records = [record for record in records if record["device"] == records[0]["device"]]
        self.found = {(record["case"], record["peer"], record["metric"]): record for record in self.records}

    def cases(self, metric: str) -> dict[str, str]:
        """Names and titles of the cases that have a metric, in the order measured."""
        return {record["case"]: record["title"] for record in self.records if record["metric"] == metric}

    def value(self, case: str, peer: str, metric: str) -> str:
        record = self.found.get((case, peer, metric))
        return cell(record) if record else NONE

    def ratio(self, case: str, peer: str, metric: str) -> str:
        record = self.found.get((case, peer, metric))
        return f"{record['ratio']:.2f}" if record and record["ratio"] is not None else NONE

    def ours(self, metric: str, columns: Sequence[tuple[str, str, str]]) -> str:
        """A line for every case and peer of ours; a column is a head, a peer (ours if empty) and a metric.

        A metric with a slash before it is shown in units of optax's.
        """
        lines = []
        for case, title in self.cases(metric).items():
            for own in (peer for peer in OURS if (case, peer, metric) in self.found):
                cells = (
                    (self.ratio if wanted.startswith("/") else self.value)(case, peer or own, wanted.removeprefix("/"))
                    for _, peer, wanted in columns
                )
                lines.append([", ".join([title, *own.split(" ", 1)[1:]]), *cells])
        return table([{"step": "step", "total": "program"}[metric], *(head for head, _, _ in columns)], lines)

    def eager(self) -> str:
        peers = ("adam_fn", "adam_fn make_step", "optax", "torch fused", "torch foreach")
        body = [
            [f"{title}: {label}", *(self.value(case, x, metric) for x in peers), self.ratio(case, "adam_fn", metric)]
            for metric, label in (("eager update", "update"), ("eager step", "update and apply"))
            for case, title in self.cases(metric).items()
        ]
        return table(["outside jit", *peers, "adam_fn / optax"], body)

    def text(self) -> str:
        """The tables that have rows, and on what they were measured."""
        runs = dict.fromkeys(f"{named(record['versions'])} ({record['date'][:10]})" for record in self.records)
        about = f"**{self.records[0]['device']}**, with {'; '.join(runs)}, by `benchmarks/speed.py`:"
        rates = [[row["peer"], cell(row)] for row in self.records if row["metric"] == "compilations per new rate"]
        tables = {
            "step": self.ours("step", STEP),
            "total": self.ours("total", PROGRAM),
            "eager update": self.eager(),
            "compilations per new rate": table(["another learning rate", "compilations"], rates),
        }
        return "\n\n".join([about, *(text for metric, text in tables.items() if self.cases(metric))])


STEP = (
    ("adam_fn", "", "step"),
    ("optax", "optax", "step"),
    ("adam_fn / optax", "", "/step"),
    *((f"{peer} / optax", peer, "/step") for peer in ("torch fused", "torch foreach")),
    ("adam_fn GB/s", "", "bandwidth"),
    *((f"{peer} GB/s", peer, "bandwidth") for peer in ("optax", "copy", "in place")),
)
PROGRAM = (
    ("trace + compile, adam_fn", "", "total"),
    ("optax", "optax", "total"),
    ("adam_fn / optax", "", "/total"),
    ("temporaries, adam_fn", "", "temporaries"),
    ("optax", "optax", "temporaries"),
    ("state, adam_fn, bytes/parameter", "", "state"),
    ("optax", "optax", "state"),
)
