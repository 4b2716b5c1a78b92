"""Records states of torch's and Keras's optimizers: `python tests/recorded/record_states.py [torch] [keras]`.

Writes `states/torch.npz` and `states/keras.npz`, which the tests of `adam_fn.interop` read, so that they need neither
framework. Each row trains a small model BEFORE steps in float32 on gradients that do not depend on it, and records the
state of the optimizer and the parameters then, and the parameters after AFTER further steps. Keras runs on its torch
backend unless KERAS_BACKEND says otherwise.

A file holds "grads/<parameter>" ([BEFORE + AFTER, *shape], in the framework's layout), "start/<parameter>", and for
every row "<row>/params/<parameter>", "<row>/after/<parameter>", and of its state "<row>/state/<number>/<name>" and
"<row>/groups" (JSON) for torch, "<row>/variables/<number>" and "<row>/names" (JSON) for Keras.
"""

# torch and keras are installed by the maintainer, and may be missing where the types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Rows: TypeAlias = Mapping[str, tuple[str, Mapping[str, Any]]]

FOLDER = Path(__file__).parent / "states"
BEFORE, AFTER = 10, 100
#: Shapes in torch's layout, in the order of the model's parameters; Keras's kernels are transposed.
SHAPES = {"dense.weight": (3, 5), "dense.bias": (3,), "head.weight": (2, 3), "head.bias": (2,)}

TORCH: Rows = {
    "adam": ("Adam", {}),
    "adam_amsgrad": ("Adam", {"amsgrad": True}),
    "adamw_groups": ("AdamW", {"lr": 2**-10, "weight_decay": 2**-3}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {}),
    "complex_adam": ("Adam", {}),
}
"""`groups`: weights first, and biases, which do not decay, in a second group. `complex`: parameters are complex.

Where there is decay, float32 holds ``1 - αλ``: its rounding would be the largest difference by far.
"""

KERAS: Rows = {
    "adam": ("Adam", {}),
    "adam_amsgrad": ("Adam", {"amsgrad": True}),
    "adamw_ema": ("AdamW", {"learning_rate": 2**-10, "weight_decay": 2**-3, "use_ema": True}),
    "adamax": ("Adamax", {}),
    "nadam": ("Nadam", {}),
    "lion": ("Lion", {"learning_rate": 1e-3}),
}


def _problem() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in SHAPES.items():
        found[f"start/{name}"] = rng.standard_normal(shape).astype(np.float32)
        found[f"grads/{name}"] = rng.standard_normal((BEFORE + AFTER, *shape)).astype(np.float32)
    return found


def record_torch() -> dict[str, Any]:
    import torch

    arrays = _problem()
    for row, (kind, options) in TORCH.items():
        factor = 1 + 0.5j if row.startswith("complex") else 1
        params = {name: torch.nn.Parameter(torch.tensor(arrays[f"start/{name}"]) * factor) for name in SHAPES}
        named: Any = list(params.items())
        if row.endswith("groups"):
            named = [
                {"params": [(n, p) for n, p in params.items() if n.endswith("weight")]},
                {"params": [(n, p) for n, p in params.items() if n.endswith("bias")], "weight_decay": 0.0},
            ]
        optimizer = getattr(torch.optim, kind)(named, **options)
        for t in range(BEFORE + AFTER):
            if t == BEFORE:
                saved = optimizer.state_dict()
                arrays |= {
                    f"{row}/state/{number}/{key}": value.numpy().copy()
                    for number, entry in saved["state"].items()
                    for key, value in entry.items()
                }
                arrays[f"{row}/groups"] = np.array(json.dumps(saved["param_groups"]))
                arrays |= {f"{row}/params/{name}": p.detach().numpy().copy() for name, p in params.items()}
            for name, p in params.items():
                p.grad = torch.tensor(arrays[f"grads/{name}"][t]) * factor
            optimizer.step()
        arrays |= {f"{row}/after/{name}": p.detach().numpy().copy() for name, p in params.items()}
    return arrays | {"version": np.array(torch.__version__)}


def record_keras() -> dict[str, Any]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    arrays = {name: np.moveaxis(x, -1, -2).copy() if "weight" in name else x for name, x in _problem().items()}
    for row, (kind, options) in KERAS.items():
        params = {name: keras.Variable(arrays[f"start/{name}"], name=name.replace(".", "_")) for name in SHAPES}
        optimizer = getattr(keras.optimizers, kind)(**options)
        for t in range(BEFORE + AFTER):
            if t == BEFORE:
                arrays |= {f"{row}/variables/{i}": v.numpy().copy() for i, v in enumerate(optimizer.variables)}
                arrays[f"{row}/names"] = np.array(json.dumps([v.name for v in optimizer.variables]))
                arrays |= {f"{row}/params/{name}": p.numpy().copy() for name, p in params.items()}
            grads = [keras.ops.convert_to_tensor(arrays[f"grads/{name}"][t]) for name in SHAPES]
            optimizer.apply(grads, list(params.values()))
        arrays |= {f"{row}/after/{name}": p.numpy().copy() for name, p in params.items()}
    return arrays | {"version": np.array(keras.__version__)}


def main(frameworks: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for framework in frameworks or ["torch", "keras"]:
        arrays = {"torch": record_torch, "keras": record_keras}[framework]()
        np.savez_compressed(FOLDER / f"{framework}.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
