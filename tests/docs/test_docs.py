"""The guides, where a machine can tell: their code runs and prints what they show, their links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: Code, and the output that may follow it; a single line stands behind the `print` that makes it.
BLOCKS = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs_and_prints_what_is_shown(page: Path) -> None:
    """The blocks of a page in order, in one namespace."""
    names: dict[str, Any] = {}
    for code, shown in BLOCKS.findall(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        beside = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
        assert printed.getvalue() == (shown or "".join(f"{line}\n" for line in beside)), code


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "examples/README.md"], ids=str)
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


def test_index_names_every_page() -> None:
    """In its lists, which GitHub shows, and in the same order in the site's table of contents."""
    index = (ROOT / "docs/index.md").read_text()
    listed = re.findall(r"^- \[.*?\]\((.*?)\.\w+\)", index, re.MULTILINE)
    trees = re.findall(r"^```{toctree}\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
    assert listed == [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert {page.stem for page in PAGES} == {"index", *listed} - {"api/index"}
