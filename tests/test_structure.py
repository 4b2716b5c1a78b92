"""The package's own laws: imports run one way, from room to room and within one; files are short; internals private."""

import ast
import graphlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import adam_fn

pytestmark = pytest.mark.quick

ROOT = Path(adam_fn.__file__).parent
PROJECT = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))
# From the bottom up: a module imports from the rooms before its own, and in its own room without a cycle. What is in no
# room stands at the root because users import it by name.
ROOMS = (
    ("schedules", "algebra"),
    ("storage",),
    ("execute",),
    ("trees",),
    ("masks", "options", "wrappers"),
    ("checkpoint", "diagnostics"),
    ("family", "devices"),
    ("backward", "presets", "interop", "surgery"),
)
FIRST = {name for names in ROOMS for name in names} | {"version"}
PUBLIC = {"backward", "checkpoint", "diagnostics", "interop", "masks", "options", "presets", "schedules", "surgery"}


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _room(module: str) -> int:
    name = module.split(".", maxsplit=1)[0]
    found = [i for i, names in enumerate(ROOMS) if name in names]
    return found[0] if found else len(ROOMS) if module == "" else -1  # `version` is below all.


def _imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base.split(".")[0] == "adam_fn" else []
        else:
            continue
        for name in (name.removeprefix("adam_fn").removeprefix(".") for name in names if name.startswith("adam_fn")):
            is_module = (path := ROOT / name.replace(".", "/")).is_dir() or path.with_suffix(".py").exists()
            yield name if is_module else name.rpartition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_imports_run_one_way(file: Path) -> None:
    module = _module(file)
    for imported in _imports(file):
        same = imported.split(".")[0] == module.split(".")[0]
        assert same or _room(imported) < _room(module), f"{module} imports {imported}"


def test_imports_have_no_cycle() -> None:
    graphlib.TopologicalSorter({_module(file): {*_imports(file)} - {_module(file)} for file in FILES}).prepare()


def test_the_root_has_only_public_names_and_modules() -> None:
    """Each module is in a room, and no function hides a module."""
    assert {_module(file).split(".")[0] for file in FILES} - {""} == FIRST
    assert all(inspect.ismodule(getattr(adam_fn, name)) for name in FIRST)
    assert {name for name in dir(adam_fn) if not name.startswith("_")} == {*adam_fn.__all__} | FIRST
    assert FIRST.intersection(adam_fn.__all__) == PUBLIC


@pytest.mark.parametrize("place", ["docs", "examples", "benchmarks"])
def test_only_what_is_public_is_imported_outside(place: str) -> None:
    for file in sorted((PROJECT / place).rglob("*.py")):
        for imported in _imports(file):
            assert imported.split(".")[0] in PUBLIC | {"", "version"}, f"{file} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_no_file_is_longer_than_300_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


def test_the_packages_init_only_imports() -> None:
    *imports, names = ast.parse((ROOT / "__init__.py").read_text()).body[1:]
    assert {*map(type, imports)} == {ast.ImportFrom}
    assert ast.unparse(names).startswith("__all__ = [")
    assert isinstance(adam_fn.__version__, str)


def test_the_arithmetic_runs_in_one_place() -> None:
    callers = [
        _module(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "leaf" and _module(file) not in {"algebra.rule"}
    ]
    assert callers == ["execute.body"]  # `rule.leaf` is called by `body`, and otherwise only by `Chain`.
