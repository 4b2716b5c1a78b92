"""The tables of one device, of what `speed.py` measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from measure import workloads
from measure.report import Record, cell

OURS = ("adam_fn", "adam_fn bfloat16 moments", "adam_fn 24-bit state", "adam_fn 16-bit state")
NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column stands left, the others right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def latest(records: Iterable[Record]) -> list[Record]:
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
    """The records of one device."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.found = {(record["case"], record["peer"], record["metric"]): record for record in records}

    def cases(self, metric: str) -> dict[str, str]:
        """Names and titles of the cases that have a metric, in the order measured."""
        return {record["case"]: record["title"] for record in self.records if record["metric"] == metric}

    def value(self, case: str, peer: str, metric: str) -> str:
        record = self.found.get((case, peer, metric))
        return cell(record) if record else NONE

    def ratio(self, case: str, peer: str, metric: str) -> str:
        record = self.found.get((case, peer, metric))
        return f"{record['ratio']:.2f}" if record and record["ratio"] is not None else NONE

    def ours(self, metric: str) -> list[tuple[str, str, str]]:
        """Case, peer and label of every row of ours."""
        rows = []
        for case, title in self.cases(metric).items():
            for peer in OURS:
                if (case, peer, metric) in self.found:
                    rows.append((case, peer, ", ".join([title, *peer.split(" ", 1)[1:]])))
        return rows

    def steps(self) -> str:
        torch = ("torch fused", "torch foreach")
        rates = ("optax", "copy", "in place")
        head = ["step", "adam_fn", "optax", "adam_fn / optax", *(f"{peer} / optax" for peer in torch)]
        head += ["adam_fn GB/s", *(f"{peer} GB/s" for peer in rates)]
        body = [
            [
                label,
                self.value(case, peer, "step"),
                self.value(case, "optax", "step"),
                self.ratio(case, peer, "step"),
                *(self.ratio(case, other, "step") for other in torch),
                self.value(case, peer, "bandwidth"),
                *(self.value(case, other, "bandwidth") for other in rates),
            ]
            for case, peer, label in self.ours("step")
        ]
        return table(head, body)

    def programs(self) -> str:
        head = ["program", "trace + compile, adam_fn", "optax", "adam_fn / optax", "temporaries, adam_fn", "optax"]
        head += ["state, adam_fn, bytes/parameter", "optax"]
        body = [
            [
                label,
                self.value(case, peer, "total"),
                self.value(case, "optax", "total"),
                self.ratio(case, peer, "total"),
                self.value(case, peer, "temporaries"),
                self.value(case, "optax", "temporaries"),
                self.value(case, peer, "state"),
                self.value(case, "optax", "state"),
            ]
            for case, peer, label in self.ours("total")
        ]
        return table(head, body)

    def eager(self) -> str:
        peers = ("adam_fn", "adam_fn make_step", "optax", "torch fused", "torch foreach")
        body = [
            [
                f"{title}: {label}",
                *(self.value(case, peer, metric) for peer in peers),
                self.ratio(case, "adam_fn", metric),
            ]
            for metric, label in (("eager update", "update"), ("eager step", "update and apply"))
            for case, title in self.cases(metric).items()
        ]
        return table(["outside jit", *peers, "adam_fn / optax"], body)

    def rates(self) -> str:
        metric = "compilations per new rate"
        body = [[row["peer"], cell(row)] for row in self.records if row["metric"] == metric]
        return table(["another learning rate", "compilations"], body)

    def text(self) -> str:
        """The tables that have rows, and on what they were measured."""
        runs = dict.fromkeys(f"{named(record['versions'])} ({record['date'][:10]})" for record in self.records)
        about = f"**{self.records[0]['device']}**, with {'; '.join(runs)}, by `benchmarks/speed.py`:"
        kinds = (("step", self.steps), ("total", self.programs), ("eager update", self.eager))
        kinds += (("compilations per new rate", self.rates),)
        return "\n\n".join([about, *(make() for metric, make in kinds if self.cases(metric))])
