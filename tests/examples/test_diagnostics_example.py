"""The example of `adam_fn.diagnostics`: what it draws and writes."""

from pathlib import Path

import diagnostics as example
import numpy as np
from helpers.scripts import assert_png, read_json


def test_a_run_is_drawn_and_written(tmp_path: Path) -> None:
    course = example.main(("--data", "digits", "--quick", "--out", str(tmp_path)))
    assert_png(tmp_path / "diagnostics.png")
    numbers = read_json(tmp_path / "diagnostics.json")
    assert numbers["steps"] == sorted(set(numbers["steps"]))
    assert set(numbers["scalars"]) >= {"cost", "signal_to_noise", "effective_step", "quantisation_error/nu"}
    assert "signal_to_noise/hidden1/kernel" in course.scalars
    assert np.diff(course.scalars["cost"][[0, -1]]) < 0
    np.testing.assert_allclose(course.scalars["learning_rate"], 1e-3, rtol=1e-6)
    steps = 1e-3 * course.scalars["signal_to_noise"]
    np.testing.assert_allclose(course.scalars["effective_step"], steps, rtol=1e-5)


def test_means_of_stretches() -> None:
    found = example.means(np.arange(5000.0) + 1)
    assert found[0] == 1
    assert np.all(np.diff(found) > 0)
    assert found[-1] < 5000
    assert example.means(np.ones(7)).tolist() == [1] * 7
