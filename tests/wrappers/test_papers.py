"""Optimizers that are not elementwise, against float64 transcriptions of their papers: SWATS, LAMB and others."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import relative_error
from helpers.states import slots_of
from oracles import wrappers as oracles

import adam_fn

STEPS = 300
RNG = np.random.default_rng(0)
SHAPES = {"a": (8, 5), "b": (7,), "zero": (3,)}
START = {name: RNG.standard_normal(shape) * (name != "zero") for name, shape in SHAPES.items()}
NOISE = {name: RNG.standard_normal((STEPS, *shape)) for name, shape in SHAPES.items()}
CURVATURE = {name: np.exp(RNG.uniform(-2, 1, shape)) for name, shape in SHAPES.items()}
TREE = jax.tree.structure(START)


def slope(scale: float) -> Callable[[int, oracles.Leaves], oracles.Leaves]:
    """The gradients of a quadratic with noise of this scale."""

    def grads(t: int, theta: oracles.Leaves) -> oracles.Leaves:
        return [CURVATURE[name] * p + scale * NOISE[name][t - 1] for name, p in zip(SHAPES, theta, strict=True)]

    return grads


def follow(tx: Any, scale: float, dtype: Any = jnp.float64, *, odd: bool = True) -> tuple[Any, Any]:
    """The parameters and the states after every step, with an empty leaf, None and an integer beside them."""

    @jax.jit
    def run(start: Any, curvature: Any, noise: Any) -> tuple[Any, Any]:
        others = {"empty": jnp.zeros((0, 2), dtype), "none": None, "whole": jnp.arange(3), "bool": jnp.ones(2, bool)}
        unlike = {"empty": others["empty"], "none": None, "whole": np.zeros(3, jax.dtypes.float0), "bool": None}

        def step(carry: Any, noise: Any) -> Any:
            params, state = carry
            grads = {"real": jax.tree.map(lambda c, p, n: c * p + scale * n, curvature, params["real"], noise)}
            updates, state = tx.update({**grads, **unlike} if odd else grads, state, params)
            if odd:
                assert updates["bool"] is None  # Like its gradient.
                updates["bool"] = jnp.zeros(2, bool)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        params = {"real": start, **(others if odd else {})}
        return jax.lax.scan(step, (params, tx.init(params)), noise)[1]

    with jax.enable_x64(dtype == jnp.float64):
        params, states = run(*jax.tree.map(lambda x: jnp.asarray(x, dtype), (START, CURVATURE, NOISE)))
    assert not odd or (np.asarray(params["whole"]) == np.arange(3)).all()
    return params["real"], states


def assert_follows(found: Any, expected: list[oracles.Leaves], tolerance: float) -> None:
    for i, leaf in enumerate(jax.tree.leaves(found)):
        assert relative_error(np.asarray(leaf), np.stack([step[i] for step in expected])) < tolerance


def assert_both_follow(tx: Any, expected: list[oracles.Leaves]) -> None:
    for dtype, tolerance in ((jnp.float64, 1e-9), (jnp.float32, 2e-5)):
        assert_follows(follow(tx, 0.3, dtype)[0], expected, tolerance)


WARM: Any = optax.linear_schedule(2e-2, 1e-3, STEPS)


@pytest.mark.quick("constant")
@pytest.mark.parametrize(("rate", "tolerance"), [(1e-2, 1e-5), (WARM, 1e-4)], ids=["constant", "schedule"])
def test_swats_follows_its_paper(rate: Any, tolerance: float) -> None:
    schedule: Any = rate if rate is WARM else optax.constant_schedule(rate)

    def alpha(t: int) -> float:
        return float(schedule(t - 1))

    options: Any = {"b1": 0.8, "b2": 0.99, "tolerance": tolerance}
    expected, switch = oracles.swats(slope(0.01), list(START.values()), STEPS, alpha, **options)
    assert 5 < switch.step < STEPS - 50, "the test must see both phases"
    before = np.arange(1, STEPS + 1) < switch.step
    for dtype, precision in ((jnp.float64, 1e-6 if rate is WARM else 1e-9), (jnp.float32, 1e-4)):
        params, states = follow(adam_fn.swats(rate, **options), 0.01, dtype)
        assert_follows(params, expected, precision)
        np.testing.assert_array_equal(states.switched, ~before)
        np.testing.assert_allclose(states.sgd_rate[-1], switch.rate, rtol=1e-6 if dtype == jnp.float64 else 1e-3)
        assert not np.asarray(states.sgd_rate)[before].any()
        np.testing.assert_allclose(states.adam_rate[-1], alpha(switch.step), rtol=1e-6)


def test_swats_does_not_switch_at_the_first_step_or_to_a_negative_rate() -> None:
    """At k = 1 the average is the rate itself, so that the criterion would hold whatever the gradients are."""
    tx: Any = adam_fn.swats(1e-2, b2=0.5, tolerance=1e3)
    p = jnp.ones(3)
    _, state = tx.update(p, tx.init(p), p)
    assert not state.switched
    updates, state = tx.update(-0.5 * p, state, p)  # Adam's step still goes the other way: γ < 0
    assert state.average < 0
    assert not state.switched
    assert (jnp.asarray(updates) != 0).all()


@pytest.mark.quick("options0")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 1e-3, "decay": "independent"}])
def test_lamb_follows_its_paper(options: dict[str, Any]) -> None:
    decay = options.get("weight_decay", 0.0)
    outside = options.get("decay") == "independent"
    expected = oracles.lamb(slope(0.3), list(START.values()), STEPS, 1e-2, 0.9, 0.99, 1e-6, decay, outside=outside)
    assert_both_follow(adam_fn.lamb(1e-2, b2=0.99, **options), expected)


@pytest.mark.quick
def test_cautious_follows_its_paper() -> None:
    expected = oracles.cautious_adamw(slope(0.3), list(START.values()), STEPS, 1e-2, 0.9, 0.99, weight_decay=0.1)
    decay = adam_fn.transform(adam_fn.Decay(1e-3, independent=True))
    assert_both_follow(optax.chain(adam_fn.cautious(adam_fn.adam(1e-2, b2=0.99)), decay), expected)


@pytest.mark.parametrize("decay", [0.9, 0.999, None])
def test_averaged_params_follow_the_paper(decay: float | None) -> None:
    """The averages of section 7.2 are taken of the parameters of the same run."""
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.float64, 1e-12)):
        params, states = follow(optax.chain(adam_fn.adam(3e-2), adam_fn.average_params(decay)), 1.0, dtype)
        path = [[np.asarray(leaf[t], np.float64) for leaf in jax.tree.leaves(params)] for t in range(STEPS)]
        assert_follows(slots_of(states[1])["average"]["real"], oracles.averages(path, decay), tolerance)


def test_averaged_params_finds_its_average_in_any_state() -> None:
    params: Any = {
        "w": jnp.asarray([1.0, 2.0], jnp.bfloat16),
        "z": jnp.asarray([1 + 2j]),
        "n": jnp.arange(2),
        "none": None,
    }
    tx: Any = optax.chain(adam_fn.adam(0.5), adam_fn.average_params(0.5))
    state = tx.init(params)
    same = adam_fn.averaged_params(state, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, same, params))
    grads = {"w": jnp.ones(2, jnp.bfloat16), "z": jnp.asarray([1 - 1j]), "n": jnp.zeros(2, int), "none": None}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    average: Any = adam_fn.average_params()
    jax.tree.map(np.testing.assert_array_equal, average.update(grads, average.init(params), params)[0], grads)
    found = adam_fn.averaged_params({"opt": (state,)}, params)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found["w"], float), [(0.5 + 2 * 0) / 3, (1.5 + 2 * 1) / 3], rtol=1e-2)
    np.testing.assert_allclose(found["z"], [(0.5 + 2.5j + 2 * (0 + 3j)) / 3], rtol=1e-5)
    assert (found["n"] == params["n"]).all()


@pytest.mark.parametrize("warmup", [0, 50])
def test_schedule_free_around_adamw_follows_its_paper(warmup: int) -> None:
    """`optax.contrib.schedule_free` around `adamw(b1=0)`: the parameters are y, those to evaluate with are x.

    optax counts its steps from 1 and passes them on to its rate, while the optimizer inside counts from 0.
    """
    ys, xs = oracles.schedule_free_adamw(
        slope(0.3), list(START.values()), STEPS, 1e-2, b2=0.99, weight_decay=0.1, warmup=warmup
    )

    def rate(step: jax.Array) -> jax.Array:
        return 1e-2 * jnp.minimum(1.0, step / max(warmup, 1))

    adamw = adam_fn.adamw(lambda count: rate(count + 1), b1=0.0, b2=0.99, weight_decay=0.1)
    found, states = follow(optax.contrib.schedule_free(adamw, cast(Any, rate), b1=0.9), 0.3, odd=False)
    with jax.enable_x64(True):
        averaged = jax.vmap(optax.contrib.schedule_free_eval_params)(states, {"real": found})
    assert_follows(found, ys, 1e-7)
    assert_follows(averaged, xs, 1e-7)
    assert set(slots_of(states.base_optimizer_state)) == {"nu"}, "b1 = 0 keeps no momentum"
