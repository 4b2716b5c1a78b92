"""What the tests of the loaders share."""

from collections.abc import Iterator, Mapping

import pytest
from helpers.mirror import Mirror, Serve


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data but what a test names, and no proxy before the loopback."""
    monkeypatch.delenv("ADAM_FN_DATA", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts mirrors, which the end of the test closes."""
    mirrors: list[Mirror] = []

    def start(files: Mapping[str, bytes], cut: frozenset[str] = frozenset()) -> Mirror:
        mirrors.append(Mirror(files, cut))
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.close()
