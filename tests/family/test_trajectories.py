"""The family against torch and Keras: 1,000 steps that `record_trajectories.py` recorded in float64.

Every recorded row has its adam_fn call in CALLS, which doubles as the guide for whoever comes from there. The oracles
are held by the same records and by optax, so that what the other tests compare with is known to be right.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from helpers.records import distance, follow, load, relative_error
from helpers.runs import together
from jax.typing import DTypeLike
from oracles import family
from recorded.record_trajectories import (
    FOLDER,
    KERAS,
    RECORDED,
    STEPS,
    TORCH,
    Array,
    Problem,
    Rows,
    fingerprint,
    gradient,
    listing,
    problem,
)

import adam_fn


class Call(NamedTuple):
    """An alias and its arguments, the same for the oracle of that name."""

    alias: str
    arguments: Mapping[str, object]


def call(alias: str, **arguments: object) -> Call:
    return Call(alias, arguments)


#: Keras adds its eps to the raw second moment's root: the paper's epsilon-hat. Its Nadam, whatever its documentation
#: says, adds it to the corrected one, as Algorithm 1 does. torch does that too, but in RAdam, which has epsilon-hat.
CALLS: Mapping[str, Call] = {
    "torch/adam": call("adam", learning_rate=1e-3),
    "torch/adam_betas_eps": call("adam", learning_rate=3e-3, b1=0.8, b2=0.95, eps=1e-5),
    "torch/adam_long_memory": call("adam", learning_rate=3e-3, b1=0.95, b2=0.9999, eps=1e-10),
    "torch/adam_rmsprop": call("adam", learning_rate=1e-3, b1=0.0, b2=0.99),
    "torch/adam_l2": call("adam", learning_rate=1e-3, weight_decay=1e-2, decay="l2"),
    "torch/adam_amsgrad": call("amsgrad", learning_rate=1e-3),
    "torch/adam_amsgrad_l2": call("amsgrad", learning_rate=2e-3, b2=0.99, weight_decay=1e-2, decay="l2"),
    "torch/adamw": call("adamw", learning_rate=1e-3, weight_decay=1e-2),
    "torch/adamw_betas_eps": call("adamw", learning_rate=3e-3, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
    "torch/adamw_amsgrad": call("amsgrad", learning_rate=1e-3, weight_decay=1e-2),
    "torch/adamax": call("adamax", learning_rate=2e-3),
    "torch/adamax_betas_eps": call("adamax", learning_rate=2e-3, b1=0.8, b2=0.95, eps=1e-5),
    "torch/adamax_l2": call("adamax", learning_rate=2e-3, weight_decay=1e-2, decay="l2"),
    "torch/nadam": call("nadam", learning_rate=2e-3, momentum_decay=4e-3),
    "torch/nadam_betas_eps": call("nadam", learning_rate=1e-3, b1=0.95, b2=0.99, eps=1e-5, momentum_decay=2e-2),
    "torch/nadam_l2": call("nadam", learning_rate=2e-3, momentum_decay=4e-3, weight_decay=1e-2, decay="l2"),
    "torch/nadamw": call("nadamw", learning_rate=2e-3, momentum_decay=4e-3, weight_decay=1e-2),
    "torch/radam": call("radam", learning_rate=1e-3, eps_hat=True),
    "torch/radam_betas_eps": call("radam", learning_rate=2e-3, b1=0.8, b2=0.95, eps=1e-5, eps_hat=True),
    "torch/radam_l2": call("radam", learning_rate=1e-3, eps_hat=True, weight_decay=1e-2, decay="l2"),
    "torch/radamw": call("radam", learning_rate=1e-3, eps_hat=True, weight_decay=1e-2),
    "torch/complex_adam": call("adam", learning_rate=1e-3),
    "torch/complex_adamw_amsgrad": call("amsgrad", learning_rate=1e-3, weight_decay=1e-2),
    "torch/complex_adamax": call("adamax", learning_rate=2e-3),
    "keras/adam": call("adam", learning_rate=1e-3, eps=1e-7, eps_hat=True),
    "keras/adam_betas_eps": call("adam", learning_rate=3e-3, b1=0.8, b2=0.95, eps=1e-5, eps_hat=True),
    "keras/adam_amsgrad": call("amsgrad", learning_rate=1e-3, eps=1e-7, eps_hat=True),
    "keras/adamw": call("adamw", learning_rate=1e-3, eps=1e-7, eps_hat=True, weight_decay=4e-3),
    "keras/adamw_betas_eps": call(
        "adamw", learning_rate=3e-3, b1=0.8, b2=0.95, eps=1e-6, eps_hat=True, weight_decay=0.1
    ),
    "keras/adamax": call("adamax", learning_rate=1e-3, eps=1e-7, eps_hat=True),
    "keras/adamax_betas_eps": call("adamax", learning_rate=2e-3, b1=0.8, b2=0.95, eps=1e-5, eps_hat=True),
    "keras/adamaxw": call("adamaxw", learning_rate=1e-3, eps=1e-7, eps_hat=True, weight_decay=4e-3),
    "keras/nadam": call("nadam", learning_rate=1e-3, eps=1e-7, momentum_decay=1.0),
    "keras/nadam_betas_eps": call("nadam", learning_rate=2e-3, b1=0.8, b2=0.95, eps=1e-5, momentum_decay=1.0),
    "keras/nadamw": call("nadamw", learning_rate=1e-3, eps=1e-7, momentum_decay=1.0, weight_decay=4e-3),
}

#: Where optax has the same maths.
OPTAX: Mapping[str, Call] = {
    "adam": call("adam", learning_rate=1e-3, b1=0.8, b2=0.99, eps=1e-6, eps_root=1e-9),
    "adamw": call("adamw", learning_rate=1e-3, weight_decay=0.1),
    "nadam": call("nadam", learning_rate=1e-3, eps_root=1e-10),
    "nadamw": call("nadamw", learning_rate=1e-3, weight_decay=0.1),
    "adamax": call("adamax", learning_rate=1e-3, b1=0.8, b2=0.99, eps=1e-6),
    "adamaxw": call("adamaxw", learning_rate=1e-3, weight_decay=0.1),
    "amsgrad_uncorrected": call("amsgrad", learning_rate=1e-3, bias_correction_mu=False, bias_correction_nu=False),
    "amsgrad_half_corrected": call("amsgrad", learning_rate=1e-3, eps_root=1e-10, bias_correction_nu=False),
    "radam": call("radam", learning_rate=1e-3, b2=0.99),
    "radam_nesterov": call("radam", learning_rate=1e-3, eps_root=1e-10, threshold=4.5, nesterov=True),
    "adabelief": call("adabelief", learning_rate=1e-3),
    "adabelief_nesterov": call("adabelief", learning_rate=1e-3, eps=1e-7, eps_root=1e-13, nesterov=True),
    "yogi": call("yogi", learning_rate=1e-3),
    "yogi_betas_eps": call("yogi", learning_rate=1e-3, b1=0.8, b2=0.99, eps=1e-5),
}


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, Array]:
    return {f"{framework}/{row}": p for framework in ("torch", "keras") for row, p in load(framework).params.items()}


def transcribed(made: Call, this: Problem) -> Array:
    """[5, 64]: the same from the oracle."""
    oracle = getattr(family, made.alias)
    path = oracle(lambda t, p: gradient(this, t, p), this.params, steps=STEPS, **made.arguments)
    return path.params[np.array(RECORDED) - 1]


@pytest.mark.parametrize(("framework", "rows"), [("torch", TORCH), ("keras", KERAS)])
def test_record_is_of_this_problem_and_of_these_rows(framework: str, rows: Rows) -> None:
    record = load(framework)
    assert record.text["problem"] == fingerprint(problem())
    assert record.text["rows"] == listing(rows)
    assert record.params.keys() == rows.keys()
    assert {f"{framework}/{row}" for row in rows} == {row for row in CALLS if row.startswith(framework)}
    assert (FOLDER / f"{framework}.npz").stat().st_size < 200_000


def test_problem_is_exact_in_float32() -> None:
    for numbers in problem():
        np.testing.assert_array_equal(numbers.astype(np.float32).astype(np.float64), numbers)


@pytest.mark.parametrize("row", CALLS)
def test_oracles_reproduce_the_recorded_runs(row: str, recorded: Mapping[str, Array]) -> None:
    assert distance(transcribed(CALLS[row], problem()), recorded[row]) < 1e-12


@functools.cache
def paths(kind: str, dtype: DTypeLike) -> Mapping[str, Array]:
    """[5, 64] of every row: the parameters after the steps RECORDED. Two programs: one of real, one of complex ones."""
    calls, module = (OPTAX, optax) if kind == "optax" else (CALLS, adam_fn)
    found: dict[str, Array] = {}
    for is_complex in (False, True):
        rows = [row for row in calls if ("/complex" in row) == is_complex]
        if rows:
            tiled = Problem(*(np.stack([x] * len(rows), axis=-2) for x in problem()))
            with jax.enable_x64(dtype == np.float64):
                tx = together([getattr(module, calls[row].alias)(**calls[row].arguments) for row in rows])
                path = follow(tx, tiled, dtype, is_complex=is_complex)
            found |= dict(zip(rows, np.swapaxes(path, 0, 1), strict=True))
    return found


@pytest.mark.parametrize("row", OPTAX)
def test_oracle_is_optax(row: str) -> None:
    assert distance(transcribed(OPTAX[row], problem()), paths("optax", np.float64)[row]) < 1e-12


@pytest.mark.parametrize("row", CALLS)
def test_float32_follows_the_record(row: str, recorded: Mapping[str, Array]) -> None:
    assert relative_error(paths("adam_fn", np.float32)[row], recorded[row]) < 2e-6


@pytest.mark.parametrize("row", CALLS)
def test_float64_is_the_record(row: str, recorded: Mapping[str, Array]) -> None:
    assert distance(paths("adam_fn", np.float64)[row], recorded[row]) < 1e-10
