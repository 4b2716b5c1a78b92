"""The documentation, as far as a machine can check it: code prints what is shown, links resolve, tables are true."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import CASES
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

import adam_fn
from adam_fn import presets

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "examples/README.md", ROOT / "CONTRIBUTING.md"]
EVERY_PAGE = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))


class Printed:
    """The output of the last block, which a page shows in comments beside `print` or in the next ``text`` block."""

    def __init__(self) -> None:
        self.text = ""
        self.run = PythonEvaluator()

    def python(self, example: Example) -> None:
        assert not self.text, f"printed above line {example.line} and not shown:\n{self.text}"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.run(example)
        self.text = printed.getvalue()
        if beside := re.findall(r"^ *print\(.*\)  # (.*)$", example.parsed, re.MULTILINE):
            assert self.text.splitlines() == beside, f"line {example.line}"
            self.text = ""

    def shown(self, example: Example) -> None:
        assert self.text == example.parsed, f"line {example.line}"
        self.text = ""


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@EVERY_PAGE
def test_code_runs_and_prints_what_is_shown(page: Path) -> None:
    """The blocks of a page run in order, in one namespace."""
    printed = Printed()
    parsers = CodeBlockParser("python", printed.python), CodeBlockParser("text", printed.shown)
    for example in Document.parse(str(page), *parsers).examples():
        example.evaluate()
    assert not printed.text


@pytest.mark.quick
@EVERY_PAGE
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if fragment:
            assert fragment in map(_anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


@pytest.mark.quick
def test_index_names_every_page() -> None:
    """Its lists, which GitHub shows, have the pages in the same order as the site's table of contents."""
    index = (ROOT / "docs/index.md").read_text()
    listed = re.findall(r"^- \[.*?\]\((.*?)\.\w+\)", index, re.MULTILINE)
    trees = re.findall(r"^```{toctree}\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
    assert listed == [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert {page.stem for page in PAGES} == {"index", *listed} - {"api/index"}


def test_the_guide_to_a_new_optimizer_shows_the_whole_file() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line]

    page = Document.parse(str(ROOT / "docs/new_optimizer.md"), CodeBlockParser("python", lambda example: None))
    shown = "\n".join(example.parsed for example in page.examples())
    file = lines((ROOT / "examples/new_optimizer.py").read_text())
    assert lines(shown)[: len(file)] == file


# The tables.

README = (ROOT / "README.md").read_text()
OPTIMIZERS = (ROOT / "docs" / "optimizers.md").read_text()
FAMILY = OPTIMIZERS.split("## The family")[1].split("\n## ")[0]
ROWS = {
    name: row
    for row in re.findall(r"^\| `.*$", FAMILY, re.MULTILINE)
    for name in re.findall(r"[`.](\w+)[`(]", row.split("|")[1])
}
OTHER_MEMBERS: dict[str, Any] = {
    "swats": adam_fn.swats,
    "cautious": lambda rate: adam_fn.cautious(adam_fn.adam(rate)),
    "average_params": lambda rate: adam_fn.average_params(),
    "schedule_free": lambda rate: optax.contrib.schedule_free(adam_fn.adamw(rate, b1=0.0), rate),
}


MEMBERS = {case.alias.__name__ for case in CASES} | {"lamb"}
KINDS = ("float32", "bfloat16", "24bit", "16bit")
PARAMS = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)


def state_bytes(tx: optax.GradientTransformation) -> str:
    """Bytes per parameter, as the tables write them."""
    return f"{adam_fn.state_bytes(tx, PARAMS) / PARAMS.size:.2f}".removesuffix(".00")


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(MEMBERS | set(OTHER_MEMBERS)))
def test_family_table_is_complete_and_its_bytes_are_true(name: str) -> None:
    make: Any = OTHER_MEMBERS.get(name) or getattr(adam_fn, name)
    said = ROWS[name].split("|")[5].strip()
    sizes = re.findall(r"(\d+)(?::| with `b1=0`)", said) or [state_bytes(adam_fn.adam(1e-3))]  # "that of `tx`"
    options: tuple[dict[str, float], ...] = ({}, {"b1": 0.0})
    assert [state_bytes(make(1e-3, **given)) for given in options[: len(sizes)]] == sizes, said


@pytest.mark.quick
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


@pytest.mark.quick
def test_presets_table_names_every_preset() -> None:
    section = OPTIMIZERS.split("## Other frameworks' Adam")[1].split("\n## ")[0]
    named = {name for name in re.findall(r"`(\w+)`", section) if "_" in name}
    public = {name for name in vars(presets) if re.fullmatch(r"[a-z]+\d?_(adam|ams|nadam|radam)\w*", name)}
    assert public == named - {"adam_fn", "inverse_time"}


@pytest.mark.quick
def test_the_readme_fits_on_two_screens() -> None:
    """Its tables belong in docs."""
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 12_000
    assert MEMBERS - {"lamb"} <= set(re.findall(r"`(\w+)`", README)), "the short table of the family"


@pytest.mark.quick
def test_pictures_of_the_examples_are_shown_and_small() -> None:
    pages = ROOT / "examples/README.md", ROOT / "docs/paper.md"
    named = {
        (page.parent / name).resolve() for page in pages for name in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    }
    assert named == set((ROOT / "examples/results").glob("*.png"))
    assert all(name.stat().st_size < 150_000 for name in named)
