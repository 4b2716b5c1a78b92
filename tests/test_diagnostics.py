"""Diagnostics against float64 transcriptions, with every wrapper, storage and kind of tree."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.layouts import KINDS, assert_placed, mesh_of
from helpers.runs import Array, compilations, random_gradients, relative_error, scanned
from helpers.states import count_of, slots_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import family, momentum

import adam_fn
from adam_fn import Storage, diagnostics

STEPS, SIZE, RATE = 5, 24, 1e-2
GRADS = random_gradients(STEPS, SIZE, spread=1.0)
MATRIX = np.random.default_rng(1).standard_normal((4, 64, 128)).astype(np.float32)
START = np.linspace(-1.0, 1.0, SIZE, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=0)
def stepped(tx: optax.GradientTransformation, grads: Any, params: Any) -> tuple[Any, Any, Any]:
    """Parameters, state and updates after a step for each of the stacked gradients."""
    (params, state), updates = scanned(tx, params, grads)
    return params, state, jax.tree.map(lambda u: u[-1], updates)


def wide(x: Any) -> Array:
    return np.asarray(x, np.float64)


def ema(beta: float, xs: Array, start: float = 0.0) -> Array:
    """The moving average of the rows, in float64."""
    average = np.full(xs.shape[1:], start)
    for x in wide(xs):
        average = beta * average + (1 - beta) * x
    return average


def direction(oracle: Callable[..., family.Trajectory], **options: Any) -> Callable[[Array], Array]:
    """A function for the ratio: the last step that a paper would take at a rate of 1 and without ε."""
    return lambda g: -oracle(g, np.zeros_like(g[0]), 1.0, eps=0.0, **options).updates[-1]


def adan(g: Array) -> Array:
    ahead = np.concatenate([g[:1], g[1:] + 0.92 * np.diff(g, axis=0)])
    weights = [1 - beta ** len(g) for beta in (0.98, 0.99)]
    return ema(0.98, g) / weights[0] / np.sqrt(ema(0.99, ahead**2) / weights[1])


adam = direction(family.adam)
RAW: Any = {"b2": 0.5, "bias_correction_mu": False, "bias_correction_nu": False}
RATIOS: dict[str, tuple[optax.GradientTransformation, Callable[[Array], Array]]] = {
    "adam": (adam_fn.adam(RATE, eps=1.0), adam),
    "betas": (adam_fn.adamw(RATE, 0.5, 0.99), direction(family.adam, b1=0.5, b2=0.99)),
    "nadam": (adam_fn.nadam(RATE), adam),
    "radam": (adam_fn.radam(RATE), adam),
    "ademamix": (adam_fn.ademamix(RATE), adam),
    "adam_atan2": (adam_fn.adam_atan2(RATE), direction(family.adam, b2=0.99)),
    "lamb": (adam_fn.lamb(RATE), adam),
    "amsgrad": (adam_fn.amsgrad(RATE, b2=0.5), direction(family.amsgrad, b2=0.5)),
    "amsgrad-raw": (adam_fn.amsgrad(RATE, **RAW), direction(family.amsgrad, **RAW)),
    "adamax": (adam_fn.adamax(RATE), direction(family.adamax)),
    "adabelief": (adam_fn.adabelief(RATE), direction(family.adabelief, eps_root=0.0)),
    "yogi": (adam_fn.yogi(RATE), direction(family.yogi)),
    "laprop": (adam_fn.laprop(RATE), direction(momentum.laprop)),
    "adopt": (adam_fn.adopt(RATE), direction(momentum.adopt)),
    "adan": (adam_fn.adan(RATE), adan),
    "averaged": (adam_fn.transform(adam_fn.Average() >> adam_fn.Adam() >> adam_fn.Rate(RATE)), adam),
}


@functools.cache
def ratios() -> dict[str, jax.Array]:
    """The ratios of all optimizers after some steps, in one program."""

    def read(grads: jax.Array, params: jax.Array) -> dict[str, jax.Array]:
        states = {name: (tx, stepped(tx, grads, params)[1]) for name, (tx, _) in RATIOS.items()}
        return {name: diagnostics.signal_to_noise(tx, state, params) for name, (tx, state) in states.items()}

    return jax.jit(read)(GRADS, START)


@pytest.mark.parametrize("name", RATIOS)
def test_signal_to_noise_equals_the_papers_step_at_rate_1(name: str) -> None:
    tolerance = 2e-5 if name == "adabelief" else 3e-6  # AdaBelief's g - m cancels.
    assert relative_error(np.asarray(ratios()[name]), RATIOS[name][1](wide(GRADS))) < tolerance


def rate(count: Any) -> Any:
    return RATE / (1 + count)


def decay(count: Any) -> Any:
    return 0.1 / (2 + count)


ADAMW = adam_fn.adamw(rate, weight_decay=decay)
WRAPPERS: dict[str, optax.GradientTransformation] = {
    "bare": ADAMW,
    "jax_array": adam_fn.adamw(jnp.asarray(RATE), weight_decay=decay),
    "independent": adam_fn.adam(rate, weight_decay=decay, decay="independent"),
    "proximal": adam_fn.adam(rate, weight_decay=decay, decay="proximal"),
    "chain": optax.chain(optax.trace(0.0), ADAMW, adam_fn.average_params(0.9)),
    "links": optax.chain(*map(adam_fn.transform, (adam_fn.Adam(), adam_fn.Decay(decay), adam_fn.Rate(rate)))),
    "named": optax.named_chain(("z", ADAMW), ("a", adam_fn.average_params())),
    "injected": optax.inject_hyperparams(adam_fn.adamw)(rate, weight_decay=decay),
    "injected_rate": optax.inject_hyperparams(adam_fn.adamw)(RATE, weight_decay=decay),
    "masters": adam_fn.master_weights(ADAMW),
    "masters_of_chain": adam_fn.master_weights(optax.chain(ADAMW)),
    "rounding": adam_fn.stochastic_rounding(ADAMW),
    "rounding_of_chain": adam_fn.stochastic_rounding(optax.chain(ADAMW)),
    "cautious": adam_fn.cautious(ADAMW),
    "lamb": adam_fn.lamb(rate, weight_decay=decay),
    "swats": adam_fn.swats(rate),
    "steps": optax.MultiSteps(ADAMW, 1).gradient_transformation(),
    "finite": optax.apply_if_finite(ADAMW, 3),
    "masked": optax.masked(ADAMW, {"w": True, "b": False}),
    "split": optax.partition({"a": ADAMW, "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
}
PARAMS = {"w": START, "b": np.ones(2, np.float32)}


@functools.cache
def runs() -> dict[str, Any]:
    """The end of a run with each wrapper, and the diagnostics that are read there, in one program."""

    def run(grads: Any, params: Any) -> dict[str, Any]:
        found = {}
        for name, tx in WRAPPERS.items():
            p, state, updates = stepped(tx, grads, params)
            later = diagnostics.learning_rate(tx, state, p, ahead=2)
            summary = diagnostics.summary(tx, state, p, updates, per_leaf=True)
            found[name] = (p, updates, later, summary, diagnostics.moments(tx, state, p))
        return found

    return jax.jit(run)({"w": GRADS, "b": np.ones((STEPS, 2), np.float32)}, PARAMS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizer_is_found_in_every_wrapper(name: str) -> None:
    params, updates, later, found, moments = runs()[name]
    constant = name in ("jax_array", "injected_rate")
    rates = [RATE if constant else rate(count) for count in (STEPS - 1, STEPS, STEPS + 1)]
    decayed = 0 if name == "swats" else decay(STEPS - 1)
    logged = [found[key] for key in ("learning_rate", "next_learning_rate", "weight_decay")]
    assert [float(x) for x in (*logged, later)] == pytest.approx([*rates[:2], decayed, rates[2]], rel=1e-6)

    ratio = np.sqrt(np.mean(adam(wide(GRADS)) ** 2))
    of_weight = np.linalg.norm(wide(updates["w"])) / np.linalg.norm(wide(params["w"]))
    logged = [found[f"{key}/w"] for key in ("signal_to_noise", "effective_step", "update_to_weight")]
    assert [float(x) for x in logged] == pytest.approx([ratio, rates[0] * ratio, of_weight], rel=1e-5)
    alone = name in ("masked", "split")  # The leaf b is not trained by this optimizer.
    assert ("signal_to_noise/b" in found) != alone
    assert ("update_to_weight/b" in found) != alone
    if alone:
        assert float(found["update_to_weight"]) == float(found["update_to_weight/w"])

    assert relative_error(np.asarray(moments["mu"]["w"]), ema(0.9, wide(GRADS))) < 1e-6
    tolerance = 2e-5 if name.startswith("injected") else 1e-6  # Injection makes 1 - β₂ a float32.
    assert relative_error(np.asarray(moments["nu"]["w"]), ema(0.999, wide(GRADS) ** 2)) < tolerance
    assert (moments["mu"]["b"] == optax.MaskedNode()) == alone


NARROW = ("bfloat16", "24bit", "16bit")


@functools.partial(jax.jit, static_argnums=0)
def summary_of(tx: optax.GradientTransformation, grads: jax.Array, params: jax.Array) -> dict[str, jax.Array]:
    return diagnostics.summary(tx, stepped(tx, grads, params)[1], params)


@pytest.mark.parametrize("storage", NARROW)
def test_bfloat16_parameters_with_masters_have_the_ratios_of_float32_ones(storage: Any) -> None:
    tx, short = adam_fn.adam(RATE, storage=storage), jnp.asarray(MATRIX[:2], jnp.bfloat16)
    wide = short.astype(jnp.float32)
    found, expected = summary_of(adam_fn.master_weights(tx), short[1:], short[0]), summary_of(tx, wide[1:], wide[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_diagnostics_are_finite_before_the_first_step() -> None:
    """The last rate is then that of the first step."""
    for name in ("bare", "injected"):
        tx, params = WRAPPERS[name], {"w": jnp.asarray(START)}
        state = tx.init(params)
        for ahead, count in ((0, 0), (1, 0), (2, 1)):
            assert float(diagnostics.learning_rate(tx, state, params, ahead=ahead)) == pytest.approx(rate(count))
        found = diagnostics.summary(tx, state, params, params)
        assert all(np.isfinite(float(x)) for x in found.values())
        assert float(found["at_bound"]) == float(found["signal_to_noise"]) == 0


def test_a_rate_of_one_step_is_passed_to_the_diagnostics() -> None:
    tx, params = adam_fn.adam(rate), jnp.asarray(START)
    _, state = tx.update(jnp.ones(SIZE), tx.init(params), params, learning_rate=0.5)
    np.testing.assert_allclose(np.asarray(diagnostics.effective_step(tx, state, params, learning_rate=0.5)), 0.5)
    np.testing.assert_allclose(np.asarray(diagnostics.effective_step(tx, state, params)), RATE, rtol=1e-6)
    found = diagnostics.summary(tx, state, params, learning_rate=0.5)
    assert (float(found["learning_rate"]), float(found["next_learning_rate"])) == (0.5, pytest.approx(RATE / 2))
    assert float(found["effective_step"]) == pytest.approx(0.5)


def test_an_injected_rate_is_read_after_it_is_set() -> None:
    """It is set by assignment, as optax documents it."""
    tx, params = optax.inject_hyperparams(adam_fn.adam)(RATE), jnp.asarray(START)
    _, state, _ = stepped(tx, jnp.ones((1, SIZE)), params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    assert float(diagnostics.learning_rate(tx, state, params, ahead=1)) == 0.25


def test_at_bound_is_the_share_of_elements_at_the_step_bound() -> None:
    """Gradients of steady sign reach the bound, those of alternating sign do not, and growing ones go beyond."""
    ages = np.arange(40.0)
    a = np.stack([1 + 0 * ages, 2 + 0 * ages, -3 + 0 * ages, (-1) ** ages], axis=1, dtype=np.float32)
    grads = {"a": a, "b": (1.1 ** ages[:, None]).astype(np.float32), "e": np.ones((40, 0), np.float32)}
    tx, params = adam_fn.adam(RATE), jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
    params, state, updates = stepped(tx, grads, params)
    assert jax.tree.map(float, diagnostics.at_bound(tx, state, params)) == {"a": 0.75, "b": 1.0, "e": 0.0}
    assert jax.tree.map(float, diagnostics.at_bound(tx, state, params, threshold=1.1)) == {"a": 0.0, "b": 1.0, "e": 0.0}
    found = diagnostics.summary(tx, state, params, updates, per_leaf=True)
    assert float(found["at_bound"]) == pytest.approx(0.8)
    assert all(np.isfinite(float(x)) for x in found.values())


def test_update_to_weight_is_the_ratio_of_norms() -> None:
    cases = {  # An update, a parameter, and the ratio of their norms.
        "w": ([0.0, 0.5], [3.0, 4.0], 0.1),
        "of zeros": ([1.0, 1.0], [0.0, 0.0], np.inf),
        "zeros": ([0.0, 0.0], [1.0, 1.0], 0),
        "zeros of zeros": ([0.0, 0.0], [0.0, 0.0], 0),
        "squares are 0": ([1e-30 / 1024] * 9, [1e-30] * 9, 1 / 1024),
        "squares are inf": ([1e30 / 1024] * 9, [1e30] * 9, 1 / 1024),
        "half": (np.full(9, 60000, np.float16), np.full(9, 30000, np.float16), 2),
        "complex": ([3 + 4j], [10j], 0.5),
        "nan": ([np.nan], [1.0], np.nan),
    }
    updates, params = ({name: jnp.asarray(case[i]) for name, case in cases.items()} for i in range(2))
    whole = {"i": np.arange(2), "n": None}
    found = diagnostics.update_to_weight({**updates, **whole}, {**params, **whole})
    assert (found.pop("i"), found.pop("n")) == (optax.MaskedNode(), None)
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}
    expected = {name: case[2] for name, case in cases.items()}
    assert jax.tree.map(float, found) == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_leaves_that_are_not_trained_are_left_out() -> None:
    """They are None, integers and frozen leaves. Complex ones are two reals; empty ones and scalars work as well."""
    z = np.random.default_rng(0).standard_normal((STEPS, 3, 2)) @ [1, 1j]
    shapes = {"c": (3,), "e": (0, 3), "f": (2,), "s": ()}
    first: Any = {name: jnp.zeros(shape, jnp.complex64 if name == "c" else float) for name, shape in shapes.items()}
    first |= {"i": jnp.zeros(2, int), "n": None}
    grads = jax.tree.map(lambda x: jnp.stack([x] * STEPS), first)
    grads = {**grads, "c": jnp.asarray(z, jnp.complex64), "s": GRADS[:, 0]}
    tx = adam_fn.adam(RATE, frozen=adam_fn.masks.path("f"))
    params = jax.tree.map(jnp.ones_like, first)
    params, state, updates = stepped(tx, grads, params)
    moments = diagnostics.moments(tx, state, params)
    chex.assert_trees_all_equal(moments, slots_of(state))
    found = diagnostics.signal_to_noise(tx, state, params)
    assert (found["f"], found["i"], found["n"]) == (optax.MaskedNode(), optax.MaskedNode(), None)
    assert found["e"].shape == (0, 3)
    assert relative_error(np.asarray(found["c"]), np.stack([adam(z.real), adam(z.imag)])) < 1e-5
    assert relative_error(np.asarray(found["s"]), adam(wide(GRADS))[0]) < 1e-5
    logged = diagnostics.summary(tx, state, params, updates, first, per_leaf=True)
    per_leaf = {key.split("/")[1] for key in logged if "/" in key}
    assert per_leaf == {"c", "e", "s"}
    assert all(np.isfinite(float(x)) for x in logged.values())
    every = np.concatenate([np.asarray(found[name]).ravel() for name in "cs"])
    assert float(logged["signal_to_noise"]) == pytest.approx(np.sqrt(np.mean(every**2)), rel=1e-5)


@pytest.mark.parametrize(
    ("storage", "most"),
    [
        ("float32", {}),
        (Storage(mu=adam_fn.Cast("bfloat16")), {"mu": 0.03}),
        *((storage, {"mu": 0.03, "nu": 0.03}) for storage in ("bfloat16", "24bit")),
        ("16bit", {"mu": 0.15, "nu": 0.15}),
    ],
    ids=str,
)
def test_moments_are_decoded_and_their_storage_error_is_that_of_one_step(storage: Any, most: dict[str, float]) -> None:
    """The error is computed with the gradients that the optimizer gets, and is the same at any scale."""
    coded, plain = optax.chain(optax.scale(0.5), adam_fn.adam(RATE, storage=storage)), adam_fn.adam(RATE)
    params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(3)}
    grads = {"w": MATRIX, "b": MATRIX[:, 0, :3]}
    now = jax.tree.map(lambda g: g[0], grads)

    @jax.jit
    def run(params: Any, grads: Any, now: Any) -> Any:
        _, state, _ = stepped(coded, grads, params)
        updates, later = coded.update(now, state, params)
        before, after = (diagnostics.moments(coded, x, params) for x in (state, later))
        exact = (optax.ScaleByAdamState(count_of(state), **before), optax.EmptyState())
        expected, _ = plain.update(jax.tree.map(lambda g: g / 2, now), exact, params)
        first = coded.init(params)
        scaled = [jax.tree.map(lambda g, x=x: x * g, now) for x in (1, 2.0**-40)]  # Squares of ν are 0 in float32.
        read = (
            diagnostics.signal_to_noise(coded, state, params),
            [diagnostics.quantisation_error(coded, first, g, params) for g in scaled],
            diagnostics.summary(coded, state, params, grads=now, per_leaf=True),
        )
        return before, after, (updates, expected), read

    before, after, updates, (ratio, errors, logged) = run(params, grads, now)
    chex.assert_trees_all_close(*updates, rtol=1e-6)  # Float32 storage continues alike from these moments.
    m, v = (wide(before[slot]["w"]) for slot in ("mu", "nu"))
    for slot, x, expected in (("mu", m, ema(0.9, MATRIX / 2)), ("nu", v, ema(0.999, wide(MATRIX / 2) ** 2))):
        assert (relative_error(x, expected) > 1e-4) == (slot in most)
        assert relative_error(x, expected) < most.get(slot, 1e-6)
    assert relative_error(np.asarray(ratio["w"]), m / (1 - 0.9**4) / np.sqrt(v / (1 - 0.999**4))) < 1e-5

    # One more step: the exact slots in float64, against the stored ones.
    kept = {key for key in logged if key.startswith("quantisation_error")}
    assert kept == {f"quantisation_error/{slot}{leaf}" for slot in most for leaf in ("", "/w", "/b")}
    powers = {"mu": (0.9, 1), "nu": (0.999, 2)}
    for slot in most:
        (beta, power), lost, all_of_it = powers[slot], [], []
        for leaf in ("w", "b"):
            exact = beta * wide(before[slot][leaf]) + (1 - beta) * (wide(now[leaf]) / 2) ** power
            error = wide(after[slot][leaf]) - exact
            lost, all_of_it = [*lost, *error.ravel()], [*all_of_it, *exact.ravel()]
            expected = np.linalg.norm(error) / np.linalg.norm(exact)
            assert float(logged[f"quantisation_error/{slot}/{leaf}"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        expected = np.linalg.norm(lost) / np.linalg.norm(all_of_it)
        assert float(logged[f"quantisation_error/{slot}"]) == pytest.approx(expected, rel=1e-3)
        assert float(errors[1][slot]["w"]) == pytest.approx(float(errors[0][slot]["w"]), rel=0.02)
        assert min(expected, float(errors[0][slot]["w"])) > 1e-4


def test_a_summary_in_a_compiled_step_equals_one_outside() -> None:
    """Its entries are float32 scalars, and it is compiled once."""
    tx = adam_fn.adamw(rate, storage="24bit")

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates, state, diagnostics.summary(tx, state, params, updates, grads, per_leaf=True)

    trees = [{"layers": [{"kernel": g, "bias": g[0, :3].astype(jnp.bfloat16)}]} for g in MATRIX]
    params, first, second, _ = jax.tree.map(jnp.asarray, trees)
    _, state, _ = step(params, tx.init(params), first)
    updates, state, found = step(params, state, second)
    assert compilations(step) == 1
    assert {(x.shape, str(x.dtype)) for x in found.values()} == {((), "float32")}
    outside = diagnostics.summary(tx, state, params, updates)
    chex.assert_trees_all_close({key: found[key] for key in outside}, outside, rtol=1e-4)
    rates, read = (
        ["learning_rate", "next_learning_rate", "weight_decay"],
        ["signal_to_noise", "effective_step", "at_bound"],
    )
    each = [*read, "update_to_weight", "quantisation_error/mu", "quantisation_error/nu"]
    assert set(found) == {*rates, *(key + leaf for key in each for leaf in ("", "/layers/0/kernel", "/layers/0/bias"))}
    assert set(jax.eval_shape(lambda s: diagnostics.summary(tx, s, params), state)) == {*rates, *read}


def test_reading_the_rate_runs_no_step() -> None:
    """The update that is traced to find the optimizer is not in the program."""
    tx, params = optax.chain(optax.clip_by_global_norm(1.0), adam_fn.adam(rate)), jnp.zeros((256, 256))
    read = jax.jit(lambda state, params: diagnostics.learning_rate(tx, state, params))
    cost = read.lower(tx.init(params), params).compile().cost_analysis()
    assert cost is not None
    assert cost["flops"] < 100
    assert tx.update(params, tx.init(params), params)[1] is not None  # Tracing leaves nothing behind.


@KINDS
def test_a_sharded_summary_gathers_no_array(kind: AxisType) -> None:
    """The numbers are the same, and the elements stay where they are."""
    mesh = mesh_of(kind, (2, 4))
    where = NamedSharding(mesh, PartitionSpec("data", "model"))
    tx = adam_fn.adamw(RATE, storage="16bit")

    @jax.jit
    def read(p: jax.Array, g: jax.Array) -> Any:
        updates, state = tx.update(g, tx.init(p), p)
        return diagnostics.signal_to_noise(tx, state, p), diagnostics.summary(tx, state, p, updates, g)

    _, expected = read(MATRIX[0], MATRIX[1])
    with jax.set_mesh(mesh):
        p, g = jax.device_put((MATRIX[0], MATRIX[1]), where)
        program = read.lower(p, g).compile()
        ratio, found = program(p, g)
    assert_placed(ratio, where)
    assert "all-gather" not in (program.as_text() or "all-gather")
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.quick
def test_a_missing_optimizer_rate_or_ratio_is_an_error() -> None:
    def read(function: Callable[..., Any], tx: optax.GradientTransformation) -> Any:
        grads = (START,) if function is diagnostics.quantisation_error else ()
        return function(tx, tx.init(START), *grads, START)

    def steps(tx: Any) -> optax.GradientTransformation:
        return optax.MultiSteps(tx, 2).gradient_transformation()

    adam, lion, plain, rate = adam_fn.adam(RATE), adam_fn.lion(RATE), adam_fn.Adam(), adam_fn.Rate(RATE)
    injected, coded = optax.inject_hyperparams(adam_fn.adam)(RATE), adam_fn.adam(RATE, storage="16bit")
    only_rate, only_adam, two_rates = map(adam_fn.transform, (rate, plain, rate >> rate))
    averaged, scaled = optax.chain(only_rate, adam_fn.average_params()), optax.chain(only_adam, optax.scale(-RATE))
    for function, tx, message in (
        (diagnostics.signal_to_noise, optax.adam(RATE), "exactly one adam_fn optimizer, found 0"),
        (diagnostics.summary, averaged, "exactly one adam_fn optimizer, found 0"),
        (diagnostics.summary, optax.chain(adam, lion), "exactly one adam_fn optimizer, found 2"),
        (diagnostics.signal_to_noise, optax.chain(adam, adam), "exactly one adam_fn optimizer, found 2"),
        (diagnostics.quantisation_error, optax.chain(adam, lion), "exactly one adam_fn optimizer, found 2"),
        (diagnostics.at_bound, lion, r"Lion.* has no m̂/√v̂: its slots are \['mu'\]"),
        (diagnostics.effective_step, adam_fn.adam(RATE, b1=0.0), r"slots are \['nu'\]"),
        (diagnostics.learning_rate, scaled, "one Rate in the transformation, found 0"),
        (diagnostics.effective_step, only_adam, "found 0: pass learning_rate"),
        (diagnostics.learning_rate, two_rates, "one Rate in the transformation, found 2"),
        (diagnostics.learning_rate, steps(injected), r"learning_rate cannot see .* inside lax\.cond"),
        (diagnostics.quantisation_error, steps(coded), r"quantisation_error cannot see .* inside lax\.cond"),
    ):
        with pytest.raises(ValueError, match=message):
            read(function, tx)
    assert set(read(diagnostics.summary, lion)) == {"learning_rate", "next_learning_rate", "weight_decay"}


def test_ratio_and_step_fall_near_the_optimum_at_a_constant_rate() -> None:
    tx, start = adam_fn.adam(RATE), jnp.ones(64)

    def step(carry: Any, noise: jax.Array) -> Any:
        p, state = carry
        updates, state = tx.update(p + 0.5 * noise, state, p)
        return (p + updates, state), diagnostics.summary(tx, state, p)

    noise = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    found = jax.jit(lambda noise: jax.lax.scan(step, (start, tx.init(start)), noise)[1])(noise)
    for key in ("signal_to_noise", "effective_step", "at_bound"):
        assert np.mean(found[key][-50:]) < 0.5 * np.mean(found[key][:50]), key
