"""Speed of adam_fn beside its peers, alternating in one run: what else the machine does hits all alike.

    python benchmarks/speed.py [--quick] [--only CASE]... [--out DIR]

Prints the tables of the documentation; writes speed-<device>.json (a list of records: case, peer, metric, value, ratio
to optax, device, versions), in which cases that are not measured stay as they were. A step is what a user runs: a
jitted function that donates parameters and state, updates, and applies the updates. Nothing here is specific to a
device. On a GPU, the storages beside optax, torch's fused Adam and the speed of a copy take a few minutes:
``--only leaf-2^28-float32 --only gpt2``.
"""

import gc
import os
import random
import time
import typing
from collections.abc import Callable, Sequence

# With this a torch peer finds memory left on a GPU; JAX would take most of it at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import peers, report, scripts, workloads

import adam_fn


class Effort(typing.NamedTuple):
    """How long to measure: seconds a case, the bounds of its rounds, and repetitions of a compilation."""

    seconds: float
    fewest: int
    most: int
    compilations: int


FULL, QUICK = Effort(20.0, 15, 300, 3), Effort(0.3, 5, 20, 1)


def alternate(runners: Sequence[peers.Runner], effort: Effort) -> dict[str, list[float]]:
    """Seconds a step of every runner: each round times each runner once, in an order drawn anew for every round.

    On an accelerator, where steps are queued, one timing covers ten steps and a single wait; on a CPU it covers one.
    """
    cpu = jax.devices()[0].platform == "cpu"
    steps = 1 if cpu else 10
    for runner in runners:
        runner.seconds(3)
    one = sum(runner.seconds(steps) for runner in runners)
    rounds = int(np.clip(effort.seconds / max(one, 1e-9), effort.fewest, effort.most))
    order, shuffle = list(runners), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for runner in order:
                if cpu:
                    time.sleep(0.002)  # the threads of the last peer's pool spin for a while before they sleep
                seconds[runner.name].append(runner.seconds(steps) / steps)
    finally:
        gc.enable()
    return seconds


def measure_programs(case: workloads.Case, effort: Effort, records: report.Records) -> None:
    """The time to trace, lower and compile every JAX peer's step, and its temporaries.

    Peers alternate, each time with all of JAX's caches empty.
    """
    stages = ("trace", "lower", "compile", "total")
    seconds: dict[str, dict[str, list[float]]] = {stage: {} for stage in stages}
    temporaries: dict[str, int] = {}
    several = 7 if case.kind == "loop" else 1  # Programs of a few hundredths of a second.
    for _ in range(several * effort.compilations):
        for peer in peers.jax_peers(case):
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
            for stage, own in zip(stages, (*np.diff(times), times[-1] - times[0]), strict=True):
                seconds[stage].setdefault(peer.name, []).append(float(own))
            if (analysis := compiled.memory_analysis()) is not None:
                temporaries[peer.name] = analysis.temp_size_in_bytes
    for stage in stages:
        records.add(case, stage, "s", seconds[stage])
    records.add(case, "temporaries", "bytes", temporaries)


def measure_steps(case: workloads.Case, effort: Effort, records: report.Records) -> None:
    """A jitted step: time, traffic, state; outside jit the update alone, and the update with its application."""
    if case.kind == "eager":
        records.add(case, "eager update", "s", alternate(peers.updates(case), effort))
    runners = peers.runners(case)
    seconds = alternate(runners, effort)
    records.add(case, "eager step" if case.kind == "eager" else "step", "s", seconds)
    if case.kind == "tree":
        rates = {runner.name: runner.traffic / np.median(seconds[runner.name]) / 1e9 for runner in runners}
        records.add(case, "bandwidth", "GB/s", rates)
    if case.kind != "eager":
        state = {runner.name: runner.state_bytes / case.parameters for runner in runners if runner.state_bytes}
        records.add(case, "state", "bytes/parameter", state)


def count_compilations(case: workloads.Case, records: report.Records) -> None:
    """Programs compiled per new learning rate, for every way of giving one."""
    params, grads = case.tree(0, 0.02), case.tree(1, 0.01)
    first, *rates = 1e-3, 2e-3, 3e-3, 4e-3, 5e-3
    tx = adam_fn.adam(first)
    state = tx.init(params)

    def argument(rate: float) -> object:
        return tx.update(grads, state, params, learning_rate=rate)

    def injected(build: Callable[..., optax.GradientTransformation]) -> Callable[[float], object]:
        tx = optax.inject_hyperparams(build)(learning_rate=first)
        state = typing.cast(optax.InjectStatefulHyperparamsState, tx.init(params))
        step = jax.jit(lambda state: tx.update(grads, state, params))
        return lambda rate: step(state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.float32(rate)}))

    def rebuilt(build: Callable[..., optax.GradientTransformation]) -> Callable[[float], object]:
        state = build(first).init(params)

        def call(rate: float) -> object:
            own, carried = jax.tree.map(jnp.copy, (params, state))
            return peers.plain_step(build(rate))(own, carried, grads)

        return call

    ways: dict[str, Callable[[float], object]] = {
        "adam_fn, update(learning_rate=) in a jitted step": jax.jit(argument),
        "adam_fn, update(learning_rate=) eager": argument,
        "adam_fn, inject_hyperparams": injected(adam_fn.adam),
        "adam_fn, a new transformation": rebuilt(adam_fn.adam),
        "optax, inject_hyperparams": injected(optax.adam),
        "optax, a new transformation": rebuilt(optax.adam),
    }
    counts: dict[str, float] = {}
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for name, call in ways.items():
        jax.block_until_ready(call(first))
        compiled.clear()
        for rate in rates:
            jax.block_until_ready(call(rate))
        counts[name] = len(compiled) / len(rates)
    jax.monitoring.unregister_event_duration_listener(listen)
    records.add(case, "compilations per new rate", "", counts)


def main() -> None:
    quick = "small sizes and few rounds, under a minute on two cores"
    options = scripts.parser(__doc__, quick=quick, only="part of a case's name", out="out").parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    effort = QUICK if options.quick else FULL
    records = report.Records(options.quick)
    if peers.torch_device() is None:
        print("torch is not installed, or not for this device: its rows are left out")

    # The first compilation of a process also starts the compiler; it belongs to nobody.
    measure_programs(workloads.Case("start", "", "tree", {"leaf": (8,)}), QUICK, report.Records(quick=True))
    cases = {case.name: case for case in workloads.cases(options.quick)}
    chosen = scripts.selected(cases, options.only)
    for case in (cases[name] for name in chosen):
        print(f"{case.name}: {case.title}, {case.parameters:,} parameters", flush=True)
        if case.kind == "rates":
            count_compilations(case, records)
        if case.kind in ("tree", "training", "loop"):
            with jax.enable_x64(case.dtype == "float64"):
                measure_programs(case, effort, records)
        if case.kind in ("tree", "training", "eager"):
            measure_steps(case, effort, records)
    print(report.Device(records.rows).text())
    path = options.out / f"{'quick' if options.quick else 'speed'}-{scripts.slug()}.json"
    kept = [row for row in scripts.read(path) if row["case"] in {*cases} - {*chosen}]
    order = list(cases)
    scripts.write(path, sorted([*kept, *records.rows], key=lambda row: order.index(row["case"])))


if __name__ == "__main__":
    main()
