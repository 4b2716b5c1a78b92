"""What a compiled program would run, read from the text of its optimized HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# Neither run nor move anything: they name what is there, or are counted where what they call or start is.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "after-all"}
FREE |= {"partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update", "async-done"}
# A TPU's fetches into its fast memory, ahead of the kernel that reads them, which is counted.
FREE |= {f"{name}-{end}" for name in ("copy", "slice", "dynamic-slice") for end in ("start", "done")}
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer", "Sharding"}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-", "ragged-all-to-all", "reduce-scatter")
HOST = 5
BITS = {"pred": 8, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      space: the memory that it is in; a device's main one is 0, the host's `HOST`.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = dataclasses.field(default=0, compare=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype) or int("".join(re.findall(r"\d+", self.dtype)) or 0)
        return self.size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: its result (the arrays of a tuple), the names of its operands, and what follows them."""

    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, name: str) -> str:
        """The computation that is named `name=`."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found.group(1) if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that run once where it does."""
        if self.opcode == "call":
            return [self.attribute("to_apply")]
        if self.opcode == "async-start":
            return [self.attribute("calls")]
        if self.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
            if branches is None:
                return [self.attribute("true_computation"), self.attribute("false_computation")]
            return re.findall(r"%?([\w.-]+)", branches.group(1))
        return []

    @property
    def is_kernel(self) -> bool:
        target = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return self.opcode not in FREE and (target is None or target.group(1) not in FREE_CALLS)

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate; 0 where there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else 0


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis: {text[:200]}")


def instruction(line: str) -> Instruction | None:
    """The instruction of a line, if it is one."""
    found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    line = re.sub(r"/\*.*?\*/", "", line)
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    result = (
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space or 0))
        for dtype, shape, space in re.findall(r"(\w+)\[([\d,]*)\](?:\{[^}S]*(?:S\((\d+)\))?)?", line[start:end])
    )
    operands = re.findall(r"%([\w.-]+)", line[opened:closed])
    # A constant's "operand" is its value.
    rest = line[opened:] if line[end:opened].strip() == "constant" else line[closed:]
    return Instruction(found.group(1), tuple(result), line[end:opened].strip(), tuple(operands), rest)


class Program:
    """The computations of a module by name, and which of them is the entry."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                body = self.computations.setdefault(found.group(2), {})
                self.entry = found.group(2) if found.group(1) else self.entry
            elif parsed := instruction(line):
                body[parsed.name] = parsed

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as annotated, or the constant that its condition compares the counter with; else 1."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if found:
            return int(found.group(1))
        condition = self.computations[loop.attribute("condition")].values()
        bounds = [re.match(r"\((\d+)\)", x.rest) for x in condition if x.opcode == "constant"]
        less = any(x.opcode == "compare" and "direction=LT" in x.rest for x in condition)
        return int(bounds[0].group(1)) if less and len(bounds) == 1 and bounds[0] else 1

    def run(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
        """Every instruction that runs, those beside it, and how often; both branches of a condition."""
        beside = self.computations[name or self.entry]
        for each in beside.values():
            yield each, beside, times
            if each.opcode == "while":
                yield from self.run(each.attribute("body"), times * self.trips(each))
            for called in each.called:
                yield from self.run(called, times)

    def kernels(self) -> Iterator[tuple[Instruction, list[Array], int]]:
        """Every kernel, the arrays that it reads and writes, and how often it runs."""
        for each, beside, times in self.run():
            if each.is_kernel:
                read = [array for name in each.operands for array in beside[name].result]
                yield each, [*read, *each.result], times

    def passes(self, size: int) -> int:
        """Kernels that read or write an array of `size` elements or more. One in a loop counts once."""
        return sum(any(array.size >= size for array in arrays) for _, arrays, _ in self.kernels())

    def count(self) -> int:
        """Launches of kernels."""
        return sum(times for _, _, times in self.kernels())

    def bytes(self) -> float:
        """What all kernels read and write, each its whole operands and results."""
        return sum(times * array.bytes for _, arrays, times in self.kernels() for array in arrays)

    def loops(self) -> bool:
        """Whether there are any."""
        return any(each.opcode == "while" for each, _, _ in self.run())

    def cycles(self) -> int:
        """The TPU compiler's estimates, added."""
        return sum(times * each.cycles for each, _, times in self.run())

    def collectives(self) -> list[str]:
        """The operations between devices, whether they run or not."""
        every = (each.opcode for body in self.computations.values() for each in body.values())
        return sorted({opcode for opcode in every if opcode.startswith(COLLECTIVES) and not opcode.endswith("-done")})

    def exchanges(self) -> list[tuple[str, float]]:
        """Each operation between devices, whether it runs or not: its kind, and the bytes of the whole that is summed
        or gathered.

        One that is asynchronous counts where it starts, one in a loop once. For TPUs XLA writes a reduce-scatter as a
        fusion `%all-reduce-scatter`, of an all-reduce and a slice, and what is asynchronous again in each of the
        kernels that it runs beside, with the same `chain_id`.
        """
        found: dict[tuple[str, ...], tuple[str, float]] = {}
        for name, body in self.computations.items():
            for each in body.values():
                if not each.opcode.startswith(COLLECTIVES) or each.opcode.endswith("-done"):
                    continue
                kind, started = each.opcode.removesuffix("-start"), each.opcode.endswith("-start")
                given = sum(array.bytes for operand in each.operands for array in body[operand].result)
                made = sum(array.bytes for array in each.result)
                whole = given if kind in ("all-reduce", "reduce-scatter") else made - given * started
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                chain = re.search(r'chain_id="(\d+)"', each.rest)
                found[(kind, chain.group(1)) if chain else (name, each.name)] = kind, whole
        return list(found.values())

    def bus(self) -> tuple[float, float]:
        """Bytes read from the host's memory, by copies and by kernels that read it where it is, and stored there."""
        read = stored = 0.0
        for each, beside, times in self.run():
            if not each.is_kernel and each.opcode != "copy-start":
                continue
            # What starts a copy has the copy, what it copies and a number.
            results = each.result[:1] if each.opcode == "copy-start" else each.result
            given = [array for operand in each.operands for array in beside[operand].result]
            read += times * sum(array.bytes for array in given if array.space == HOST)
            stored += times * sum(array.bytes for array in results if array.space == HOST)
        return read, stored
