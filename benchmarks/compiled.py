"""What the TPU and GPU compilers make of a step, without the hardware: nothing that is compiled here runs.

    python benchmarks/compiled.py [--check] [--only TEXT]... [--target NAME]... [--out DIR]

The compilers are wheels that compile ahead of time for devices which are not there. They are large and in conflict with
each other, so each is installed, once, in an environment of its own. Compiled are steps of one leaf of 65,536 x 1,024,
of GPT-2 small, of Llama-7B on meshes of up to 256 devices, with `zero1` and with `offload`, and every member of the
family with every storage and write. --only selects programs whose name contains a text, such as `v5e, leaf: 24bit`.
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
import time
import venv
from collections.abc import Iterator, Sequence

import rich.console
import rich.table
from compilers.limits import (
    BACKWARD,
    FAMILY,
    GPU,
    LEAF,
    LLAMA,
    OFFLOAD,
    TPU,
    TREE,
    ZERO1,
    Row,
    exceeded,
    label,
    relative,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / "benchmarks" / "compilers" / "worker.py"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """The targets of a compiler, the packages that it needs beside optax ({} is jax's version), and its settings."""

    targets: tuple[str, ...]
    packages: tuple[str, ...]
    settings: dict[str, str]


COMPILERS = {
    "tpu": Compiler(
        TPU,
        ("jax[tpu]=={}",),
        {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # It only compiles; two may do so at once.
        },
    ),
    "gpu": Compiler(GPU, ("jax=={}", "jax-cuda12-plugin=={}", "jax-cuda12-pjrt=={}", "nvidia-cuda-nvcc-cu12"), {}),
}
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
SETTINGS["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))


def requirements(name: str) -> list[str]:
    """What is installed: jax and optax in the versions that are installed here, and what fits them."""
    packages = (package.format(importlib.metadata.version("jax")) for package in COMPILERS[name].packages)
    return [*packages, f"optax=={importlib.metadata.version('optax')}"]


def python(folder: pathlib.Path, name: str, console: rich.console.Console) -> pathlib.Path:
    """The interpreter of a compiler's environment, which is made if it is not there."""
    wanted, done = requirements(name), folder / "requirements.json"
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not done.exists() or json.loads(done.read_text()) != wanted:
        console.print(f"{name}: installing {', '.join(wanted)} in {folder}", markup=False)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.write_text(json.dumps(wanted))
    return interpreter


def run(name: str, options: argparse.Namespace, console: rich.console.Console) -> tuple[dict[str, str], list[Row]]:
    """Versions and rows of one compiler's targets."""
    folder = options.environments / name
    command = [str(python(folder, name, console)), str(WORKER), *(f"--only={text}" for text in options.only)]
    command += [f"--target={target}" for target in COMPILERS[name].targets if target in options.target]
    versions, rows, begun = {}, [], {}
    with (folder / "log").open("w") as log, console.status(name) as status:
        settings = {**os.environ, **SETTINGS, **COMPILERS[name].settings}
        worker = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=log, text=True)
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
    if worker.wait() and not begun:
        raise OSError(f"the compiler does not start: see {log.name}")
    if worker.returncode:
        rows.append({**begun, "error": f"the compiler ended with {worker.returncode}: see {log.name}"})
    return versions, rows


#: The figures of each part that are shown: their heads, and how they are written; in that of optax's float32 step where
#: the head says so.
FIGURES: dict[str, dict[str, tuple[str, str]]] = {
    LEAF: {
        "passes": ("passes", "d"),
        "kernels": ("kernels", "d"),
        "temporaries": ("temporaries", ".3f"),
        "bytes": ("bytes moved", ".2f"),
        "cycles": ("cycles / optax", ".2f"),
        "seconds": ("compilation / optax", ".1f"),
    },
    TREE: {
        "kernels": ("kernels", "d"),
        "beside": ("peak beyond the arguments", ".3f"),
        "cycles": ("cycles / optax", ".2f"),
        "seconds": ("compilation / optax", ".1f"),
    },
    LLAMA: {"collectives": ("collectives", "d"), "temporaries": ("temporaries", ".3f"), "state": ("state", ".3f")},
    ZERO1: {
        **{kind: (kind, ".3f") for kind in ("reduce-scatter", "all-gather", "all-reduce")},
        "others": ("others", "g"),
        "share": ("part of the state", ".3f"),
    },
    BACKWARD: {
        "temporaries": ("temporaries", ".2f"),
        "activations": ("activations", ".2f"),
        "gradient": ("gradient of a layer", ".2f"),
        "exchanged": ("exchanged", ".1f"),
    },
    OFFLOAD: {
        "read": ("read", ".2f"),
        "stored": ("stored", ".2f"),
        "peak": ("peak", ".1f"),
        "saved": ("peak saved", ".1f"),
    },
}


def span(values: Sequence[float | None], form: str) -> str:
    """The least and the largest, or the one; nothing where there is none."""
    known = sorted(x for x in values if x is not None)
    return " to ".join(dict.fromkeys(format(end, form) for end in (*known[:1], *known[-1:])))


def summary(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Of one compiler's rows a table for each part: its name, its head and its lines, all targets in one cell."""
    for part, figures in FIGURES.items():
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                groups.setdefault((row["step"], row["way"]), []).append(row)
        shown = {x: y for x, y in figures.items() if any(x in row for group in groups.values() for row in group)}
        lines = []
        for names, group in groups.items():
            found = {
                x: [relative(row, x, rows) if "/" in head else row.get(x) for row in group]
                for x, (head, _) in shown.items()
            }
            lines.append([*names, *(span(found[x], form) for x, (_, form) in shown.items())])
        if lines:
            yield part, ["step", "by", *(head for head, _ in shown.values())], lines


def family(rows: Sequence[Row]) -> str:
    """Whether every member compiles; nothing where that was not asked."""
    members = [row for row in rows if row["part"] == FAMILY and "error" not in row]
    programs, failed = sum(row["programs"] for row in members), sum(len(row["failed"]) for row in members)
    about = f"{len({row['step'] for row in members})} members of the family with every storage and every kind of write"
    return f"{about}: {programs - failed} of {programs} steps compile." if members else ""


def show(rows: Sequence[Row], console: rich.console.Console) -> None:
    for title, head, lines in summary(rows):
        table = rich.table.Table(*head, title=f"{title}, for {', '.join(dict.fromkeys(row['target'] for row in rows))}")
        table.columns[0].no_wrap = True
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(family(rows), highlight=False)


def keep(file: pathlib.Path, versions: dict[str, dict[str, str]], rows: Sequence[Row]) -> None:
    """Writes the rows; those of other programs stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {"versions": {}, "rows": []}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {"ran": False, "date": date, "versions": before["versions"] | versions}
    found["rows"] = list(({label(row): row for row in before["rows"]} | {label(row): row for row in rows}).values())
    file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    parser.add_argument("--check", action="store_true", help="exit 1 when a limit is exceeded or a compiler missing")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="part of a name; repeatable")
    parser.add_argument("--target", action="append", choices=[*TPU, *GPU], help="repeatable; all by default")
    parser.add_argument("--out", type=pathlib.Path, help="folder for compiled.json; its other rows stay")
    parser.add_argument(
        "--environments",
        type=pathlib.Path,
        default=cache / "adam_fn" / "compilers",
        help="where the compilers are installed; a cache folder",
    )
    options = parser.parse_args()
    options.target = options.target or [*TPU, *GPU]
    terminal = rich.console.Console()
    console = terminal if terminal.is_terminal else rich.console.Console(width=140)
    console.print("Compiled ahead of time, for devices that are not there: nothing of this ran.")
    rows: list[Row] = []
    versions: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for name in (name for name, compiler in COMPILERS.items() if {*compiler.targets} & {*options.target}):
        began = time.perf_counter()
        try:
            versions[name], found = run(name, options, console)
        except (OSError, subprocess.CalledProcessError) as missing:
            wrong.append(f"{name}: there is no compiler: {missing}")
            continue
        show(found, console)
        rows += found
        packages = ", ".join(f"{package} {version}" for package, version in versions[name].items())
        console.print(f"{name}: {len(found)} rows in {time.perf_counter() - began:.0f} s, with {packages}")
    if options.out and rows:
        keep(options.out / "compiled.json", versions, rows)
    wrong += exceeded(rows)
    for line in wrong:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.check:
        console.print(f"{len(wrong)} failures" if wrong else "All limits hold.")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
