"""Records torch and Keras on a small problem: `python tests/recorded/record_trajectories.py [torch] [keras]`.

Writes `trajectories/torch.npz` and `trajectories/keras.npz`, which the tests read, so that they need neither framework.
Everything runs in float64: the record is the framework's maths and not its rounding. Keras runs on its torch backend
unless KERAS_BACKEND says otherwise. A file holds, for every row of the tables below, the parameters after the steps
RECORDED ("params/<row>", [5, 64]), and as text the class and arguments of every row ("rows", JSON), the versions
("versions", JSON) and the fingerprint of the problem ("problem").
"""

# torch and keras are installed by the maintainer, and may be missing where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = Mapping[str, tuple[str, Mapping[str, object]]]

FOLDER = Path(__file__).parent / "trajectories"
STEPS = 1000
SIZE = 64
RECORDED = (1, 2, 10, 100, 1000)
PULL = 0.125


class Problem(NamedTuple):
    """gradient(t, p) = scale * active[t-1] * (noise[t-1] + PULL * (p - target)), t from 1.

    A noisy quadratic bowl: the pull feeds the parameters back, so that decay and every past error count. Every number
    is an integer times a power of two that float32 holds, so that the problem is the same to the last bit on every
    platform, in every NumPy and in both precisions.
    """

    params: Array
    target: Array
    scale: Array
    noise: Array
    active: Array


def _hash(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """An integer mixer ("lowbias32": two rounds of xor-shift and multiply, and an xor-shift), modulo 2^32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def problem(steps: int = STEPS, size: int = SIZE) -> Problem:
    """The recorded problem: scales 2^-20 ... 2^2, larger noise in the first 32 steps, every eighth coordinate sparse.

    The first coordinate's gradient is always zero and the other sparse ones start with zeros: 0/0 must be no step. The
    early burst is what AMSGrad's maximum remembers.
    """
    index = np.arange(steps * size, dtype=np.uint32).reshape(steps, size)
    half = np.uint32(0xFFFF)
    first, second = _hash(index * np.uint32(2) + np.uint32(1)), _hash(index * np.uint32(2) + np.uint32(2))
    words = [(word & half).astype(np.int64) for word in (first, first >> np.uint32(16), second)]
    noise = (sum(words[1:], words[0]) - 3 * 0x7FFF).astype(np.float64) / 2**15  # in [-3, 3], standard deviation 1
    noise[:32] *= 4
    j = np.arange(size)
    rests = _hash(index + np.uint32(0x10000000)) & np.uint32(15) != 0
    rests[:3] = True
    seed = _hash(np.arange(2 * size, dtype=np.uint32) + np.uint32(0x20000000)) & half
    start = (seed.astype(np.int64) - 0x8000).astype(np.float64) / 2**15  # in [-1, 1)
    scale = np.ldexp(1.0, -20 + (j * 23) // size)
    return Problem(start[:size], start[size:], scale, noise, np.where((j % 8 == 0) & rests | (j == 0), 0.0, 1.0))


def gradient(this: Problem, t: int, p: Array) -> Array:
    """The gradient at step t (from 1) and parameters p, in float64."""
    return this.scale * this.active[t - 1] * (this.noise[t - 1] + PULL * (p - this.target))


def fingerprint(this: Problem) -> str:
    """SHA-256 of the problem's numbers as little-endian float64."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x, "<f8").tobytes() for x in this)).hexdigest()


def listing(rows: Rows) -> str:
    """The text about the rows of a file."""
    return json.dumps({row: {"class": name, "arguments": dict(arguments)} for row, (name, arguments) in rows.items()})


TORCH: Rows = {
    "adam": ("Adam", {"lr": 1e-3}),
    "adam_betas_eps": ("Adam", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adam_long_memory": ("Adam", {"lr": 3e-3, "betas": (0.95, 0.9999), "eps": 1e-10}),
    "adam_rmsprop": ("Adam", {"lr": 1e-3, "betas": (0.0, 0.99)}),
    "adam_l2": ("Adam", {"lr": 1e-3, "weight_decay": 1e-2}),
    "adam_amsgrad": ("Adam", {"lr": 1e-3, "amsgrad": True}),
    "adam_amsgrad_l2": ("Adam", {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
    "adamw_betas_eps": ("AdamW", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw_amsgrad": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2, "amsgrad": True}),
    "adamax": ("Adamax", {"lr": 2e-3}),
    "adamax_betas_eps": ("Adamax", {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adamax_l2": ("Adamax", {"lr": 2e-3, "weight_decay": 1e-2}),
    "nadam": ("NAdam", {"lr": 2e-3}),
    "nadam_betas_eps": ("NAdam", {"lr": 1e-3, "betas": (0.95, 0.99), "eps": 1e-5, "momentum_decay": 2e-2}),
    "nadam_l2": ("NAdam", {"lr": 2e-3, "weight_decay": 1e-2}),
    "nadamw": ("NAdam", {"lr": 2e-3, "weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {"lr": 1e-3}),
    "radam_betas_eps": ("RAdam", {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-5}),
    "radam_l2": ("RAdam", {"lr": 1e-3, "weight_decay": 1e-2}),
    "radamw": ("RAdam", {"lr": 1e-3, "weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "complex_adam": ("Adam", {"lr": 1e-3}),
    "complex_adamw_amsgrad": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2, "amsgrad": True}),
    "complex_adamax": ("Adamax", {"lr": 2e-3}),
}
"""Rows that begin with `complex` run on 32 complex128 parameters: consecutive pairs of the problem's numbers."""

KERAS: Rows = {
    "adam": ("Adam", {"learning_rate": 1e-3}),
    "adam_betas_eps": ("Adam", {"learning_rate": 3e-3, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}),
    "adam_amsgrad": ("Adam", {"learning_rate": 1e-3, "amsgrad": True}),
    "adamw": ("AdamW", {"learning_rate": 1e-3, "weight_decay": 4e-3}),
    "adamw_betas_eps": (
        "AdamW",
        {"learning_rate": 3e-3, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1},
    ),
    "adamax": ("Adamax", {"learning_rate": 1e-3}),
    "adamax_betas_eps": ("Adamax", {"learning_rate": 2e-3, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}),
    "adamaxw": ("Adamax", {"learning_rate": 1e-3, "weight_decay": 4e-3}),
    "nadam": ("Nadam", {"learning_rate": 1e-3}),
    "nadam_betas_eps": ("Nadam", {"learning_rate": 2e-3, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}),
    "nadamw": ("Nadam", {"learning_rate": 1e-3, "weight_decay": 4e-3}),
}
"""Arguments that a row does not name have the framework's default: what most people migrate from."""


def record_torch(this: Problem, row: str, name: str, arguments: Mapping[str, object]) -> Array:
    """Parameters after the steps RECORDED, [5, 64]."""
    import torch

    def tensor(x: Array) -> torch.Tensor:
        return torch.from_numpy(x.view(np.complex128) if row.startswith("complex") else x).clone()

    p = tensor(this.params)
    optimizer = getattr(torch.optim, name)([p], **arguments)

    def step(g: Array) -> Array:
        p.grad = tensor(g)
        optimizer.step()
        return p.numpy().view(np.float64)

    record = _run(this, step)
    kinds = {"p": p.dtype} | {key: value.dtype for key, value in optimizer.state[p].items()}
    assert set(kinds.values()) <= {torch.float64, torch.complex128}, f"torch's {name} did not run in float64: {kinds}"
    return record


def record_keras(this: Problem, row: str, name: str, arguments: Mapping[str, object]) -> Array:
    """Parameters after the steps RECORDED, [5, 64]."""
    del row
    import keras

    assert keras.config.floatx() == "float64"
    p = keras.Variable(this.params, dtype="float64", name="p")
    optimizer = getattr(keras.optimizers, name)(**arguments)

    def step(g: Array) -> Array:
        optimizer.apply([keras.ops.convert_to_tensor(g, dtype="float64")], [p])
        return np.asarray(keras.ops.convert_to_numpy(p), np.float64)

    record = _run(this, step)
    kinds = {v.name: v.dtype for v in (p, *optimizer.variables) if "iteration" not in v.name}
    assert set(kinds.values()) == {"float64"}, f"keras's {name} did not run in float64: {kinds}"
    return record


def _run(this: Problem, step: Callable[[Array], Array]) -> Array:
    p, record = this.params, []
    for t in range(1, STEPS + 1):
        p = np.array(step(gradient(this, t, p)), np.float64)
        if t in RECORDED:
            record.append(p)
    return np.stack(record)


def _save(framework: str, rows: Rows, record: Callable[..., Array], versions: dict[str, str]) -> None:
    this = problem()
    arrays = {f"params/{row}": record(this, row, name, arguments) for row, (name, arguments) in rows.items()}
    text = {
        "rows": listing(rows),
        "problem": fingerprint(this),
        "versions": json.dumps(versions | {"numpy": np.__version__, "python": platform.python_version()}),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{framework}.npz"
    np.savez_compressed(path, **arrays, **{key: np.array(value) for key, value in text.items()})  # pyright: ignore[reportArgumentType]
    print(f"{path.relative_to(FOLDER.parent)}: {len(rows)} rows, {path.stat().st_size} bytes, {text['versions']}")


def main(frameworks: list[str]) -> None:
    for framework in frameworks or ["torch", "keras"]:
        if framework == "torch":
            import torch

            torch.set_default_dtype(torch.float64)  # NAdam's running product of momenta has the default dtype
            _save("torch", TORCH, record_torch, {"torch": torch.__version__})
        elif framework == "keras":
            os.environ.setdefault("KERAS_BACKEND", "torch")
            import keras

            keras.config.set_floatx("float64")
            _save("keras", KERAS, record_keras, {"keras": keras.__version__, "backend": keras.config.backend()})
        else:
            raise SystemExit(f"not a framework: {framework}")


if __name__ == "__main__":
    main(sys.argv[1:])
