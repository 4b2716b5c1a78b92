"""The common parts of the scripts: options, place and time of a measurement, rows and files, Markdown tables."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax

#: One result, by the names of what identifies it and of what was measured.
Row: TypeAlias = dict[str, Any]

NONE = "–"


def parser(doc: str | None, *, quick: str = "", only: str = "", out: str | None = None) -> argparse.ArgumentParser:
    """The options of a script: --out, and those that it gives a help for."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if quick:
        found.add_argument("--quick", action="store_true", help=quick)
    if only:
        found.add_argument("--only", action="extend", nargs="+", default=[], metavar="TEXT", help=f"{only}; repeatable")
    found.add_argument("--out", type=pathlib.Path, default=out and pathlib.Path(out), help="folder for the results")
    return found


def selected(names: Iterable[str], texts: Sequence[str]) -> list[str]:
    """The names that equal one of the texts, or contain one that is itself no name; all names without texts.

    The script ends if there is no such name.
    """
    names = list(names)
    meant = {name for text in texts for name in ([text] if text in names else names) if text in name}
    if texts and not meant:
        raise SystemExit(f"nothing is named {' or '.join(texts)}; there are: {'; '.join(names)}")
    return [name for name in names if not texts or name in meant]


def collected(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as soon as it is there."""
    found = []
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), flush=True)
        found.append(row)
    return found


def read(path: pathlib.Path) -> Any:  # noqa: ANN401 (JSON)
    """The contents of a file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: pathlib.Path, found: object) -> None:
    """Writes a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
    print(path)


def merged(old: Sequence[Row], new: Sequence[Row], *keys: str) -> list[Row]:
    """The new rows, each in the place of the old one that has the same keys, and the other old ones."""
    return list({tuple(row[key] for key in keys): row for row in (*old, *new)}.values())


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """The device JAX computes on; for a CPU, its model and the number of cores."""
    first, info = jax.devices()[0], pathlib.Path("/proc/cpuinfo")
    if first.platform != "cpu":
        return first.device_kind
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {cores()} cores"


def slug() -> str:
    """The device as part of a file name."""
    first = jax.devices()[0]
    name = "cpu" if first.platform == "cpu" else first.device_kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    there = {x.name for x in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in packages if name in there}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def about() -> Row:
    """The device, the versions and the time of a measurement."""
    compared = versions("adam_fn", "jax", "jaxlib", "optax", "torch", "numpy")
    return {"device": device(), "versions": {"python": platform.python_version()} | compared, "date": now()}


def save(options: argparse.Namespace, name: str, rows: Sequence[Row], **more: object) -> None:
    """Writes the rows, what they were measured on and what else a script says of them, if the options have a folder."""
    if options.out:
        write(options.out / f"{name}.json", {**about(), **more, "rows": rows})


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def span(values: Iterable[float | None], form: str) -> str:
    """The least and the largest value, or the only one; a dash if there is none."""
    known = sorted(x for x in values if x is not None)
    return " to ".join(dict.fromkeys(format(end, form) for end in (*known[:1], *known[-1:]))) or NONE
