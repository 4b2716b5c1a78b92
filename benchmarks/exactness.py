"""How far Adam's update is from exact arithmetic.

    python benchmarks/exactness.py [--steps N] [--coordinates N] [--out DIR]

Random gradients, coordinates whose scales span e^-9 to e^9; the relative L2 error of the update at some steps against
a float64 transcription that reads the very same float32 gradients and the very same hyperparameters.
"""

import argparse
import dataclasses
import json
import pathlib
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from measure import machine

import adam_fn

TIMES = (1, 2, 10, 100, 1000, 10000)
B2 = (0.999, 0.9999, 0.99999, 0.999999)

Hyperparameter = float | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike]
Errors = dict[int, float]


@dataclasses.dataclass(frozen=True)
class Exact:
    """The hyperparameters of the float64 transcription."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


def gradients(steps: int, coordinates: int, seed: int) -> npt.NDArray[np.float32]:
    """Normal random gradients, float32[steps, coordinates], each coordinate with a scale of its own."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.uniform(-9, 9, coordinates))
    return (random.standard_normal((steps, coordinates)) * scales).astype(np.float32)


def oracle(grads: npt.NDArray[np.float32], exact: Exact, times: tuple[int, ...]) -> dict[int, npt.NDArray[np.float64]]:
    """Algorithm 1 of arXiv:1412.6980 in float64: the updates at `times`."""
    mu = nu = np.zeros(grads.shape[1])
    updates = {}
    for step, grad in enumerate(grads.astype(np.float64), 1):
        mu = exact.b1 * mu + (1 - exact.b1) * grad
        nu = exact.b2 * nu + (1 - exact.b2) * grad**2
        if step in times:
            mu_hat, nu_hat = mu / (1 - exact.b1**step), nu / (1 - exact.b2**step)
            updates[step] = -exact.learning_rate * mu_hat / (np.sqrt(nu_hat) + exact.eps)
    return updates


def updates(tx: optax.GradientTransformation, grads: jax.Array) -> jax.Array:
    """The updates of all steps, one scan."""
    params = jnp.zeros(grads.shape[1:], grads.dtype)

    def step(state: optax.OptState, grad: jax.Array) -> tuple[optax.OptState, optax.Updates]:
        update, state = tx.update(grad, state, params)
        return state, update

    _, found = jax.lax.scan(step, tx.init(params), grads)
    return typing.cast(jax.Array, found)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The updates found, [steps, coordinates], and the exact ones by step."""

    found: npt.NDArray[np.float32]
    exact: dict[int, npt.NDArray[np.float64]]

    def errors(self, order: float = 2) -> Errors:
        """Relative error over the coordinates, by step: the L2 norm, or with `order=np.inf` the largest coordinate."""
        return {
            step: float(np.linalg.norm(self.found[step - 1] - update, order) / np.linalg.norm(update, order))
            for step, update in self.exact.items()
        }


def compare(
    make_tx: Callable[[dict[str, typing.Any]], optax.GradientTransformation],
    hyperparameters: dict[str, Hyperparameter],
    exact: Exact,
    *,
    steps: int,
    coordinates: int,
    seed: int,
) -> Comparison:
    """Run `make_tx(hyperparameters)` beside the transcription; those that are arrays reach it as tracers of one jit."""
    grads = gradients(steps, coordinates, seed)
    arrays = {name: value for name, value in hyperparameters.items() if isinstance(value, jax.Array)}
    others = {name: value for name, value in hyperparameters.items() if name not in arrays}
    program = jax.jit(lambda arrays, grads: updates(make_tx({**others, **arrays}), grads))
    found = np.asarray(program(arrays, grads))
    return Comparison(found, oracle(grads, exact, tuple(time for time in TIMES if time <= steps)))


def measure(
    make_tx: Callable[[Hyperparameter], optax.GradientTransformation],
    b2: Hyperparameter,
    oracle_b2: float,
    steps: int = 10000,
    coordinates: int = 1000,
    *,
    seed: int = 0,
) -> Errors:
    """Relative L2 error of the update of `make_tx(b2)` by step.

    `b2` is a number or a schedule, or an array, which `make_tx` then gets as a tracer; `oracle_b2` is its value. The
    other hyperparameters of the transcription are Adam's defaults as Python numbers, and a rate of 1e-3.
    """
    sizes = {"steps": steps, "coordinates": coordinates, "seed": seed}
    return compare(lambda given: make_tx(given["b2"]), {"b2": b2}, Exact(b2=oracle_b2), **sizes).errors()


def constant(value: jax.typing.ArrayLike) -> Callable[[jax.Array], jax.typing.ArrayLike]:
    """A schedule of one value."""
    return lambda count: value


def float32(exact: Exact) -> Exact:
    """The values that float32 arrays hold."""
    return Exact(**{name: float(np.float32(value)) for name, value in dataclasses.asdict(exact).items()})


@dataclasses.dataclass(frozen=True)
class Form:
    """A way of giving hyperparameters: what the transformation gets, and the values that this stands for."""

    give: Callable[[float], Hyperparameter]
    exact: Callable[[Exact], Exact]


FORMS = {
    "numbers": Form(lambda value: value, lambda exact: exact),
    "schedules of numbers": Form(constant, lambda exact: exact),
    "schedules of float32 arrays": Form(lambda value: constant(np.float32(value)), float32),
    "traced arrays": Form(jnp.float32, float32),
}
PEERS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[str, ...]]] = {
    "adam_fn": (adam_fn.adam, tuple(FORMS)),
    # optax.adam takes a schedule for the rate alone.
    "optax": (optax.adam, ("numbers", "traced arrays")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--coordinates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="folder for exactness.json")
    options = parser.parse_args()

    times = [time for time in TIMES if time <= options.steps]
    print(f"relative L2 error of the update, {options.coordinates:,} coordinates; {machine.device()}")
    print(f"{'b2':<9}{'':<9}{'hyperparameters':<29}" + "".join(f"{f't={time:,}':>10}" for time in times))
    sizes = {"steps": options.steps, "coordinates": options.coordinates, "seed": options.seed}
    rows = []
    for b2 in B2:
        exact = Exact(b2=b2)
        for peer, (make_tx, forms) in PEERS.items():
            for name in forms:
                form = FORMS[name]
                given = {key: form.give(value) for key, value in dataclasses.asdict(exact).items()}
                found = compare(lambda given, make_tx=make_tx: make_tx(**given), given, form.exact(exact), **sizes)
                kinds = {"errors": found.errors(), "largest": found.errors(np.inf)}
                print(
                    f"{b2:<9}{peer:<9}{name:<29}" + "".join(f"{kinds['errors'][time]:>10.1e}" for time in times),
                    flush=True,
                )
                rows.append({"b2": b2, "peer": peer, "form": name, **kinds})
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = {"device": machine.device(), "versions": machine.versions(), "date": machine.now()}
        (options.out / "exactness.json").write_text(json.dumps({**about, **sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
