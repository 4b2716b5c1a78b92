"""The tables of what `compiled.py` measured."""

from collections.abc import Iterator, Sequence

from compilers.limits import BACKWARD, FAMILY, LEAF, LLAMA, OFFLOAD, ORDINARY, TREE, ZERO1, Row, relative
from measure.scripts import NONE, span, table

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
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in (row for row in rows if row["part"] == part):
            groups.setdefault((row["step"], row["way"]), []).append(row)
        heads = {x: HEADS.get(x, x) for x in forms if any(x in row for group in groups.values() for row in group)}

        def cells(group: Sequence[Row], heads: dict[str, str] = heads, forms: dict[str, str] = forms) -> Iterator[str]:
            for x, head in heads.items():
                yield span((relative(row, x, rows) if "/" in head else row.get(x) for row in group), forms[x]) or NONE

        if groups:
            lines = [[*names, *cells(group)] for names, group in groups.items()]
            yield f"{part}:\n\n{table(['step', 'by', *heads.values()], lines)}"


def family(rows: Sequence[Row]) -> str:
    """Whether every member compiles; nothing where that was not asked."""
    members = [row for row in rows if row["part"] == FAMILY and "error" not in row]
    programs, failed = sum(row["programs"] for row in members), sum(len(row["failed"]) for row in members)
    about = f"{len({row['step'] for row in members})} members of the family with every storage and every kind of write"
    return f"{about}: {programs - failed} of {programs} steps compile." if members else ""


def backward(rows: Sequence[Row]) -> str:
    """The memory of a training step of a stacked GPT, both ways."""
    known = {(row["target"], row["way"], row["step"]): row for row in rows if row["part"] == BACKWARD}
    body = []
    for (target, way, step), row in known.items():
        if (first := known.get((target, way, f"{step}{ORDINARY}"))) is not None:
            cycles = f"{row['cycles'] / first['cycles']:.2f}" if "cycles" in row else NONE
            sizes = (first["temporaries"], row["temporaries"], row["activations"], row["gradient"])
            body.append([f"{target}, {way}", step, *(f"{x:.2f}" for x in sizes), cycles])
    head = ["device", "state", "gradients first", "step in the backward pass", "activations alone"]
    return table([*head, "one layer's gradient", "cycles, relative to gradients first"], body)
