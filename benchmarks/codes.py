"""Storages of Adam's two moments, of this package and of other libraries: how far the updates are from exact Adam's.

    python benchmarks/codes.py [--quick] [--only TEXT ...] [--gradients DIR] [--check] [--out DIR]

Ours run as they are, `adam_fn.adam` in float32 with ε = 0; those of other libraries are emulated in float64
(`emulation/peers.py`), but for optax's own; exact is Adam in float64 with ε = 0, and 0/0 counts as 0. The rate is 1,
β₁ = 0.9 and β₂ = 0.999 unless a scenario says otherwise, the others' ε 1e-8 of the gradients' scale σ. `scenarios` has
the gradients, each element's with a scale of lognormal(0.7) times σ, and the measures of the updates.
Those of the scenario `recorded` come from a character transformer while it trains, with `--gradients DIR`, which keeps
them; recording takes minutes.
"""

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from emulation import peers
from exactness import updates
from measure import scripts
from training import tasks

import adam_fn

B1, B2 = 0.9, 0.999
SLOW = 0.9999  # AdEMAMix's β₃
LAST = 200

Random: TypeAlias = np.random.Generator
Array: TypeAlias = npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A way of storing the moments; `optimizer` makes Adam from β₁, β₂ and ε, with the rate 1."""

    name: str
    bytes: float
    ours: bool
    optimizer: Callable[[float, float, float], optax.GradientTransformation]


class Sizes(NamedTuple):
    """The numbers of steps and elements; some scenarios have fewer steps."""

    steps: int = 2000
    steady: int = 1000
    slow: int = 1500
    elements: int = 2048


QUICK = Sizes(800, 300, 300, 512)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Gradients, float32[steps, elements], and a measure that compares their updates with the right ones."""

    name: str
    case: str
    gradients: Callable[[Random, int, int], Array]
    measure: Callable[[Array, Array], dict[str, float]]
    b1: float = B1
    b2: float = B2
    sigma: float = 1.0


def emulated(name: str, mu: peers.Moment, nu: peers.Moment) -> Storage:
    """The emulated storage of another library."""
    return Storage(name, mu.bytes + nu.bytes, False, functools.partial(peers.adam, mu, nu))


EXACT = Storage("exact", 16, False, lambda b1, b2, _: peers.adam(peers.EXACT, peers.EXACT, b1, b2, 0.0))


def storages() -> Iterator[Storage]:
    """Ours, optax's own (which rounds β₁m to bfloat16 as well), then the emulations."""
    params = jnp.zeros(2**20)
    for name in get_args(adam_fn.StorageName):
        optimizer = functools.partial(lambda name, b1, b2, _: adam_fn.adam(1.0, b1, b2, eps=0.0, storage=name), name)
        size = adam_fn.state_bytes(optimizer(B1, B2, 0), params) / params.size
        yield Storage(name, round(size, 3), True, optimizer)
    low = functools.partial(optax.adam, 1.0, mu_dtype="bfloat16")
    yield Storage("optax, mu_dtype=bfloat16", 6, False, low)
    yield from itertools.starmap(emulated, ((name, *moments) for name, moments in peers.PEERS.items()))


def scales(random: Random, elements: int, spread: float = 0.7) -> npt.NDArray[np.float64]:
    """A scale for each element."""
    return np.exp(spread * random.standard_normal(elements))


def normal(random: Random, steps: int, elements: int, *, spread: float = 0.7) -> Array:
    return random.standard_normal((steps, elements)) * scales(random, elements, spread)


def sparse(random: Random, steps: int, elements: int) -> Array:
    """Gradients at 1% of the steps of each element, without a scale of its own."""
    return random.standard_normal((steps, elements)) * (random.random((steps, elements)) < 0.01)


def steady(random: Random, steps: int, elements: int, *, noise: float) -> Array:
    """Each element's gradient is its scale times 1 + noise."""
    return (1 + noise * random.standard_normal((steps, elements))) * scales(random, elements)


def quiet(random: Random, steps: int, elements: int) -> Array:
    """Every fourth element's gradient becomes 0 after step 10."""
    found = normal(random, steps, elements)
    found[10:, ::4] = 0
    return found


def falling(random: Random, steps: int, elements: int) -> Array:
    """The gradient falls tenfold every quarter of the steps, so that the right update is far below the rate."""
    return 10 ** (-4 * np.arange(steps)[:, None] / steps) * scales(random, elements)


def periodic(random: Random, steps: int, elements: int, *, frequency: float) -> Array:
    """Gradients of one frequency, with a phase of its own for each element."""
    turns = frequency * np.arange(steps)[:, None] + random.random(elements)
    return np.sin(2 * np.pi * turns) * scales(random, elements)


def recorded(folder: pathlib.Path, steps: int, elements: int) -> Array:
    """Gradients of groups of 256 neighbours from eight weight matrices of the character transformer, as it trains.

    They are kept in the folder, and read from there if they exist.
    """
    rows, file = elements // tasks.GROUP, folder / "recorded.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(file, tasks.recorded(tasks.characters(), steps, rows))
    gradients = np.load(file)
    if gradients.shape != (steps, rows, tasks.GROUP):
        raise ValueError(f"{file} holds gradients of other sizes, {gradients.shape}")
    return gradients.reshape(steps, elements)


def errors(found: Array, exact: Array) -> dict[str, float]:
    """Measures of the last updates: relative L2 error, RMS and largest in units of exact Adam's, RMS of the error."""
    found, exact = found[-LAST:], exact[-LAST:]
    return {
        "error": rms(found - exact) / rms(exact),
        "rms": rms(found) / rms(exact),
        "largest": float(np.abs(found).max() / np.abs(exact).max()),
        "absolute": rms(found - exact),
    }


def late_errors(found: Array, exact: Array) -> dict[str, float]:
    """The RMS and mean error of the second half of the updates, in units of the rate."""
    error = (found - exact)[len(exact) // 2 :]
    return {"absolute": rms(error), "mean": float(error.mean())}


def mean_step(found: Array, exact: Array) -> dict[str, float]:
    """The mean of all updates, in units of the right one."""
    return {"step": float(found.mean() / exact.mean())}


def quiet_rows(found: Array, exact: Array) -> dict[str, float]:
    """The distance that elements without gradients moved, in units of the right one, and their last update."""
    found, exact = found[:, ::4], exact[:, ::4]
    return {"moved": rms(found.sum(0)) / rms(exact.sum(0)), "last": rms(found[-1])}


def rms(x: Array) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def scenarios(sizes: Sizes, folder: pathlib.Path | None = None) -> Iterator[Scenario]:
    """All scenarios but those of the slow moment."""
    for sigma in (1.0, 1e-3, 1e-6, 1e-9, 1e-15):
        yield Scenario("random", f"σ = {sigma:g}", normal, errors, sigma=sigma)
    yield Scenario("wide", "", functools.partial(normal, spread=2.5), errors)
    yield Scenario("sparse", "", sparse, errors)
    yield Scenario("β₁ = β₂ = 0.95", "", normal, errors, b1=0.95, b2=0.95)
    yield Scenario("β₁ = 0.99", "", normal, errors, b1=0.99)
    if folder is not None:
        gradients = recorded(folder, sizes.steps, 4 * sizes.elements)
        yield Scenario("recorded", "", lambda *_: gradients, errors)
    for noise, b1 in itertools.product((0, 1 / 3, 1, 3), (0.9, 0.95, 0.99)):
        name, made = "noisy" if noise else "steady", functools.partial(steady, noise=noise)
        yield Scenario(name, f"β₁ = {b1}, noise {noise:.2g}", made, mean_step, b1=b1)
    yield Scenario("quiet", "", quiet, quiet_rows)
    yield Scenario("falling", "", falling, late_errors)
    for period in (2, 3, 4, 5, 8):
        yield Scenario("periodic", f"period {period}", functools.partial(periodic, frequency=1 / period), errors)
    yield Scenario("golden", "", functools.partial(periodic, frequency=(5**0.5 - 1) / 2), errors)


@functools.partial(jax.jit, static_argnames=("storage", "b1", "b2"))
def trajectory(storage: Storage, b1: float, b2: float, eps: float, gradients: jax.Array) -> jax.Array:
    """The updates, [steps, elements], with the sign of the gradients."""
    return -updates(storage.optimizer(b1, b2, eps), gradients)


def made_by(storage: Storage, scenario: Scenario, gradients: Array) -> Array:
    """The updates of a storage: ours in float32, all others in float64."""
    with jax.enable_x64(not storage.ours):
        given = jnp.asarray(gradients, jnp.float32 if storage.ours else jnp.float64)
        return np.asarray(trajectory(storage, scenario.b1, scenario.b2, 1e-8 * scenario.sigma, given))


def compared(candidates: Iterable[Storage], scenario: Scenario, sizes: Sizes) -> Iterator[scripts.Row]:
    """A row for each storage."""
    random, steps = np.random.default_rng(0), sizes.steady if scenario.measure is mean_step else sizes.steps
    gradients = (scenario.sigma * scenario.gradients(random, steps, sizes.elements)).astype(np.float32)
    exact = made_by(EXACT, scenario, gradients)
    for storage in candidates:
        found = scenario.measure(made_by(storage, scenario, gradients), exact)
        yield {**about(storage), "scenario": scenario.name, "case": scenario.case, **found}


def about(storage: Storage) -> scripts.Row:
    return {"storage": storage.name, "bytes": storage.bytes, "ours": storage.ours}


@functools.partial(jax.jit, static_argnames="name")
def slow_moment(name: adam_fn.StorageName, gradients: jax.Array) -> jax.Array:
    """AdEMAMix's slow moment after the last step, in one of our storages."""
    tx, params = adam_fn.ademamix(1.0, b3=SLOW, storage=name), jnp.zeros_like(gradients[0])
    state, _ = jax.lax.scan(lambda state, g: (tx.update(g, state, params)[1], None), tx.init(params), gradients)
    return adam_fn.diagnostics.moments(tx, state, params)["slow"]


def slow(candidates: Iterable[Storage], sizes: Sizes) -> Iterator[scripts.Row]:
    """The slow moment's mean, in units of the exact one's, for each of our storages."""
    weights = (1 - SLOW) * SLOW ** np.arange(sizes.slow)[::-1]
    for noise in (0, 0.3, 1, 10):
        gradients = steady(np.random.default_rng(0), sizes.slow, sizes.elements, noise=noise).astype(np.float32)
        for storage in (storage for storage in candidates if storage.ours):
            mean = float(slow_moment(cast(adam_fn.StorageName, storage.name), jnp.asarray(gradients)).mean())
            ratio = mean / float((weights @ gradients.astype(np.float64)).mean())
            yield {**about(storage), "scenario": "slow", "case": f"noise {noise:g}", "step": ratio}


class Bar(NamedTuple):
    """The largest distance of a number from the right one, for each of the storages `BARRED`."""

    scenario: str
    metric: str
    most: tuple[float, float, float]
    right: float = 0.0


BARRED = ("bfloat16", "24bit", "16bit")
ALIKE = ("random", "wide", "recorded")
BARS = (
    *(Bar(name, "error", (0.016, 0.040, 0.15)) for name in ALIKE),
    *(Bar(name, "rms", (0.01, 0.01, 0.03), right=1) for name in ALIKE),
    *(Bar(name, "largest", (1.1, 1.1, 1.25)) for name in ALIKE),
    Bar("sparse", "error", (0.016, 0.035, 0.10)),
    Bar("β₁ = β₂ = 0.95", "error", (0.016, 0.055, 0.165)),
    Bar("β₁ = 0.99", "error", (0.02, 0.11, 0.26)),
    Bar("steady", "step", (0.002, 0.01, 0.02), right=1),
    Bar("noisy", "step", (0.002, 0.01, 0.025), right=1),
    Bar("quiet", "moved", (0.02, 0.02, 0.02), right=1),
    Bar("quiet", "last", (1e-30, 1e-30, 1e-30)),  # Where subnormal numbers are not 0, m may stop at one.
    Bar("falling", "absolute", (0.004, 0.004, 0.02)),
    Bar("falling", "mean", (0.0004, 0.0004, 0.002)),
    Bar("slow", "step", (0.02, 0.02, 0.02), right=1),
)
PERIODIC = 2  # The largest error with periodic gradients, in units of that with random ones.


def misses(rows: Iterable[scripts.Row]) -> list[str]:
    """The bars that our storages miss, each with the number and the limit."""
    rows, found = list(rows), []
    for place, storage in enumerate(BARRED):
        own = [row for row in rows if row["storage"] == storage]
        random = [row["error"] for row in own if (row["scenario"], row["case"]) == ("random", "σ = 1")]
        periodic = [Bar(name, "error", (PERIODIC * error,) * 3) for name in ("periodic", "golden") for error in random]
        for bar in (*BARS, *periodic):
            for row in (row for row in own if row["scenario"] == bar.scenario):
                value, most = row[bar.metric], bar.most[place]
                if not abs(value - bar.right) <= most:
                    name = f"{storage}, {bar.scenario} {row['case']}".rstrip()
                    within = f"{bar.right:g} ± {most:.3g}" if bar.right else f"at most {most:.3g}"
                    found.append(f"{name}: {bar.metric} {value:.4g}, not {within}")
    return found


def main() -> None:
    quick, only = "few steps and elements, to try the script", "part of a storage's name"
    parser = scripts.parser(__doc__, quick=quick, only=only)
    parser.add_argument("--check", action="store_true", help="exit 1 when a storage of ours misses a bar")
    parser.add_argument("--gradients", type=pathlib.Path, help="folder that keeps recorded gradients")
    options = parser.parse_args()
    sizes, every = QUICK if options.quick else Sizes(), {storage.name: storage for storage in storages()}
    chosen = [every[name] for name in scripts.selected(every, options.only)]
    updated = (row for scenario in scenarios(sizes, options.gradients) for row in compared(chosen, scenario, sizes))
    rows = scripts.collected(itertools.chain(updated, slow(chosen, sizes)))
    scripts.save(options, "codes", rows, **sizes._asdict(), last=LAST, b1=B1, b2=B2)
    if options.check and (missed := misses(rows)):
        sys.exit("\n".join(["bars missed:", *missed]))


if __name__ == "__main__":
    main()
