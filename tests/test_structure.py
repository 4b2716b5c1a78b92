"""The package's own laws: imports run one way, files stay short, `__init__` only names."""

import ast
import importlib
from pathlib import Path

import pytest

import adam_fn

ROOT = Path(adam_fn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the bottom up; a module imports only from layers above it in this list. Whatever is not listed is the last layer.
LAYERS = (
    ("arithmetic", "functions", "noise", "schedules"),
    ("bias", "codec", "fields"),
    ("codes", "leaves", "rule"),
    ("groups", "states"),
    ("execute",),
    ("execute.body", "execute.sources"),
    ("execute.cpu",),
    ("execute.run", "observe"),
    ("spec",),
    ("transform",),
    ("options",),
    ("rules",),
    ("rules.adam",),
    ("rules.adamax", "rules.amsgrad", "rules.momentum", "rules.variance"),
    ("averaging", "wrapper"),
    ("parts", "sharding", "write"),
    ("interop.moments",),
    ("interop.keras", "interop.optax", "interop.storage", "interop.torch"),
)


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _layer(module: str) -> int:
    if not module:
        return len(LAYERS) + 1
    return next((i for i, names in enumerate(LAYERS) if module in names), len(LAYERS))


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if base == "adam_fn" else base for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("adam_fn").removeprefix(".") for name in names if name.split(".")[0] == "adam_fn"}
    return found


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_imports_run_one_way(file: Path) -> None:
    module = _module(file)
    for imported in _imports(file):
        assert _layer(imported) < _layer(module), f"{module} imports {imported}"


def test_every_layer_is_a_module() -> None:
    modules = {_module(file) for file in FILES}
    assert {name for names in LAYERS for name in names} <= modules


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_no_file_is_longer_than_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def test_init_only_names() -> None:
    *body, exported = ast.parse((ROOT / "__init__.py").read_text()).body[1:]
    for node in body:
        assert isinstance(node, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in node.names)
    names = [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(names) == len(set(names))
    assert isinstance(exported, ast.Assign)
    assert ast.unparse(exported.targets[0]) == "__all__"  # What `help` lists.
    assert sorted([*ast.literal_eval(exported.value), "__version__"]) == sorted(names)
    assert all(getattr(importlib.import_module("adam_fn"), name) is not None for name in names)


def test_the_arithmetic_runs_in_one_place() -> None:
    callers = [
        _module(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "leaf" and _module(file) not in {"rule"}
    ]
    assert callers == ["execute.body"]  # `rule.leaf` is called by `body`, and otherwise only by `Chain`.


def test_it_is_typed() -> None:
    assert (ROOT / "py.typed").exists()
