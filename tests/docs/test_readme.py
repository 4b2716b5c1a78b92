"""What the README says, where a machine can tell: its size, and that its table of the family is complete and true."""

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


MEMBERS = {case.alias.__name__ for case in CASES} | {"lamb"}
KINDS = ("float32", "bfloat16", "24bit", "16bit")
PARAMS = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)


def state_bytes(tx: optax.GradientTransformation) -> str:
    """Bytes per parameter, as the tables say them."""
    return f"{adam_fn.state_bytes(tx, PARAMS) / PARAMS.size:.2f}".removesuffix(".00")


@pytest.mark.parametrize("name", sorted(MEMBERS | set(OTHERS)))
def test_family_table_is_complete_and_its_bytes_are_true(name: str) -> None:
    make: Any = OTHERS.get(name) or getattr(adam_fn, name)
    said = ROWS[name].split("|")[5].strip()
    sizes = re.findall(r"(\d+)(?::| with `b1=0`)", said) or [state_bytes(adam_fn.adam(1e-3))]  # "that of `tx`"
    options: tuple[dict[str, float], ...] = ({}, {"b1": 0.0})
    assert [state_bytes(make(1e-3, **given)) for given in options[: len(sizes)]] == sizes, said


def test_bytes_by_storage_are_true() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text()
    rows = page.split("Bytes of the state alone")[1].split("|--:|\n")[1].split("\n\n")[0].splitlines()
    named = set()
    for row in rows:
        names, *said = (cell.strip() for cell in row.strip("|").split("|"))
        for name, option in re.findall(r"`(\w+)(\(b1=0\))?`", names):
            options: dict[str, Any] = {"b1": 0.0} if option else {}
            txs = [getattr(adam_fn, name)(1e-3, storage=kind, **options) for kind in KINDS]
            assert list(map(state_bytes, txs)) == said, name
            named.add(name)
    assert named == MEMBERS


def test_presets_table_names_every_preset() -> None:
    section = OPTIMIZERS.split("## Other frameworks' Adam")[1].split("\n## ")[0]
    named = {name for name in re.findall(r"`(\w+)`", section) if "_" in name}
    public = {name for name in vars(presets) if re.fullmatch(r"[a-z]+\d?_(adam|ams|nadam|radam)\w*", name)}
    assert public == named - {"adam_fn", "inverse_time"}


def test_two_screens() -> None:
    """The tables belong into docs."""
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12_000
    assert MEMBERS - {"lamb"} <= set(re.findall(r"`(\w+)`", README)), "the short table of the family"


def test_pictures_of_the_examples_are_shown_and_small() -> None:
    pages = ROOT / "examples/README.md", ROOT / "docs/paper.md"
    named = {
        (page.parent / name).resolve() for page in pages for name in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    }
    assert named == set((ROOT / "examples/results").glob("*.png"))
    assert all(name.stat().st_size < 150_000 for name in named)
