"""The instructions that a compiled program would run, read from the text of its optimized HLO."""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator

# These neither run nor move anything: they name arrays, or are counted with what they call or start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "after-all"}
FREE |= {"partition-id", "replica-id", "while", "call", "async-start", "async-update", "async-done"}
# A TPU's fetches into its fast memory, ahead of the kernel that reads them, which is counted.
FREE |= {f"{name}-{end}" for name in ("copy", "slice", "dynamic-slice") for end in ("start", "done")}
FREE_CALL = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer|Sharding)"')
#: Instructions that call a computation once, and the attribute that names it.
CALLS = {"call": "to_apply", "async-start": "calls", "while": "body"}
EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "collective-", "ragged-all-to-all", "reduce-scatter")
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
    space: int = 0

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

    @property
    def is_kernel(self) -> bool:
        return self.opcode not in FREE and not FREE_CALL.search(self.rest)

    @property
    def made(self) -> tuple[Array, ...]:
        """The arrays that it writes; the start of a copy has the copy, its source and a number."""
        return self.result[:1] if self.opcode == "copy-start" else self.result if self.is_kernel else ()


def instruction(line: str) -> Instruction | None:
    """The instruction of a line, if it is one."""
    found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)", line)
    if not found:
        return None
    name, types, opcode, operands, rest = found.groups()
    result = (
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space or 0))
        for dtype, shape, space in re.findall(r"(\w+)\[([\d,]*)\](?:\{[^}S]*(?:S\((\d+)\))?)?", types)
    )
    return Instruction(name, tuple(result), opcode, tuple(re.findall(r"%([\w.-]+)", operands)), rest)


class Program:
    """The computations of a module by name, which of them is the entry, and its results."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, self.results = "", tuple[Array, ...]()
        self.constants: dict[str, list[int]] = {}  # Of each computation.
        body: dict[str, Instruction] = {}
        numbers: list[int] = []
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                body = self.computations.setdefault(found.group(2), {})
                self.entry = found.group(2) if found.group(1) else self.entry
                numbers = self.constants.setdefault(found.group(2), [])
            elif parsed := instruction(line):
                body[parsed.name] = parsed
                numbers += [int(n) for n in re.findall(r"= s32\S* constant\((\d+)\)", line)]
                if "ROOT" in line and body is self.computations.get(self.entry):
                    self.results = parsed.result

    def run(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, list[Array], int]]:
        """Every instruction that runs, once, with its operands and how often it runs, which a loop's condition says."""
        beside = self.computations[name or self.entry]
        for each in beside.values():
            given = (beside[operand] for operand in each.operands if operand in beside)
            yield each, [array for operand in given for array in operand.result], times
            if each.opcode in CALLS:
                condition = re.search(r"\bcondition=%?([\w.-]+)", each.rest)
                loops = max(self.constants.get(condition.group(1), []), default=1) if condition else 1
                for called in re.findall(rf"\b{CALLS[each.opcode]}=%?([\w.-]+)", each.rest):
                    yield from self.run(called, times * loops)

    def kernels(self, size: int = 0) -> int:
        """The number of kernels that read or write an array of `size` elements or more."""
        kernels = ((*given, *each.result) for each, given, _ in self.run() if each.is_kernel)
        return sum(any(array.size >= size for array in arrays) for arrays in kernels)

    def cycles(self, *, in_full: bool = False) -> int:
        """The TPU compiler's estimates, added: of a loop once, or in full as often as it runs."""
        found = ((each, times if in_full else 1) for each, _, times in self.run())
        return sum(n * int(x) for each, n in found for x in re.findall(r'"estimated_cycles":"(\d+)"', each.rest))

    def temporaries(self, memory: typing.Any) -> float:  # noqa: ANN401 (JAX has no public type for it)
        """The bytes of arrays that are made but are no results.

        XLA's own figure, or the sum of all arrays in the main memory, as if each had a place of its own: as soon as
        there is any, if only of one number, XLA for TPUs counts another 16 kB for each fetch into fast memory.
        """
        made, results = (x.bytes for each, *_ in self.run() for x in each.made if not x.space), self.results
        return min(memory.temp_size_in_bytes, max(0, sum(made) - sum(x.bytes for x in results if not x.space)))

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
                if not each.opcode.startswith(EXCHANGES) or each.opcode.endswith("-done"):
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
        for each, given, _ in self.run():
            read += sum(array.bytes for array in given if array.space == HOST and each.made)
            stored += sum(array.bytes for array in each.made if array.space == HOST)
        return read, stored
