"""What storage costs in quality: two networks trained with parameters and moments of fewer bytes.

    python benchmarks/precision.py [--quick] [--only LABEL]... [--workload NAME] [--seeds N] [--again] [--out DIR]

The character transformer of `char_model` on tinyshakespeare, the same trained further at a low rate, and the MLP
784-1000-1000-10 on MNIST, for every entry of `CONFIGURATIONS` and several seeds. The runs of one seed begin with the
same float32 numbers, rounded where the parameters are bfloat16, and see the same batches; optimizer, schedule and
number of steps are the same for all, with a rate that is the best of a short search for float32. Writes
precision-<device>.json after every run, so that it can be interrupted (runs that it holds are not repeated while the
settings are the same), and a plot of the same name.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from measure import machine
from training import char_model
from training.tasks import POINTS, Data, Params, Workload, characters, images

import adam_fn
from adam_fn import StorageLike

Carry: typing.TypeAlias = tuple[Params, optax.OptState]


class Adam(typing.Protocol):
    """``adam_fn.adamw`` with a workload's hyperparameters, open to `storage`."""

    def __call__(self, *, storage: StorageLike | None = None) -> optax.GradientTransformation: ...


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The dtype of the parameters, and of the gradients that come from the network, and what is made of Adam."""

    dtype: str
    make: Callable[[Adam], optax.GradientTransformation]


BASE = "float32"
CONFIGURATIONS = {
    BASE: Configuration("float32", lambda adam: adam()),
    "bfloat16": Configuration("bfloat16", lambda adam: adam()),
    "bfloat16, stochastic rounding": Configuration("bfloat16", lambda adam: adam_fn.stochastic_rounding(adam())),
    "bfloat16, stochastic rounding, 16-bit state": Configuration(
        "bfloat16", lambda adam: adam_fn.stochastic_rounding(adam(storage="16bit"))
    ),
    "bfloat16, 32-bit masters": Configuration("bfloat16", lambda adam: adam_fn.master_weights(adam(), bits=16)),
    "bfloat16, 24-bit masters": Configuration("bfloat16", lambda adam: adam_fn.master_weights(adam(), bits=8)),
    "bfloat16, 24-bit masters, 16-bit state": Configuration(
        "bfloat16", lambda adam: adam_fn.master_weights(adam(storage="16bit"), bits=8)
    ),
    "bfloat16 moments": Configuration("float32", lambda adam: adam(storage="bfloat16")),
    "24-bit state": Configuration("float32", lambda adam: adam(storage="24bit")),
    "16-bit state": Configuration("float32", lambda adam: adam(storage="16bit")),
}


def tuned(quick: bool = False, text: char_model.Text | None = None) -> Workload:
    """`characters` trained to its end in float32, then some more steps at a low rate, as in fine-tuning.

    At this rate most updates are below half a unit of a bfloat16 parameter's last place.
    """
    base = characters(quick, text)
    done, steps, rate = base.settings.steps, *((96, 1e-3) if quick else (480, 1e-4))

    @functools.cache
    def trained(seed: int) -> Params:
        return jax.device_get(Program(base, CONFIGURATIONS[BASE]).run(seed, lambda _: None).params)

    return dataclasses.replace(
        base,
        name="tuned",
        settings=dataclasses.replace(base.settings, steps=steps, rate=rate),
        init=lambda seed: jax.tree.map(jnp.array, trained(seed)),
        batch=lambda data, seed, step: base.batch(data, seed, step + done),
    )


WORKLOADS = {"char": characters, "tuned": tuned, "mnist": images}


class Run(typing.TypedDict):
    """One training. `loss` and `accuracy` are of the validation part at the end, `train` the mean of the last twelfth's
    training losses, `curve` the validation loss by step; `bytes` are a parameter's, `seconds` those of the steps.
    """

    workload: str
    label: str
    seed: int
    loss: float
    accuracy: float | None
    train: float
    curve: list[tuple[int, float]]
    bytes: dict[str, float]
    seconds: float
    date: str


class Training(typing.NamedTuple):
    """What a run gives: the final parameters, the curve, the accuracy, the last training loss, seconds of the steps."""

    params: Params
    curve: list[tuple[int, float]]
    accuracy: float
    train: float
    seconds: float


class Program:
    """The compiled training and evaluation of one configuration, for any seed."""

    def __init__(self, workload: Workload, configuration: Configuration) -> None:
        self.workload, self.dtype = workload, configuration.dtype
        self.tx = configuration.make(workload.settings.adam)
        self.length = workload.settings.steps // POINTS

        def step(data: Data, seed: jax.Array, carry: Carry, number: jax.Array) -> tuple[Carry, jax.Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(workload.loss)(params, workload.batch(data, seed, number))
            # Without the barrier the compiler is free to leave out the rounding of the gradients to bfloat16.
            grads = jax.lax.optimization_barrier(grads)
            updates, state = self.tx.update(grads, state, params)
            return (typing.cast(Params, optax.apply_updates(params, updates)), state), loss

        def chunk(carry: Carry, data: Data, seed: jax.Array, first: jax.Array) -> tuple[Carry, jax.Array]:
            return jax.lax.scan(functools.partial(step, data, seed), carry, first + jnp.arange(self.length))

        params = jax.eval_shape(self.start, workload.init(0))
        shapes = ((params, jax.eval_shape(self.tx.init, params)), workload.data, jnp.int32(0), jnp.int32(0))
        self.bytes = self._bytes(params)
        self.chunk = jax.jit(chunk, donate_argnums=0).lower(*shapes).compile()
        self.evaluate = jax.jit(workload.evaluate).lower(params, workload.data).compile()

    def start(self, params: Params) -> Params:
        """The initial parameters of the configuration."""
        return {name: leaf.astype(self.dtype) for name, leaf in params.items()}

    def _bytes(self, params: typing.Any) -> dict[str, float]:  # noqa: ANN401 (shapes)
        """Bytes per parameter, of what lives at the end of the backward pass; a gradient has its parameter's dtype."""
        size = jnp.dtype(self.dtype).itemsize
        state = adam_fn.state_bytes(self.tx, params) / self.workload.settings.parameters
        return {"parameter": size, "gradient": size, "state": state}

    def run(self, seed: int, advance: Callable[[int], object]) -> Training:
        """Trains; `advance` is told of the steps that are done."""
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
            advance(self.length)
        return Training(carry[0], curve, float(accuracy), float(np.mean(losses)), seconds)


class Results:
    """The runs of one file, written after each."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[Run] = found.get("runs", [])
        self.settings: dict[str, dict[str, float]] = found.get("settings", {})

    def begin(self, workload: Workload) -> None:
        """Forget the workload's runs that were made with other settings, and those of no configuration."""
        settings = dataclasses.asdict(workload.settings)
        self.runs = [run for run in self.runs if run["label"] in CONFIGURATIONS]
        if self.settings.get(workload.name) != settings:
            self.runs = [run for run in self.runs if run["workload"] != workload.name]
        self.settings[workload.name] = settings

    def find(self, workload: str, label: str) -> list[Run]:
        return [run for run in self.runs if (run["workload"], run["label"]) == (workload, label)]

    def add(self, run: Run) -> None:
        """Replaces the run of the same workload, label and seed."""
        keys = ("workload", "label", "seed")
        self.runs = [old for old in self.runs if any(old[key] != run[key] for key in keys)] + [run]
        about = {"device": machine.device(), "versions": machine.versions(), "date": machine.now()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({**about, "settings": self.settings, "runs": self.runs}, indent=1) + "\n")
        part.replace(self.path)


def measure(workload: Workload, labels: list[str], seeds: int, results: Results, again: bool = False) -> None:
    """Every configuration of the seed 0, then of the next; those that `results` has are left out, unless `again`."""
    results.begin(workload)
    program = functools.cache(lambda label: Program(workload, CONFIGURATIONS[label]))
    done = {(label, run["seed"]) for label in labels for run in results.find(workload.name, label) if not again}
    missing = [(label, seed) for seed in range(seeds) for label in labels if (label, seed) not in done]
    with tqdm.tqdm(total=len(missing) * workload.settings.steps, unit="step", disable=None) as bar:
        for label, seed in missing:
            bar.set_description(f"{workload.name}: {label}, seed {seed}")
            _, curve, accuracy, train, seconds = program(label).run(seed, bar.update)
            results.add({
                "workload": workload.name, "label": label, "seed": seed, "loss": curve[-1][1],
                "accuracy": None if np.isnan(accuracy) else accuracy, "train": train, "curve": curve,
                "bytes": program(label).bytes, "seconds": seconds, "date": machine.now(),
            })  # fmt: skip
    show(workload, results)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, if there is anything to spread."""
    if not values:
        return ""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def show(workload: Workload, results: Results) -> None:
    """A line a configuration."""
    print(f"{workload.name}: loss in nats, mean ± standard deviation over the seeds; bytes per parameter")
    print(f"{'':<43}{'validation':>18}{'train':>18}{'accuracy':>18}{'bytes':>8}{'ms/step':>9}")
    for label in CONFIGURATIONS:
        if found := results.find(workload.name, label):
            columns = ([run[column] for run in found] for column in ("loss", "train", "accuracy"))
            spreads = "".join(f"{spread([value for value in column if value is not None]):>18}" for column in columns)
            milliseconds = statistics.median(run["seconds"] for run in found) / workload.settings.steps * 1e3
            print(f"{label:<43}{spreads}{sum(found[0]['bytes'].values()):>8.3f}{milliseconds:>9.1f}")


COLOURS = ("#000000", "#d55e00", "#e69f00", "#f0c808", "#0072b2", "#56b4e9", "#11a579", "#009e73", "#cc79a7", "#7f3c8d")


def plot(results: Results, path: pathlib.Path) -> None:
    """A column a workload: the means of the curves, and below them what is above float32's, each seed beside its own.

    The grey band is float32's standard deviation over the seeds, around its mean.
    """
    import matplotlib  # noqa: PLC0415 (optional)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    names = [name for name in results.settings if results.find(name, BASE)]
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(7 * len(names), 9), squeeze=False, sharex="col", layout="constrained"
    )
    for (top, bottom), name in zip(axes.T, names, strict=True):
        base = {run["seed"]: np.array(run["curve"]) for run in results.find(name, BASE)}
        steps = next(iter(base.values()))[:, 0]
        band = np.std([curve[:, 1] for curve in base.values()], axis=0, ddof=min(1, len(base) - 1))
        bottom.fill_between(steps, -band, band, color="0.85", label="± standard deviation of float32's seeds")
        for (label, configuration), colour in zip(CONFIGURATIONS.items(), COLOURS, strict=True):
            runs = [run for run in results.find(name, label) if run["seed"] in base]
            if not runs:
                continue
            losses = np.array([run["curve"] for run in runs])[..., 1]
            above = losses - np.array([base[run["seed"]][:, 1] for run in runs])
            style = {"color": colour, "linestyle": "-" if configuration.dtype == "float32" else "--", "label": label}
            top.plot(steps, losses.mean(0), **style)
            bottom.plot(steps, above.mean(0), marker=".", **style)
        top.set_title(f"{name}, {results.settings[name]['parameters']:,} parameters")
        top.set_ylabel("validation loss, nats")
        bottom.set_ylabel("above float32's")
        bottom.set_xlabel("step")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(machine.device(), fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def selected(parts: list[str]) -> list[str]:
    """The labels that are one of `parts`; a part that is no label stands for all that have it in them."""
    meant = {name for part in parts for name in ([part] if part in CONFIGURATIONS else CONFIGURATIONS) if part in name}
    return [label for label in CONFIGURATIONS if not parts or label in meant]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks and few steps, about a minute")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="a label or a part; repeatable")
    parser.add_argument("--workload", choices=list(WORKLOADS), help="one of them alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="repeat the runs that the file has")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for JSON and plot")
    options = parser.parse_args()

    labels = selected(options.only)
    if not labels:
        parser.error(f"no label has {' or '.join(options.only)} in it; there are: {'; '.join(CONFIGURATIONS)}")
    path = options.out / f"precision-{'quick-' if options.quick else ''}{machine.slug()}.json"
    results = Results(path)
    for name in [options.workload] if options.workload else WORKLOADS:
        measure(WORKLOADS[name](options.quick), labels, options.seeds, results, options.again)
    if any(run["label"] == BASE for run in results.runs):
        plot(results, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
