"""A character GPT of stacked layers, trained twice: all gradients and then the step, and the step in the backward pass.

    python examples/backward_gpt.py           # 3 million parameters, some minutes on a CPU

Both runs have the same losses, number for number. The picture shows them, and what XLA says of the memory of the two
programs (`memory_analysis`): the one needs an array for all gradients, the other for those of one layer.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loaders import shakespeare
from matplotlib.figure import Figure
from numpy.typing import NDArray
from support.command_line import Parser, whole
from support.report import COLORS, dump

import adam_fn
from adam_fn import backward, masks

HEADS, CONTEXT, BATCH = 4, 64, 8
Tree = Any  # Any pytree.


# The model: what is before the layers, one layer, and what is after them.


def normed(h: jax.Array, scale: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * scale


def embed(params: Tree, batch: jax.Array) -> jax.Array:
    return params["embedding"][batch[:, :-1]] + params["positions"]


def layer(p: Tree, h: jax.Array, batch: jax.Array) -> jax.Array:
    rows, length = h.shape[:2]
    q, k, v = jnp.split((normed(h, p["norm"][0]) @ p["qkv"]).reshape(rows, length, 3 * HEADS, -1), 3, 2)
    h = h + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape) @ p["out"]
    return h + jax.nn.gelu(normed(h, p["norm"][1]) @ p["up"]) @ p["down"]


def head(params: Tree, h: jax.Array, batch: jax.Array) -> jax.Array:
    logits = normed(h, params["norm"]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def first(vocabulary: int, options: Namespace) -> Tree:
    """Normal numbers of variance 1/inputs, and ones for the norms; the layers are stacked along a first axis."""
    width, depth = options.width, options.depth
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    keys = jax.random.split(jax.random.key(options.seed), len(shapes) + 2)
    layers: Tree = {
        name: jax.random.normal(key, (depth, *shape))
        / (shape[0] * (2 * depth if name in ("out", "down") else 1)) ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return {
        "embedding": jax.random.normal(keys[-1], (vocabulary, width)) / width**0.5,
        "positions": jax.random.normal(keys[-2], (CONTEXT, width)) / width**0.5,
        "layers": layers | {"norm": jnp.ones((depth, 2, width))},
        "norm": jnp.ones(width),
    }


# The two ways to train it.


def gradients_first(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def loss(params: Tree, batch: jax.Array) -> jax.Array:
        again = jax.checkpoint(partial(layer, batch=batch))
        h, _ = jax.lax.scan(lambda h, p: (again(p, h), None), embed(params, batch), params["layers"])
        return head(params, h, batch)

    def step(params: Tree, state: optax.OptState, batch: jax.Array) -> tuple[jax.Array, Tree, optax.OptState]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return value, *adam_fn.make_step(tx)(params, state, grads)

    return step


def step_in_the_backward_pass(tx: optax.GradientTransformation) -> Callable[..., Any]:
    return backward.value_and_step(tx, embed, layer, head)


WAYS = {"gradients first": gradients_first, "step in the backward pass": step_in_the_backward_pass}


def run(name: str, text: shakespeare.Text, options: Namespace) -> tuple[NDArray[np.float32], dict[str, float]]:
    """The losses, and what the program needs in bytes a parameter."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, options.steps // 10, options.steps)
    decay = masks.path("layers/norm", "norm", invert=True)
    tx = adam_fn.adamw(rate, b2=0.99, weight_decay=0.1, mask=decay, storage="16bit")
    params = first(text.vocabulary, options)
    count = sum(x.size for x in jax.tree.leaves(params))
    state, random = tx.init(params), np.random.default_rng(options.seed)
    batch = jnp.zeros((BATCH, CONTEXT + 1), jnp.int32)
    step: Any = jax.jit(WAYS[name](tx), donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory = step.memory_analysis()
    losses = []
    for _ in range(options.steps):
        starts = random.integers(0, len(text.codes) - CONTEXT - 1, BATCH)
        batch = jnp.asarray(text.codes[starts[:, None] + np.arange(CONTEXT + 1)])
        value, params, state = step(params, state, batch)
        losses.append(value)
    kept = options.depth * BATCH * CONTEXT * options.width * 4
    held = {
        "parameters": 4.0,
        "state": memory.argument_size_in_bytes / count - 4.0,
        "inputs of the layers": kept / count,
        "everything else": (memory.temp_size_in_bytes - kept) / count,
    }
    return np.asarray(losses), held


def draw(losses: dict[str, NDArray[np.float32]], held: dict[str, dict[str, float]], place: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, values), width, style in zip(losses.items(), (3.5, 1.2), ("-", "--"), strict=True):
        window = max(1, len(values) // 50)
        left.plot(np.convolve(values, np.ones(window) / window, "valid"), style, label=name, linewidth=width)
    left.set(xlabel="step", ylabel="loss in nats a character", title="the two runs")
    left.legend(frameon=False)
    names, bottom = list(held), np.zeros(len(held))
    for part, color in zip(next(iter(held.values())), ("#999999", *COLORS[1:]), strict=False):
        sizes = np.array([held[name][part] for name in names])
        right.barh(names, sizes, left=bottom, label=part, color=color)
        bottom += sizes
    right.set(xlabel="bytes a parameter (memory_analysis)", title="memory of the two programs")
    right.invert_yaxis()
    right.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=4)
    figure.savefig(place, dpi=150)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(10), default=400)
    parser.add_argument("--width", type=whole(HEADS), default=128)
    parser.add_argument("--depth", type=whole(1), default=16)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="20 steps of a small model")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.width, options.depth = 20, 32, 4
    text = shakespeare.load()
    results = {name: run(name, text, options) for name in WAYS}
    losses, held = {name: x for name, (x, _) in results.items()}, {name: x for name, (_, x) in results.items()}
    difference = float(np.max(np.abs(np.subtract(*losses.values()))))
    for name, values in losses.items():
        print(f"{name}: loss {values[-10:].mean():.4f}, {sum(held[name].values()):.2f} bytes a parameter")
    print(f"the largest difference between the losses of a step is {difference:.1e}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(losses, held, options.out / "backward_gpt.png")
    last = {name: float(values[-10:].mean()) for name, values in losses.items()}
    dump(options.out / "backward_gpt.json", {"loss": last, "largest difference": difference, "bytes": held})


if __name__ == "__main__":
    main()
