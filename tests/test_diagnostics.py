"""Diagnostics against float64 transcriptions, and found in every wrapper, storage and tree."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import Array, compilations, full_jit, random_gradients, relative_error
from helpers.states import count_of, slots_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Storage, diagnostics

STEPS, SIZE, RATE = 5, 24, 1e-2
GRADS = random_gradients(STEPS, SIZE, spread=1.0)
START = np.linspace(-1.0, 1.0, SIZE, dtype=np.float32)


def stepped(tx: optax.GradientTransformation, grads: Any, params: Any) -> tuple[Any, Any, Any]:
    """Parameters, state and updates after a step for each of the gradients."""
    step, state, updates = jax.jit(tx.update), tx.init(params), None
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, updates


def wide(x: Any) -> Array:
    return np.asarray(x, np.float64)


def ema(beta: float, xs: Array, start: float = 0.0) -> Array:
    """The moving average of the rows, in float64."""
    average = np.full(xs.shape[1:], start)
    for x in wide(xs):
        average = beta * average + (1 - beta) * x
    return average


def corrected(beta: float, xs: Array) -> Array:
    return ema(beta, xs) / (1 - beta ** len(xs))


def adam(g: Array, b1: float = 0.9, b2: float = 0.999) -> Array:
    return corrected(b1, g) / np.sqrt(corrected(b2, g * g))


def amsgrad(g: Array) -> Array:
    highest = np.max([ema(0.5, g[:t] ** 2) for t in range(1, len(g) + 1)], axis=0)
    return corrected(0.9, g) / np.sqrt(highest / (1 - 0.5 ** len(g)))


def amsgrad_raw(g: Array) -> Array:
    return ema(0.9, g) / np.sqrt(np.max([ema(0.5, g[:t] ** 2) for t in range(1, len(g) + 1)], axis=0))


def adamax(g: Array) -> Array:
    ages = np.arange(len(g))[::-1, None]
    return corrected(0.9, g) / np.max(0.999**ages * (np.abs(g) + 1e-8), axis=0)


def adabelief(g: Array) -> Array:
    distances = np.stack([g[t] - ema(0.9, g[: t + 1]) for t in range(len(g))])
    return corrected(0.9, g) / np.sqrt(corrected(0.999, distances**2))


def yogi(g: Array) -> Array:
    v = np.full(g.shape[1], 1e-6)
    for x in g:
        v = v - 1e-3 * np.sign(v - x**2) * x**2
    weight = 1 - 0.999 ** len(g)
    return ema(0.9, g, 1e-6) / (1 - 0.9 ** len(g)) / np.sqrt(v / weight)


def laprop(g: Array) -> Array:
    normalised = np.stack([g[t] / np.sqrt(corrected(0.999, g[: t + 1] ** 2)) for t in range(len(g))])
    return corrected(0.9, normalised)


def adopt(g: Array) -> Array:
    v, normalised = g[0] ** 2, [0 * g[0]]
    for t in range(1, len(g)):
        normalised.append(np.clip(g[t] / np.sqrt(v), -(t**0.25), t**0.25))
        v = 0.9999 * v + 1e-4 * g[t] ** 2
    return ema(0.9, np.stack(normalised))


def adan(g: Array) -> Array:
    ahead = np.concatenate([g[:1], g[1:] + 0.92 * np.diff(g, axis=0)])
    return corrected(0.98, g) / np.sqrt(corrected(0.99, ahead**2))


RATIOS: dict[str, tuple[optax.GradientTransformation, Callable[[Array], Array]]] = {
    "adam": (adam_fn.adam(RATE, eps=1.0), adam),
    "betas": (adam_fn.adamw(RATE, 0.5, 0.99), functools.partial(adam, b1=0.5, b2=0.99)),
    "nadam": (adam_fn.nadam(RATE), adam),
    "radam": (adam_fn.radam(RATE), adam),
    "ademamix": (adam_fn.ademamix(RATE), adam),
    "adam_atan2": (adam_fn.adam_atan2(RATE), functools.partial(adam, b2=0.99)),
    "lamb": (adam_fn.lamb(RATE), adam),
    "amsgrad": (adam_fn.amsgrad(RATE, b2=0.5), amsgrad),
    "amsgrad-raw": (adam_fn.amsgrad(RATE, b2=0.5, bias_correction_mu=False, bias_correction_nu=False), amsgrad_raw),
    "adamax": (adam_fn.adamax(RATE), adamax),
    "adabelief": (adam_fn.adabelief(RATE), adabelief),
    "yogi": (adam_fn.yogi(RATE), yogi),
    "laprop": (adam_fn.laprop(RATE), laprop),
    "adopt": (adam_fn.adopt(RATE), adopt),
    "adan": (adam_fn.adan(RATE), adan),
    "averaged": (adam_fn.transform(adam_fn.Average() >> adam_fn.Adam() >> adam_fn.Rate(RATE)), adam),
}


@functools.cache
def ratios() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Of all, in one program: before the first step, and after the last."""

    def run(grads: jax.Array, params: jax.Array) -> Any:
        found = {}
        for name, (tx, _) in RATIOS.items():
            first = state = tx.init(params)
            for g in grads:
                _, state = tx.update(g, state, params)
            found[name] = [diagnostics.signal_to_noise(tx, s, params) for s in (first, state)]
        return found

    both = jax.jit(run)(GRADS, jnp.asarray(START))
    return {name: x[0] for name, x in both.items()}, {name: x[1] for name, x in both.items()}


@pytest.mark.parametrize("name", RATIOS)
def test_signal_to_noise(name: str) -> None:
    first, last = (np.asarray(found[name]) for found in ratios())
    assert not first.any()
    # AdaBelief's g - m cancels.
    assert relative_error(last, RATIOS[name][1](wide(GRADS))) < (2e-5 if name == "adabelief" else 3e-6)


def rate(count: Any) -> Any:
    return RATE / (1 + count)


def decay(count: Any) -> Any:
    return 0.1 / (2 + count)


WRAPPERS: dict[str, optax.GradientTransformation] = {
    "bare": adam_fn.adamw(rate, weight_decay=decay),
    "jax_array": adam_fn.adamw(jnp.asarray(RATE), weight_decay=decay),
    "independent": adam_fn.adam(rate, weight_decay=decay, decay="independent"),
    "proximal": adam_fn.adam(rate, weight_decay=decay, decay="proximal"),
    "chain": optax.chain(optax.trace(0.0), adam_fn.adamw(rate, weight_decay=decay), adam_fn.average_params(0.9)),
    "links": optax.chain(
        adam_fn.transform(adam_fn.Adam()),
        adam_fn.transform(adam_fn.Decay(decay)),
        adam_fn.transform(adam_fn.Rate(rate)),
    ),
    "named": optax.named_chain(("z", adam_fn.adamw(rate, weight_decay=decay)), ("a", adam_fn.average_params())),
    "injected": optax.inject_hyperparams(adam_fn.adamw)(rate, weight_decay=decay),
    "injected_rate": optax.inject_hyperparams(adam_fn.adamw)(RATE, weight_decay=decay),
    "masters": adam_fn.master_weights(adam_fn.adamw(rate, weight_decay=decay)),
    "masters_of_chain": adam_fn.master_weights(optax.chain(adam_fn.adamw(rate, weight_decay=decay))),
    "rounding": adam_fn.stochastic_rounding(adam_fn.adamw(rate, weight_decay=decay)),
    "rounding_of_chain": adam_fn.stochastic_rounding(optax.chain(adam_fn.adamw(rate, weight_decay=decay))),
    "cautious": adam_fn.cautious(adam_fn.adamw(rate, weight_decay=decay)),
    "lamb": adam_fn.lamb(rate, weight_decay=decay),
    "swats": adam_fn.swats(rate),
    "steps": optax.MultiSteps(adam_fn.adamw(rate, weight_decay=decay), 1).gradient_transformation(),
    "finite": optax.apply_if_finite(adam_fn.adamw(rate, weight_decay=decay), 3),
    "masked": optax.masked(adam_fn.adamw(rate, weight_decay=decay), {"w": True, "b": False}),
    "split": optax.partition(
        {"a": adam_fn.adamw(rate, weight_decay=decay), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizer_is_found_in_every_wrapper(name: str) -> None:
    tx = WRAPPERS[name]
    params = {"w": jnp.asarray(START), "b": jnp.ones(2)}
    params, state, updates = stepped(tx, [{"w": jnp.asarray(g), "b": jnp.ones(2)} for g in GRADS], params)
    found = diagnostics.summary(tx, state, params, updates, per_leaf=True)

    constant = name in ("jax_array", "injected_rate")
    rates = [RATE if constant else rate(count) for count in (STEPS - 1, STEPS, STEPS + 1)]
    assert float(found["learning_rate"]) == pytest.approx(rates[0], rel=1e-6)
    assert float(found["next_learning_rate"]) == pytest.approx(rates[1], rel=1e-6)
    assert float(diagnostics.learning_rate(tx, state, params, ahead=2)) == pytest.approx(rates[2], rel=1e-6)
    decayed = 0 if name == "swats" else decay(STEPS - 1)
    assert float(found["weight_decay"]) == pytest.approx(decayed, rel=1e-6)

    expected = adam(wide(GRADS))
    assert float(found["signal_to_noise/w"]) == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-5)
    assert float(found["effective_step/w"]) == pytest.approx(rates[0] * np.sqrt(np.mean(expected**2)), rel=1e-5)
    w, u = (wide(tree["w"]) for tree in (params, updates))
    assert float(found["update_to_weight/w"]) == pytest.approx(np.linalg.norm(u) / np.linalg.norm(w), rel=1e-5)
    alone = name in ("masked", "split")  # The leaf b is not trained by this optimizer.
    assert ("signal_to_noise/b" in found) != alone
    assert ("update_to_weight/b" in found) != alone
    if alone:
        assert float(found["update_to_weight"]) == float(found["update_to_weight/w"])


NARROW: Any = pytest.mark.parametrize("storage", ["bfloat16", "24bit", "16bit"])


@NARROW
def test_bfloat16_parameters(storage: Any) -> None:
    """With masters they have the ratios of float32 ones."""
    tx = adam_fn.adam(RATE, storage=storage)
    w, g = (jnp.asarray(x, jnp.bfloat16) for x in MATRIX[:2])
    masters = adam_fn.master_weights(tx)
    _, state, _ = stepped(masters, [g], w)
    found = diagnostics.summary(masters, state, w)
    wide_w, wide_g = w.astype(jnp.float32), g.astype(jnp.float32)
    _, state, _ = stepped(tx, [wide_g], wide_w)
    expected = diagnostics.summary(tx, state, wide_w)
    assert jax.tree.map(float, found) == pytest.approx(jax.tree.map(float, expected), rel=1e-5)


def test_before_the_first_step() -> None:
    """The last rate is then the first."""
    for name in ("bare", "injected"):
        tx, params = WRAPPERS[name], {"w": jnp.asarray(START)}
        state = tx.init(params)
        for ahead, count in ((0, 0), (1, 0), (2, 1)):
            assert float(diagnostics.learning_rate(tx, state, params, ahead=ahead)) == pytest.approx(rate(count))
        found = diagnostics.summary(tx, state, params, params)
        assert all(np.isfinite(float(x)) for x in found.values())
        assert float(found["at_bound"]) == 0


def test_the_rate_of_one_step() -> None:
    tx, params = adam_fn.adam(rate), jnp.asarray(START)
    _, state = tx.update(jnp.ones(SIZE), tx.init(params), params, learning_rate=0.5)
    np.testing.assert_allclose(np.asarray(diagnostics.effective_step(tx, state, params, learning_rate=0.5)), 0.5)
    np.testing.assert_allclose(np.asarray(diagnostics.effective_step(tx, state, params)), RATE, rtol=1e-6)
    found = diagnostics.summary(tx, state, params, learning_rate=0.5)
    assert (float(found["learning_rate"]), float(found["next_learning_rate"])) == (0.5, pytest.approx(RATE / 2))
    assert float(found["effective_step"]) == pytest.approx(0.5)


def test_injected_hyperparameters_that_are_set() -> None:
    """By assignment, as optax documents it."""
    tx, params = optax.inject_hyperparams(adam_fn.adam)(RATE), jnp.asarray(START)
    _, state, _ = stepped(tx, [jnp.ones(SIZE)], params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    assert float(diagnostics.learning_rate(tx, state, params, ahead=1)) == 0.25


def test_share_at_the_step_bound() -> None:
    """Of three signs that are steady, and one that alternates; a growing gradient goes beyond the bound."""
    grads = [{"a": jnp.array([1.0, 2.0, -3.0, (-1.0) ** t]), "b": jnp.array([1.1**t]), "e": jnp.ones(0)}
             for t in range(40)]  # fmt: skip
    tx, params = adam_fn.adam(RATE), jax.tree.map(jnp.zeros_like, grads[0])
    params, state, updates = stepped(tx, grads, params)
    assert jax.tree.map(float, diagnostics.at_bound(tx, state, params)) == {"a": 0.75, "b": 1.0, "e": 0.0}
    assert jax.tree.map(float, diagnostics.at_bound(tx, state, params, threshold=1.1)) == {"a": 0.0, "b": 1.0, "e": 0.0}
    found = diagnostics.summary(tx, state, params, updates, per_leaf=True)
    assert float(found["at_bound"]) == pytest.approx(0.8)
    steps = diagnostics.effective_step(tx, state, params)
    alternating = wide([[(-1.0) ** t] for t in range(40)])
    np.testing.assert_allclose(np.asarray(steps["a"]), RATE * np.array([1, 1, -1, adam(alternating)[0]]), rtol=1e-4)
    assert all(np.isfinite(float(x)) for x in found.values())


def test_update_to_weight() -> None:
    params = {"w": np.array([3, 4], np.float32), "zero": np.zeros(2, np.float32), "i": np.arange(2), "n": None}
    updates = {"w": np.array([0, 0.5], np.float32), "zero": np.ones(2, np.float32), "i": np.zeros(2, int), "n": None}
    found = diagnostics.update_to_weight(updates, params)
    assert float(found["w"]) == pytest.approx(0.1)
    assert float(found["zero"]) == np.inf
    assert (found["i"], found["n"]) == (optax.MaskedNode(), None)
    assert float(diagnostics.update_to_weight(params, updates)["zero"]) == 0  # 0 over something
    assert float(diagnostics.update_to_weight({"a": jnp.zeros(2)}, {"a": jnp.zeros(2)})["a"]) == 0
    for scale in (1e-30, 1e30):  # Whose squares are 0 or inf.
        found = diagnostics.update_to_weight(scale * jnp.ones(9) / 1024, scale * jnp.ones(9))
        assert float(found) == pytest.approx(1 / 1024)
    found = diagnostics.update_to_weight(jnp.full(9, 60000, jnp.float16), jnp.full(9, 30000, jnp.float16))
    assert (float(found), found.dtype) == (2, jnp.float32)
    assert float(diagnostics.update_to_weight(jnp.array([3 + 4j]), jnp.array([0 + 10j]))) == pytest.approx(0.5)
    assert np.isnan(float(diagnostics.update_to_weight(jnp.array([jnp.nan]), jnp.ones(1))))


@pytest.mark.parametrize("name", WRAPPERS)
def test_moments_are_found_in_every_wrapper(name: str) -> None:
    tx, params = WRAPPERS[name], {"w": jnp.asarray(START), "b": jnp.ones(2)}
    _, state, _ = stepped(tx, [{"w": jnp.asarray(g), "b": jnp.ones(2)} for g in GRADS], params)
    found = diagnostics.moments(tx, state, params)
    assert relative_error(np.asarray(found["mu"]["w"]), ema(0.9, wide(GRADS))) < 1e-6
    tolerance = 2e-5 if name.startswith("injected") else 1e-6  # Which makes 1 - β₂ one of float32.
    assert relative_error(np.asarray(found["nu"]["w"]), ema(0.999, wide(GRADS) ** 2)) < tolerance
    assert (found["mu"]["b"] == optax.MaskedNode()) == (name in ("masked", "split"))


def test_moments_of_float32_are_the_state() -> None:
    tx = adam_fn.amsgrad(RATE, frozen={"c": False, "f": True, "i": False, "n": False})
    params = {"c": jnp.ones(3, jnp.complex64), "f": jnp.ones(2), "i": jnp.arange(2), "n": None}
    _, state, _ = stepped(tx, [{**params, "c": jnp.asarray([1, 2j, 3 + 1j], jnp.complex64)}], params)
    found = diagnostics.moments(tx, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(slots_of(state))
    assert found["mu"]["c"].shape == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, found, slots_of(state))


@NARROW
def test_moments_of_codes_are_what_the_next_step_computes_with(storage: Any) -> None:
    """A transformation that stores float32 goes on from them with the same update."""
    coded, plain = adam_fn.adam(RATE, storage=storage), adam_fn.adam(RATE)
    params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(3)}
    grads = [{"w": jnp.asarray(g), "b": jnp.asarray(g[0, :3])} for g in MATRIX]
    _, state, _ = stepped(coded, grads[:1], params)
    found = full_jit(lambda state: diagnostics.moments(coded, state, params))(state)
    for slot, exact in (("mu", 0.1 * wide(MATRIX[0])), ("nu", 0.001 * wide(MATRIX[0]) ** 2)):
        assert found[slot]["w"].dtype == jnp.float32
        assert 1e-4 < relative_error(np.asarray(found[slot]["w"]), exact) < (0.15 if storage == "16bit" else 0.03)
    expected, _ = full_jit(coded.update)(grads[1], state, params)
    wide_state = (optax.ScaleByAdamState(count_of(state), **found), optax.EmptyState())
    updates, _ = full_jit(plain.update)(grads[1], wide_state, params)
    for key in params:
        np.testing.assert_allclose(np.asarray(updates[key]), np.asarray(expected[key]), rtol=1e-6)


def test_leaves_that_are_not_trained() -> None:
    """None, integers, frozen leaves; complex ones are two reals, and empty ones and scalars are no trouble."""
    z = np.random.default_rng(0).standard_normal((STEPS, 3, 2)) @ [1, 1j]
    grads = [
        {"c": jnp.asarray(z[t], jnp.complex64), "e": jnp.zeros((0, 3)), "f": jnp.ones(2), "i": jnp.zeros(2, int),
         "n": None, "s": jnp.asarray(GRADS[t, 0])}
        for t in range(STEPS)
    ]  # fmt: skip
    tx = adam_fn.adam(RATE, frozen={"c": False, "e": False, "f": True, "i": False, "n": False, "s": False})
    params = jax.tree.map(jnp.ones_like, grads[0])
    params, state, updates = stepped(tx, grads, params)
    found = diagnostics.signal_to_noise(tx, state, params)
    assert (found["f"], found["i"], found["n"], found["e"].shape) == (
        optax.MaskedNode(),
        optax.MaskedNode(),
        None,
        (0, 3),
    )
    assert relative_error(np.asarray(found["c"]), np.stack([adam(z.real), adam(z.imag)])) < 1e-5
    assert relative_error(np.asarray(found["s"]), adam(wide(GRADS))[0]) < 1e-5
    logged = diagnostics.summary(tx, state, params, updates, grads[0], per_leaf=True)
    per_leaf = {key.split("/")[1] for key in logged if "/" in key}
    assert per_leaf == {"c", "e", "s"}
    assert all(np.isfinite(float(x)) for x in logged.values())
    every = np.concatenate([np.asarray(found[name]).ravel() for name in "cs"])
    assert float(logged["signal_to_noise"]) == pytest.approx(np.sqrt(np.mean(every**2)), rel=1e-5)


MATRIX = np.random.default_rng(1).standard_normal((4, 64, 128)).astype(np.float32)


@pytest.mark.parametrize("storage", ["16bit", Storage(mu=adam_fn.MuLaw(), nu=adam_fn.Cast("bfloat16"))], ids=str)
def test_storage_is_decoded(storage: Any) -> None:
    """And the error of storing is that of one step, from the same stored state."""
    tx, params = adam_fn.adam(RATE, storage=storage), {"w": jnp.zeros((64, 128)), "b": jnp.zeros(3)}
    grads = [{"w": jnp.asarray(g), "b": jnp.asarray(g[0, :3])} for g in MATRIX]
    _, state, _ = stepped(tx, grads, params)
    before = jax.tree.map(wide, tx.update.decoded(state, params))
    m, v = (before[slot]["w"] for slot in ("mu", "nu"))
    expected = m / (1 - 0.9**4) / np.sqrt(v / (1 - 0.999**4))
    assert relative_error(np.asarray(diagnostics.signal_to_noise(tx, state, params)["w"]), expected) < 1e-5

    # One more step: the slots in float64, and what is read back of them.
    _, after = tx.update(grads[0], state, params)
    found = diagnostics.quantisation_error(tx, state, grads[0], params)
    logged = diagnostics.summary(tx, state, params, grads=grads[0])
    for slot, beta, power in (("mu", 0.9, 1), ("nu", 0.999, 2)):
        stored = tx.update.decoded(after, params)[slot]
        lost, all_of_it = [], []
        for leaf in ("w", "b"):
            exact = beta * before[slot][leaf] + (1 - beta) * wide(grads[0][leaf]) ** power
            error = wide(stored[leaf]) - exact
            lost, all_of_it = [*lost, *error.ravel()], [*all_of_it, *exact.ravel()]
            expected = np.linalg.norm(error) / np.linalg.norm(exact)
            assert float(found[slot][leaf]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        expected = np.linalg.norm(lost) / np.linalg.norm(all_of_it)
        assert float(logged[f"quantisation_error/{slot}"]) == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-4


def test_quantisation_error_of_a_cast_is_its_rounding() -> None:
    """After the first step m is 0.1 g, which NumPy puts between two bfloat16, at an even dither as far from either.

    Gradients are those that the optimizer gets.
    """
    tx = optax.chain(optax.scale(0.3), adam_fn.adam(RATE, mu_dtype="bfloat16"))
    params = jnp.zeros((64, 128))
    found = diagnostics.quantisation_error(tx, tx.init(params), jnp.asarray(MATRIX[0]), params)
    m = np.float32(0.3) * MATRIX[0] * np.float32(0.1)
    bits = m.view(np.uint32)
    lower, upper = (wide((bits + up & 0xFFFF0000).view(np.float32)) for up in (0, 0x10000))
    squares = np.abs((upper - m) * (m - lower))  # (upper - m) of a share (m - lower) of all dithers, and the other way.
    expected = np.sqrt(squares.sum()) / np.linalg.norm(wide(m))
    assert set(found) == {"mu"}  # The second moment is float32.
    assert float(found["mu"]) == pytest.approx(expected, rel=0.04)
    assert diagnostics.quantisation_error(adam_fn.adam(RATE), adam_fn.adam(RATE).init(params), params, params) == {}


@NARROW
def test_quantisation_error_of_tiny_gradients(storage: Any) -> None:
    """Second moments of about 1e-27: their squares are 0 in float32."""
    tx, params = adam_fn.adam(RATE, storage=storage), jnp.zeros((64, 128))
    errors = [
        diagnostics.quantisation_error(tx, tx.init(params), jnp.asarray(scale * MATRIX[0]), params)
        for scale in (np.float32(1), np.float32(2.0**-40))
    ]
    for slot in ("mu", "nu"):
        assert float(errors[1][slot]) == pytest.approx(float(errors[0][slot]), rel=0.02)
        assert float(errors[0][slot]) > 1e-3


def test_summary_in_a_compiled_step() -> None:
    """Stable keys, float32 scalars, the same inside of `jit` as outside, and one compilation."""
    tx = adam_fn.adamw(rate, storage="24bit")
    params = {"layers": [{"kernel": jnp.asarray(MATRIX[0]), "bias": jnp.ones(3, jnp.bfloat16)}]}

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates, state, diagnostics.summary(tx, state, params, updates, grads, per_leaf=True)

    state, keys = tx.init(params), None
    updates = grads = found = {}
    for g in MATRIX:
        grads = {"layers": [{"kernel": jnp.asarray(g), "bias": jnp.asarray(g[0, :3], jnp.bfloat16)}]}
        updates, state, found = step(params, state, grads)
        assert keys in (None, list(found))
        keys = list(found)
        assert all(x.shape == () and x.dtype == jnp.float32 for x in found.values())
    everything = functools.partial(diagnostics.summary, tx, per_leaf=True)
    assert keys == list(jax.eval_shape(everything, state, params, updates, grads))
    outside = diagnostics.summary(tx, state, params, updates)
    for key in outside:
        assert float(found[key]) == pytest.approx(float(outside[key]), rel=1e-4), key
    shared = {"signal_to_noise", "effective_step", "at_bound", "update_to_weight", "quantisation_error/mu"}
    leaves = {f"{key}/layers/0/{leaf}" for key in (*shared, "quantisation_error/nu") for leaf in ("kernel", "bias")}
    rates = {"learning_rate", "next_learning_rate", "weight_decay", "quantisation_error/nu"}
    assert set(found) == shared | leaves | rates
    fewer = {key for key in shared | rates if not key.startswith(("quantisation", "update"))}
    assert set(jax.eval_shape(lambda s: diagnostics.summary(tx, s, params), state)) == fewer
    assert compilations(step) == 1


def test_reading_the_rate_runs_no_step() -> None:
    """The update that tells what is inside is not in the program."""
    tx, params = optax.chain(optax.clip_by_global_norm(1.0), adam_fn.adam(rate)), jnp.zeros((256, 256))
    read = jax.jit(lambda state, params: diagnostics.learning_rate(tx, state, params))
    cost = read.lower(tx.init(params), params).compile().cost_analysis()
    assert cost is not None
    assert cost["flops"] < 100
    assert tx.update(params, tx.init(params), params)[1] is not None  # And nothing is left behind.


SHARDED = adam_fn.adamw(RATE, storage="16bit")


@functools.cache
def alone() -> dict[str, jax.Array]:
    """What `test_a_sharded_summary_gathers_no_array` expects: all of it on one device."""
    params, grads = jnp.asarray(MATRIX[0]), jnp.asarray(MATRIX[1])
    updates, state = SHARDED.update(grads, SHARDED.init(params), params)
    return diagnostics.summary(SHARDED, state, params, updates, grads)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_sharded_summary_gathers_no_array(explicit: bool) -> None:
    """The same numbers, elements that stay where they are, and no array gathered."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    where = NamedSharding(mesh, PartitionSpec("x", "y"))
    tx = SHARDED
    with jax.set_mesh(mesh):
        p, g = jax.device_put((MATRIX[0], MATRIX[1]), where)
        state = jax.jit(tx.init)(p)
        updates, state = jax.jit(tx.update)(g, state, p)
        assert diagnostics.signal_to_noise(tx, state, p).sharding.is_equivalent_to(where, 2)
        read = jax.jit(lambda s, p, u, g: diagnostics.summary(tx, s, p, u, g))
        program = read.lower(state, p, updates, g).compile()
        found = program(state, p, updates, g)
    assert "all-gather" not in (program.as_text() or "all-gather")
    assert jax.tree.map(float, found) == pytest.approx(jax.tree.map(float, alone()), rel=1e-5)


@pytest.mark.quick
def test_what_is_not_there_is_an_error() -> None:
    params = jnp.asarray(START)

    def read(function: Any, tx: optax.GradientTransformation, *args: Any) -> Any:
        return function(tx, tx.init(params), *args, params)

    with pytest.raises(ValueError, match="exactly one adam_fn optimizer, found 0"):
        read(diagnostics.signal_to_noise, optax.adam(RATE))
    with pytest.raises(ValueError, match="exactly one adam_fn optimizer, found 0"):
        read(diagnostics.summary, optax.chain(adam_fn.transform(adam_fn.Rate(RATE)), adam_fn.average_params()))
    with pytest.raises(ValueError, match="exactly one adam_fn optimizer, found 2"):
        read(diagnostics.summary, optax.chain(adam_fn.adam(RATE), adam_fn.lion(RATE)))
    with pytest.raises(ValueError, match="exactly one adam_fn optimizer, found 2"):
        read(diagnostics.signal_to_noise, optax.chain(adam_fn.adam(RATE), adam_fn.adam(RATE)))
    with pytest.raises(ValueError, match="exactly one adam_fn optimizer, found 2"):
        read(diagnostics.quantisation_error, optax.chain(adam_fn.adam(RATE), adam_fn.lion(RATE)), params)
    with pytest.raises(ValueError, match=r"Lion.* has no m̂/√v̂: its slots are \['mu'\]"):
        read(diagnostics.at_bound, adam_fn.lion(RATE))
    with pytest.raises(ValueError, match=r"slots are \['nu'\]"):
        read(diagnostics.effective_step, adam_fn.adam(RATE, b1=0.0))
    with pytest.raises(ValueError, match="one Rate in the transformation, found 0"):
        read(diagnostics.learning_rate, optax.chain(adam_fn.transform(adam_fn.Adam()), optax.scale(-RATE)))
    with pytest.raises(ValueError, match="found 0: pass learning_rate"):
        read(diagnostics.effective_step, adam_fn.transform(adam_fn.Adam()))
    with pytest.raises(ValueError, match="one Rate in the transformation, found 2"):
        read(diagnostics.learning_rate, adam_fn.transform(adam_fn.Rate(1.0) >> adam_fn.Rate(0.5)))
    steps = optax.MultiSteps(optax.inject_hyperparams(adam_fn.adam)(RATE), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"learning_rate cannot see an optimizer that runs inside lax\.cond"):
        read(diagnostics.learning_rate, steps)
    steps = optax.MultiSteps(adam_fn.adam(RATE, storage="16bit"), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"quantisation_error cannot see an optimizer that runs inside lax\.cond"):
        read(diagnostics.quantisation_error, steps, params)
    assert set(read(diagnostics.summary, adam_fn.lion(RATE))) == {"learning_rate", "next_learning_rate", "weight_decay"}


def test_ratio_and_step_fall_near_the_optimum_at_a_constant_rate() -> None:
    """Near the optimum of a noisy bowl the ratio and the step fall by themselves: the rate is constant."""
    tx, params = adam_fn.adam(RATE), jnp.full(64, 1.0)
    state, noise = tx.init(params), jnp.asarray(np.random.default_rng(0).standard_normal((300, 64)), jnp.float32)

    @jax.jit
    def run(params: jax.Array, state: Any) -> Any:
        def step(carry: Any, e: jax.Array) -> Any:
            p, s = carry
            u, s = tx.update(p + 0.5 * e, s, p)
            p = optax.apply_updates(p, u)
            return (p, s), diagnostics.summary(tx, s, p, u)

        return jax.lax.scan(step, (params, state), noise)[1]

    found = run(params, state)
    for key in ("signal_to_noise", "effective_step", "at_bound"):
        assert np.mean(found[key][-50:]) < 0.5 * np.mean(found[key][:50]), key
    np.testing.assert_allclose(np.asarray(found["effective_step"]), RATE * np.asarray(found["signal_to_noise"]), 1e-5)
    np.testing.assert_allclose(np.asarray(found["learning_rate"]), RATE, 1e-6)
