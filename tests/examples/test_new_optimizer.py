"""The optimizer of the guide: it follows its paper, and the guide shows the whole file."""

from collections.abc import Sequence
from pathlib import Path

import new_optimizer
import pytest
from new_optimizer import QHAdam
from sybil import Document
from sybil.parsers.myst import CodeBlockParser

ROOT = Path(__file__).parents[2]


class OneWeight(QHAdam):
    """The second moment with the first one's bias weight."""

    @property
    def betas(self) -> Sequence[float]:
        return self.b1, self.b1


def test_qhadam_follows_its_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_optimizer.largest_error(100) < 1e-6
    monkeypatch.setattr(new_optimizer, "QHAdam", OneWeight)
    assert new_optimizer.largest_error(10) > 1e-2


def test_the_guide_shows_the_whole_file() -> None:
    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if line]

    page = Document.parse(str(ROOT / "docs/new_optimizer.md"), CodeBlockParser("python", lambda example: None))
    shown = "\n".join(example.parsed for example in page.examples())
    file = lines((ROOT / "examples/new_optimizer.py").read_text())
    assert lines(shown)[: len(file)] == file
