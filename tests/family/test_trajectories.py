"""The records of torch and Keras (1,000 steps in float64), and those rows of them that are no preset's."""

from collections.abc import Mapping

import jax
import numpy as np
import pytest
from helpers.records import distance, follow, load, relative_error
from recorded.record_trajectories import FOLDER, KERAS, TORCH, Array, Rows, fingerprint, listing, problem

import adam_fn

#: The records of complex parameters, and of betas with which the presets are not tested (`test_presets.py`).
OURS: Mapping[str, adam_fn.Transformation] = {
    "adam_long_memory": adam_fn.adam(3e-3, b1=0.95, b2=0.9999, eps=1e-10),
    "adam_rmsprop": adam_fn.adam(1e-3, b1=0.0, b2=0.99),
    "complex_adam": adam_fn.adam(1e-3),
    "complex_adamw_amsgrad": adam_fn.amsgrad(1e-3, weight_decay=1e-2),
    "complex_adamax": adam_fn.adamax(2e-3),
}


@pytest.mark.parametrize(("framework", "rows"), [("torch", TORCH), ("keras", KERAS)])
def test_record_is_of_this_problem_and_of_these_rows(framework: str, rows: Rows) -> None:
    record = load(framework)
    assert record.text["problem"] == fingerprint(problem())
    assert record.text["rows"] == listing(rows)
    assert record.params.keys() == rows.keys()
    assert (FOLDER / f"{framework}.npz").stat().st_size < 200_000


def test_problem_is_exact_in_float32() -> None:
    for numbers in problem():
        np.testing.assert_array_equal(numbers.astype(np.float32).astype(np.float64), numbers)


@pytest.mark.parametrize("row", OURS)
def test_follows_the_record(row: str) -> None:
    recorded = load("torch").params[row]

    def ours(dtype: type[np.floating]) -> Array:
        with jax.enable_x64(dtype == np.float64):
            return follow(OURS[row], problem(), dtype, is_complex=row.startswith("complex"))

    assert relative_error(ours(np.float32), recorded) < 2e-6
    assert distance(ours(np.float64), recorded) < 1e-10
