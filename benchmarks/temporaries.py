"""What a step of one large leaf needs beside its parameters, gradients and state: compiled, not run.

    python benchmarks/temporaries.py [--out DIR]

For `adam_fn.adamw` with every storage: the temporaries in units of the leaf's float32 size, of `make_step` and of
`tx.update` alone in a `jit` that donates nothing (JAX would pair a donated moment with the updates, of the same shape).
"""

import argparse
import json
import math
import pathlib
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from measure import machine

import adam_fn
from adam_fn import StorageName

SHAPES = ((1 << 24,), (4096, 4096), (50304, 768), (50257, 768))
COLUMNS = ("make_step", "update")


def size(function: Callable[..., object], *shapes: object) -> int:
    """The bytes of temporaries of a jitted function."""
    memory = typing.cast(typing.Any, function).lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes


def measure(shape: tuple[int, ...], storage: StorageName) -> dict[str, float]:
    """The temporaries by column, in leaves."""
    tx = adam_fn.adamw(1e-3, storage=storage)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, leaf)
    step, update = adam_fn.make_step(tx), jax.jit(tx.update)
    found = [size(step, leaf, state, leaf), size(update, leaf, state, leaf)]
    return dict(zip(COLUMNS, (bytes_ / (4 * math.prod(shape)) for bytes_ in found), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for temporaries-<device>.json")
    options = parser.parse_args()
    rows = [
        {"shape": shape, "storage": storage, **measure(shape, storage)}
        for shape in SHAPES
        for storage in typing.get_args(StorageName)
    ]
    table = rich.table.Table("leaf", "storage", *COLUMNS, title="temporaries / the leaf's float32 size")
    for row in rows:
        numbers = (f"{typing.cast(float, row[column]):.3f}" for column in COLUMNS)
        table.add_row(" x ".join(map(str, typing.cast(tuple[int, ...], row["shape"]))), str(row["storage"]), *numbers)
    rich.console.Console().print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = {"device": machine.device(), "versions": machine.versions(), "date": machine.now()}
        path = options.out / f"temporaries-{machine.slug()}.json"
        path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
