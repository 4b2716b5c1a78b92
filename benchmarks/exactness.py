"""The distance of Adam's update from exact arithmetic.

    python benchmarks/exactness.py [--quick] [--out DIR]

Random gradients, coordinates whose scales span e^-9 to e^9; the relative L2 error of the update at some steps against
a float64 transcription that reads the very same float32 gradients and the very same hyperparameters.
"""

import functools
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from emulation import peers
from measure import scripts

import adam_fn

TIMES = (1, 2, 10, 100, 1000, 10000)
B2 = (0.999, 0.9999, 0.99999, 0.999999)
SIZES = {"steps": 10000, "coordinates": 1000, "seed": 0}
QUICK = {"steps": 1000, "coordinates": 100, "seed": 0}
DEFAULTS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8}

Hyperparameter = float | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike]
Errors = dict[int, float]


def gradients(steps: int, coordinates: int, seed: int) -> npt.NDArray[np.float32]:
    """Normal random gradients, float32[steps, coordinates], each coordinate with a scale of its own."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.uniform(-9, 9, coordinates))
    return (random.standard_normal((steps, coordinates)) * scales).astype(np.float32)


def updates(tx: optax.GradientTransformation, grads: jax.Array) -> jax.Array:
    """The updates of all steps, one scan."""
    params = jnp.zeros(grads.shape[1:], grads.dtype)

    def step(state: optax.OptState, grad: jax.Array) -> tuple[optax.OptState, optax.Updates]:
        update, state = tx.update(grad, state, params)
        return state, update

    _, found = jax.lax.scan(step, tx.init(params), grads)
    return typing.cast(jax.Array, found)


def measure(
    make_tx: Callable[[typing.Any], optax.GradientTransformation],
    given: Hyperparameter | dict[str, Hyperparameter],
    exact: float | dict[str, float],
    steps: int = 10000,
    coordinates: int = 1000,
    seed: int = 0,
) -> Errors:
    """The relative L2 error by step of `make_tx(given)` beside Adam in float64.

    `given` is b2 or any hyperparameters; `make_tx` gets those that are arrays as tracers of one jit. `exact` has their
    values; other hyperparameters have the defaults.
    """
    exact = DEFAULTS | (exact if isinstance(exact, dict) else {"b2": exact})
    grads, (leaves, tree) = gradients(steps, coordinates, seed), jax.tree.flatten(given)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def run(arrays: dict[int, jax.Array], grads: jax.Array) -> jax.Array:
        return updates(make_tx(tree.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))), grads)

    found = np.asarray(jax.jit(run)(arrays, grads))
    with jax.enable_x64(True):
        tx = peers.adam(peers.EXACT, peers.EXACT, exact["b1"], exact["b2"], exact["eps"])
        program = jax.jit(functools.partial(updates, tx))
        right = exact["learning_rate"] * np.asarray(program(jnp.asarray(grads, jnp.float64)))
    times, norm = (time for time in TIMES if time <= steps), np.linalg.norm
    return {time: float(norm(found[time - 1] - right[time - 1]) / norm(right[time - 1])) for time in times}


#: The ways of giving a hyperparameter, and whether it is then rounded to float32.
FORMS: dict[str, tuple[Callable[[float], Hyperparameter], bool]] = {
    "numbers": (lambda value: value, False),
    "schedules of numbers": (lambda value: lambda count: value, False),
    "schedules of float32 arrays": (lambda value: lambda count: np.float32(value), True),
    "traced arrays": (jnp.float32, True),
}
#: optax.adam takes a schedule for the rate alone.
PEERS: dict[str, tuple[Callable[..., optax.GradientTransformation], dict[str, typing.Any]]] = {
    "adam_fn": (adam_fn.adam, FORMS),
    "optax": (optax.adam, {name: FORMS[name] for name in ("numbers", "traced arrays")}),
}


def measured(sizes: dict[str, int]) -> Iterator[scripts.Row]:
    """A row for every β₂, peer and form."""
    for b2 in B2:
        exact = DEFAULTS | {"b2": b2}
        rounded = {name: float(np.float32(value)) for name, value in exact.items()}
        for peer, (adam, forms) in PEERS.items():
            for form, (give, rounds) in forms.items():
                given = {name: give(value) for name, value in exact.items()}
                errors = measure(lambda given, adam=adam: adam(**given), given, rounded if rounds else exact, **sizes)
                yield {"b2": b2, "peer": peer, "form": form, "errors": errors}


def main() -> None:
    options = scripts.parser(__doc__, quick="1,000 steps of 100 coordinates").parse_args()
    sizes = QUICK if options.quick else SIZES
    rows = scripts.collected(measured(sizes))
    scripts.save(options, "exactness", rows, **sizes)


if __name__ == "__main__":
    main()
