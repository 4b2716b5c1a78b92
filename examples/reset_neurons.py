"""Neurons that are reset in the middle of a run: how large their next steps are, with and without `adam_fn.surgery`.

    python examples/reset_neurons.py          # 256 hidden units on a synthetic regression, seconds

A tenth of the hidden units get new weights at step 1,000, as ReDo does with dormant ones (arXiv 2302.12902). Their
moments are left as they were, set to 0, or made by `adam_fn.surgery.reset`. The picture shows the largest step of these
units in units of the learning rate, and the loss.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from numpy.typing import NDArray
from support.command_line import Parser, whole
from support.report import dump

import adam_fn
from adam_fn import surgery

WIDTH, INPUTS, RATE = 256, 32, 1e-2
WAYS = {"the mean of the others' v": "mean", "zeros": "zero", "moments left as they were": None}
Params = dict[str, jax.Array]


def model(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]


def first(key: jax.Array) -> Params:
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (INPUTS, WIDTH)) / INPUTS**0.5,
        "bias": jnp.zeros(WIDTH),
        "down": jax.random.normal(down, (WIDTH, 1)) / WIDTH**0.5,
    }


@partial(jax.jit, static_argnames="tx")
def step(
    params: Params, state: optax.OptState, key: jax.Array, chosen: jax.Array, *, tx: optax.GradientTransformation
) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    """One update; the loss, and the largest step of the chosen units' incoming weights."""
    x = jax.random.normal(key, (128, INPUTS))
    y = jnp.sin(x[:, :1] * 2) + x[:, 1:2] * x[:, 2:3]
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((model(p, x) - y) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    largest = jnp.max(jnp.abs(jnp.where(chosen[None], cast(Params, updates)["up"], 0)))
    return optax.apply_updates(params, updates), state, loss, largest  # pyright: ignore[reportReturnType]


def run(second: str | None, options: Namespace) -> NDArray[np.floating[Any]]:
    """The loss and the largest step, ``[steps, 2]``."""
    tx = adam_fn.adam(RATE, storage="16bit")
    params = first(jax.random.key(options.seed))
    state = tx.init(params)
    chosen = jnp.arange(WIDTH) < WIDTH // 10
    rows = []
    for t in range(options.steps):
        if t == options.steps // 2:
            new = first(jax.random.key(options.seed + 1))
            params = {
                "up": jnp.where(chosen[None], new["up"], params["up"]),
                "bias": jnp.where(chosen, 0, params["bias"]),
                "down": jnp.where(chosen[:, None], 0, params["down"]),
            }
            where = {"up": chosen[None], "bias": chosen, "down": chosen[:, None]}
            if second is not None:
                state = surgery.reset(tx, state, params, where, second=second)  # pyright: ignore[reportArgumentType]
        params, state, loss, largest = step(params, state, jax.random.key(10_000 + t), chosen, tx=tx)
        rows.append((loss, largest / RATE))
    return np.asarray(rows)


def draw(runs: Mapping[str, NDArray[np.floating[Any]]], place: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in runs.items():
        half = len(rows) // 2
        steps = np.arange(-50, min(150, half))
        window = rows[half - 50 : half + len(steps) - 50]
        left.plot(steps, window[:, 1], label=name, linewidth=1.2)
        smooth = np.convolve(rows[:, 0], np.ones(10) / 10, "same")
        right.plot(steps, smooth[half - 50 : half + len(steps) - 50], linewidth=1.2)
    left.set(xlabel="steps after the reset", ylabel="largest step / rate", title="steps of the units that are reset")
    left.legend(frameon=False)
    right.set(xlabel="steps after the reset", ylabel="loss", title="loss, mean of 10 steps", yscale="log")
    figure.savefig(place, dpi=150)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(200), default=2000)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="300 steps")
    options = parser.parse_args()
    options.steps = 300 if options.quick else options.steps
    runs = {name: run(second, options) for name, second in WAYS.items()}
    half = options.steps // 2
    largest = {name: float(rows[half : half + 100, 1].max()) for name, rows in runs.items()}
    for name, x in largest.items():
        print(f"{name}: the largest of the next 100 steps is {x:.2f} times the rate")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(runs, options.out / "reset_neurons.png")
    dump(options.out / "reset_neurons.json", {"largest of the next 100 steps": largest})


if __name__ == "__main__":
    main()
