"""The tables of what `compiled.py` measured."""

from collections.abc import Iterator, Sequence

from compilers.limits import BACKWARD, FAMILY, LEAF, LLAMA, OFFLOAD, ORDINARY, TREE, ZERO1, relative
from measure.scripts import Row, span, table, where

#: The figures of each part that are shown, and how they are written (with z, -0.0 as 0.0).
FIGURES: dict[str, dict[str, str]] = {
    LEAF: {"passes": "d", "kernels": "d", "temporaries": ".3f", "bytes": ".2f", "cycles": ".2f", "seconds": ".1f"},
    TREE: {"kernels": "d", "beside": ".3f", "cycles": ".2f", "seconds": ".1f"},
    LLAMA: {"collectives": "d", "temporaries": ".3f", "state": ".3f"},
    ZERO1: {"reduce-scatter": ".3f", "all-gather": ".3f", "all-reduce": ".3f", "others": "g", "share": ".3f"},
    BACKWARD: {"temporaries": ".2f", "activations": ".2f", "gradient": ".2f", "exchanged": ".1f"},
    OFFLOAD: {"read": ".2f", "stored": ".2f", "peak": ".1f", "saved": "z.1f"},
}
#: What stands above them if not their names; with a slash they are in units of optax's float32 step.
HEADS = {
    "beside": "peak beyond the arguments",
    "bytes": "bytes moved",
    "cycles": "cycles / optax",
    "gradient": "gradient of a layer",
    "saved": "peak saved",
    "seconds": "compilation / optax",
    "share": "part of the state",
}


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Of one compiler's rows a table for each part, with its name, all targets in one cell."""
    for part, forms in FIGURES.items():
        own, lines = where(rows, part=part), []
        heads = {x: HEADS.get(x, x) for x in forms if any(x in row for row in own)}
        for step, way in dict.fromkeys((row["step"], row["way"]) for row in own):
            cells = [step, way]
            for x, head in heads.items():
                group = where(own, step=step, way=way)
                values = [relative(row, x, rows) if "/" in head else row.get(x) for row in group]
                cells.append(span(values, forms[x]))
            lines.append(cells)
        if lines:
            yield f"{part}:\n\n{table(['step', 'by', *heads.values()], lines)}"


def family(rows: Sequence[Row]) -> str:
    """Whether every member compiles; nothing where that was not asked."""
    members = [row for row in rows if row["part"] == FAMILY and "error" not in row]
    programs, failed = sum(row["programs"] for row in members), sum(len(row["failed"]) for row in members)
    about = f"{len({row['step'] for row in members})} members of the family with every storage and every kind of write"
    return f"{about}: {programs - failed} of {programs} steps compile." if members else ""


def backward(rows: Sequence[Row]) -> str:
    """The memory of a training step of a stacked GPT, both ways."""
    body = []
    for row in where(rows, part=BACKWARD):
        target, way, step = row["target"], row["way"], row["step"]
        for first in where(rows, target=target, part=BACKWARD, way=way, step=f"{step}{ORDINARY}"):
            sizes = (first["temporaries"], row["temporaries"], row["activations"], row["gradient"])
            cycles = relative(row, "cycles", rows, first["step"])
            body.append([f"{target}, {way}", step, *(span([x], ".2f") for x in (*sizes, cycles))])
    head = ["device", "state", "gradients first", "step in the backward pass", "activations alone"]
    return table([*head, "one layer's gradient", "cycles, relative to gradients first"], body)
