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
    """Bytes a parameter, scalars left out."""
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


def test_pictures_of_the_examples_are_there_and_small() -> None:
    folder = ROOT / "examples"
    named = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "README.md").read_text())
    assert {folder / name for name in named} == set((folder / "results").glob("*.png"))
    assert all((folder / name).stat().st_size < 150_000 for name in named)
