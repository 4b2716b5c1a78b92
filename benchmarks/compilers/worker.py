"""Compiles steps for accelerators that are not there; `compiled.py` runs it in an environment that has the compiler.

It is given the targets and the texts asked for, as JSON, and prints a line of JSON for the versions and for every
program. Nothing that it compiles is run.
"""

import functools
import itertools
import json
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from compilers import figures, layered, placements, steps
from compilers.figures import BASE, ORDINARY, SIZES, TREE
from compilers.hlo import Program
from compilers.steps import STEPS, WAYS, Shapes, Step, first, placed, spent
from measure import scripts
from measure.workloads import held, size

import adam_fn

Job = tuple[scripts.Row, Callable[[], scripts.Row]]
#: For programs that need only compile: a TPU's take a tenth of the time.
HASTY: typing.Any = {"exec_time_optimization_effort": -1.0}


def measured(tree: Shapes, name: str, way: str, target: str) -> scripts.Row:
    """The memory and the kernels of a step's program; bytes per parameter."""
    step = STEPS[name]
    arguments, count = placed(step.arguments(tree), first(target)), size(tree)
    jax.clear_caches()
    began = spent()
    compiled = WAYS[way](step.tx).lower(*arguments).compile()
    seconds = spent() - began
    memory, program = compiled.memory_analysis(), Program(compiled.as_text() or "")
    temporaries = program.temporaries(memory)
    found: scripts.Row = {
        "passes": program.kernels(max(x.size for x in arguments[0].values())),
        "temporaries": temporaries / count,
        "beside": (memory.output_size_in_bytes - memory.alias_size_in_bytes + temporaries) / count,
        "seconds": seconds,
    }
    if not (cycles := program.cycles()):
        return found | {"kernels": program.kernels()}
    # Only for a TPU.
    moved, least = compiled.cost_analysis()["bytes accessed"], 2 * held(arguments[:2]) + held(arguments[2])
    return found | {"cycles": cycles, "bytes": moved / count, "beyond": (moved - least) / count}


def together(every: Mapping[str, Step], target: str) -> list[str]:
    """Compiles the steps in one program, or one by one if that fails; returns which failed, and why."""
    given = {name: placed(step.arguments(steps.SMALL), first(target)) for name, step in every.items()}

    def run(given: Mapping[str, tuple[typing.Any, ...]]) -> object:
        return {name: adam_fn.make_step(every[name].tx)(*arguments) for name, arguments in given.items()}

    try:
        jax.jit(run).lower(given).compile(HASTY)
    except Exception as error:
        if len(every) == 1:
            return [f"{next(iter(every))} does not compile: {first_line(error)}"]
        return [line for name, step in every.items() for line in together({name: step}, target)]
    return []


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def member(name: str, _: str, target: str) -> scripts.Row:
    """Whether the steps of a member of the family compile."""
    began, every = spent(), steps.family(name)
    failed = together(every, target)
    return {"programs": len(every), "failed": failed, "seconds": spent() - began}


def jobs(target: str) -> Iterator[Job]:
    """The programs for a target: the names of each, and a function that compiles it."""
    divisions = itertools.product(placements.MESHES.get(target, ()), ("auto", "explicit"), SIZES)
    trainings = itertools.product(layered.WAYS.get(target, ()), figures.STEPPED, ("", ORDINARY))
    offloads = [*((x, "make_step") for x in (*SIZES, TREE)), ("training", "one program"), ("training", "two programs")]
    told = target in (figures.TPU[0], figures.GPU[0])  # One target per compiler is enough.
    parts: dict[str, tuple[Callable[[str, str, str], scripts.Row], Iterable[tuple[str, str]]]] = {
        figures.LEAF: (
            functools.partial(measured, steps.ONE),
            ((x, way) for x, step in STEPS.items() for way in step.ways),
        ),
        TREE: (functools.partial(measured, steps.GPT2), ((x, STEPS[x].ways[0]) for x in steps.WHOLE)),
        figures.LLAMA: (placements.sharded, ((step, f"{name}, {kind}") for name, kind, step in divisions)),
        figures.ZERO1: (placements.zero1, itertools.product(SIZES, ("jit", "shard_map"))),
        figures.OFFLOAD: (placements.offload, offloads),
        figures.BACKWARD: (layered.compiled, ((f"{step}{kind}", way) for way, step, kind in trainings)),
        figures.FAMILY: (member, ((x, "make_step") for x in steps.MEMBERS if told)),
    }
    for part, (run, names) in parts.items():
        for step, way in names:
            yield {"part": part, "step": step, "way": way}, functools.partial(run, step, way, target)


def wanted(target: str, only: Sequence[str]) -> list[Job]:
    """The jobs whose name contains one of the texts asked for, and the steps that they are compared with."""
    every = [({"target": target, **name}, run) for name, run in jobs(target)]

    def named(row: scripts.Row) -> bool:
        return not only or any(text in figures.label(row) for text in only)

    chosen = [row for row, _ in every if named(row)]
    held = ((limit, row) for limit in figures.LIMITS for row in chosen if limit.base and limit.holds_for(row))
    bases = {(row["part"], name) for limit, row in held for name in (limit.compared(row), BASE)}
    return [(row, run) for row, run in every if named(row) or (row["part"], row["step"]) in bases]


def main() -> None:
    def say(row: scripts.Row) -> None:
        print(json.dumps(row), flush=True)

    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")  # Where dtypes differ.
    parts = scripts.versions("jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    say({"versions": {"adam_fn": adam_fn.__version__} | parts})
    targets, only = json.loads(sys.argv[1])
    for target in targets:
        # The first compilation also starts the compiler; its time is not counted.
        jax.jit(jnp.sin).lower(placed(jax.ShapeDtypeStruct((8, 128), "float32"), first(target))).compile()
        for about, run in wanted(target, only):
            say({"begin": about})
            try:
                say({**about, **run()})
            except Exception as error:
                say({**about, "error": first_line(error)})


if __name__ == "__main__":
    main()
