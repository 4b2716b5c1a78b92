"""The programs that TPU and GPU compilers make of a step, without the hardware: nothing that is compiled here runs.

    python benchmarks/compiled.py [--check] [--only TEXT]... [--target NAME]... [--out DIR]

The compilers are wheels that compile ahead of time for devices that are not there. They are large and in conflict with
each other, so each is installed, once, in an environment of its own. The steps are of one leaf of 65,536 x 1,024,
of GPT-2 small, of Llama-7B on meshes of up to 256 devices, with `zero1` and with `offload`, and every member of the
family with every storage and write. --only selects programs whose name contains a text, such as `v5e, leaf: 24bit`.
With --check the exit status is 1 when a limit is exceeded, a program does not compile, or a compiler is missing.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import venv
from collections.abc import Iterator

from compilers.figures import GPU, TARGETS, TPU, exceeded, family, summary
from measure import scripts

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / "benchmarks" / "compilers" / "worker.py"
#: Of every compiler the packages that it needs beside optax ({} is jax's version), and its settings.
PACKAGES = {
    "tpu": ("jax[tpu]=={}",),
    "gpu": ("jax=={}", "jax-cuda12-plugin=={}", "jax-cuda12-pjrt=={}", "nvidia-cuda-nvcc-cu12"),
}
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
SETTINGS["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
SETTINGS |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled"}
SETTINGS["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # It only compiles; two may do so at once.


def requirements(name: str) -> list[str]:
    """The packages to install: jax and optax in the versions that are installed here, and what fits them."""
    packages = (package.format(importlib.metadata.version("jax")) for package in PACKAGES[name])
    return [*packages, f"optax=={importlib.metadata.version('optax')}"]


def python(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The interpreter of a compiler's environment, which is made if it is not there."""
    wanted, done = requirements(name), folder / "requirements.json"
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if scripts.read(done) != wanted:
        print(f"{name}: installing {', '.join(wanted)} in {folder}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.write_text(json.dumps(wanted))
    return interpreter


def compiled(name: str, options: argparse.Namespace, versions: dict[str, dict[str, str]]) -> Iterator[scripts.Row]:
    """The rows of one compiler's targets; its versions are added to `versions`."""
    folder = options.environments / name
    targets = [target for target in TARGETS[name] if target in options.target]
    command = [str(python(folder, name)), str(WORKER), json.dumps([targets, options.only])]
    begun: scripts.Row = {}
    with (folder / "log").open("w") as log:
        settings = {**os.environ, **SETTINGS}
        worker = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=log, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            found = json.loads(line) if line.startswith("{") else {}
            begun = found.get("begin", begun)
            if "versions" in found:
                versions[name] = found["versions"]
            elif found and "begin" not in found:
                yield found
    if worker.wait() and not begun:
        raise OSError(f"the compiler does not start: see {log.name}")
    if worker.returncode:
        yield {**begun, "error": f"the compiler ended with {worker.returncode}: see {log.name}"}


def main() -> None:
    check = "exit 1 when a limit is exceeded or a compiler missing"
    parser = scripts.parser(__doc__, only="part of a program's name")
    parser.add_argument("--check", action="store_true", help=check)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "adam_fn" / "compilers"
    parser.add_argument("--target", action="append", choices=[*TPU, *GPU], help="repeatable; all by default")
    parser.add_argument("--environments", type=pathlib.Path, default=cache, help="where the compilers are installed")
    options = parser.parse_args()
    options.target = options.target or [*TPU, *GPU]
    print("Compiled ahead of time, for devices that are not there: nothing of this ran.")
    rows: list[scripts.Row] = []
    versions: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for name in (name for name, targets in TARGETS.items() if {*targets} & {*options.target}):
        try:
            found = scripts.collected(compiled(name, options, versions))
        except (OSError, subprocess.CalledProcessError) as missing:
            wrong.append(f"{name}: there is no compiler: {missing}")
            continue
        rows += found
        about = f"{name}: {len(found)} rows, with {scripts.named(versions[name])}"
        print(*filter(None, (*summary(found), family(found), about)), sep="\n\n")
    if options.out and rows:
        path = options.out / "compiled.json"
        before = scripts.read(path)
        rows_ = scripts.merged(before.get("rows", []), rows, "target", "part", "step", "way")
        about = {"ran": False, "date": scripts.now(), "versions": before.get("versions", {}) | versions}
        scripts.write(path, {**about, "rows": rows_})
    wrong += exceeded(rows)
    print(*wrong, sep="\n")
    if options.check:
        print(f"{len(wrong)} failures" if wrong else "All limits hold.")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
