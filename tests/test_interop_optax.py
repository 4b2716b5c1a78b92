"""optax's states to ours and back: training goes on as if nothing had happened."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import relative_error

import adam_fn
from adam_fn.interop import from_optax, to_optax

# Their complements are exact in float32: what optax loses elsewhere (`1 - float32(0.999)`) is not what is tested.
BETAS = {"b1": 0.875, "b2": 0.96875}
BEFORE, AFTER = 10, 100
PARAMS = {
    "dense": {"kernel": np.linspace(-1, 1, 3 * 40, dtype=np.float32).reshape(3, 40), "bias": np.ones(40, np.float32)},
    "scale": np.float32(2.0) * np.ones((), np.float32),
}
LABELS = {"dense": {"kernel": "decays", "bias": "stays"}, "scale": "stays"}
DECAYS = {"dense": {"kernel": True, "bias": False}, "scale": False}


def falling(count: Any) -> Any:
    return 1e-3 / (1 + 0.1 * count)


class Pair(NamedTuple):
    """An optimizer of optax, and ours of the same maths."""

    theirs: optax.GradientTransformation
    ours: optax.GradientTransformation


def chained() -> Pair:
    theirs = optax.chain(optax.identity(), optax.adamw(falling, **BETAS, weight_decay=0.02, mask=DECAYS))
    return Pair(theirs, adam_fn.adamw(falling, **BETAS, weight_decay=0.02, mask=DECAYS))


def partitioned() -> Pair:
    parts = {"decays": optax.adamw(1e-3, **BETAS, weight_decay=0.02), "stays": optax.adam(1e-3, **BETAS)}
    return Pair(optax.partition(parts, LABELS), adam_fn.adamw(1e-3, **BETAS, weight_decay=0.02, mask=DECAYS))


def frozen() -> Pair:
    stays = {"dense": {"kernel": False, "bias": True}, "scale": True}
    theirs = optax.chain(optax.masked(optax.adam(1e-3, **BETAS), DECAYS), optax.masked(optax.set_to_zero(), stays))
    return Pair(theirs, adam_fn.adam(1e-3, **BETAS, frozen=stays))


PAIRS = {
    "adam": Pair(optax.adam(1e-3, **BETAS), adam_fn.adam(1e-3, **BETAS)),
    "adam-b1_zero": Pair(optax.adam(1e-3, b1=0.0, b2=0.875), adam_fn.adam(1e-3, b1=0.0, b2=0.875)),
    "adamw-chain": chained(),
    "adamw-partition": partitioned(),
    "adam-masked": frozen(),
    "adam-inject": Pair(optax.inject_hyperparams(optax.adam)(falling, **BETAS), adam_fn.adam(falling, **BETAS)),
    "adam-finite": Pair(optax.apply_if_finite(optax.adam(1e-3, **BETAS), 3), adam_fn.adam(1e-3, **BETAS)),
    "nadam": Pair(optax.nadam(1e-3, **BETAS), adam_fn.nadam(1e-3, **BETAS)),
    "adamax": Pair(optax.adamax(1e-3, **BETAS), adam_fn.adamax(1e-3, **BETAS)),
    "amsgrad": Pair(
        optax.amsgrad(1e-3, **BETAS, bias_correction_nu=False), adam_fn.amsgrad(1e-3, **BETAS, bias_correction_nu=False)
    ),
    "radam": Pair(optax.radam(1e-3, **BETAS), adam_fn.radam(1e-3, **BETAS)),
    "adabelief": Pair(optax.adabelief(1e-3, **BETAS), adam_fn.adabelief(1e-3, **BETAS)),
    "yogi": Pair(optax.yogi(1e-3, **BETAS), adam_fn.yogi(1e-3, **BETAS)),
    "lion": Pair(optax.lion(1e-4, b1=0.75, b2=0.875), adam_fn.lion(1e-4, b1=0.75, b2=0.875)),
    # optax has 1 - b2 where b2 belongs: at a half, the same.
    "adan": Pair(optax.adan(1e-3, b2=0.5, b3=0.96875), adam_fn.adan(1e-3, b2=0.5, b3=0.96875, eps_root=1e-8)),
    "adopt": Pair(optax.contrib.adopt(1e-3, **BETAS), adam_fn.adopt(1e-3, **BETAS)),
    "ademamix": Pair(optax.contrib.ademamix(1e-3, **BETAS, b3=0.96875), adam_fn.ademamix(1e-3, **BETAS, b3=0.96875)),
}


def gradients(steps: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.standard_normal((steps, *p.shape)).astype(np.float32), PARAMS)


def run(txs: Any, params: Any, states: Any, grads: Any) -> tuple[Any, Any, Any]:
    """``(params, states, all updates)`` of several transformations, each by itself, in one program."""

    @jax.jit
    def scanned(params: Any, states: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, states = carry
            done = {name: tx.update(g, states[name], params[name]) for name, tx in txs.items()}
            updates = {name: u for name, (u, _) in done.items()}
            params = {name: optax.apply_updates(params[name], u) for name, u in updates.items()}
            return (params, {name: s for name, (_, s) in done.items()}), updates

        (params, states), updates = jax.lax.scan(step, (params, states), grads)
        return params, states, updates

    return scanned(params, states, grads)


class Run(NamedTuple):
    start: Any
    before: Any
    converted: Any
    updates: Any
    our_updates: Any
    params: Any
    after: Any
    ours: Any


@pytest.fixture(scope="module")
def ran() -> Run:
    """10 steps of optax, the conversion, and 100 steps of both."""
    theirs, ours = ({name: pair[i] for name, pair in PAIRS.items()} for i in range(2))
    params = dict.fromkeys(PAIRS, jax.tree.map(jnp.asarray, PARAMS))
    states = {name: tx.init(params[name]) for name, tx in theirs.items()}
    params, before, _ = run(theirs, params, states, gradients(BEFORE, 0))
    converted = {name: from_optax(tx, params[name], before[name]) for name, tx in ours.items()}
    _, after, updates = run(theirs, params, before, gradients(AFTER, 1))
    ended, ours_after, our_updates = run(ours, params, converted, gradients(AFTER, 1))
    return Run(params, before, converted, updates, our_updates, ended, after, ours_after)


def flat(tree: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on(name: str, ran: Run) -> None:
    # Two optimizers in float32, each with roundings of its own; a moment, count or weight that was wrong shows at 1e-3.
    assert relative_error(flat(ran.our_updates[name]), flat(ran.updates[name])) < 1e-6
