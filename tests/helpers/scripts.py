"""Running a script as its users do, and reading what it wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example as a user does."""
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))


def read_json(path: Path) -> dict[str, Any]:
    """JSON as the standard has it: no NaN."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def assert_png(path: Path, least: int = 10_000, most: int | None = None) -> None:
    """A picture of so many bytes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert least < len(content) < (most or len(content) + 1)
