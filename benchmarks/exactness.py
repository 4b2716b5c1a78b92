"""How far Adam's update is from exact arithmetic.

    python benchmarks/exactness.py [--steps N] [--coordinates N] [--out DIR]

Random gradients, coordinates whose scales span e^-9 to e^9; the relative L2 error of the update at some steps against
a float64 transcription that reads the very same float32 gradients and the very same hyperparameters.
"""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from measure import scripts

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


def compare(
    make_tx: Callable[[dict[str, typing.Any]], optax.GradientTransformation],
    hyperparameters: dict[str, Hyperparameter],
    exact: Exact,
    *,
    steps: int,
    coordinates: int,
    seed: int = 0,
) -> Errors:
    """Runs `make_tx(hyperparameters)` beside the transcription; those that are arrays reach it as tracers of one jit.

    The relative L2 error over the coordinates by step.
    """
    grads = gradients(steps, coordinates, seed)
    arrays = {name: value for name, value in hyperparameters.items() if isinstance(value, jax.Array)}
    program = jax.jit(lambda arrays, grads: updates(make_tx({**hyperparameters, **arrays}), grads))
    found = np.asarray(program(arrays, grads))
    right = oracle(grads, exact, tuple(time for time in TIMES if time <= steps))

    norm = np.linalg.norm
    return {step: float(norm(found[step - 1] - update) / norm(update)) for step, update in right.items()}


def measure(
    make_tx: Callable[[Hyperparameter], optax.GradientTransformation],
    b2: Hyperparameter,
    oracle_b2: float,
    steps: int = 10000,
    coordinates: int = 1000,
) -> Errors:
    """Relative L2 error of the update of `make_tx(b2)` by step.

    `b2` is a number or a schedule, or an array, which `make_tx` then gets as a tracer; `oracle_b2` is its value. The
    other hyperparameters of the transcription are Adam's defaults as Python numbers, and a rate of 1e-3.
    """
    sizes = {"steps": steps, "coordinates": coordinates}
    return compare(lambda given: make_tx(given["b2"]), {"b2": b2}, Exact(b2=oracle_b2), **sizes)


def constant(value: jax.typing.ArrayLike) -> Callable[[jax.Array], jax.typing.ArrayLike]:
    """A schedule of one value."""
    return lambda count: value


def float32(exact: Exact) -> Exact:
    """The values that float32 arrays hold."""
    return Exact(**{name: float(np.float32(value)) for name, value in dataclasses.asdict(exact).items()})


#: The ways of giving hyperparameters: what the transformation gets, and the values that this stands for.
FORMS: dict[str, tuple[Callable[[float], Hyperparameter], Callable[[Exact], Exact]]] = {
    "numbers": (lambda value: value, lambda exact: exact),
    "schedules of numbers": (constant, lambda exact: exact),
    "schedules of float32 arrays": (lambda value: constant(np.float32(value)), float32),
    "traced arrays": (jnp.float32, float32),
}
PEERS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[str, ...]]] = {
    "adam_fn": (adam_fn.adam, tuple(FORMS)),
    # optax.adam takes a schedule for the rate alone.
    "optax": (optax.adam, ("numbers", "traced arrays")),
}


def measured(sizes: dict[str, int]) -> Iterator[scripts.Row]:
    """A row for every β₂, peer and form."""
    for b2, (peer, (make_tx, forms)) in itertools.product(B2, PEERS.items()):
        for name in forms:
            give, values = FORMS[name]
            exact = Exact(b2=b2)
            given = {key: give(value) for key, value in dataclasses.asdict(exact).items()}
            found = compare(lambda given, make_tx=make_tx: make_tx(**given), given, values(exact), **sizes)
            yield {"b2": b2, "peer": peer, "form": name, "errors": found}


def main() -> None:
    parser = scripts.parser(__doc__)
    sizes = {"steps": 10000, "coordinates": 1000, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in sizes}
    rows = scripts.collected(measured(sizes))
    if options.out:
        scripts.write(options.out / "exactness.json", {**scripts.about(), **sizes, "rows": rows})


if __name__ == "__main__":
    main()
