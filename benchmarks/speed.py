"""Speed of adam_fn beside its peers, alternating in one run.

    python benchmarks/speed.py [--quick] [--only CASE]... [--out DIR]

Prints the tables of the documentation; writes speed-<device>.json (a list of records: case, peer, metric, value, ratio
to optax, device, versions), in which cases that are not measured stay as they were. A step is what a user runs: a
jitted function that donates parameters and state, updates, and applies the updates. Nothing here is specific to a
device. On a GPU, the storages beside optax, torch's fused Adam and the speed of a copy take a few minutes:
``--only leaf-2^28-float32 --only gpt2``.
"""

import os
import typing
from collections.abc import Callable

# With this a torch peer finds memory left on a GPU; JAX would take most of it at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import peers, report, scripts, timing, workloads

import adam_fn


def measure_programs(case: workloads.Case, effort: timing.Effort, records: report.Records) -> None:
    """The time to compile, and temporaries."""
    with jax.enable_x64(case.dtype == "float64"):
        stages, temporaries = timing.compilations(case, effort.compilations)
    for stage, seconds in stages.items():
        records.add(case, stage, "s", seconds)
    records.add(case, "temporaries", "bytes", temporaries)


def measure_steps(case: workloads.Case, effort: timing.Effort, records: report.Records) -> None:
    """A jitted step: time, traffic, state; outside jit the update alone, and the update with its application."""
    if case.kind == "eager":
        records.add(case, "eager update", "s", timing.alternate(peers.updates(case), effort))
    runners = peers.runners(case)
    seconds = timing.alternate(runners, effort)
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
    for name, call in ways.items():
        jax.block_until_ready(call(first))
        with timing.compiled() as events:
            for rate in rates:
                jax.block_until_ready(call(rate))
        counts[name] = len(events) / len(rates)
    records.add(case, "compilations per new rate", "", counts)


def main() -> None:
    quick = "small sizes and few rounds, under a minute on two cores"
    options = scripts.parser(__doc__, quick=quick, only="part of a case's name", out="out").parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    effort = timing.QUICK if options.quick else timing.FULL
    records = report.Records(options.quick)
    if peers.torch_device() is None:
        print("torch is not installed, or not for this device: its rows are left out")

    # The first compilation of a process also starts the compiler; it belongs to nobody.
    timing.compilations(workloads.Case("start", "", "tree", {"leaf": (8,)}), 1)
    cases = {case.name: case for case in workloads.cases(options.quick)}
    chosen = scripts.selected(cases, options.only)
    for case in (cases[name] for name in chosen):
        print(f"{case.name}: {case.title}, {case.parameters:,} parameters", flush=True)
        if case.kind == "rates":
            count_compilations(case, records)
        if case.kind in ("tree", "training", "loop"):
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
