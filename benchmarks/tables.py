"""Writes the tables of README.md and docs from benchmarks/results and examples/results.

    python benchmarks/tables.py [--check]

Each table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. With --check nothing is written, and the exit
status is 1 when a file does not hold what the results say.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
import statistics
import sys
import typing
from collections.abc import Callable, Sequence

from compilers import figures
from compilers.figures import BACKWARD, LEAF, ORDINARY, TARGETS, relative
from measure import scripts
from measure.report import Device
from measure.scripts import NONE, Row, named, span, table, where

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
#: The case of `speed.py` that the README quotes.
LARGE = "leaf-2^26-float32"


def read(script: str, options: str = "--out benchmarks/results", of: str = "") -> typing.Any:  # noqa: ANN401 (JSON)
    """The first file of the results of a script, or of those whose name goes on with `of`; ends where there is none."""
    folder = ROOT / "examples" / "results" if script.startswith("examples/paper") else RESULTS
    path = next(iter(sorted(folder.glob(f"{pathlib.Path(script).stem}{of}*.json"))), None)
    if path is None:
        raise SystemExit(f"nothing in {folder.relative_to(ROOT)}: python {script} {options}")
    return scripts.read(path)


def largest_errors(rows: Sequence[Row], b2: float, peer: str) -> dict[str, float]:
    """The largest error by step of adam_fn over the ways of giving hyperparameters, or optax's."""
    forms = {} if peer == "adam_fn" else {"form": "numbers"}
    own = [row["errors"] for row in where(rows, b2=b2, peer=peer, **forms)]
    return {time: max(errors[time] for errors in own) for time in own[0]}


def exactness() -> str:
    found = read("benchmarks/exactness.py")
    columns = dict.fromkeys((row["b2"], row["peer"]) for row in found["rows"])
    errors = {column: largest_errors(found["rows"], *column) for column in columns}
    forms = dict.fromkeys(row["form"] for row in found["rows"])
    head = ["step", *(f"{peer}, b2 = {b2}" for b2, peer in errors)]
    times = found["rows"][0]["errors"]
    body = [[f"{int(time):,}", *(f"{error[time]:.1e}" for error in errors.values())] for time in times]
    return (
        f"{table(head, body)}\n\n"
        f"Relative L2 error of the update against float64: random gradients, {found['coordinates']:,} coordinates "
        "whose scales span e^±9. adam_fn: the largest error over hyperparameters given as "
        f"{', '.join(forms)}; optax.adam: hyperparameters given as numbers. Measured on {found['device']} with "
        f"{named(found['versions'])} by `benchmarks/exactness.py`."
    )


def speed() -> str:
    """Every device's tables."""
    read("benchmarks/speed.py")
    texts = [Device(scripts.read(path)).text() for path in sorted(RESULTS.glob("speed-*.json"))]
    note = (
        "Medians of steps timed in turn within one run. GB/s counts the least possible traffic: gradients, parameters "
        "and moments read once, parameters and moments written once, each in its dtype. `copy` moves as many bytes "
        "from one array to another, `in place` changes one array in place. Steps whose data fit into the caches may "
        "exceed both."
    )
    return "\n\n".join([*texts, note])


def above(runs: Sequence[Row], workload: str, label: str) -> list[float]:
    """The losses of a configuration, less those of float32 with the same seed."""
    base = {run["seed"]: run["loss"] for run in where(runs, workload=workload, label="float32")}
    return [run["loss"] - base[run["seed"]] for run in where(runs, workload=workload, label=label)]


def comparison() -> str:
    """The README's table: what matters to somebody who uses optax.adam, each figure from the results of a script."""
    exact, trained, coded = (read(f"benchmarks/{name}.py") for name in ("exactness", "precision", "codes"))
    device = Device(read("benchmarks/speed.py", of="-cpu"))
    machines = {x["device"].split(",")[0] for x in (exact, trained, coded, device.records[0])}
    programs = where(read("benchmarks/compiled.py")["rows"], target="v5e")

    def error(b2: float) -> list[str]:
        return [f"{largest_errors(exact['rows'], b2, peer)['1000']:.0e}" for peer in ("optax", "adam_fn")]

    def state(peer: str) -> str:
        return device.value(next(iter(device.cases("state"))), peer, "state")

    def ratio(metric: str, case: str = LARGE) -> list[str]:
        return ["1", device.value(case, "adam_fn", f"/{metric}")]

    def lost(label: str) -> str:
        return f"{statistics.mean(above(trained['runs'], 'tuned', label)):+.5f}"

    def cycles(step: str) -> str:
        return f"{relative(where(programs, part=LEAF, step=step)[0], 'cycles', programs):.2f}"

    def beside(step: str) -> str:
        return f"{where(programs, part=BACKWARD, step=step)[0]['temporaries']:.2f}"

    def steady(storage: str) -> str:
        found = where(coded["rows"], storage=storage, scenario="steady")
        return ", ".join(f"{row['step']:.2f}" for row in found if row["case"].endswith("noise 0"))

    def each(cell: Callable[[str], str], *names: str) -> str:
        return ", ".join(map(cell, names))

    ours = each(state, "adam_fn bfloat16 moments", "adam_fn 24-bit state", "adam_fn 16-bit state")
    losses = "change of the final loss with 3 and with 2 bytes of state instead of 8"
    tpu = "cycles of a step on a TPU v5e with 8, 3 and 2 bytes of state (compiled, not run)"
    gpt = "bytes per parameter that a training step of a stacked GPT needs besides parameters and state (compiled)"
    constant = "size of the steps for a constant gradient, moments in bfloat16 (exact: 1)"
    rows = [
        ["error of an update, β₂ = 0.999", *error(0.999)],
        ["error of an update, β₂ = 0.999999", *error(0.999999)],
        ["bytes of state per parameter", state("optax"), f"{state('adam_fn')}, or {ours} on request"],
        ["time of one step of 67 million parameters, relative to optax", *ratio("step")],
        ["time to compile that step, relative to optax", *ratio("total")],
        ["time of one update of 200 leaves outside `jit`, relative to optax", *ratio("eager update", "eager")],
        [losses, "– (no such state)", each(lost, "24-bit state", "16-bit state")],
        [tpu, "1", each(cycles, "float32", "24bit", "16bit")],
        [gpt, beside(f"16bit{ORDINARY}"), f"{beside('16bit')} with the step in the backward pass"],
        [constant, steady("plain bfloat16"), steady("bfloat16")],
        ["the state of a running optax training", "", "restored as it is"],
    ]
    return (
        f"{table(['', '`optax.adam`', '`adam_fn.adam`'], rows)}\n\n"
        "Errors are relative L2 errors against float64 at step 1,000. The two times in each ratio come from the same "
        "run. The losses are those of a character transformer, trained further at a low rate. Steps for a "
        "constant gradient are with β₁ = 0.9, 0.95 and 0.99 and both moments in bfloat16. Measured on "
        f"{' and '.join(sorted(machines))} by `exactness.py`, `speed.py`, `precision.py` and `codes.py` in "
        "`benchmarks`, or compiled by `compiled.py`."
    )


def codes() -> str:
    """The errors of every storage on random gradients, then what signals become."""
    found = read("benchmarks/codes.py", "--gradients DIR --out benchmarks/results")
    storages = {row["storage"]: row for row in found["rows"]}

    def cell(storage: str, scenario: str, metric: str, *case: str) -> str:
        own = where(found["rows"], storage=storage, scenario=scenario, **dict.fromkeys(["case"] * len(case), *case))
        return span((row[metric] for row in own), ".3f" if metric in ("rms", "step", "moved") else ".3g")

    def made(columns: dict[str, tuple[str, ...]]) -> str:
        body = []
        for storage, row in storages.items():
            name = f"**{storage}**" if row["ours"] else storage
            body.append([name, f"{row['bytes']:.4g}", *(cell(storage, *column) for column in columns.values())])
        return table(["storage", "bytes", *columns], body)

    errors = {
        "random: error": ("random", "error", "σ = 1"),
        "RMS": ("random", "rms", "σ = 1"),
        "largest": ("random", "largest", "σ = 1"),
        "error, σ from 1 to 1e-15": ("random", "error"),
        "wide": ("wide", "error"),
        "sparse": ("sparse", "error"),
        "β₁ = β₂ = 0.95": ("β₁ = β₂ = 0.95", "error"),
        "β₁ = 0.99": ("β₁ = 0.99", "error"),
        "recorded": ("recorded", "error"),
    }
    signals = {
        **{f"steady, β₁ = {b1}": ("steady", "step", f"β₁ = {b1}, noise 0") for b1 in (0.9, 0.95, 0.99)},
        "noisy": ("noisy", "step"),
        "slow moment": ("slow", "step"),
        "quiet": ("quiet", "moved"),
        "last update": ("quiet", "last"),
        "falling": ("falling", "absolute"),
        "its mean": ("falling", "mean"),
        "periods 2 to 8": ("periodic", "error"),
        "golden": ("golden", "error"),
    }
    about = (
        f"The last {found['last']} of {found['steps']:,} updates: their relative L2 error against exact Adam's. Each "
        "element has a scale of lognormal(0.7) and normal gradients (*random*; there also the updates' RMS and largest "
        "element relative to exact Adam's), a scale of lognormal(2.5) (*wide*), a gradient at 1% of the steps "
        "(*sparse*) or those of a transformer that trains (*recorded*). Bold: storages of this package, as they run; "
        f"the others are emulated, but for optax's own. {named(found['versions'])} ({found['date'][:10]}), by "
        "`benchmarks/codes.py`."
    )
    signal = (
        f"The mean of {found['steady']:,} steps of *steady* gradients, and of those with noise of 1/3 to 3 times the "
        "signal (*noisy*), where 1 is right; likewise AdEMAMix's *slow moment*. *Quiet*: how far elements went whose "
        "gradient became 0, where 1 is right, and their last update, which should be 0. *Falling*: RMS and mean of the "
        f"error, in units of the rate, when the gradient falls tenfold every {found['steps'] // 4} steps. Then the "
        "errors of *periodic* gradients, of whole periods and of the frequency of the *golden* ratio."
    )
    return "\n\n".join([about, made(errors), signal, made(signals)])


def precision() -> str:
    """Per configuration: bytes per parameter, and for each workload the loss and its distance from float32's."""
    found = read("benchmarks/precision.py")
    runs = found["runs"]
    names = [name for name in found["settings"] if where(runs, workload=name, label="float32")]
    head = ["", "bytes", *(cell for name in names for cell in (f"{name}: loss", "above float32"))]
    body = []
    for label in dict.fromkeys(run["label"] for run in runs):
        cells = [label, f"{sum(where(runs, label=label)[0]['bytes'].values()):.2f}"]
        for name in names:
            cells.append(spread([run["loss"] for run in where(runs, workload=name, label=label)], 4))
            cells.append(NONE if label == "float32" else spread(above(runs, name, label), 4))
        body.append(cells)
    about = (
        "Validation loss in nats, mean ± standard deviation over the seeds; *above float32*: the difference from "
        "float32 with the same seed. Bytes per parameter: parameter, gradient and state. "
        f"{found['device']}, {named(found['versions'])}, by `benchmarks/precision.py`."
    )
    return f"{table(head, body)}\n\n{about}"


def temporaries() -> str:
    """The temporaries of every leaf and storage."""
    found = read("benchmarks/temporaries.py")
    columns = ("make_step", "update and apply", "update")
    body = [
        [" x ".join(f"{axis:,}" for axis in row["shape"]), row["storage"], *(f"{row[name]:.3f}" for name in columns)]
        for row in found["rows"]
    ]
    about = (
        "Temporaries of a step of one leaf, in units of its float32 size, on "
        f"{found['device']} with {named(found['versions'])}, by `benchmarks/temporaries.py`."
    )
    return f"{table(['leaf', 'moments', *columns], body)}\n\n{about}"


def compiled() -> str:
    """The programs that the compilers for TPU and GPU make of steps: for each, a table for every part."""
    found = read("benchmarks/compiled.py")
    texts = []
    for name, versions in found["versions"].items():
        rows = [row for row in found["rows"] if row["target"] in TARGETS[name]]
        about = f"Compiled for {', '.join(dict.fromkeys(row['target'] for row in rows))}, but **not run**, with "
        about += f"{named(versions)} ({found['date'][:10]}), by `benchmarks/compiled.py`. {figures.family(rows)}"
        texts += [f"### {name.upper()}", about.strip(), *figures.summary(rows)]
    return "\n\n".join(texts)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; a dash if there is nothing."""
    if not values:
        return NONE
    mean = round(statistics.mean(values), digits) + 0.0  # No -0.
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def mnist() -> str:
    """The last epoch of every run of examples/mnist_mlp.py."""
    read("examples/mnist_mlp.py", "--out benchmarks/results, with --compare or without")
    head = ["optimizer", "rate", "decay", "schedule", "epochs", "training cost", "test accuracy", "best", "images/s"]
    texts = []
    for path in sorted(RESULTS.glob("mnist_*.json"), reverse=True):
        found = scripts.read(path)
        body = []
        for run in found["runs"]:
            epochs, last = run["epochs"], run["epochs"][-1]
            seconds = sum(epoch["seconds"] for epoch in epochs)
            images = sum(epoch["seconds"] * epoch["images_per_second"] for epoch in epochs)
            numbers = (f"{run[name]:g}" for name in ("learning_rate", "weight_decay"))
            cost = NONE if last["train_cost"] is None else f"{last['train_cost']:.4f}"
            best = max(epoch["test_accuracy"] for epoch in epochs)
            row = [run["label"], *numbers, run["schedule"], str(len(epochs)), cost]
            body.append([*row, f"{last['test_accuracy']:.2%}", f"{best:.2%}", f"{images / seconds:,.0f}"])
        about = (
            f"{found['dataset']}, {found['train_images']:,} training and {found['test_images']:,} test images, "
            f"MLP {'-'.join(map(str, found['layers']))}, batch {found['batch']}, seed {found['seed']}, "
            f"on {found['device']} with {named(found['versions'])}, by `examples/mnist_mlp.py`:"
        )
        texts.append(f"{about}\n\n{table(head, body)}")
    return "\n\n".join(texts)


def claims(name: str) -> str:
    """The claims of one figure of the paper, each with what its script in examples/paper measured."""
    words = {True: "Yes", False: "No", None: "Not decided"}
    found = read(f"examples/paper/{name}.py", "--out examples/results")
    lines = []
    for claim in found["claims"]:
        said = f"**{words[claim['holds']]}.** {claim['text']} ({claim['section']})."
        lines.append(f"- {said} *Measured:* {claim['measured']}.".replace("|", "ǀ"))
    about = f"Measured on {found['device']}, {named(found['versions'])}, by `examples/paper/{name}.py`."
    return "\n".join([*lines, "", about])


def backward() -> str:
    """The memory of a training step of a stacked GPT, both ways."""
    rows, body = where(read("benchmarks/compiled.py")["rows"], part=BACKWARD), []
    for row in rows:
        target, way, step = row["target"], row["way"], row["step"]
        for first in where(rows, target=target, way=way, step=f"{step}{ORDINARY}"):
            sizes = (first["temporaries"], row["temporaries"], row["activations"], row["gradient"])
            cycles = relative(row, "cycles", rows, first["step"])
            body.append([f"{target}, {way}", step, *(span([x], ".2f") for x in (*sizes, cycles))])
    head = ["device", "state", "gradients first", "step in the backward pass", "activations alone"]
    head += ["one layer's gradient", "cycles, relative to gradients first"]
    return (
        f"{table(head, body)}\n\n"
        "Bytes per parameter (of a device) beside parameters and state, of a training step of "
        "a GPT with 12 stacked layers in bfloat16. Compiled, but **not run**, by `benchmarks/compiled.py`; cycles are "
        "the TPU compiler's estimate, every loop counted in full."
    )


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (comparison, precision, backward, codes, temporaries, compiled, exactness, speed, mnist)
}
TABLES |= {x: functools.partial(claims, x) for x in ("figure1", "figure2", "figure3", "figure4", "section7")}
MARKED = re.compile(r"(?P<begin><!-- begin:(?P<name>\w+) -->).*?(?P<end><!-- end:(?P=name) -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    options = parser.parse_args()
    wrong, left = list[str](), {*TABLES}

    def filled(found: re.Match[str]) -> str:
        left.remove(found["name"])
        return f"{found['begin']}\n{TABLES[found['name']]()}\n{found['end']}"

    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = file.read_text()
        new = MARKED.sub(filled, old)
        if options.check:
            wrong += [f"{file.relative_to(ROOT)} is out of date: python benchmarks/tables.py"] * (new != old)
        elif new != old:
            file.write_text(new)
            print(f"wrote {file.relative_to(ROOT)}")
    wrong += [f"there is no place for {name}" for name in sorted(left)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
