"""Eight optimizers on two surfaces: the bowl x² + y² and Rosenbrock's valley (1 - x)² + 100 (y - x²)².

    python examples/surface.py

Each path is one compiled scan of exact gradients. A surface gives one picture (`surface_bowl.png`,
`surface_rosenbrock.png`): the surface and its contours with the paths drawn on them, and the value over the steps. The
final points are printed and, with the rates, written beside the pictures as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import NDArray
from support.command_line import Parser
from support.report import COLORS, align, dump

import adam_fn

OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "Adam": adam_fn.adam,
    "AMSGrad": adam_fn.amsgrad,
    "NAdam": adam_fn.nadam,
    "AdaMax": adam_fn.adamax,
    "momentum": partial(optax.sgd, momentum=0.9),
    "SGD": optax.sgd,
    "AdaGrad": optax.adagrad,
    "RMSProp": optax.rmsprop,
}


class Surface(NamedTuple):
    """A function of the plane, where the paths start, and the window [low, high] of x and y that is drawn."""

    name: str
    formula: str
    value: Callable[[Any, Any], Any]  # of x and y, arrays of NumPy or JAX
    minimum: tuple[float, float]
    start: tuple[float, float]
    steps: int
    rates: Mapping[str, float]
    x: tuple[float, float]
    y: tuple[float, float]
    levels: NDArray[np.float64]  # of the contours
    offset: float | None  # heights and colours are log10(value + offset); None draws the value itself
    floor: float  # of the plot of values
    view: tuple[float, float]  # elevation and azimuth of the eye, in degrees


# The rates are from a coarse grid (1, 2, 3, 5 times powers of ten), among those whose paths stay within the window, and
# there such that the paths are told apart: other rates would rank the optimizers in another order.
SURFACES = (
    Surface(
        name="bowl",
        formula="x² + y²",
        value=lambda x, y: x**2 + y**2,
        minimum=(0.0, 0.0),
        start=(-4.0, 2.0),
        steps=100,
        rates={
            "Adam": 0.2,
            "AMSGrad": 0.2,
            "NAdam": 0.2,
            "AdaMax": 0.3,
            "momentum": 0.02,
            "SGD": 0.05,
            "AdaGrad": 0.5,
            "RMSProp": 0.1,
        },
        x=(-5.0, 2.0),
        y=(-2.0, 2.5),
        levels=np.arange(1, 8) ** 2 / 1.0,
        offset=None,
        floor=1e-8,
        view=(42, -62),
    ),
    Surface(
        name="rosenbrock",
        formula="(1 - x)² + 100 (y - x²)²",
        value=lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        minimum=(1.0, 1.0),
        start=(-1.4, -0.2),
        steps=600,
        rates={
            "Adam": 0.1,
            "AMSGrad": 0.2,
            "NAdam": 0.05,
            "AdaMax": 0.2,
            "momentum": 1e-4,
            "SGD": 3e-4,
            "AdaGrad": 0.5,
            "RMSProp": 5e-3,
        },
        x=(-1.9, 1.4),
        y=(-0.5, 1.5),
        levels=10.0 ** np.arange(0, 3.5, 0.5),
        offset=0.1,
        floor=1e-4,
        view=(48, -105),
    ),
)


class Trajectory(NamedTuple):
    """Where an optimizer went: points (steps + 1, 2) from the start on, and the values (steps + 1,) there."""

    optimizer: str
    rate: float
    points: NDArray[np.float32]
    values: NDArray[np.float32]


def descend(surface: Surface, optimizer: str, steps: int) -> Trajectory:
    """The path of one optimizer, at its rate on this surface."""
    rate = surface.rates[optimizer]
    tx = OPTIMIZERS[optimizer](rate)

    def value(point: jax.Array) -> jax.Array:
        return surface.value(point[0], point[1])

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
        point, state = carry
        updates, state = tx.update(jax.grad(value)(point), state, point)
        return (point + jnp.asarray(updates), state), point

    @jax.jit
    def run(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        (last, _), points = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        points = jnp.concatenate([points, last[None]])
        return points, jax.vmap(value)(points)

    points, values = run(jnp.array(surface.start))
    return Trajectory(optimizer, rate, np.asarray(points), np.asarray(values))


# Pale colours, the lower the lighter, leave the contrast to the paths.
PALE = LinearSegmentedColormap.from_list("pale", ["#FFFFFF", "#DCE4EC", "#A9B8C6"], N=12)


def style(optimizer: str) -> dict[str, Any]:
    """Each its own colour; the dashed ones lie above the solid ones, which show through where paths coincide."""
    i = list(OPTIMIZERS).index(optimizer)
    if i % 2:
        return {"color": COLORS[i], "ls": (0, (3, 3)), "lw": 1.6, "zorder": 20 + i}
    return {"color": COLORS[i], "lw": 2.0, "zorder": 10 + i, "path_effects": [withStroke(linewidth=3, foreground="w")]}


def plot(picture: Path, surface: Surface, paths: Sequence[Trajectory]) -> None:
    """The surface and its contours with the paths on them, and the values over the steps."""
    figure = Figure(figsize=(11.5, 4.3), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=(1.15, 1.1, 1))
    _draw_relief(figure.add_subplot(grid[0], projection="3d"), surface, paths)
    plane, course = figure.add_subplot(grid[1]), figure.add_subplot(grid[2])

    x, y = _mesh(surface, 300)
    plane.contourf(x, y, _height(surface, surface.value(x, y)), 12, cmap=PALE)
    plane.contour(x, y, surface.value(x, y), surface.levels, colors="#7C8A97", linewidths=0.5)
    for path in paths:
        plane.plot(*path.points.T, **style(path.optimizer), label=f"{path.optimizer}, rate {path.rate:g}")
        plane.plot(*path.points[-1], "o", ms=5, color=style(path.optimizer)["color"], mec="w", mew=0.7, zorder=40)
        course.plot(path.values, **style(path.optimizer))
    plane.plot(*surface.start, "ks", ms=5, zorder=50)
    plane.plot(*surface.minimum, "k*", ms=11, zorder=9)
    plane.annotate("start", surface.start, xytext=(-3, 5), textcoords="offset points", ha="right")
    plane.set(xlim=surface.x, ylim=surface.y, xlabel="x", ylabel="y", title="contours (dots: ends, star: minimum)")
    course.set(yscale="log", ylim=(surface.floor, None), xlabel="step", ylabel="value", title="value")
    course.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{surface.formula}, {len(paths[0].points) - 1:,} steps")
    figure.savefig(picture, dpi=90)


def _mesh(surface: Surface, points: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(np.meshgrid(np.linspace(*surface.x, points), np.linspace(*surface.y, points)))


def _height(surface: Surface, value: NDArray[Any]) -> NDArray[Any]:
    return value if surface.offset is None else np.log10(value + surface.offset)


def _draw_relief(axes: Axes3D, surface: Surface, paths: Sequence[Trajectory]) -> None:
    axes.computed_zorder = False  # paths are drawn above the surface that they lie on
    x, y = _mesh(surface, 80)
    height = _height(surface, surface.value(x, y))
    axes.plot_surface(x, y, height, cmap=PALE, rcount=80, ccount=80, lw=0, antialiased=False, shade=False, zorder=1)
    for path in paths:
        axes.plot(*path.points.T, _height(surface, path.values), **style(path.optimizer))
    axes.view_init(*surface.view)
    label = "value" if surface.offset is None else f"log₁₀(value + {surface.offset:g})"
    axes.set(xlabel="x", ylabel="y", title=f"surface; height: {label}")
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.set_box_aspect((1, 1, 0.6))


def table(paths: Sequence[Trajectory]) -> str:
    """One line a path, the lowest end first."""
    rows = [("optimizer", "rate", "steps", "final point", "final value")]
    for path in sorted(paths, key=lambda path: float(path.values[-1])):
        x, y = path.points[-1]
        steps = f"{len(path.points) - 1:,}"
        rows.append((path.optimizer, f"{path.rate:g}", steps, f"({x:.4f}, {y:.4f})", f"{path.values[-1]:.2e}"))
    return align(rows, right=(1, 2, 3, 4))


def run(surface: Surface, out: Path, *, quick: bool) -> Sequence[Trajectory]:
    """The paths on a surface, printed and written."""
    steps = surface.steps // 10 if quick else surface.steps
    paths = [descend(surface, optimizer, steps) for optimizer in OPTIMIZERS]
    print(f"{surface.formula}\n{table(paths)}\n")
    picture, numbers = (out / f"surface_{surface.name}.{kind}" for kind in ("png", "json"))
    plot(picture, surface, paths)
    ends = [
        {"optimizer": path.optimizer, "rate": path.rate, "point": path.points[-1], "value": path.values[-1]}
        for path in paths
    ]
    dump(numbers, {"formula": surface.formula, "start": surface.start, "steps": steps, "ends": ends})
    print(f"wrote {picture} and {numbers}\n")
    return paths


def main(argv: Sequence[str] | None = None) -> Mapping[str, Sequence[Trajectory]]:
    parser = Parser(prog="surface.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="for the pictures and numbers (default: out)",
    )
    add("--quick", action="store_true", help="a tenth of the steps")
    given = parser.parse_args(argv)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        return {surface.name: run(surface, given.out, quick=given.quick) for surface in SURFACES}
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
