"""The cost of storage in quality: two networks trained with parameters and moments of fewer bytes.

    python benchmarks/precision.py [--quick] [--only LABEL]... [--seeds N] [--out DIR]

The character transformer of `training` on tinyshakespeare, the same trained further at a low rate, and the MLP
784-1000-1000-10 on MNIST, for every entry of `CONFIGURATIONS` and several seeds. The runs of one seed begin with the
same float32 numbers, rounded where the parameters are bfloat16, and see the same batches; optimizer, schedule and
number of steps are the same for all, with a rate that is the best of a short search for float32. Writes
precision-<device>.json after every run, so that it can be interrupted (runs that it holds are not repeated while the
settings are the same), and a plot of the same name.
"""

import dataclasses
import functools
import pathlib
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from matplotlib.figure import Figure
from measure import scripts
from training.tasks import POINTS, Carry, Data, Params, Workload, characters, images

import adam_fn


class Configuration(typing.NamedTuple):
    """The dtype of the parameters and of the gradients that come from the network; Adam's storage; what wraps it."""

    dtype: str
    storage: adam_fn.StorageLike | None = None
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx


BASE = "float32"
BITS8 = functools.partial(adam_fn.master_weights, bits=8)
CONFIGURATIONS = {
    BASE: Configuration("float32"),
    "bfloat16": Configuration("bfloat16"),
    "bfloat16, stochastic rounding": Configuration("bfloat16", None, adam_fn.stochastic_rounding),
    "bfloat16, stochastic rounding, 16-bit state": Configuration("bfloat16", "16bit", adam_fn.stochastic_rounding),
    "bfloat16, 32-bit masters": Configuration("bfloat16", None, adam_fn.master_weights),
    "bfloat16, 24-bit masters": Configuration("bfloat16", None, BITS8),
    "bfloat16, 24-bit masters, 16-bit state": Configuration("bfloat16", "16bit", BITS8),
    "bfloat16 moments": Configuration("float32", "bfloat16"),
    "24-bit state": Configuration("float32", "24bit"),
    "16-bit state": Configuration("float32", "16bit"),
}


def tuned(quick: bool = False) -> Workload:
    """`characters` trained to its end in float32, then some more steps at a low rate, as in fine-tuning.

    At this rate most updates are below half a unit of a bfloat16 parameter's last place.
    """
    base = characters(quick)
    done, steps, rate = base.settings.steps, *((96, 1e-3) if quick else (480, 1e-4))

    @functools.cache
    def trained(seed: int) -> Params:
        return jax.device_get(Program(base, CONFIGURATIONS[BASE]).run(seed)[0])

    return dataclasses.replace(
        base,
        name="tuned",
        settings=dataclasses.replace(base.settings, steps=steps, rate=rate),
        init=lambda seed: jax.tree.map(jnp.array, trained(seed)),
        batch=lambda data, seed, step: base.batch(data, seed, step + done),
    )


WORKLOADS = (characters, tuned, images)


class Program:
    """The compiled training and evaluation of one configuration, for any seed."""

    def __init__(self, workload: Workload, configuration: Configuration) -> None:
        self.workload, self.dtype = workload, configuration.dtype
        self.tx = configuration.wrap(workload.settings.adam(storage=configuration.storage))
        self.length = workload.settings.steps // POINTS

        def chunk(carry: Carry, data: Data, seed: jax.Array, first: jax.Array) -> tuple[Carry, jax.Array]:
            def step(carry: Carry, number: jax.Array) -> tuple[Carry, jax.Array]:
                carry, (loss, _) = workload.step(self.tx, data, seed, carry, number)
                return carry, loss

            return jax.lax.scan(step, carry, first + jnp.arange(self.length))

        params = jax.eval_shape(self.start, workload.init(0))
        shapes = ((params, jax.eval_shape(self.tx.init, params)), workload.data, jnp.int32(0), jnp.int32(0))
        # Bytes per parameter, of what lives at the end of the backward pass; a gradient has its parameter's dtype.
        size, state = jnp.dtype(self.dtype).itemsize, adam_fn.state_bytes(self.tx, typing.cast(optax.Params, params))
        self.bytes = {"parameter": size, "gradient": size, "state": state / workload.settings.parameters}
        self.chunk = jax.jit(chunk, donate_argnums=0).lower(*shapes).compile()
        self.evaluate = jax.jit(workload.evaluate).lower(params, workload.data).compile()

    def start(self, params: Params) -> Params:
        """The initial parameters of the configuration."""
        return {name: leaf.astype(self.dtype) for name, leaf in params.items()}

    def run(self, seed: int) -> tuple[Params, scripts.Row]:
        """Trains; returns the parameters and the row that is kept.

        `loss` and `accuracy` are of the validation part at the end, `train` the mean of the last twelfth's training
        losses, `curve` the validation loss by step; `bytes` are a parameter's, `seconds` those of the steps.
        """
        data = self.workload.data
        params = self.start(self.workload.init(seed))
        carry = (params, self.tx.init(params))
        curve: list[tuple[int, float]] = []
        seconds, accuracy, losses = 0.0, jnp.nan, jnp.nan
        for first in range(0, self.workload.settings.steps, self.length):
            begin = time.perf_counter()
            carry, losses = jax.block_until_ready(self.chunk(carry, data, jnp.int32(seed), jnp.int32(first)))
            seconds += time.perf_counter() - begin
            loss, accuracy = self.evaluate(carry[0], data)
            curve.append((first + self.length, float(loss)))
        found: scripts.Row = {"loss": curve[-1][1], "accuracy": None if np.isnan(accuracy) else float(accuracy)}
        found |= {"train": float(np.mean(losses)), "curve": curve, "bytes": self.bytes, "seconds": seconds}
        return carry[0], found | {"date": scripts.now()}


def measure(workload: Workload, labels: list[str], seeds: int, path: pathlib.Path) -> None:
    """Runs every configuration with seed 0, then with the next; runs that the file has are left out.

    The file is written after every run. Runs that were made with other settings, or of no configuration, are forgotten.
    """
    old, own = scripts.read(path), dataclasses.asdict(workload.settings)
    settings = old.get("settings", {})
    others = {name for name, kept in settings.items() if name != workload.name or kept == own}
    kept = [run for run in old.get("runs", []) if run["label"] in CONFIGURATIONS and run["workload"] in others]
    settings |= {workload.name: own}
    program = functools.cache(lambda label: Program(workload, CONFIGURATIONS[label]))
    done = {(run["label"], run["seed"]) for run in scripts.where(kept, workload=workload.name)}
    for seed in range(seeds):
        for label in (label for label in labels if (label, seed) not in done):
            run = {"workload": workload.name, "label": label, "seed": seed, **program(label).run(seed)[1]}
            kept += scripts.collected([run])
            scripts.write(path, {**scripts.about(), "settings": settings, "runs": kept})


COLOURS = ("#000000", "#d55e00", "#e69f00", "#f0c808", "#0072b2", "#56b4e9", "#11a579", "#009e73", "#cc79a7", "#7f3c8d")


def plot(path: pathlib.Path) -> None:
    """Draws a column per workload: mean curves, and below them the excess over float32 with the same seed.

    The grey band is float32's standard deviation over the seeds, around its mean.
    """
    found = scripts.read(path)

    def curves(workload: str, label: str) -> dict[int, npt.NDArray[np.floating]]:
        runs = scripts.where(found["runs"], workload=workload, label=label)
        return {run["seed"]: np.array(run["curve"]) for run in runs}

    names = [name for name in found["settings"] if curves(name, BASE)]
    figure = Figure(figsize=(7 * len(names), 9), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for (top, bottom), name in zip(axes.T, names, strict=True):
        base = curves(name, BASE)
        steps = next(iter(base.values()))[:, 0]
        band = np.std([curve[:, 1] for curve in base.values()], axis=0, ddof=min(1, len(base) - 1))
        bottom.fill_between(steps, -band, band, color="0.85", label="± standard deviation of float32's seeds")
        for (label, configuration), colour in zip(CONFIGURATIONS.items(), COLOURS, strict=True):
            if own := {seed: curve for seed, curve in curves(name, label).items() if seed in base}:
                style = {"color": colour, "linestyle": "-" if configuration.dtype == "float32" else "--"}
                mean = np.mean([curve[:, 1] for curve in own.values()], axis=0)
                above = np.mean([(curve - base[seed])[:, 1] for seed, curve in own.items()], axis=0)
                top.plot(steps, mean, label=label, **style)
                bottom.plot(steps, above, marker=".", label=label, **style)
        top.set(title=f"{name}, {found['settings'][name]['parameters']:,} parameters", ylabel="validation loss, nats")
        bottom.set(ylabel="above float32's", xlabel="step")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(found["device"], fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    quick = "small networks and few steps, about a minute"
    parser = scripts.parser(__doc__, quick=quick, only="a label or a part of one", out="out")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    labels = scripts.selected(CONFIGURATIONS, options.only)
    path = options.out / f"precision-{'quick-' if options.quick else ''}{scripts.slug()}.json"
    for workload in WORKLOADS:
        measure(workload(options.quick), labels, options.seeds, path)
    if any(run["label"] == BASE for run in scripts.read(path)["runs"]):
        plot(path)


if __name__ == "__main__":
    main()
