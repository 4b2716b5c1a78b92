"""What the TPU and GPU compilers make of a step, without the hardware: nothing that is compiled here runs.

    python benchmarks/compiled.py [--check] [--only TEXT]... [--target NAME]... [--family] [--out DIR]

The compilers are wheels that compile ahead of time for devices which are not there. They are large and in conflict with
each other, so each is installed, once, in an environment of its own. For every target: a step of one leaf of
65,536 x 1,024 (temporaries, peak, passes over the leaf, bytes moved, cycles), GPT-2 small as a whole, and whether a
step on a mesh of 2 x 2 makes devices talk; with --family, whether every member compiles with every storage and write.
With --check the exit status is 1 when a limit is exceeded, a program does not compile, or a compiler is missing.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence

import rich.console
import rich.table
from compilers.limits import BASE, GPU, LEAF, OFFLOAD, TPU, TREE, ZERO1, Row, exceeded, label, unmeasured

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = pathlib.Path(__file__).resolve().parent / "compilers" / "worker.py"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """The targets of a compiler, the packages that it needs beside jax ({} is jax's version), and its settings."""

    targets: tuple[str, ...]
    packages: tuple[str, ...]
    settings: dict[str, str]


COMPILERS = {
    "tpu": Compiler(
        TPU,
        ("jax[tpu]{}",),
        {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # It only compiles; two may do so at once.
        },
    ),
    "gpu": Compiler(GPU, ("jax{}", "jax-cuda12-plugin{}", "jax-cuda12-pjrt{}", "nvidia-cuda-nvcc-cu12"), {}),
}
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


class MissingError(Exception):
    """A compiler cannot be had; the message says why."""


def place() -> pathlib.Path:
    """Where the environments are kept: below the user's cache folder, or a temporary one where there is none."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    try:
        (cache / "adam_fn").mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = pathlib.Path(tempfile.gettempdir())
    return cache / "adam_fn" / "compilers"


def requirements(compiler: Compiler) -> list[str]:
    """Its packages, in the versions of jax and optax that are installed here, if any are."""

    def pinned(package: str) -> str:
        try:
            return f"=={importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return ""

    return [*(package.format(pinned("jax")) for package in compiler.packages), f"optax{pinned('optax')}"]


def python(folder: pathlib.Path, name: str, console: rich.console.Console) -> pathlib.Path:
    """The interpreter of a compiler's environment, which is made if it is not there."""
    wanted = requirements(COMPILERS[name])
    environment, done = folder / name, folder / name / "requirements.json"
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if done.exists() and json.loads(done.read_text()) == wanted:
        return interpreter
    console.print(f"{name}: installing {', '.join(wanted)} in {environment}", markup=False)
    began = time.perf_counter()
    venv.create(environment, clear=True, with_pip=True)
    command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable"]
    result = subprocess.run([*command, str(ROOT), *wanted], capture_output=True, text=True, check=False)
    if result.returncode:
        errors = "\n".join(line.strip() for line in result.stderr.splitlines() if "ERROR" in line)
        raise MissingError(f"{name}: the compiler cannot be installed:\n{tail(errors or result.stderr)}")
    done.write_text(json.dumps(wanted))
    console.print(f"{name}: installed in {time.perf_counter() - began:.0f} s")
    return interpreter


def tail(text: str, lines: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def run(name: str, options: argparse.Namespace, console: rich.console.Console) -> tuple[dict[str, str], list[Row]]:
    """Versions and rows of one compiler's targets."""
    targets = [target for target in COMPILERS[name].targets if target in options.target]
    command = [str(python(options.environments, name, console)), str(WORKER)]
    # One target of a compiler says whether the family compiles.
    flags = (("--target", targets), ("--only", options.only), ("--family", targets[:1] if options.family else []))
    command += [part for flag, values in flags for value in values for part in (flag, value)]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    settings = {**os.environ, **SETTINGS, **COMPILERS[name].settings, "PYTHONPATH": path}
    versions, rows, begun = {}, [], {}
    with tempfile.TemporaryFile("w+") as errors, console.status(name) as status:
        worker = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            found = json.loads(line) if line.startswith("{") else {}
            if "begin" in found:
                begun = found["begin"]
                status.update(label(begun))
            elif "versions" in found:
                versions = found["versions"]
            elif found:
                rows.append(found)
        code = worker.wait()
        errors.seek(0)
        if code and not begun:
            raise MissingError(f"{name}: the compiler does not start:\n{tail(errors.read())}")
        if code:
            rows.append({**begun, "error": f"the compiler ended with {code}: {tail(errors.read(), 1)}"})
    return versions, rows


#: The figures that are shown: their heads, and how they are written.
FIGURES = {
    "temporaries": ("temporaries, leaves", ".3f"),
    "peak": ("peak, bytes per parameter", ".2f"),
    "passes": ("passes", "d"),
    "kernels": ("kernels", "d"),
    "bytes": ("moved, bytes per parameter", ".1f"),
    "cycles": ("cycles / optax", ".2f"),
    "seconds": ("compilation, s", ".1f"),
}


def figures(row: Row, rows: Sequence[Row]) -> dict[str, float | None]:
    """Those of a row; cycles in units of optax's float32 step on the same target."""
    base = [x for x in rows if (x["target"], x["part"], x["step"]) == (row["target"], row["part"], BASE)]
    found = {name: row.get(name) for name in FIGURES}
    if found["cycles"] is not None:
        found["cycles"] = row["cycles"] / base[0]["cycles"] if base and base[0].get("cycles") else None
    return found


def show(rows: Sequence[Row], console: rich.console.Console) -> None:
    """A table for each target and tree, and a line for the rest."""
    for target, part in dict.fromkeys((row["target"], row["part"]) for row in rows):
        own = [row for row in rows if (row["target"], row["part"]) == (target, part)]
        failed = [row for row in own if row.get("failed") or "error" in row]
        if part in (LEAF, TREE):
            measured = {id(row): figures(row, rows) for row in own}
            shown = [name for name in FIGURES if any(found[name] is not None for found in measured.values())]
            table = rich.table.Table("step", "by", *(FIGURES[name][0] for name in shown), title=f"{target}: {part}")
            table.columns[0].no_wrap = True
            for row in own:
                values = ((measured[id(row)][name], FIGURES[name][1]) for name in shown)
                cells = ("" if value is None else format(value, form) for value, form in values)
                table.add_row(row["step"], row["way"], *cells)
            console.print(table)
        elif part == "sharded":
            talk = sum(bool(row.get("collectives")) for row in own)
            console.print(f"{target}: {len(own)} steps on four devices, {talk} with collectives, {len(failed)} failed")
        elif part in (ZERO1, OFFLOAD):
            about = [f"{len(own)} of {part}, {len(failed)} do not compile", *remarks(own)]
            console.print(f"{target}: {'; '.join(about)}", highlight=False, soft_wrap=True)
        else:
            programs, seconds = (sum(row.get(name, 0) for row in own) for name in ("programs", "seconds"))
            console.print(
                f"{target}: the family: {len(own)} members, {programs} steps in {seconds:.0f} s, {len(failed)} failed"
            )


def span(values: Sequence[float | None], form: str) -> str:
    """The least and the largest, or the one; nothing where there is none."""
    known = sorted(x for x in values if x is not None)
    return " to ".join(dict.fromkeys(format(end, form) for end in (*known[:1], *known[-1:])))


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows say of `zero1` and of `offload`, bytes per parameter."""
    there = [row for row in rows if "error" not in row]

    def of(figure: str, form: str, part: str, **about: str) -> str:
        chosen = [x for x in there if x["part"] == part and all(x[key] == value for key, value in about.items())]
        return span([x[figure] for x in chosen], form)

    if state := of("state", ".3f", ZERO1):
        kinds = ((kind, of(kind, form, ZERO1)) for kind, form in (("reduce-scatter", ".2f"), ("all-gather", ".2f")))
        text = ", ".join(f"{kind} {size}" for kind, size in kinds)
        text += f", all-reduce {of('all-reduce', '.4f', ZERO1)}, others {of('other exchanges', 'g', ZERO1)}"
        count = sum(row["part"] == ZERO1 for row in there)
        yield f"`zero1`, communication in {count} training steps on four devices, in bytes per parameter: {text}"
        yield f"`zero1`, fraction of the state held by one of four devices: {state}"
    if own := of("peak", ".1f", OFFLOAD, step=TREE):
        saved = (f"{of('saved', '.1f', OFFLOAD, way=way)} as {way}" for way in ("one program", "two programs"))
        text = "`offload`, reduction of a training step's peak memory, in bytes per parameter (negative: an increase)"
        yield f"{text}: {', '.join(saved)}"
        yield f"`offload`, peak memory of an optimizer step for {TREE}, in bytes per parameter: {own}"


def summary(found: Row) -> Iterator[tuple[list[str], list[list[str]], str]]:
    """For each compiler the head and the rows of a table, figures of all its targets in one cell, and a paragraph."""
    for name, versions in found["versions"].items():
        rows = [row for row in found["rows"] if row["target"] in COMPILERS[name].targets]
        targets = dict.fromkeys(row["target"] for row in rows)
        groups: dict[tuple[str, str], list[dict[str, float | None]]] = {}
        for row in rows:
            if row["part"] in (LEAF, TREE) and (row["way"] == "make_step" or row["step"].startswith("optax")):
                groups.setdefault((row["part"], row["step"]), []).append(figures(row, rows))
        shown = [figure for figure in FIGURES if any(x[figure] is not None for group in groups.values() for x in group)]
        body = [
            [step if part == LEAF else f"{part}: {step}", *(span([x[y] for x in group], FIGURES[y][1]) for y in shown)]
            for (part, step), group in groups.items()
        ]
        about = f"Compiled for {' and '.join(targets)}, but **not run**, with "
        about += (
            f"{', '.join(f'{package} {version}' for package, version in versions.items())} ({found['date'][:10]}), "
        )
        about += "by `benchmarks/compiled.py`.\n"
        if talk := [bool(row.get("collectives") or "error" in row) for row in rows if row["part"] == "sharded"]:
            about += (
                f"\n- Sharded over four devices, {len(talk) - sum(talk)} of {len(talk)} programs have no collectives."
            )
        if programs := sum(row.get("programs", 0) for row in rows):
            members = [row for row in rows if row["part"] == "family"]
            failed = sum(len(row.get("failed", [])) for row in members)
            about += f"\n- The {len(members)} members of the family, with every storage and every kind of write: "
            about += f"{programs - failed} of {programs} steps compile."
        about += "".join(f"\n- {remark}." for remark in remarks(rows))
        yield ["step", *(FIGURES[figure][0] for figure in shown)], body, about


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when a limit is exceeded or a compiler missing")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="part of a step's name; repeatable")
    parser.add_argument("--target", action="append", choices=[*TPU, *GPU], help="repeatable; all by default")
    parser.add_argument("--family", action="store_true", help="also every member x storage x write; takes minutes")
    parser.add_argument("--out", type=pathlib.Path, help="folder for compiled.json; its other rows stay")
    parser.add_argument("--environments", type=pathlib.Path, help="where the compilers are installed; a cache folder")
    options = parser.parse_args()
    options.target = options.target or [*TPU, *GPU]
    options.environments = options.environments or place()

    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)
    console.print("Compiled ahead of time, for devices that are not there: nothing of this ran.")
    rows: list[Row] = []
    versions: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for name, compiler in COMPILERS.items():
        if not set(compiler.targets) & set(options.target):
            continue
        began = time.perf_counter()
        try:
            versions[name], found = run(name, options, console)
        except MissingError as missing:
            wrong.append(str(missing))
            continue
        show(found, console)
        rows += found
        packages = ", ".join(f"{package} {version}" for package, version in versions[name].items())
        console.print(f"{name}: {len(found)} rows in {time.perf_counter() - began:.0f} s, with {packages}")
    if options.out and rows:
        options.out.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file = options.out / "compiled.json"
        before = json.loads(file.read_text()) if file.exists() else {"versions": {}, "rows": []}
        found = {"ran": False, "date": date, "versions": before["versions"] | versions}
        found["rows"] = list(({label(row): row for row in before["rows"]} | {label(row): row for row in rows}).values())
        file.write_text(json.dumps(found, indent=1) + "\n")
    wrong += exceeded(rows)
    if not options.only:
        there = [target for name in versions for target in COMPILERS[name].targets if target in options.target]
        wrong += unmeasured(rows, there)
    for line in wrong:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.check:
        console.print(f"{len(wrong)} failures" if wrong else "All limits hold.")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
