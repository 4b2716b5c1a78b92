"""The limits of the figures of compiled programs, and their tables."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from measure.scripts import Row, span, table, where

TPU, GPU = ("v5e", "v6e"), ("h200", "a100")
BOTH = (*TPU, *GPU)
#: Of each compiler.
TARGETS = {"tpu": TPU, "gpu": GPU}
LEAF, TREE, LLAMA, ZERO1, OFFLOAD, FAMILY = "leaf", "GPT-2 small", "Llama-7B", "zero1", "offload", "family"
BACKWARD, ORDINARY = "backward", ", gradients first"
BASE = "optax float32"


def label(row: Row) -> str:
    return f"{row['target']}, {row['part']}: {row['step']}, {row['way']}"


def relative(row: Row, figure: str, rows: Sequence[Row], base: str = BASE) -> float | None:
    """A figure in units of another step's, of the same tree on the same target; None if there is none."""
    every = [x for x in where(rows, target=row["target"], part=row["part"], step=base) if figure in x]
    found = next(iter(where(every, way=row["way"]) or every), None)
    return row[figure] / found[figure] if found and figure in row else None


@dataclasses.dataclass(frozen=True)
class Limit:
    """The most that a figure may be.

    Attributes:
      steps: those that it holds for; by default all but optax's.
      least: the least that it may be.
      base: the step whose figure is the unit; that of float32 is the same step with another storage, and ORDINARY
        the same step after all gradients.
      way: the one that it holds for; all by default.
    """

    targets: tuple[str, ...]
    part: str
    figure: str
    most: float
    steps: tuple[str, ...] = ()
    least: float = -math.inf
    base: str = ""
    way: str = ""

    def holds_for(self, row: Row) -> bool:
        step = row["step"]
        known = row["target"] in self.targets and row["part"] == self.part and self.way in ("", row["way"])
        return known and (step in self.steps if self.steps else not step.startswith("optax"))

    def compared(self, row: Row) -> str:
        """The step whose figure is the unit for a row."""
        if self.base == "float32":
            return ", ".join([*row["step"].split(", ")[:-1], self.base])
        return f"{row['step']}{ORDINARY}" if self.base == ORDINARY else self.base

    def broken(self, row: Row, rows: Sequence[Row]) -> str:
        """The error of a row that it holds for; empty if there is none."""
        base = self.compared(row)
        value = relative(row, self.figure, rows, base) if base else row.get(self.figure)
        if value is None:
            return f"{self.figure} was not measured"
        found = f"{self.figure} {value:.4g}{base and f' times that of {base}'}"
        if value > self.most:
            return f"{found}, at most {self.most:g}"
        return f"{found}, at least {self.least:g}" if value < self.least else ""


#: Bytes of state per parameter.
SIZES = {"float32": 8, "24bit": 3, "16bit": 2, "masters, 16bit": 4}
STEPPED = ("16bit", "masters, 16bit")
LIMITS = (
    # One pass, no temporaries, and no more bytes than what is given and kept.
    Limit(BOTH, LEAF, "passes", 1),
    Limit(BOTH, LEAF, "temporaries", 0.04),
    Limit(TPU, LEAF, "beyond", 0.1),
    Limit(GPU, LEAF, "kernels", 1, base="float32"),
    Limit(TPU, LEAF, "bytes", 18.1, ("24bit",)),
    Limit(TPU, LEAF, "bytes", 16.1, ("16bit",)),
    Limit(TPU, LEAF, "cycles", 0.68, ("24bit",), base=BASE),
    Limit(TPU, LEAF, "cycles", 0.62, ("16bit",), base=BASE),
    Limit(BOTH, TREE, "beside", 0.05),
    Limit(BOTH, TREE, "seconds", 4, base=BASE),
    Limit(BOTH, LLAMA, "collectives", 0),
    Limit(BOTH, LLAMA, "temporaries", 0.02),
    Limit(BOTH, LLAMA, "moved", 0),
    *(Limit(BOTH, LLAMA, "state", size, (step,), least=size) for step, size in SIZES.items()),
    # The gradients are summed once, into parts, and the parameters put together once. What is left of all-reduces: a
    # loss, a leaf that four devices cannot divide and, on TPU, a bias.
    *(
        Limit(BOTH, ZERO1, kind, size, steps, least=0.99 * size)
        for steps, size in ((("float32", "24bit", "16bit"), 4), (("masters, 16bit",), 2))
        for kind in ("reduce-scatter", "all-gather")
    ),
    Limit(BOTH, ZERO1, "all-reduce", 0.004),
    Limit(BOTH, ZERO1, "others", 0),
    Limit(BOTH, ZERO1, "share", 0.251),
    *(
        Limit(BOTH, OFFLOAD, figure, 1.001 * size, (step,), least=0.999 * size)
        for step, size in SIZES.items()
        for figure in ("on the host", "kept there", "read", "stored")
    ),
    Limit(GPU, OFFLOAD, "saved", 8.01, ("training",), least=7.9, way="one program"),
    # 8: the TPU's scheduler fetches the state before the backward pass is over.
    Limit(TPU, OFFLOAD, "saved", 8.01, ("training",), least=-10.5, way="one program"),
    Limit(BOTH, OFFLOAD, "saved", 8.01, ("training",), least=7.9, way="two programs"),
    # Beside the activations and the gradient of one layer.
    Limit(("v5e", "h200"), BACKWARD, "beside", 0.15, STEPPED),
    Limit(("v5e",), BACKWARD, "cycles", 1.02, STEPPED, base=ORDINARY),
    Limit(("v5e",), BACKWARD, "temporaries", 1, STEPPED, base=ORDINARY),
    Limit(("v5e",), BACKWARD, "exchanged", 1, STEPPED, base=ORDINARY, way="FSDP 16"),
    Limit(("v5e",), BACKWARD, "exchanged", 1, STEPPED, base=ORDINARY, way="ZeRO-1 16"),
    Limit(("v5e",), BACKWARD, "collectives", 1, STEPPED, base=ORDINARY, way="ZeRO-1 16"),
    Limit(GPU, OFFLOAD, "peak", 10.7, ("GPT-2 small",)),
    Limit(TPU, OFFLOAD, "peak", 20.5, ("GPT-2 small",)),  # 16.2, as on the device: all is fetched at once.
)


def exceeded(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that did not compile, and for each limit that one exceeds."""
    for row in rows:
        if "error" in row:
            wrong = [f"does not compile: {row['error']}"]
        else:
            wrong = [limit.broken(row, rows) for limit in LIMITS if limit.holds_for(row)]
        yield from (f"{label(row)}: {line}" for line in (*wrong, *row.get("failed", [])) if line)


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
    """A table for each part of one compiler's rows, with its name, and all targets in one cell."""
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
    """Whether every member compiles; empty if that was not asked."""
    members = [row for row in rows if row["part"] == FAMILY and "error" not in row]
    programs, failed = sum(row["programs"] for row in members), sum(len(row["failed"]) for row in members)
    about = f"{len({row['step'] for row in members})} members of the family with every storage and every kind of write"
    return f"{about}: {programs - failed} of {programs} steps compile." if members else ""
