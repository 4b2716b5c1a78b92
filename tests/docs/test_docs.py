"""The documentation, where a machine can tell: its code runs and prints what it shows, its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "examples/README.md", ROOT / "CONTRIBUTING.md"]
EVERY_PAGE = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))


class Printed:
    """What the last block printed. It is shown in comments beside its prints, or in the ``text`` block that follows."""

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
    """The blocks of a page in order, in one namespace."""
    printed = Printed()
    parsers = CodeBlockParser("python", printed.python), CodeBlockParser("text", printed.shown)
    for example in Document.parse(str(page), *parsers).examples():
        example.evaluate()
    assert not printed.text


@pytest.mark.quick
@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
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
    """In its lists, which GitHub shows, and in the same order in the site's table of contents."""
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
