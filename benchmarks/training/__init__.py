"""What is trained: networks, and their data as the examples load them."""

import pathlib
import sys

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
