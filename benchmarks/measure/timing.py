"""How it is measured: peers alternate, so that whatever else the machine does hits all of them alike."""

import dataclasses
import gc
import random
import time
import typing
from collections.abc import Callable, Sequence

import jax
import numpy as np
from measure.peers import JittedStep, Runner


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: seconds a case, the bounds of its rounds, and repetitions of a compilation."""

    seconds: float
    fewest: int
    most: int
    compilations: int

    def rounds(self, one: float) -> int:
        return int(np.clip(self.seconds / max(one, 1e-9), self.fewest, self.most))


FULL = Effort(20.0, 15, 300, 3)
QUICK = Effort(0.3, 5, 20, 1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of one quantity, one per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.values, [25, 75])
        return float(low), float(high)

    def per_round(self, other: "Sample") -> float:
        """The median of the ratios to `other`, round by round."""
        return float(np.median(np.divide(self.values, other.values)))


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(runners: Sequence[Runner], effort: Effort) -> dict[str, Sample]:
    """Seconds a step of every runner: each round times each runner once, in an order drawn anew for every round.

    On an accelerator, where steps are queued, one timing covers ten steps and a single wait; on a CPU it covers one.
    """
    cpu = jax.devices()[0].platform == "cpu"
    steps = 1 if cpu else 10
    for runner in runners:
        runner.run(3)
    one = sum(clock(lambda runner=runner: runner.run(steps)) for runner in runners)
    order, shuffle = list(runners), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    gc.collect()
    gc.disable()
    try:
        for _ in range(effort.rounds(one)):
            shuffle(order)
            for runner in order:
                if cpu:
                    time.sleep(0.002)  # the threads of the last peer's pool spin for a while before they sleep
                seconds[runner.name].append(clock(lambda runner=runner: runner.run(steps)) / steps)
    finally:
        gc.enable()
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Seconds of the three stages, and the bytes of the program's temporaries."""

    trace: Sample
    lower: Sample
    compile: Sample
    temporaries: int | None

    @property
    def total(self) -> Sample:
        return Sample(tuple(map(sum, zip(self.trace.values, self.lower.values, self.compile.values, strict=True))))


def compilations(
    programs: dict[str, Callable[[], tuple[JittedStep, tuple[object, ...]]]], repetitions: int
) -> dict[str, Compilation]:
    """Trace, lower and compile every program, alternating, each time with all of JAX's caches empty.

    A program is a function that builds the jitted step and its arguments (shapes suffice).
    """
    stages: dict[str, list[tuple[float, float, float]]] = {name: [] for name in programs}
    temporaries: dict[str, int | None] = {}
    for _ in range(repetitions):
        for name, build in programs.items():
            function, arguments = build()
            jax.clear_caches()
            gc.collect()
            start = time.perf_counter()
            traced = function.trace(*arguments)
            middle = time.perf_counter()
            lowered = traced.lower()
            last = time.perf_counter()
            compiled = lowered.compile()
            stages[name].append((middle - start, last - middle, time.perf_counter() - last))
            analysis = compiled.memory_analysis()
            temporaries[name] = analysis.temp_size_in_bytes if analysis else None
    return {
        name: Compilation(
            trace=Sample(tuple(trace for trace, _, _ in seconds)),
            lower=Sample(tuple(lower for _, lower, _ in seconds)),
            compile=Sample(tuple(compile for _, _, compile in seconds)),
            temporaries=temporaries[name],
        )
        for name, seconds in stages.items()
    }


class CompilationCounter:
    """Counts the programs that XLA compiles inside a `with` block."""

    _event: typing.ClassVar[str] = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> typing.Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == self._event
