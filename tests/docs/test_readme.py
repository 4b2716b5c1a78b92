"""What the README says, where a machine can tell: its size, and that its table of the family is complete and true."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import CASES

import adam_fn
from adam_fn import presets

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OPTIMIZERS = (ROOT / "docs" / "optimizers.md").read_text()
FAMILY = OPTIMIZERS.split("## The family")[1].split("\n## ")[0]
ROWS = {
    name: row
    for row in re.findall(r"^\| `.*$", FAMILY, re.MULTILINE)
    for name in re.findall(r"[`.](\w+)[`(]", row.split("|")[1])
}
OTHERS: dict[str, Any] = {
    "swats": adam_fn.swats,
    "cautious": lambda rate: adam_fn.cautious(adam_fn.adam(rate)),
    "average_params": lambda rate: adam_fn.average_params(),
    "schedule_free": lambda rate: optax.contrib.schedule_free(adam_fn.adamw(rate, b1=0.0), rate),
}


def state_bytes(tx: optax.GradientTransformation) -> int:
    """Bytes per parameter, scalars left out."""
    params = jnp.zeros(64)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.shape == params.shape) // params.size


@pytest.mark.parametrize("name", sorted({case.alias.__name__ for case in CASES} | {"lamb"} | set(OTHERS)))
def test_family_table_is_complete_and_its_bytes_are_true(name: str) -> None:
    make: Any = OTHERS.get(name) or getattr(adam_fn, name)
    said = ROWS[name].split("|")[5].strip()
    if name == "cautious":
        assert said == "that of `tx`"
        assert state_bytes(make(1e-3)) == state_bytes(adam_fn.adam(1e-3))
        return
    numbers = re.findall(r"(\d+)(?::| with)", said)
    assert state_bytes(make(1e-3)) == int(numbers[0]), said
    if len(numbers) > 1:
        assert said.endswith("with `b1=0`")
        assert state_bytes(make(1e-3, b1=0.0)) == int(numbers[1])


def test_bytes_by_storage_are_true() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text()
    rows = page.split("Bytes of the state alone")[1].split("|--:|\n")[1].split("\n\n")[0].splitlines()
    kinds = ("float32", "bfloat16", "24bit", "16bit")
    params = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    named = set()
    for row in rows:
        names, *said = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`(\w+)", names):
            options = {"b1": 0.0} if f"`{name}(b1=0)`" in names else {}
            make: Any = functools.partial(getattr(adam_fn, name), 1e-3, **options)
            sizes = [adam_fn.state_bytes(make(storage=kind), params) / params.size for kind in kinds]
            assert [f"{size:.2f}".removesuffix(".00") for size in sizes] == said, name
            named.add(name)
    assert named == {case.alias.__name__ for case in CASES} | {"lamb"}


def test_presets_table_names_every_preset() -> None:
    section = OPTIMIZERS.split("## Other frameworks' Adam")[1].split("\n## ")[0]
    named = {name for name in re.findall(r"`(\w+)`", section) if "_" in name and name not in ("adam_fn",)}
    public = {
        name
        for name, value in vars(presets).items()
        if callable(value) and re.fullmatch(r"[a-z]+\d?_(adam|ams|nadam|radam)\w*", name)
    }
    assert public == named - {"inverse_time"}


def test_two_screens() -> None:
    """The tables belong into docs."""
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12_000
    missing = {case.alias.__name__ for case in CASES} - set(re.findall(r"`(\w+)`", README))
    assert not missing, "the short table of the family"


def test_pictures_of_the_examples_are_shown_and_small() -> None:
    pages = ROOT / "examples/README.md", ROOT / "docs/paper.md"
    named = {
        (page.parent / name).resolve() for page in pages for name in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    }
    assert named == set((ROOT / "examples/results").glob("*.png"))
    assert all(name.stat().st_size < 150_000 for name in named)
