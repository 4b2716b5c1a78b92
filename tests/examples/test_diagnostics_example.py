"""The example of `adam_fn.diagnostics`: what it draws and writes."""

import json
from pathlib import Path

import diagnostics as example
import numpy as np


class TestExample:
    def test_draws_a_run(self, tmp_path: Path) -> None:
        course = example.main(("--data", "digits", "--quick", "--out", str(tmp_path)))
        assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
        numbers = json.loads((tmp_path / "diagnostics.json").read_text())
        assert numbers["steps"] == sorted(set(numbers["steps"]))
        assert set(numbers["scalars"]) >= {"cost", "signal_to_noise", "effective_step", "quantisation_error/nu"}
        assert "signal_to_noise/hidden1/kernel" in course.scalars
        assert np.diff(course.scalars["cost"][[0, -1]]) < 0
        np.testing.assert_allclose(course.scalars["learning_rate"], 1e-3, rtol=1e-6)
        steps = 1e-3 * course.scalars["signal_to_noise"]
        np.testing.assert_allclose(course.scalars["effective_step"], steps, rtol=1e-5)

    def test_means_of_stretches(self) -> None:
        found = example.means(np.arange(5000.0) + 1)
        assert found[0] == 1
        assert np.all(np.diff(found) > 0)
        assert found[-1] < 5000
        assert example.means(np.ones(7)).tolist() == [1] * 7
        assert example.means(np.full(5000, 2.0)).tolist() == [2] * len(found)
