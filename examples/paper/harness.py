"""What the scripts of this folder share: the command line, sweeps over a grid of rates, claims and their table, files.

A script imports this module first: that makes the modules of `examples/` importable from here.

    options = harness.options("figure1.py", __doc__, argv, epochs=30)
    problem = harness.Problem(params, data, cost, size=60_000)
    runs = harness.sweep("Adam", lambda point: adam_fn.adam(1.0), {"rate": (1e-3, 1e-2)}, problem, epochs=30, seed=0)
    index = harness.best(runs).point
    harness.write(options.out, "figure1", figure, {"options": ..., "runs": [runs.numbers()]}, claims)
    print(harness.claims_table(claims))
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from mnist_mlp import shuffled
from numpy.typing import NDArray
from PIL import Image
from support import report
from support.command_line import Parser, whole
from tqdm import tqdm

STEPS_PER_UPDATE = 50  # of the progress bar: each update waits for the device
ORDER = ("Adam", "AdaMax", "AdamW", "NAdam", "SGD, Nesterov", "AdaGrad", "RMSProp", "AdaDelta")
STANDINS = {"mnist": "digits"}  # the word that asks a loader for its stand-in; "standin" for all others

P = TypeVar("P")  # the parameters' tree
D = TypeVar("D")  # the data's tree
Point = Mapping[str, jax.Array]  # one point of the grid: a scalar for each hyperparameter
Metrics = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper beside what was measured.

    Attributes:
      text: the paper's claim, short.
      section: of the paper, or its figure.
      measured: the numbers that decide, and what they are.
      holds: None where this run is too small to decide (as in --quick).
    """

    text: str
    section: str
    measured: str
    holds: bool | None


def claims_table(claims: Sequence[Claim]) -> str:
    """The claims as aligned text; long cells are wrapped."""
    words = {True: "yes", False: "no", None: "not decided"}
    rows: list[tuple[str, ...]] = [("section", "claim of the paper", "measured", "holds")]
    for claim in claims:
        cells = textwrap.wrap(claim.text, 42), textwrap.wrap(claim.measured, 66)
        lines = list(itertools.zip_longest(*cells, fillvalue=""))
        rows += [
            (claim.section if i == 0 else "", *line, words[claim.holds] if i == 0 else "")
            for i, line in enumerate(lines)
        ]
    return report.align(rows)


def decided(options: Namespace, holds: bool) -> bool | None:
    """`holds`, or None in a --quick run, which is too small to say."""
    return None if options.quick else bool(holds)


def options(
    name: str,
    doc: str | None,
    argv: Sequence[str] | None,
    *,
    epochs: int,
    quick_epochs: int = 2,
    extras: Callable[[Parser], None] | None = None,
) -> Namespace:
    """The parsed command line: `quick`, `epochs`, `seed`, `data` and `out` (a Path, made), and what `extras` adds.

    `name` is the script's file name, `doc` its docstring; `epochs` and `quick_epochs` are the defaults of `--epochs`.
    A script with data sets of different lengths may use `epochs` as the default of one of them.
    """
    parser = Parser(prog=name, description=(doc or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a trial of seconds: few steps, small models")
    add("--epochs", type=whole(1), metavar="N", help=f"default: {epochs}")
    add("--seed", type=whole(0), default=0, metavar="N", help="of initialisation, shuffles and noise (default: 0)")
    add("--data", metavar="FOLDER", help="with the folders mnist, imdb, cifar10, or the word standin for small "
        "stand-ins (default: $ADAM_FN_DATA, else the user's cache, else a download)")  # fmt: skip
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the plot and the numbers (default: out)")
    if extras is not None:
        extras(parser)
    given = parser.parse_args(argv)
    given.epochs = given.epochs or (quick_epochs if given.quick else epochs)
    with errors_in_one_line(name):
        given.out.mkdir(parents=True, exist_ok=True)
    return given


def folder(data: str | None, name: str) -> str | None:
    """What to ask the loader of the data set `name` for, from the value of `--data`."""
    if data is None:
        return None
    return STANDINS.get(name, "standin") if data == "standin" else str(Path(data) / name)


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Around loading: missing data or an unusable folder end the script with one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{name}: error: {error}")


def constant(step: jax.Array) -> jax.Array:
    """The schedule 1."""
    return jnp.ones_like(step, jnp.float32)


def inverse_sqrt(step: jax.Array) -> jax.Array:
    """The schedule 1/√t for the t-th step, t = 1, 2, …; `step` counts from 0."""
    return jax.lax.rsqrt(step.astype(jnp.float32) + 1)


def no_metrics(params: object, state: optax.OptState, data: object) -> Metrics:
    """For a `Problem` that is not evaluated."""
    return {}


@dataclass(frozen=True)
class Problem(Generic[P, D]):
    """What is trained: the same for every optimizer and every point of its grid.

    Attributes:
      params: the one initialisation, a tree of arrays.
      data: a tree of arrays, which is handed on to `cost` and `evaluate`.
      cost: ``(params, data, rows, key) -> scalar``, the mean cost of the minibatch whose row numbers, ``[batch]``, are
        `rows`; `key` is for noise (dropout, sampling). Work that does not depend on `params` is shared by the grid.
      size: the number of training rows.
      batch: rows a minibatch.
      steps: at most so many steps an epoch; all whole minibatches by default.
      schedule: ``step -> factor`` of every rate; the first step is 0.
      evaluate: ``(params, state, data) -> {name: scalar}`` after each epoch; `state` is the optimizer's.
    """

    params: P
    data: D
    cost: Callable[[P, D, jax.Array, jax.Array], jax.Array]
    size: int
    batch: int = 128
    steps: int | None = None
    schedule: Callable[[jax.Array], jax.Array] = constant
    evaluate: Callable[[P, optax.OptState, D], Metrics] = no_metrics

    @property
    def steps_per_epoch(self) -> int:
        return min(self.size // self.batch, self.steps or self.size)


@dataclass(frozen=True)
class Sweep:
    """The curves of one optimizer over its grid.

    Attributes:
      label: the optimizer.
      grid: the values of each hyperparameter, each ``[points]``.
      costs: ``[points, epochs]``, the mean training cost over each epoch's minibatches, each before its update; nan or
        inf from where a run diverged.
      metrics: what `Problem.evaluate` returned after each epoch, each ``[points, epochs]``.
    """

    label: str
    grid: Mapping[str, NDArray[np.float64]]
    costs: NDArray[np.float64]
    metrics: Mapping[str, NDArray[np.float64]]

    def numbers(self) -> dict[str, object]:
        """Everything, for the JSON file."""
        return asdict(self)


def sweep(
    label: str,
    make: Callable[[Point], optax.GradientTransformation],
    grid: Mapping[str, Sequence[float]],
    problem: Problem[P, D],
    *,
    epochs: int,
    seed: int,
) -> Sweep:
    """Train at all points of a grid at once, in one `vmap`, from one initialisation and on the same minibatches.

    The minibatches and the noise keys follow from `seed` alone, so they are the same for every optimizer too.

    Args:
      label: the optimizer's name, for the bar and the result.
      make: the optimizer of a point **at rate 1**, ``make(point)``. Its updates are multiplied by
        ``point["rate"] * schedule(step)``: the same as a rate inside for every optimizer whose last factor it is.
      grid: hyperparameters by name, all of one length, the number of points; "rate" is one of them. For a product of
        several axes see `product`.
      problem: what is trained.
      epochs: passes over the training rows.
      seed: of shuffles and noise.
    """
    points = {name: jnp.asarray(values, jnp.float32) for name, values in grid.items()}
    steps = problem.steps_per_epoch

    def train_step(params: P, state: optax.OptState, point: Point, data: D, rows: jax.Array, key: jax.Array,
                   step: jax.Array) -> tuple[P, optax.OptState, jax.Array]:  # fmt: skip
        cost, grads = jax.value_and_grad(problem.cost)(params, data, rows, key)
        updates, state = make(point).update(grads, state, cast(optax.Params, params))
        factor = point["rate"] * problem.schedule(step)
        params = jax.tree.map(lambda p, u: p + factor * u, params, updates)
        return params, state, cost

    over_points = jax.vmap(train_step, in_axes=(0, 0, 0, None, None, None, None))

    def part(params: P, state: optax.OptState, data: D, batches: jax.Array, epoch: jax.Array, start: jax.Array,
             stop: jax.Array) -> tuple[P, optax.OptState, jax.Array]:  # fmt: skip
        """The steps from `start` to `stop` of an epoch, and the sum of their costs, ``[points]``."""
        noise = jax.random.fold_in(jax.random.key(seed + 1), epoch)

        def body(i: jax.Array, carry: tuple[P, optax.OptState, jax.Array]) -> tuple[P, optax.OptState, jax.Array]:
            params, state, total = carry
            key = jax.random.fold_in(noise, i)
            params, state, cost = over_points(params, state, points, data, batches[i], key, epoch * steps + i)
            return params, state, total + cost

        return jax.lax.fori_loop(start, stop, body, (params, state, jnp.zeros_like(points["rate"])))

    run_part = jax.jit(part, donate_argnums=(0, 1))
    evaluate = jax.jit(jax.vmap(problem.evaluate, in_axes=(0, 0, None)))
    size = len(points["rate"])
    params = jax.tree.map(lambda p: jnp.repeat(jnp.asarray(p)[None], size, 0), problem.params)
    state = jax.jit(jax.vmap(lambda point, params: make(point).init(params)))(points, params)
    costs: list[NDArray[np.float64]] = []
    metrics: list[Mapping[str, NDArray[np.float64]]] = []
    with progress(label, epochs * steps) as bar:
        for epoch in range(epochs):
            key = jax.random.fold_in(jax.random.key(seed), epoch)
            batches = shuffled(key, size=problem.size, batch=problem.batch, steps=steps)
            total = np.zeros(size)
            for start in range(0, steps, STEPS_PER_UPDATE):
                stop = min(start + STEPS_PER_UPDATE, steps)
                bounds = jnp.int32(start), jnp.int32(stop)
                params, state, cost = run_part(params, state, problem.data, batches, jnp.int32(epoch), *bounds)
                total += np.asarray(cost, np.float64)
                bar.update(stop - start)
            costs.append(total / steps)
            found = evaluate(params, state, problem.data)
            metrics.append({name: np.asarray(value, np.float64) for name, value in found.items()})
            bar.set_postfix_str(f"lowest cost {np.nanmin([*costs[-1], np.inf]):.4f}", refresh=False)
    return Sweep(
        label,
        {name: np.asarray(values, np.float64) for name, values in grid.items()},
        np.stack(costs, 1),
        {name: np.stack([found[name] for found in metrics], 1) for name in metrics[0]},
    )


def product(**axes: Sequence[float]) -> dict[str, list[float]]:
    """The grid of all combinations: ``product(rate=(1, 2), b1=(0, 0.9))`` has four points; the last axis runs first."""
    combinations = list(itertools.product(*axes.values()))
    return {name: [values[i] for values in combinations] for i, name in enumerate(axes)}


def progress(label: str, steps: int) -> tqdm[NoReturn]:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=steps, desc=label, unit=" steps", disable=None, leave=False, dynamic_ncols=True)


class Best(NamedTuple):
    """The best point of a grid, and in words where its rate lies."""

    point: int
    rate: float
    cost: float  # the last epoch's, or the mean over the epochs, whichever decided
    note: str  # empty, or that the rate is at an edge of the grid, so that a better one may lie outside


def best(runs: Sweep, by: Literal["last", "mean"] = "last") -> Best:
    """The point of the lowest training cost: the last epoch's, or the mean over all epochs.

    The mean is that of the costs before each update: up to a constant the average regret of the paper's section 4, and
    the lower, the faster the convergence. A run that diverged is never chosen.
    """
    finite = np.where(np.isfinite(runs.costs).all(1, keepdims=True), runs.costs, np.inf)
    costs = finite.mean(1) if by == "mean" else finite[:, -1]
    point = int(costs.argmin())
    if not np.isfinite(costs[point]):
        raise ValueError(f"{runs.label}: every run diverged")
    rates = runs.grid["rate"]
    edges = [word for word, rate in (("lowest", rates.min()), ("highest", rates.max())) if rates[point] == rate]
    note = f"the {edges[0]} rate tried" if edges and len(set(rates)) > 1 else ""
    return Best(point, float(rates[point]), float(costs[point]), note)


def style(label: str) -> dict[str, Any]:
    """The line of an optimizer, the same in all plots: colour, dashes and width."""
    i = ORDER.index(label)
    return {"color": report.COLORS[i], "linestyle": report.STYLES[i], "lw": 1.6}


def write(out: Path, stem: str, figure: Figure, numbers: Mapping[str, object], claims: Sequence[Claim]) -> None:
    """`stem`.png and `stem`.json in the folder `out`, and one printed line that names them.

    To `numbers` (settings, rates, curves; arrays and dataclasses' dicts are fine) the JSON file adds the device, the
    versions and the claims. What is not finite becomes null; numbers have six digits.
    """
    png, json = out / f"{stem}.png", out / f"{stem}.json"
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=110)
    Image.open(pixels).convert("RGB").quantize(256).save(png, optimize=True)  # a third of the bytes
    about = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("adam_fn", "jax", "optax", "flax", "numpy")},
    }
    report.dump(json, {**about, **numbers, "claims": [asdict(claim) for claim in claims]})
    print(f"wrote {png} and {json}")
