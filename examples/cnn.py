"""A small convolutional network on MNIST, trained by Adam, AdaGrad and SGD from one initialisation.

    python examples/cnn.py

3x3 convolution with 32 filters, ReLU, 2x2 max pooling, a dense layer of 128 ReLUs, ten outputs. The model is a Flax nnx
module, the optimizers are in `nnx.Optimizer`. After each epoch the training cost and the test accuracy are printed; a
table, a plot and the numbers follow in the folder of `--out`.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from math import isqrt
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from loaders import mnist
from loaders.mnist import Dataset
from mnist_mlp import CLASSES, Metrics, means, progress, shuffled
from support import report
from support.command_line import Parser, whole
from support.report import Epoch, Run

import adam_fn

# Adam's rate is its default; the others', which have none, are the best of 0.01, 0.03, 0.1, 0.3 and 1 after 150 steps.
OPTIMIZERS: Mapping[str, tuple[Callable[[float], optax.GradientTransformation], float]] = {
    "Adam": (adam_fn.adam, 1e-3),
    "AdaGrad": (optax.adagrad, 0.3),
    "SGD": (optax.sgd, 0.3),
}
TEST_BATCH = 1000  # images that are evaluated at once


class CNN(nnx.Module):
    """Images as rows of pixels -> convolution, pooling, dense -> logits."""

    def __init__(self, pixels: int, filters: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.side = isqrt(pixels)
        self.convolution = nnx.Conv(1, filters, (3, 3), rngs=rngs)
        self.dense = nnx.Linear((self.side // 2) ** 2 * filters, width, rngs=rngs)
        self.out = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, self.side, self.side, 1).astype(jnp.float32) / 255
        x = nnx.relu(self.convolution(x))
        half = self.side // 2
        x = x.reshape(len(x), half, 2, half, 2, -1).max((2, 4))  # on a CPU faster than `nnx.max_pool`
        return self.out(nnx.relu(self.dense(x.reshape(len(x), -1))))


def cost_and_metrics(model: CNN, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Metrics]:
    logits = model(images)
    cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return cost, Metrics(cost, (logits.argmax(-1) == labels).mean())


@nnx.jit
def train_step(
    model: CNN, optimizer: nnx.Optimizer[CNN], images: jax.Array, labels: jax.Array, rows: jax.Array
) -> Metrics:
    """One update, in place, on the images that `rows` numbers."""
    (_, metrics), grads = nnx.value_and_grad(cost_and_metrics, has_aux=True)(model, images[rows], labels[rows])
    optimizer.update(model, grads)
    return metrics


@nnx.jit
def evaluate(model: CNN, images: jax.Array, labels: jax.Array) -> Metrics:
    return cost_and_metrics(model, images, labels)[1]


def test(model: CNN, images: jax.Array, labels: jax.Array) -> tuple[float, float]:
    """Mean cost and accuracy, a part of the images at a time."""
    starts = range(0, len(labels), TEST_BATCH)
    parts = [slice(start, start + TEST_BATCH) for start in starts]
    found = np.array([jax.device_get(evaluate(model, images[part], labels[part])) for part in parts], np.float64)
    cost, accuracy = np.average(found, 0, [len(labels[part]) for part in parts])
    return float(cost), float(accuracy)


def train(dataset: Dataset, label: str, options: Namespace) -> Run:
    """A new model, from the initialisation and on the minibatches that `options.seed` stands for."""
    build, rate = OPTIMIZERS[label]
    model = CNN(dataset.pixels, options.filters, options.width, rngs=nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, build(rate), wrt=nnx.Param)
    size = len(dataset.train_labels)
    steps = min(size // options.batch, 10 if options.quick else size)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    tests = jax.device_put((dataset.test_images, dataset.test_labels))
    run = Run(label.lower(), label, rate, 0.0, "constant")
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        key = jax.random.fold_in(jax.random.key(options.seed), epoch)
        batches = shuffled(key, size=size, batch=options.batch, steps=steps)
        metrics: list[Metrics] = []
        with progress(f"{label} {epoch}/{options.epochs}", steps * options.batch) as bar:
            for rows in batches:
                metrics.append(jax.block_until_ready(train_step(model, optimizer, images, labels, rows)))
                bar.update(options.batch)
                if run.compile_seconds == 0:  # the first step of all
                    run.compile_seconds, start = time.perf_counter() - start, time.perf_counter()
        seconds = time.perf_counter() - start
        run.step_costs += [float(seen.cost) for seen in jax.device_get(metrics)]
        run.epochs.append(Epoch(epoch, *means(metrics), *test(model, *tests), seconds, steps * options.batch / seconds))
        print(report.epoch_line(run, options.epochs), flush=True)
        start = time.perf_counter()
    return run


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="cnn.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=whole(1), metavar="N", help="default: 3")
    add("--batch", type=whole(1), default=128, metavar="N", help="images a step (default: 128)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the initialisation and the shuffles (default: 0)")
    add("--data", metavar="FOLDER", help="as for mnist_mlp.py")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the plot and the numbers (default: out)")
    add("--quick", action="store_true", help="a trial of 2 epochs of at most 10 steps, 8 filters, 32 units")
    given = parser.parse_args(argv)
    given.epochs = given.epochs or (2 if given.quick else 3)
    given.filters, given.width = (8, 32) if given.quick else (32, 128)
    return given


def main(argv: Sequence[str] | None = None) -> list[Run]:
    options = parse(argv)
    try:
        dataset = mnist.load(options.data)
        if options.batch > len(dataset.train_labels):
            raise ValueError(f"--batch {options.batch} is more than the {len(dataset.train_labels)} training images")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"cnn.py: error: {error}")
    layers = [f"conv{options.filters}", "pool", options.width, CLASSES]
    title = f"CNN {'-'.join(map(str, layers))} on {dataset.name}, batch {options.batch}, seed {options.seed}"
    print(f"{title}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images")
    runs = [train(dataset, label, options) for label in OPTIMIZERS]
    print(f"\n{report.table(runs)}\n")
    png, numbers = options.out / "cnn.png", options.out / "cnn.json"
    report.plot_comparison(png, runs, title)
    about = {
        "dataset": dataset.name,
        "layers": layers,
        "batch": options.batch,
        "seed": options.seed,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "optax", "flax")},
    }
    report.write_json(numbers, about, runs)
    print(f"wrote {png} and {numbers}")
    return runs


if __name__ == "__main__":
    main()
