"""Speed of adam_fn beside its peers, alternating in one run.

    python benchmarks/speed.py [--quick] [--only CASE]... [--out DIR]

Prints tables; writes speed-<device>.json (a list of records: case, peer, metric, value, ratio to optax, device,
versions) and a plot of the same name. A step is what a user runs: a jitted function that donates parameters and state,
updates, and applies the updates. Nothing here is specific to a device. On a GPU, the storages beside optax, torch's
fused Adam and the speed of a copy take a few minutes: ``--only leaf-2^28-float32 --only gpt2``.
"""

import argparse
import functools
import json
import os
import pathlib
import typing
from collections.abc import Callable

# With this a torch peer finds memory left on a GPU; JAX would take most of it at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import optax
import rich.console
from measure import machine, peers, report, timing, workloads

import adam_fn


def programs(case: workloads.Case) -> dict[str, Callable[[], tuple[peers.JittedStep, tuple[object, ...]]]]:
    """Every JAX peer's step of a case, with the shapes it is compiled for."""
    training = case.kind == "training"

    def build(peer: peers.JaxPeer) -> tuple[peers.JittedStep, tuple[object, ...]]:
        tx = peer.build()
        step = peers.training_step(tx) if training else peer.step(tx)
        params = {name: jax.ShapeDtypeStruct(shape, case.dtype) for name, shape in case.shapes.items()}
        inputs: object = params
        if training:
            inputs = jax.eval_shape(lambda: workloads.images(case, 1))
        return step, (params, jax.eval_shape(tx.init, params), inputs)

    return {peer.name: functools.partial(build, peer) for peer in peers.jax_peers(case)}


def measure_steps(case: workloads.Case, effort: timing.Effort, records: report.Records) -> None:
    """A jitted step: compilation, temporaries, time, traffic, state."""
    compiled = timing.compilations(programs(case), effort.compilations)
    for metric in ("trace", "lower", "compile", "total"):
        records.samples(case, metric, "s", {name: getattr(found, metric) for name, found in compiled.items()})
    temporaries = {name: found.temporaries for name, found in compiled.items() if found.temporaries is not None}
    records.values(case, "temporaries", "bytes", temporaries)

    runners = peers.runners(case)
    samples = timing.alternate(runners, effort)
    records.samples(case, "step", "s", samples)
    if case.kind == "tree":
        rates = {runner.name: runner.traffic / samples[runner.name].median / 1e9 for runner in runners}
        records.values(case, "bandwidth", "GB/s", rates)
        records.values(case, "share of copy", "", {name: rate / rates["copy"] for name, rate in rates.items()})
        records.values(case, "least traffic", "bytes", {runner.name: runner.traffic for runner in runners})
    state = {runner.name: runner.state_bytes / case.parameters for runner in runners if runner.state_bytes}
    records.values(case, "state", "bytes/parameter", state)


def measure_eager(case: workloads.Case, effort: timing.Effort, records: report.Records) -> None:
    """Outside jit: the update alone, and the update with its application."""
    updates, steps = peers.eager_runners(case)
    records.samples(case, "eager update", "s", timing.alternate(updates, effort))
    records.samples(case, "eager step", "s", timing.alternate(steps, effort))


def count_compilations(case: workloads.Case, records: report.Records) -> None:
    """Programs compiled per new learning rate, for every way of giving one."""
    params, grads = case.tree(0, 0.02), case.tree(1, 0.01)
    rates = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)

    def argument() -> Callable[[float], object]:
        tx = adam_fn.adam(1e-3)
        state = tx.init(params)

        @jax.jit
        def step(params: optax.Params, rate: jax.typing.ArrayLike) -> object:
            updates, after = tx.update(grads, state, params, learning_rate=rate)
            return optax.apply_updates(params, updates), after

        return lambda rate: step(params, rate)

    def eager() -> Callable[[float], object]:
        tx = adam_fn.adam(1e-3)
        state = tx.init(params)
        return lambda rate: tx.update(grads, state, params, learning_rate=rate)

    def injected(build: Callable[..., optax.GradientTransformation]) -> Callable[[float], object]:
        tx = optax.inject_hyperparams(build)(learning_rate=1e-3)
        state = typing.cast(optax.InjectStatefulHyperparamsState, tx.init(params))
        step = jax.jit(lambda params, state: tx.update(grads, state, params))

        def call(rate: float) -> object:
            hyperparams = {**state.hyperparams, "learning_rate": jnp.float32(rate)}
            return step(params, state._replace(hyperparams=hyperparams))

        return call

    def rebuilt(build: Callable[..., optax.GradientTransformation]) -> Callable[[float], object]:
        state = build(rates[0]).init(params)

        def call(rate: float) -> object:
            own, carried = jax.tree.map(jnp.copy, (params, state))
            return peers.plain_step(build(rate))(own, carried, grads)

        return call

    ways: dict[str, Callable[[], Callable[[float], object]]] = {
        "adam_fn, update(learning_rate=) in a jitted step": argument,
        "adam_fn, update(learning_rate=) eager": eager,
        "adam_fn, inject_hyperparams": lambda: injected(adam_fn.adam),
        "adam_fn, a new transformation": lambda: rebuilt(adam_fn.adam),
        "optax, inject_hyperparams": lambda: injected(optax.adam),
        "optax, a new transformation": lambda: rebuilt(optax.adam),
    }
    counts: dict[str, float] = {}
    for name, make in ways.items():
        call = make()
        jax.block_until_ready(call(rates[0]))
        with timing.CompilationCounter() as counter:
            for rate in rates[1:]:
                jax.block_until_ready(call(rate))
        counts[name] = counter.count / len(rates[1:])
    records.values(case, "compilations per new rate", "", counts)


def selected(names: list[str], quick: bool) -> list[workloads.Case]:
    """The cases whose name contains one of `names`, all of them when there is none."""
    every = workloads.cases(quick)
    found = [case for case in every if not names or any(name in case.name for name in names)]
    if not found:
        raise SystemExit(f"no case is named {', '.join(names)}; there are {', '.join(case.name for case in every)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, under a minute on two cores")
    parser.add_argument("--only", action="append", default=[], metavar="CASE", help="part of a case's name; repeatable")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the JSON and the plot"
    )
    options = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)
    effort = timing.QUICK if options.quick else timing.FULL
    records = report.Records(machine.device(), machine.versions(), machine.now(), options.quick)
    console.print(f"{records.device}; " + ", ".join(f"{name} {version}" for name, version in records.versions.items()))
    if peers.torch_device() is None:
        console.print("torch is not installed, or not for this device: its rows are left out")

    # The first compilation of a process also starts the compiler; it belongs to nobody.
    timing.compilations(programs(workloads.Case("start", "", "tree", {"leaf": (8,)})), 1)
    for case in selected(options.only, options.quick):
        with console.status(case.title):
            if case.kind == "eager":
                measure_eager(case, effort, records)
            elif case.kind == "rates":
                count_compilations(case, records)
            else:
                measure_steps(case, effort, records)
        report.show(console, case, records)

    options.out.mkdir(parents=True, exist_ok=True)
    only = (name.replace("^", "") for name in options.only)
    name = "-".join(["quick" if options.quick else "speed", machine.slug(), *only])
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(records.rows, indent=1) + "\n")
    console.print(f"{path}: {len(records.rows)} records")
    console.print(report.plot(records.rows, path.with_suffix(".png")))


if __name__ == "__main__":
    main()
