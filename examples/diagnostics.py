"""Automatic annealing, watched: what `adam_fn.diagnostics` reads off a run of Adam at a constant rate.

    python examples/diagnostics.py            # an MLP on MNIST, 10 epochs, a state of 24 bits a parameter

At first successive gradients agree and m̂/√v̂ is near 1; soon they are mostly noise, the ratio falls, and Adam's
effective step α m̂/√v̂ falls with it although α stays (arXiv 1412.6980, section 2.1). The script writes a picture of
that, of the share of elements at the step bound, of the ratio of updates to weights and of what storing
24 bits loses at each step, and its numbers.

Of independent gradients around 0 the root mean square of the ratio is √((1-β₁)/(1+β₁)) = 0.23. It goes below that while
the gradients shrink, for v̂ remembers the larger ones.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from loaders import mnist
from loaders.mnist import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mnist_mlp import CLASSES, MLP, Metrics, Parameters, cost_and_metrics, evaluate, shuffled
from numpy.typing import NDArray
from PIL import Image
from support.command_line import Parser, real, whole
from support.report import COLORS, dump, log_axis

import adam_fn
from adam_fn.diagnostics import summary

POINTS = 150  # of a curve, at equal distances on the logarithmic axis: each the mean of the steps around it
NOISE = ((1 - 0.9) / (1 + 0.9)) ** 0.5  # m̂/√v̂ of independent gradients around 0, at β₁ = 0.9


class Course(NamedTuple):
    """A run: one-based steps, and what was read there, by name as `summary` has it, and the minibatch's cost."""

    steps: NDArray[np.floating[Any]]
    scalars: Mapping[str, NDArray[np.floating[Any]]]
    test_accuracy: float


@partial(jax.jit, static_argnames=("graph", "tx"), donate_argnames=("params", "state"))
def train_step(
    params: Parameters,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    *,
    graph: nnx.GraphDef[MLP],
    tx: optax.GradientTransformation,
) -> tuple[Parameters, optax.OptState, Metrics, dict[str, jax.Array]]:
    """One update, and what can be read off it: the summary is compiled into the step."""
    gradient = jax.value_and_grad(cost_and_metrics, has_aux=True)
    (_, metrics), grads = gradient(params, graph, images, labels)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)  # pyright: ignore[reportAssignmentType]
    return params, state, metrics, summary(tx, state, params, updates, grads, per_leaf=True)


def train(dataset: Dataset, options: Namespace) -> Course:
    """A new model, from the initialisation and on the minibatches that `options.seed` stands for."""
    tx = adam_fn.adam(options.learning_rate, storage="24bit")
    graph, variables = nnx.split(MLP(dataset.pixels, options.width, rngs=nnx.Rngs(options.seed)), nnx.Param)
    params: Parameters = nnx.to_pure_dict(variables)
    state = tx.init(params)
    images, labels = jax.device_put((dataset.train_images, dataset.train_labels))
    size = len(dataset.train_labels)
    steps = min(size // options.batch, options.steps or size)
    read: list[dict[str, jax.Array]] = []
    for epoch in range(options.epochs):
        key = jax.random.fold_in(jax.random.key(options.seed), epoch)
        for rows in shuffled(key, size=size, batch=options.batch, steps=steps):
            params, state, metrics, scalars = train_step(params, state, images[rows], labels[rows], graph=graph, tx=tx)
            read.append({"cost": metrics.cost, **scalars})
        read[-steps:] = jax.device_get(read[-steps:])
        last = read[-1]
        print(
            f"{epoch + 1}/{options.epochs}: cost {last['cost']:.4f}, signal-to-noise {last['signal_to_noise']:.3f}, "
            f"effective step {last['effective_step']:.2e} at a rate of {last['learning_rate']:g}",
            flush=True,
        )
    tested = evaluate(params, jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels), graph=graph)
    courses = {key: means(np.array([x[key] for x in read], np.float64)) for key in read[0]}
    return Course(means(np.arange(len(read)) + 1.0), courses, float(tested.accuracy))


def means(x: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The means over stretches of equal length on a logarithmic axis, of one step at least."""
    starts = np.unique(np.geomspace(1, len(x) + 1, POINTS + 1)[:-1].astype(int)) - 1
    return np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))


def plot(path: Path, course: Course, title: str) -> None:
    """Six panels over the steps: all parameters in black, the layers' kernels in colours."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    (cost, signal, step), (bound, ratio, error) = figure.subplots(2, 3)
    cost.plot(course.steps, course.scalars["cost"], color=COLORS[0], lw=1.6)
    cost.set_title("training cost (nats)")
    _draw(signal, course, "signal_to_noise", "signal-to-noise m̂/√v̂ (rms)")
    _draw(step, course, "effective_step", "effective step α m̂/√v̂ (rms)")
    step.plot(course.steps, course.scalars["learning_rate"], color=COLORS[6], ls="--", lw=1.4, label="α, constant")
    signal.axhline(NOISE, color=COLORS[7], ls="--", lw=1.4, label=f"nothing but noise: {NOISE:.2f}")
    _draw(bound, course, "at_bound", "share of elements at the step bound")
    _draw(ratio, course, "update_to_weight", "updates to weights ‖u‖/‖p‖")
    for i, (slot, name) in enumerate((("mu", "m"), ("nu", "v"))):
        error.plot(course.steps, course.scalars[f"quantisation_error/{slot}"], color=COLORS[5 + i], lw=1.6, label=name)
    error.set_title("what a step loses: m in 8 bits, v in 16")
    for axes in figure.axes:
        log_axis(axes)
        axes.set(xscale="log", xlabel="step")
    for axes in (signal, step, error):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    with BytesIO() as drawn:  # Of many curves a third of the size in 256 colours.
        figure.savefig(drawn, format="png", dpi=90)
        Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw(axes: Axes, course: Course, key: str, title: str) -> None:
    kernels = [name for name in course.scalars if name.startswith(f"{key}/") and name.endswith("kernel")]
    for i, name in enumerate(kernels, start=1):
        label = name.removeprefix(f"{key}/")
        axes.plot(course.steps, _positive(course.scalars[name]), color=COLORS[i], lw=1.2, label=label)
    axes.plot(course.steps, _positive(course.scalars[key]), color=COLORS[0], lw=1.6, label="all parameters")
    axes.set_title(title)


def _positive(x: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """A share may be 0, which a logarithmic axis has no place for."""
    return np.where(x > 0, x, np.nan)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="diagnostics.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--learning-rate", type=real, default=1e-3, metavar="RATE", help="constant (default: 0.001)")
    add("--epochs", type=whole(1), metavar="N", help="default: 10")
    add("--batch", type=whole(1), default=128, metavar="N", help="images a step (default: 128)")
    add("--width", type=whole(1), metavar="N", help="of both hidden layers (default: 256)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the initialisation and the shuffles (default: 0)")
    add("--data", metavar="FOLDER", help="as for mnist_mlp.py")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the plot and the numbers (default: out)")
    add("--quick", action="store_true", help="a trial of 2 epochs of at most 20 steps, 64 units wide")
    given = parser.parse_args(argv)
    given.steps = 20 if given.quick else None
    given.epochs = given.epochs or (2 if given.quick else 10)
    given.width = given.width or (64 if given.quick else 256)
    return given


def main(argv: Sequence[str] | None = None) -> Course:
    options = parse(argv)
    try:
        dataset = mnist.load(options.data)
        if options.batch > len(dataset.train_labels):
            raise ValueError(f"--batch {options.batch} is more than the {len(dataset.train_labels)} training images")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"diagnostics.py: error: {error}")
    layers = [dataset.pixels, options.width, options.width, CLASSES]
    sizes = "-".join(map(str, layers))
    title = (
        f"Adam at a constant rate of {options.learning_rate:g}: MLP {sizes} on {dataset.name}, batch {options.batch}"
    )
    print(title)
    course = train(dataset, options)
    picture, numbers = options.out / "diagnostics.png", options.out / "diagnostics.json"
    plot(picture, course, title)
    shown = {key: x for key, x in course.scalars.items() if "/" not in key or key.startswith("quantisation_error/")}
    dump(
        numbers,
        {
            "dataset": dataset.name,
            "layers": layers,
            "batch": options.batch,
            "seed": options.seed,
            "learning_rate": options.learning_rate,
            "device": jax.devices()[0].device_kind,
            "versions": {name: version(name) for name in ("jax", "optax", "flax")},
            "test_accuracy": course.test_accuracy,
            "steps": course.steps,
            "scalars": {key: x for key, x in shown.items() if key.count("/") < 2},
        },
    )
    print(f"test accuracy {course.test_accuracy:.2%}; wrote {picture} and {numbers}")
    return course


if __name__ == "__main__":
    main()
