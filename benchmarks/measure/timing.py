"""How it is measured: peers alternate, so that whatever else the machine does hits all of them alike."""

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from measure.peers import Runner, jax_peers
from measure.workloads import Case


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


def alternate(runners: Sequence[Runner], effort: Effort) -> dict[str, list[float]]:
    """Seconds a step of every runner: each round times each runner once, in an order drawn anew for every round.

    On an accelerator, where steps are queued, one timing covers ten steps and a single wait; on a CPU it covers one.
    """
    cpu = jax.devices()[0].platform == "cpu"
    steps = 1 if cpu else 10
    for runner in runners:
        runner.seconds(3)
    one = sum(runner.seconds(steps) for runner in runners)
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
                seconds[runner.name].append(runner.seconds(steps) / steps)
    finally:
        gc.enable()
    return seconds


def compilations(case: Case, repetitions: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Trace, lower and compile every JAX peer's step, alternating, each time with all of JAX's caches empty.

    By stage, and for all of them, the seconds of every peer; and the bytes of its temporaries.
    """
    stages = ("trace", "lower", "compile", "total")
    seconds: dict[str, dict[str, list[float]]] = {stage: {} for stage in stages}
    temporaries: dict[str, int] = {}
    for _ in range(repetitions):
        for peer in jax_peers(case):
            function, arguments = peer.program(case)
            jax.clear_caches()
            gc.collect()
            times = [time.perf_counter()]
            traced = function.trace(*arguments)
            times.append(time.perf_counter())
            lowered = traced.lower()
            times.append(time.perf_counter())
            compiled = lowered.compile()
            times.append(time.perf_counter())
            for stage, own in zip(seconds.values(), (*np.diff(times), times[-1] - times[0]), strict=True):
                stage.setdefault(peer.name, []).append(float(own))
            if (analysis := compiled.memory_analysis()) is not None:
                temporaries[peer.name] = analysis.temp_size_in_bytes
    return seconds, temporaries


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """An event for each program that XLA compiles inside a `with` block."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
