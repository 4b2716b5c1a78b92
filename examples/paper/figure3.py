"""Figure 3 of the Adam paper (arXiv 1412.6980, section 6.3): training costs of a convolutional network on CIFAR-10.

    python examples/paper/figure3.py
    python examples/paper/figure3.py --width 1        # the paper's network

Three stages of a 5x5 convolution, ReLU and 3x3 max pooling with stride 2, then a fully connected layer of ReLUs and the
ten classes: c64-c64-c128-1000. The images are whitened, the minibatches have 128. AdaGrad, SGD with Nesterov momentum
and Adam start from one initialisation, each with and without dropout on the input and on the fully connected layer.

Where it departs from the paper: the default width is an eighth (c8-c8-c16-125) and the images are those that are there
(the first 4,000 of CIFAR-10, or all), for a CPU. 45 epochs of 3,200 images are 1,125 steps, fewer than the paper's
first three epochs, which are the left half of its figure. The paper names neither the rates, which here are the best
of a small grid after a few epochs without dropout, nor the shares that are dropped, which here are 20% of the input and
half of the fully connected layer, nor how it whitens: here by ZCA.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import harness  # before the modules of examples/, which it makes importable

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import Claim, Problem, Sweep
from loaders import cifar
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mnist_mlp import shuffled
from numpy.typing import NDArray
from support.command_line import Parser, real
from support.report import log_axis

import adam_fn

DROPPED = (0.2, 0.5)  # the shares of the input and of the fully connected layer
EPS = 1e-8  # Adam's
SEARCH = 3  # epochs, of the search for the rate
FIRST = 3  # epochs, on the left of the figure
ZCA = 0.01  # regularisation of the whitening, as a share of the mean variance

# At rate 1; `train_step` multiplies by those of the grid. AdaGrad's sum starts at zero, as in its paper.
OPTIMIZERS: Mapping[str, tuple[optax.GradientTransformation, Sequence[float]]] = {
    "Adam": (adam_fn.adam(1.0, eps=EPS), (3e-4, 1e-3, 3e-3, 1e-2)),
    "SGD, Nesterov": (optax.sgd(1.0, momentum=0.9, nesterov=True), (3e-3, 1e-2, 3e-2, 0.1)),
    "AdaGrad": (optax.adagrad(1.0, initial_accumulator_value=0.0, eps=1e-10), (1e-3, 3e-3, 1e-2, 3e-2)),
}

Parameters = dict[str, dict[str, jax.Array]]
Data = tuple[jax.Array, jax.Array]  # whitened images [n, 32, 32, 3] and labels [n]
Cost = Callable[[Parameters, Data, jax.Array, jax.Array], jax.Array]


def whitened(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The images ``x [n, …]`` without their mean and decorrelated: ``x (xᵀx/n + ε)^-½`` over all pixels and channels.

    This is ZCA: the whitened image that is nearest to the image. ε is `ZCA` times the mean variance. Of the two equal
    forms, ``(x xᵀ/n + ε)^-½ x`` is the other, the one with the smaller matrix is computed.
    """
    x = images.reshape(len(images), -1).astype(np.float32) / 255
    x -= x.mean(0)
    n, pixels = x.shape
    values, vectors = np.linalg.eigh((x @ x.T if n < pixels else x.T @ x) / n)
    root = (vectors / np.sqrt(np.maximum(values, 0) + ZCA * (x**2).mean())) @ vectors.T
    return (root @ x if n < pixels else x @ root).reshape(images.shape)


def dropout(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Zeros in place of a share of `x`; the rest is scaled up, so that the expectation stays."""
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0)


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum over 3x3 windows with stride 2, as that of shifted views: its gradient is faster on a CPU."""
    for axis in (1, 2):
        size = x.shape[axis]
        ends = [(0, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, ends, constant_values=-np.inf)
        views = [jax.lax.slice_in_dim(padded, i, i + size - 1, 2, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(views[0], views[1]), views[2])
    return x


class ConvNet(nnx.Module):
    """c64-c64-c128-1000 at width 1; dropout where a key is given."""

    def __init__(self, width: float, *, rngs: nnx.Rngs) -> None:
        narrow, wide, full = (max(1, round(width * size)) for size in (64, 128, 1000))
        side = cifar.SIZE // 8
        self.stage1 = nnx.Conv(cifar.CHANNELS, narrow, (5, 5), rngs=rngs)
        self.stage2 = nnx.Conv(narrow, narrow, (5, 5), rngs=rngs)
        self.stage3 = nnx.Conv(narrow, wide, (5, 5), rngs=rngs)
        self.full = nnx.Linear(side * side * wide, full, rngs=rngs)
        self.out = nnx.Linear(full, cifar.CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = None if key is None else jax.random.split(key)
        if keys is not None:
            x = dropout(x, DROPPED[0], keys[0])
        for stage in (self.stage1, self.stage2, self.stage3):
            x = max_pool(nnx.relu(stage(x)))
        x = nnx.relu(self.full(x.reshape(len(x), -1)))
        if keys is not None:
            x = dropout(x, DROPPED[1], keys[1])
        return self.out(x)


def second_moments(params: Parameters, state: Any, data: Data) -> dict[str, jax.Array]:  # noqa: ANN401
    """Of Adam's √v̂: the median of each layer's kernel, and over all parameters the shares of √v̂ and of v̂ below ε."""
    adam = state[0]
    moments = {name: layer["kernel"] for name, layer in adam.nu.items()}
    weight = 1 - 0.999 ** adam.count.astype(float)
    found = {f"median {name}": jnp.sqrt(jnp.median(v) / weight) for name, v in moments.items()}
    every = jnp.concatenate([v.ravel() for v in jax.tree.leaves(adam.nu)]) / weight
    return {**found, "root below eps": (jnp.sqrt(every) < EPS).mean(), "below eps": (every < EPS).mean()}


class Runs(NamedTuple):
    """By optimizer the search for its rate, and the runs at the best one without and with dropout."""

    searches: dict[str, list[Sweep]]
    without: dict[str, Sweep]
    dropout: dict[str, Sweep]


@partial(jax.jit, static_argnames=("tx", "cost"), donate_argnames=("params", "state"))
def train_step(
    params: Parameters,
    state: optax.OptState,
    data: Data,
    rows: jax.Array,
    key: jax.Array,
    rate: jax.Array,
    *,
    tx: optax.GradientTransformation,
    cost: Cost,
) -> tuple[Parameters, optax.OptState, jax.Array]:
    """One update at `rate`, and the cost before it."""
    value, grads = jax.value_and_grad(cost)(params, data, rows, key)
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, value


def train(label: str, rate: float, problem: Problem[Parameters, Data], epochs: int, seed: int) -> Sweep:
    """`harness.sweep` at one rate, step by step: in a loop that is compiled, convolutions are 8 times slower on a CPU.

    Minibatches and noise are the same for every optimizer, and with the same `seed` the same as the harness's.
    """
    tx = OPTIMIZERS[label][0]
    params = jax.tree.map(jnp.copy, problem.params)
    state = tx.init(params)
    costs: list[float] = []
    metrics: list[dict[str, float]] = []
    evaluate = jax.jit(problem.evaluate)
    with harness.progress(label, epochs * problem.steps_per_epoch) as bar:
        for epoch in range(epochs):
            key, noise = (jax.random.fold_in(jax.random.key(seed + i), epoch) for i in (0, 1))
            batches = shuffled(key, size=problem.size, batch=problem.batch, steps=problem.steps_per_epoch)
            seen: list[jax.Array] = []
            for i, rows in enumerate(batches):
                key = jax.random.fold_in(noise, i)
                params, state, cost = train_step(
                    params, state, problem.data, rows, key, jnp.float32(rate), tx=tx, cost=problem.cost
                )
                seen.append(cost)
            costs.append(float(np.mean(jax.device_get(seen))))
            bar.update(len(seen))
            found = evaluate(params, state, problem.data)
            metrics.append({name: float(value) for name, value in found.items()})
    together = {name: np.array([[found[name] for found in metrics]]) for name in metrics[0]}
    return Sweep(label, {"rate": np.array([rate])}, np.array([costs]), together)


def train_all(images: NDArray[np.float32], labels: NDArray[np.int32], width: float, options: Namespace) -> Runs:
    """All runs; a --quick one has no search and two steps an epoch."""
    graph, variables = nnx.split(ConvNet(width, rngs=nnx.Rngs(options.seed)), nnx.Param)

    def cost(params: Parameters, data: Data, rows: jax.Array, key: jax.Array, drop: bool = False) -> jax.Array:
        logits = nnx.merge(graph, params)(data[0][rows], key if drop else None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1][rows]).mean()

    params: Parameters = nnx.to_pure_dict(variables)
    data = jnp.asarray(images), jnp.asarray(labels)
    problem = Problem(params, data, cost, size=len(labels), steps=2 if options.quick else None)
    noisy = partial(cost, drop=True)
    runs = Runs({}, {}, {})
    for label, (_, rates) in OPTIMIZERS.items():
        best, searched = rates[1], []
        if not options.quick:
            searched = [train(label, rate, problem, min(SEARCH, options.epochs), options.seed) for rate in rates]
            best = rates[int(np.nanargmin([run.costs[0, -1] for run in searched]))]
        runs.searches[label] = searched
        print(f"{label}: rate {best:g}, {'not searched' if options.quick else f'the best of {rates}'}", flush=True)
        evaluate = second_moments if label == "Adam" else harness.no_metrics
        for kept, its_cost, words in ((runs.without, cost, "without"), (runs.dropout, noisy, "with")):
            whole = dataclasses.replace(problem, cost=its_cost, evaluate=evaluate)
            kept[label] = train(label, best, whole, options.epochs, options.seed)
            print(f"  {words} dropout: cost {kept[label].costs[0, -1]:.2e}", flush=True)
    return runs


def claims(runs: Runs, quick: bool) -> list[Claim]:
    """What section 6.3 says, beside the costs without dropout and, where it says so, with it."""
    adam, sgd, adagrad = OPTIMIZERS
    first = {label: run.costs[0, :FIRST].mean() for label, run in runs.without.items()}
    last = {label: run.costs[0, -1] for label, run in runs.without.items()}
    noisy = {label: run.costs[0, -1] for label, run in runs.dropout.items()}

    def said(costs: Mapping[str, float]) -> str:
        return ", ".join(f"{label} {cost:.3g}" for label, cost in costs.items())

    moments = runs.without[adam].metrics
    medians = ", ".join(
        f"{name.removeprefix('median ')} {value[0, 0]:.1e} to {value[0, -1]:.1e}"
        for name, value in moments.items()
        if name.startswith("median")
    )
    share, unrooted = moments["root below eps"][0, -1], moments["below eps"][0, -1]
    found = [
        (
            "Adam and AdaGrad lower the cost rapidly in the initial stage",
            f"mean cost of the first {FIRST} epochs, without dropout: {said(first)}; rapidly: both below SGD's",
            max(first[adam], first[adagrad]) < first[sgd],
        ),
        (
            "Adam and SGD end considerably faster than AdaGrad",
            f"cost of the last epoch, without dropout: {said(last)}; with: {said(noisy)}; considerably: less than "
            "half of AdaGrad's, without dropout",
            2 * max(last[adam], last[sgd]) < last[adagrad],
        ),
        (
            "v̂ vanishes to zeros after a few epochs and is dominated by ε",
            f"without dropout, after the last epoch √v̂ is below ε = {EPS:g} for {share:.2%} of the parameters (v̂ "
            f"itself for {unrooted:.0%}); medians of √v̂, after the first and last epoch: {medians}; dominated: √v̂ of "
            "more than half of them",
            share > 0.5,
        ),
        (
            "Adam is only marginally better than SGD with momentum",
            f"cost of the last epoch, Adam's over SGD's: {last[adam] / last[sgd]:.2g} without dropout, "
            f"{noisy[adam] / noisy[sgd]:.2g} with; marginally: both between 1/2 and 1",
            all(0.5 <= costs[adam] / costs[sgd] <= 1 for costs in (last, noisy)),
        ),
    ]
    return [Claim(text, "6.3, figure 3", measured, None if quick else bool(holds)) for text, measured, holds in found]


def draw(runs: Runs, title: str) -> Figure:
    """The first epochs on a linear axis and all epochs on a logarithmic one, as in the paper."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for kept, words in ((runs.without, ""), (runs.dropout, " + dropout")):
        for label, run in kept.items():
            line = {**harness.style(label), "linestyle": "--" if words else "-"}
            costs = run.costs[0]
            name = f"{label}{words}, rate {run.grid['rate'][0]:g}"
            left.plot(np.arange(1, len(costs[:FIRST]) + 1), costs[:FIRST], marker="o", ms=4, **line)
            right.plot(np.arange(1, len(costs) + 1), costs, label=name, **line)
    axes: Axes
    for axes, words in ((left, "the first epochs"), (right, "all epochs")):
        axes.set(xlabel="epoch", ylabel="training cost (cross entropy, nats)")
        axes.set_title(words, fontsize=10)
    left.set_xticks(range(1, min(FIRST, len(next(iter(runs.without.values())).costs[0])) + 1))
    left.grid(alpha=0.3)
    log_axis(right)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def extras(parser: Parser) -> None:
    add = parser.add_argument
    add("--width", type=real, metavar="FACTOR", help="of all layers; 1 is the paper's (default: 0.125)")


def main(argv: Sequence[str] | None = None) -> list[Claim]:
    options = harness.options("figure3.py", __doc__, argv, epochs=45, quick_epochs=1, extras=extras)
    width = options.width or (1 / 32 if options.quick else 1 / 8)
    with harness.errors_in_one_line("figure3.py"):
        dataset = cifar.load(harness.folder(options.data, "cifar10"))
    count = 256 if options.quick else len(dataset.train_labels)
    images, labels = whitened(dataset.train_images[:count]), dataset.train_labels[:count]
    layers = [max(1, round(width * size)) for size in (64, 64, 128, 1000)]
    name = "-".join([*(f"c{size}" for size in layers[:3]), str(layers[3])])
    title = f"{name} on {count:,} images of {dataset.name}, whitened, minibatch 128"
    print(title, flush=True)
    runs = train_all(images, labels, width, options)
    found = claims(runs, options.quick)
    numbers = {
        "dataset": dataset.name,
        "images": count,
        "layers": layers,
        "dropout": DROPPED,
        "epochs": options.epochs,
        "seed": options.seed,
        "search": {label: [run.numbers() for run in searched] for label, searched in runs.searches.items()},
        "without dropout": {label: run.numbers() for label, run in runs.without.items()},
        "with dropout": {label: run.numbers() for label, run in runs.dropout.items()},
    }
    harness.write(options.out, "figure3", draw(runs, title), numbers, found)
    print(f"\n{harness.claims_table(found)}")
    return found


if __name__ == "__main__":
    main()
