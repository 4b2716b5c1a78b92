"""A multilayer perceptron on MNIST, trained by adam_fn (arXiv 1412.6980, section 6.2: two hidden layers of 1000 ReLUs).

    python examples/mnist_mlp.py              # Adam, 5 epochs
    python examples/mnist_mlp.py --optimizer nadam --schedule linear --epochs 10
    python examples/mnist_mlp.py --compare    # eight optimizers from one initialisation: figure 2 of the paper
    python examples/mnist_mlp.py --dropout 0.5    # in training, on both hidden layers
    python examples/mnist_mlp.py --checkpoint run    # saves every epoch; when called again, goes on from the last

It prints the test accuracy after each epoch and a table, and writes a plot and the numbers to the folder of `--out`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from loaders import mnist
from loaders.mnist import Dataset
from support import report
from support.checkpoints import Checkpoints, OtherRunError
from support.command_line import Parser, real, whole
from support.report import Epoch, Run
from tqdm import tqdm

import adam_fn

CLASSES = 10
STEPS_PER_UPDATE = 50  # of the progress bar: each update waits for the device


class Optimizer(NamedTuple):
    """How an optimizer is built, and the rate it has unless another one is asked for."""

    label: str
    build: Callable[..., optax.GradientTransformation]
    rate: float
    options: Mapping[str, float | bool] = {}
    decoupled: bool = True  # takes `weight_decay`; to the others it is added as L2 in the gradient


# The rates are those that the papers and libraries use. SGD's and AdaGrad's, which have none, were chosen on a coarse
# grid, SGD's a step below the best one, which is close to divergence.
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adam": Optimizer("Adam", adam_fn.adam, 1e-3),
    "adamw": Optimizer("AdamW", adam_fn.adamw, 1e-3, {"weight_decay": 1e-2}),
    "adamax": Optimizer("AdaMax", adam_fn.adamax, 2e-3),
    "adamaxw": Optimizer("AdaMaxW", adam_fn.adamaxw, 2e-3, {"weight_decay": 1e-2}),
    "nadam": Optimizer("NAdam", adam_fn.nadam, 1e-3),
    "nadamw": Optimizer("NAdamW", adam_fn.nadamw, 1e-3, {"weight_decay": 1e-2}),
    "amsgrad": Optimizer("AMSGrad", adam_fn.amsgrad, 1e-3),
    "radam": Optimizer("RAdam", adam_fn.radam, 1e-3),
    "adabelief": Optimizer("AdaBelief", adam_fn.adabelief, 1e-3),
    "yogi": Optimizer("Yogi", adam_fn.yogi, 1e-2),
    "sgd-nesterov": Optimizer("SGD, Nesterov", optax.sgd, 0.1, {"momentum": 0.9, "nesterov": True}, decoupled=False),
    "adagrad": Optimizer("AdaGrad", optax.adagrad, 0.1, decoupled=False),
    "rmsprop": Optimizer("RMSProp", optax.rmsprop, 1e-3, decoupled=False),
    "adadelta": Optimizer("AdaDelta", optax.adadelta, 1.0, decoupled=False),
}

COMPARED = ("adam", "adamax", "adamw", "nadam", "sgd-nesterov", "adagrad", "rmsprop", "adadelta")

# From the rate and the number of steps in the run to the learning rate of each step.
SCHEDULES: Mapping[str, Callable[[float, int], optax.ScalarOrSchedule]] = {
    "constant": lambda rate, steps: rate,
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "warmup_cosine": lambda rate, steps: optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps),
    "inverse_sqrt": lambda rate, steps: adam_fn.schedules.inverse_sqrt(rate),
    "warmup_stable_decay": lambda rate, steps: adam_fn.schedules.warmup_stable_decay(
        rate, steps // 10, steps - steps // 10 - steps // 5, steps // 5
    ),
}


class MLP(nnx.Module):
    """pixels -> width -> width -> classes, ReLU between."""

    def __init__(self, pixels: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(pixels, width, rngs=rngs)
        self.hidden2 = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, dropout: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        """Logits; with a key, `dropout` of the hidden units are left out."""
        for i, layer in enumerate((self.hidden1, self.hidden2)):
            x = nnx.relu(layer(x))
            if dropout and key is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
                x = jnp.where(keep, x / (1 - dropout), 0.0)
        return self.out(x)


Parameters = dict[str, dict[str, jax.Array]]


class Metrics(NamedTuple):
    cost: jax.Array  # mean cross entropy, in nats
    accuracy: jax.Array  # fraction


def cost_and_metrics(
    params: Parameters,
    graph: nnx.GraphDef[MLP],
    images: jax.Array,
    labels: jax.Array,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    logits = nnx.merge(graph, params)(images.astype(jnp.float32) / 255, dropout, key)
    cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return cost, Metrics(cost, (logits.argmax(-1) == labels).mean())


# The model is split into its structure, which is static, and a plain dict of arrays: such a call costs the host a
# fraction of an `nnx.jit` call, which walks the module each time.
@partial(jax.jit, static_argnames=("graph", "tx", "dropout"), donate_argnames=("params", "state"))
def train_step(
    params: Parameters,
    state: optax.OptState,
    data: tuple[jax.Array, jax.Array],
    batches: jax.Array,
    index: np.int32,
    key: jax.Array | None = None,
    *,
    graph: nnx.GraphDef[MLP],
    tx: optax.GradientTransformation,
    dropout: float = 0.0,
) -> tuple[Parameters, optax.OptState, Metrics]:
    """One update on the images that `batches[index]` numbers; params and state are updated in place.

    `key` is the epoch's, for dropout.
    """
    images, labels = (array[batches[index]] for array in data)
    key = None if key is None else jax.random.fold_in(key, index)
    gradient = jax.value_and_grad(cost_and_metrics, has_aux=True)
    (_, metrics), grads = gradient(params, graph, images, labels, dropout, key)
    updates, state = tx.update(grads, state, params)
    return cast(Parameters, optax.apply_updates(params, updates)), state, metrics


@partial(jax.jit, static_argnames="graph")
def evaluate(params: Parameters, images: jax.Array, labels: jax.Array, *, graph: nnx.GraphDef[MLP]) -> Metrics:
    return cost_and_metrics(params, graph, images, labels)[1]


@partial(jax.jit, static_argnames=("size", "batch", "steps"))
def shuffled(key: jax.Array, *, size: int, batch: int, steps: int) -> jax.Array:
    """An epoch's minibatches as (steps, batch) image numbers.

    The remainder of `size` over `batch` (96 of 60,000 images at 128) sits this epoch out; every epoch draws a new
    order, so no image is left out for good.
    """
    return jax.random.permutation(key, size)[: steps * batch].reshape(steps, batch)


def build(name: str, rate: optax.ScalarOrSchedule, weight_decay: float | None) -> optax.GradientTransformation:
    """The optimizer of the table; `weight_decay` is times the rate, or L2 in the gradient for those without one."""
    entry = OPTIMIZERS[name]
    if weight_decay is None:
        return entry.build(rate, **entry.options)
    if entry.decoupled:
        return entry.build(rate, **{**entry.options, "weight_decay": weight_decay})
    return optax.chain(optax.add_decayed_weights(weight_decay), entry.build(rate, **entry.options))


def train(dataset: Dataset, name: str, options: Options) -> Run:
    """Train a new model from the initialisation and on the minibatches that `options.seed` stands for."""
    size = len(dataset.train_labels)
    steps = min(size // options.batch, options.steps or size)
    entry = OPTIMIZERS[name]
    rate = entry.rate if options.learning_rate is None else options.learning_rate
    decay = options.weight_decay
    run = Run(
        optimizer=name,
        label=entry.label,
        learning_rate=rate,
        weight_decay=float(entry.options.get("weight_decay", 0.0) if decay is None else decay),
        schedule=options.schedule,
    )
    tx = build(name, SCHEDULES[options.schedule](rate, steps * options.epochs), decay)
    graph, variables = nnx.split(MLP(dataset.pixels, options.width, rngs=nnx.Rngs(options.seed)), nnx.Param)
    params: Parameters = nnx.to_pure_dict(variables)
    state = tx.init(params)
    data = jax.device_put((dataset.train_images, dataset.train_labels))
    test = jax.device_put((dataset.test_images, dataset.test_labels))
    key = jax.random.key(options.seed)

    def minibatches(epoch: int) -> jax.Array:
        return shuffled(jax.random.fold_in(key, epoch), size=size, batch=options.batch, steps=steps)

    def noise(epoch: int) -> jax.Array | None:
        return jax.random.fold_in(jax.random.key(options.seed + 1), epoch) if options.dropout else None

    start = time.perf_counter()
    lowered = train_step.lower(
        params, state, data, minibatches(1), np.int32(0), noise(1), graph=graph, tx=tx, dropout=options.dropout
    )
    step = lowered.compile()
    run.compile_seconds = time.perf_counter() - start

    checkpoints = None
    if options.checkpoint is not None:
        # What decides the course of a run; the optimizer itself is looked at by `Checkpoints`.
        decisive = {"data": dataset.name, "steps": steps, "rate": rate, "decay": run.weight_decay}
        names = ("schedule", "epochs", "batch", "width", "seed", "dropout")
        decisive |= {name: getattr(options, name) for name in names}
        checkpoints = Checkpoints(options.checkpoint / name, decisive, tx, params)
        if (last := checkpoints.last((params, state))) is not None:
            (params, state), record = last
            run = Run.of(record)
            print(
                f"{entry.label}: resumed from {checkpoints.folder} after epoch {len(run.epochs)}/{options.epochs}",
                flush=True,
            )

    for epoch in range(len(run.epochs) + 1, options.epochs + 1):
        batches, dropped = jax.block_until_ready((minibatches(epoch), noise(epoch)))
        metrics: list[Metrics] = []
        start = time.perf_counter()
        with progress(f"{entry.label} {epoch}/{options.epochs}", steps * options.batch) as bar:
            for index in range(steps):
                params, state, seen = step(params, state, data, batches, np.int32(index), dropped)
                metrics.append(seen)
                if len(metrics) % STEPS_PER_UPDATE == 0 or len(metrics) == steps:
                    cost, accuracy = means(metrics[-STEPS_PER_UPDATE:])
                    bar.set_postfix_str(f"cost {cost:.4f}, accuracy {accuracy:.2%}", refresh=False)
                    bar.update(len(metrics) * options.batch - bar.n)
        seconds = time.perf_counter() - start
        tested = evaluate(params, *test, graph=graph)
        run.step_costs += [float(seen.cost) for seen in jax.device_get(metrics)]
        run.epochs.append(epoch_of(epoch, metrics, tested, seconds, steps * options.batch))
        print(report.epoch_line(run, options.epochs), flush=True)
        if checkpoints is not None:
            checkpoints.save(epoch, (params, state), asdict(run))
    return run


def means(metrics: Sequence[Metrics]) -> tuple[float, float]:
    cost, accuracy = np.asarray(jax.device_get(metrics), np.float64).T
    return float(cost.mean()), float(accuracy.mean())


def epoch_of(epoch: int, metrics: Sequence[Metrics], tested: Metrics, seconds: float, images: int) -> Epoch:
    """What a pass over the training images gave, of the metrics of its steps and of the test images."""
    cost, accuracy = means(metrics)
    return Epoch(epoch, cost, accuracy, float(tested.cost), float(tested.accuracy), seconds, images / seconds)


def progress(text: str, images: int) -> tqdm[NoReturn]:
    """A bar on a terminal, nothing elsewhere: the lines of the epochs say the same in a log."""
    return tqdm(total=images, desc=text, unit=" images", unit_scale=True, disable=None, leave=False, dynamic_ncols=True)


class Options(NamedTuple):
    """What the command line asks for. Rate and weight decay of None are those of the optimizer's table."""

    optimizer: str
    learning_rate: float | None
    schedule: str
    weight_decay: float | None
    epochs: int
    batch: int
    width: int
    seed: int
    data: str | None
    out: Path
    compare: bool
    steps: int | None  # at most so many an epoch
    dropout: float
    checkpoint: Path | None


def parse(argv: Sequence[str] | None) -> Options:
    parser = Parser(prog="mnist_mlp.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=f"adam (the default) or one of {', '.join(OPTIMIZERS)}")
    add("--learning-rate", type=real, metavar="RATE", help="default: the optimizer's own, 0.001 for adam")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate over the run (default: cosine)")
    add("--weight-decay", type=real, metavar="DECAY", help="times the rate; L2 in the gradient for sgd-nesterov, "
        "adagrad, rmsprop and adadelta (default: the optimizer's own)")  # fmt: skip
    add("--dropout", type=real, default=0.0, metavar="P", help="share of the hidden units left out in training "
        "(default: 0)")  # fmt: skip
    add("--epochs", type=whole(1), metavar="N", help="default: 5")
    add("--batch", type=whole(1), default=128, metavar="N", help="images a step (default: 128)")
    add("--width", type=whole(1), metavar="N", help="of both hidden layers (default: 1000)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the initialisation and the shuffles (default: 0)")
    add("--data", metavar="FOLDER", help="with MNIST's four IDX files, .gz or plain, or the word digits for "
        "scikit-learn's (default: $ADAM_FN_DATA/mnist, else the user's cache, else a download)")  # fmt: skip
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the plot and the numbers (default: out)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="save there after every epoch, and go on from there")
    add("--compare", action="store_true", help=f"train {', '.join(COMPARED)}, each at its own rate")
    add("--quick", action="store_true", help="a trial of 2 epochs of at most 20 steps, 64 units wide")
    given = parser.parse_args(argv)
    if given.compare and (given.optimizer or given.learning_rate is not None):
        parser.error("--compare gives each optimizer its own rate: leave --optimizer and --learning-rate out")
    if given.dropout >= 1:
        parser.error(f"argument --dropout: {given.dropout:g} is not below 1")
    return Options(
        optimizer=given.optimizer or "adam",
        learning_rate=given.learning_rate,
        schedule=given.schedule,
        weight_decay=given.weight_decay,
        epochs=given.epochs or (2 if given.quick else 5),
        batch=given.batch,
        width=given.width or (64 if given.quick else 1000),
        seed=given.seed,
        data=given.data,
        out=given.out,
        compare=given.compare,
        steps=20 if given.quick else None,
        dropout=given.dropout,
        checkpoint=given.checkpoint,
    )


def main(argv: Sequence[str] | None = None) -> list[Run]:
    options = parse(argv)
    try:
        dataset = mnist.load(options.data)
        if options.batch > len(dataset.train_labels):
            raise ValueError(f"--batch {options.batch} is more than the {len(dataset.train_labels)} training images")
        for flag, folder in (("--out", options.out), ("--checkpoint", options.checkpoint or options.out)):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{flag} {folder} cannot be written to")
    except (OSError, ValueError) as error:
        sys.exit(f"mnist_mlp.py: error: {error}")
    device = jax.devices()[0].device_kind
    sizes = f"{dataset.pixels}-{options.width}-{options.width}-{CLASSES}"
    dropout = f"dropout {options.dropout:g}, " if options.dropout else ""
    title = f"MLP {sizes} on {dataset.name}, {dropout}batch {options.batch}, seed {options.seed}"
    print(f"{title}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images; {device}")
    names = COMPARED if options.compare else (options.optimizer,)
    try:
        runs = [train(dataset, name, options) for name in names]
    except OtherRunError as error:
        sys.exit(f"mnist_mlp.py: error: {error}")
    print(f"\n{report.table(runs)}\n")
    stem = options.out / ("mnist_compare" if options.compare else "mnist_mlp")
    png, numbers = stem.with_suffix(".png"), stem.with_suffix(".json")
    if options.compare:
        report.plot_comparison(png, runs, title)
    else:
        report.plot_run(png, runs[0], title)
    report.write_json(
        numbers,
        {
            "dataset": dataset.name,
            "train_images": len(dataset.train_labels),
            "test_images": len(dataset.test_labels),
            "layers": [dataset.pixels, options.width, options.width, CLASSES],
            "dropout": options.dropout,
            "batch": options.batch,
            "seed": options.seed,
            "device": device,
            "versions": {name: version(name) for name in ("jax", "optax", "flax")},
        },
        runs,
    )
    print(f"wrote {png} and {numbers}")
    return runs


if __name__ == "__main__":
    main()
