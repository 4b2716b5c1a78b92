"""The memory of a step of one large leaf besides its parameters, gradients and state: compiled, not run.

    python benchmarks/temporaries.py [--out DIR]

For `adam_fn.adamw` with every storage: the temporaries in units of the leaf's float32 size, of `make_step`, of
`tx.update` and `optax.apply_updates` in a `jit` that donates parameters and state, and of `tx.update` alone in a `jit`
that donates nothing (JAX would pair a donated moment with the updates, of the same shape).
"""

import itertools
import math
import typing

import jax
import jax.numpy as jnp
from measure import peers, scripts

import adam_fn

SHAPES = ((1 << 24,), (4096, 4096), (50304, 768), (50257, 768))


def measured(shape: tuple[int, ...], storage: adam_fn.StorageName) -> scripts.Row:
    """The temporaries, in leaves."""
    tx = adam_fn.adamw(1e-3, storage=storage)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, leaf)

    ways: typing.Any = {
        "make_step": adam_fn.make_step(tx),
        "update and apply": peers.plain_step(tx),
        "update": jax.jit(tx.update),
    }
    memory = {way: step.lower(leaf, state, leaf).compile().memory_analysis() for way, step in ways.items()}
    sizes = {way: found.temp_size_in_bytes / (4 * math.prod(shape)) for way, found in memory.items()}
    return {"shape": shape, "storage": storage} | sizes


def main() -> None:
    options = scripts.parser(__doc__).parse_args()
    every = itertools.product(SHAPES, typing.get_args(adam_fn.StorageName))
    rows = scripts.collected(itertools.starmap(measured, every))
    scripts.save(options, f"temporaries-{scripts.slug()}", rows)


if __name__ == "__main__":
    main()
