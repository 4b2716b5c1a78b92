"""What the compilers' programs are held to."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence

Row = dict[str, typing.Any]

TPU, GPU = ("v5e", "v6e"), ("h200", "a100")
LEAF, TREE, ZERO1, OFFLOAD = "leaf", "GPT-2 small", "zero1", "offload"
BASE = "optax float32"


@dataclasses.dataclass(frozen=True)
class Limit:
    """The most that a figure may be, in its own unit or, with `times`, in that of optax's float32 step.

    Attributes:
      ways: those that it holds for; all by default.
      least: the least that it may be.
    """

    targets: tuple[str, ...]
    part: str
    steps: tuple[str, ...]
    figure: str
    most: float
    times: bool = False
    ways: tuple[str, ...] = ()
    least: float = -math.inf


MOST = ("Block(8)", "AMSGrad, Block(8)", "Adan, Block(8)", "masters, Block(8)")
ROUNDED = "stochastic rounding, Block(8)"
ALONE = ("all bfloat16", "Block(8)", "Block(4)", "masters, Block(8)")
KERNELS = tuple(f"{step}, kernel" for step in (*ALONE, "AMSGrad, Block(8)", "Adan, Block(8)"))
DIVIDED = ("float32", "Block(8)", "Block(8), kernel")
WHOLE = ("float32", *ALONE, *(f"{step}, kernel" for step in ALONE))
#: What was wanted; where more is allowed, that is what was reached, and the comment says what was wanted.
LIMITS = (
    Limit(GPU, LEAF, (*MOST, ROUNDED), "temporaries", 0.10),
    Limit(GPU, LEAF, (*MOST, ROUNDED), "passes", 2),
    Limit(GPU, LEAF, ("Block(4)",), "temporaries", 0.10, ways=("make_step",)),
    Limit(GPU, LEAF, ("Block(4)",), "passes", 2, ways=("make_step",)),
    Limit(GPU, LEAF, ("Block(4)",), "temporaries", 0.30, ways=("update",)),  # 0.10: results of two shapes.
    Limit(GPU, LEAF, ("float32",), "kernels", 1.7, times=True, ways=("make_step",)),  # 1: scalars of the bias weights.
    Limit(TPU, LEAF, (*MOST, "Block(4)"), "temporaries", 0.05, ways=("make_step", "update")),
    Limit(TPU, LEAF, (ROUNDED,), "temporaries", 1.05, ways=("make_step",)),  # 0.05: the update is stored.
    # 1.7: a v6e has twice the memory's speed for little more arithmetic.
    Limit(("v6e",), LEAF, ("Block(8)",), "cycles", 1.9, times=True),
    Limit(("v6e",), LEAF, ("Block(4)",), "cycles", 3.9, times=True),
    Limit(("v5e",), LEAF, ("Block(8)",), "cycles", 1.7, times=True),
    Limit(("v5e",), LEAF, ("Block(4)",), "cycles", 1.9, times=True),  # 1.7: 16 rows of bytes fill half a register.
    Limit(TPU, LEAF, ("all bfloat16",), "bytes", 14.1, ways=("make_step",)),
    Limit((*TPU, *GPU), LEAF, KERNELS, "temporaries", 0.01, ways=("make_step", "update")),
    Limit((*TPU, *GPU), LEAF, KERNELS, "passes", 1, ways=("make_step", "update")),
    Limit((*TPU, *GPU), LEAF, ("Block(8), kernel",), "bytes", 17, ways=("make_step",)),
    Limit((*TPU, *GPU), TREE, WHOLE, "beside arguments", 0.5),
    Limit(TPU, TREE, WHOLE, "seconds", 4, times=True),
    # The gradients are summed once, into parts, and the parameters put together once. What is left of all-reduces: a
    # loss, a leaf that four devices cannot divide and, on TPU, a bias.
    *(
        Limit((*TPU, *GPU), ZERO1, steps, kind, size, least=0.99 * size)
        for steps, size in ((DIVIDED, 4), (("masters, Block(8)",), 2))
        for kind in ("reduce-scatter", "all-gather")
    ),
    Limit((*TPU, *GPU), ZERO1, (*DIVIDED, "masters, Block(8)"), "all-reduce", 0.004),
    Limit((*TPU, *GPU), ZERO1, (*DIVIDED, "masters, Block(8)"), "other exchanges", 0),
    Limit((*TPU, *GPU), ZERO1, (*DIVIDED, "masters, Block(8)"), "state", 0.251),
    *(
        Limit(targets, OFFLOAD, (step,), figure, 1.01 * size, ways=("make_step",), least=0.99 * size)
        for targets, step, size in (
            *((targets, step, size) for targets in (TPU, GPU) for step, size in (("float32", 8), ("masters", 10))),
            (TPU, "float32, kernel", 8),
            (GPU, "Block(8)", 2.125),
        )
        for figure in ("on the host", "kept there", "stored")
    ),
    Limit((*TPU, *GPU), OFFLOAD, ("float32",), "read", 8.01, ways=("make_step",), least=7.99),
    # 2.125: a GPU's kernels read the host's memory where it is, and codes need two passes.
    Limit(GPU, OFFLOAD, ("Block(8)",), "read", 4.3, least=2.1),
    Limit(GPU, OFFLOAD, ("training",), "saved", 8.01, ways=("one program",), least=7.9),
    # 8: the TPU's scheduler fetches the state before the backward pass is over.
    Limit(TPU, OFFLOAD, ("training",), "saved", 8.01, ways=("one program",), least=-10.5),
    Limit((*TPU, *GPU), OFFLOAD, ("training",), "saved", 8.01, ways=("two programs",), least=7.9),
    Limit(GPU, OFFLOAD, ("GPT-2 small",), "peak", 10.7),
    Limit(TPU, OFFLOAD, ("GPT-2 small",), "peak", 20.5),  # 16.2, as on the device: all is fetched at once.
)
#: What compilers refuse by a fault of theirs: host memory for bytes, and for what a kernel wrote over.
REFUSED = ((TPU, OFFLOAD, "Block(8)"), (GPU, OFFLOAD, "float32, kernel"))


def refused(row: Row) -> bool:
    """Whether it is known that this does not compile."""
    return any(
        row["target"] in targets and (row["part"], row["step"]) == (part, step) for targets, part, step in REFUSED
    )


def label(row: Row) -> str:
    return f"{row['target']}, {row['part']}: {row['step']}, {row['way']}"


def exceeded(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that is beyond a limit, that did not compile, or in which devices talk."""
    for row in rows:
        wrong = [row["error"]] if "error" in row else row.get("failed", [])
        if refused(row):
            if not wrong:
                yield f"{label(row)}: compiles now: it need not be refused any more"
            continue
        yield from (f"{label(row)}: does not compile: {line}" for line in wrong)
        if row.get("collectives"):
            yield f"{label(row)}: devices talk: {', '.join(row['collectives'])}"
    found = {(row["target"], row["part"], row["step"]): row for row in rows if "error" not in row}
    for limit in LIMITS:
        for row in found_by(limit, rows):
            most, value, unit = limit.most, row[limit.figure], ""
            if limit.times:
                base = found.get((row["target"], row["part"], BASE))
                if base is None:
                    continue  # It did not compile, which is said above.
                value, unit = value / base[limit.figure], f" times {BASE}'s"
            if value > most:
                yield f"{label(row)}: {limit.figure} {value:.4g}{unit}, at most {most:g}"
            if value < limit.least:
                yield f"{label(row)}: {limit.figure} {value:.4g}{unit}, at least {limit.least:g}"


def found_by(limit: Limit, rows: Sequence[Row]) -> list[Row]:
    """The rows that a limit is about and that have its figure."""
    return [
        row
        for row in rows
        if row["target"] in limit.targets
        and row["part"] == limit.part
        and row["step"] in limit.steps
        and (not limit.ways or row["way"] in limit.ways)
        and row.get(limit.figure) is not None
    ]


def unmeasured(rows: Sequence[Row], targets: Sequence[str]) -> Iterator[str]:
    """A line for each limit, target and step that nothing was measured for: a mistake when everything was asked for."""
    for limit in LIMITS:
        have = {(row["target"], row["step"]) for row in found_by(limit, rows)}
        for target in sorted({*limit.targets} & {*targets}):
            for step in limit.steps:
                if (target, step) not in have:
                    yield f"{target}, {limit.part}: {step}: no {limit.figure} was measured"
