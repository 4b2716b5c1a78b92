"""Conversion of optax's states to ours and back: training goes on as before."""

import functools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers.runs import by_name, relative_error, scanned
from helpers.states import count_of, kept_weights, slots_of

import adam_fn
from adam_fn.interop import from_optax, to_optax

# Their complements are exact in float32: the digits that optax loses elsewhere (`1 - float32(0.999)`) do not matter.
BETAS: dict[str, Any] = {"b1": 0.875, "b2": 0.96875}
STEPS = 50
PARAMS: Any = {
    "dense": {"kernel": np.linspace(-1, 1, 3 * 40, dtype=np.float32).reshape(3, 40), "bias": np.ones(40, np.float32)},
    "scale": np.float32(2.0) * np.ones((), np.float32),
}
DECAYS = {"dense": {"kernel": True, "bias": False}, "scale": False}
STAYS = jax.tree.map(operator.not_, DECAYS)
DECAYING: dict[str, Any] = {"weight_decay": 0.02, "mask": DECAYS}


def falling(count: Any) -> Any:
    return 1e-3 / (1 + 0.1 * count)


def namesakes(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    theirs = getattr(optax, name, None) or getattr(optax.contrib, name)
    return theirs(*arguments, **options), getattr(adam_fn, name)(*arguments, **options)


#: Optimizers of optax, and ours of the same maths.
PAIRS: dict[str, tuple[Any, Any]] = {
    **{x: namesakes(x, 1e-3, **BETAS) for x in ("adam", "nadam", "adamax", "radam", "adabelief", "yogi", "adopt")},
    "adam-b1_zero": namesakes("adam", 1e-3, b1=0.0, b2=0.875),
    "adamw-chain": (
        optax.chain(optax.identity(), optax.adamw(falling, **BETAS, **DECAYING)),
        adam_fn.adamw(falling, **BETAS, **DECAYING),
    ),
    "adamw-partition": (
        optax.partition(
            {True: optax.adamw(1e-3, **BETAS, weight_decay=0.02), False: optax.adam(1e-3, **BETAS)}, DECAYS
        ),
        adam_fn.adamw(1e-3, **BETAS, **DECAYING),
    ),
    "adam-masked": (
        optax.chain(optax.masked(optax.adam(1e-3, **BETAS), DECAYS), optax.masked(optax.set_to_zero(), STAYS)),
        adam_fn.adam(1e-3, **BETAS, frozen=STAYS),
    ),
    "adam-inject": (optax.inject_hyperparams(optax.adam)(falling, **BETAS), adam_fn.adam(falling, **BETAS)),
    "adam-finite": (optax.apply_if_finite(optax.adam(1e-3, **BETAS), 3), adam_fn.adam(1e-3, **BETAS)),
    "amsgrad": namesakes("amsgrad", 1e-3, **BETAS, bias_correction_nu=False),
    "lion": namesakes("lion", 1e-4, b1=0.75, b2=0.875),
    # optax has 1 - b2 where b2 belongs; at a half, both are the same.
    "adan": (optax.adan(1e-3, b2=0.5, b3=0.96875), adam_fn.adan(1e-3, b2=0.5, b3=0.96875, eps_root=1e-8)),
    "ademamix": namesakes("ademamix", 1e-3, **BETAS, b3=0.96875),
}


class Run(NamedTuple):
    """States, parameters and updates of each pair, by name."""

    blank: Any
    params: Any
    converted: Any
    updates: Any
    our_updates: Any
    after: Any
    ours: Any


@functools.cache
def ran() -> Run:
    """Runs STEPS steps of optax, converts, and runs STEPS more of each package, each in one program."""
    theirs, ours = ({name: pair[i] for name, pair in PAIRS.items()} for i in range(2))

    def gradients(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda p: rng.standard_normal((STEPS, *p.shape)).astype(np.float32), PARAMS)
        return dict.fromkeys(PAIRS, grads)

    start: Any = dict.fromkeys(PAIRS, jax.tree.map(jnp.asarray, PARAMS))
    blank = jax.jit(by_name(theirs).init)(start)
    (params, before), _ = scanned(by_name(theirs), start, gradients(0), blank)
    converted = {name: from_optax(tx, params[name], before[name]) for name, tx in ours.items()}
    (_, after), updates = scanned(by_name(theirs), params, gradients(1), before)
    (_, ours_after), our_updates = scanned(by_name(ours), params, gradients(1), converted)
    return Run(blank, params, converted, updates, our_updates, after, ours_after)


def flat(tree: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on_from_a_state_of_optax(name: str) -> None:
    """The converted state has the types, shapes and counts of ours."""
    run, tx = ran(), PAIRS[name][1]
    found = run.converted[name]
    assert jax.eval_shape(lambda: found) == jax.eval_shape(lambda: tx.init(run.params[name]))
    assert {int(x) for x in jax.tree.leaves(found) if x.dtype == jnp.int32} == {STEPS}
    # Both optimizers round float32 in their own ways; a wrong moment, count or weight would show at 1e-3.
    assert relative_error(flat(run.our_updates[name]), flat(run.updates[name])) < 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_our_state_converts_to_that_of_optax(name: str) -> None:
    """Our last state becomes the one that optax itself reached; a conversion there and back is exact."""
    run, tx = ran(), PAIRS[name][1]
    found: Any = to_optax(tx, run.params[name], run.ours[name], run.blank[name])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, run.after[name])
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(run.after[name]), strict=True):
        where = jax.tree_util.keystr(path)
        if ("hyperparams" in where and "count" not in where) or (name == "adam-b1_zero" and ".mu" in where):
            continue  # Computed anew at every step, or not used with β₁ = 0.
        most = 0 if jnp.issubdtype(x.dtype, jnp.integer) else 5e-6
        assert relative_error(np.asarray(x), np.asarray(y, np.float64)) <= most, where
    back: Any = to_optax(tx, run.params[name], run.converted[name], run.blank[name])
    chex.assert_trees_all_equal(from_optax(tx, run.params[name], back), run.converted[name])


def adam_state(mu_dtype: Any = None) -> tuple[Any, Any]:
    """Parameters and a state of optax's Adam after three steps."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, PARAMS)
    mu = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), mu_dtype or p.dtype), PARAMS)
    nu = jax.tree.map(lambda m: jnp.square(m).astype(jnp.float32), mu)
    return params, (optax.ScaleByAdamState(jnp.int32(3), mu, nu), optax.EmptyState())


@pytest.mark.quick
def test_bias_weights_follow_from_the_count() -> None:
    params, (state, _) = adam_state()
    state = state._replace(count=jnp.int32(2000))
    betas, steps = jnp.asarray([0.9, 0.9999]), np.arange(1, 2001)
    b1, b2 = map(float, betas)
    expected = [1 - b1**2000, 1 - b2**2000, np.sum((1 - b2) * b2 ** (2000 - steps) * (1 - b2**steps))]
    for make, weights in ((adam_fn.adam, expected[:2]), (adam_fn.radam, expected)):
        found: Any = from_optax(make(1e-3, *betas), params, state)
        np.testing.assert_allclose(kept_weights(found).sum(axis=1), weights, rtol=1e-7)
    fast: Any = adam_fn.schedules.nadam_momentum(0.9, 1.0)
    nadam: Any = from_optax(adam_fn.nadam(1e-3, momentum_decay=1.0), params, state._replace(count=jnp.int32(3)))
    product = np.prod([float(fast(i)) for i in range(3)])
    np.testing.assert_allclose(kept_weights(nadam)[0].sum(), 1 - product, rtol=1e-6)


def test_maxima_of_optax_amsgrad_are_converted_to_raw_ones() -> None:
    """The maximum is of the corrected v in optax and of the raw v here; converted, both divide by the same number."""
    theirs, ours = optax.amsgrad(1e-3, **BETAS), adam_fn.amsgrad(1e-3, **BETAS)
    params, (adam, _) = adam_state()
    maxima = jax.tree.map(lambda v: 2 * v / (1 - BETAS["b2"] ** 2), adam.nu)
    optax_state: Any = optax.ScaleByAmsgradState(adam.count, adam.mu, adam.nu, maxima)
    state: Any = from_optax(ours, params, optax_state)
    weight = 1 - BETAS["b2"] ** 3
    np.testing.assert_allclose(flat(slots_of(state)["nu_max"]) / weight, flat(optax_state.nu_max), rtol=1e-6)
    back: Any = to_optax(ours, params, state, theirs.init(params))
    np.testing.assert_allclose(flat(back[0].nu_max), flat(optax_state.nu_max), rtol=1e-6)


def test_a_bfloat16_moment_of_optax_becomes_float32_and_returns_unchanged() -> None:
    params, state = adam_state(jnp.bfloat16)
    found: Any = from_optax(adam_fn.adam(1e-3), params, state)
    assert slots_of(found)["mu"]["scale"].dtype == jnp.float32
    theirs, narrow = (make(1e-3, mu_dtype="bfloat16").init(params) for make in (optax.adam, adam_fn.adam))
    back: Any = to_optax(adam_fn.adam(1e-3), params, found, theirs)
    for one in (back, narrow):
        chex.assert_trees_all_equal_shapes_and_dtypes(one, theirs)
    np.testing.assert_array_equal(back[0].mu["dense"]["kernel"], state[0].mu["dense"]["kernel"])


def test_a_state_of_optax_is_converted_into_master_weights_and_back() -> None:
    params, state = adam_state()
    short = optax.tree.cast(params, jnp.bfloat16)
    tx: Any = adam_fn.master_weights(adam_fn.adam(1e-3))
    found: Any = from_optax(tx, short, state)
    chex.assert_trees_all_equal(found, tx.init(short)._replace(inner=state))
    back: Any = to_optax(tx, short, found, optax.adam(1e-3).init(params))
    chex.assert_trees_all_equal(back, state)


def test_the_state_lives_where_the_parameters_live() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    params, state = adam_state()
    params["dense"]["kernel"] = jax.device_put(params["dense"]["kernel"], sharding)
    tx = adam_fn.adam(1e-3)
    found: Any = from_optax(tx, params, state)
    for slot in ("mu", "nu"):
        assert slots_of(found)[slot]["dense"]["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert count_of(found).sharding == count_of(tx.init(params)).sharding


def test_leaves_without_moments_are_converted_there_and_back() -> None:
    params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32), "none": None}
    theirs = optax.adam(1e-3)
    found: Any = from_optax(adam_fn.adam(1e-3), params, theirs.init(params))
    assert jax.tree.structure(found) == jax.tree.structure(adam_fn.adam(1e-3).init(params))
    back: Any = to_optax(adam_fn.adam(1e-3), params, found, theirs.init(params))
    assert back[0].mu["steps"].dtype == jnp.int32


def test_a_state_inside_other_wrappers_is_found() -> None:
    params, (state, _) = adam_state()
    expected: Any = from_optax(adam_fn.adam(1e-3), params, state)
    steps: Any = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adam(1e-3)), 2).init(params)
    steps = steps._replace(inner_opt_state=(optax.EmptyState(), (state, optax.EmptyState())))
    boxed = {"optimizer": [None, steps]}
    for holder in (steps, boxed):
        chex.assert_trees_all_equal(from_optax(adam_fn.adam(1e-3), params, holder), expected)
        back: Any = to_optax(adam_fn.adam(1e-3), params, expected, jax.tree.map(jnp.zeros_like, holder))
        chex.assert_trees_all_equal(back, holder)


def test_errors_list_every_path() -> None:
    params, (state, rate) = adam_state()
    tx = adam_fn.adam(1e-3)
    broken = state._replace(
        mu={"dense": {"kernel": jnp.ones((40, 3)), "bias": optax.MaskedNode()}, "scale": state.mu["scale"]},
        nu={**state.nu, "extra": jnp.ones(2), "scale": jnp.ones((), jnp.int32)},
    )
    with pytest.raises(ValueError, match="does not fit") as error:
        from_optax(tx, params, (broken, rate))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "dense/bias: no mu",
        "dense/kernel: mu has shape (40, 3), the parameter (3, 40)",
        "scale: nu is int32, the parameter float32",
        "extra: is not a parameter",
    ]
    complex_: Any = {"w": jnp.ones(2, jnp.complex64)}
    theirs, frozen = optax.adam(1e-3), adam_fn.adam(1e-3, frozen=DECAYS)
    masked, four = optax.masked(theirs, DECAYS).init(params), optax.ScaleByScheduleState(jnp.int32(4))
    form = r"form of tx.init\(params\), \(ScaleByAdamState, EmptyState\): a tuple of 2 expected, got a tuple of 3"
    lost = r"(?s)dense/kernel: mu is not in.*dense/kernel: nu is not in"
    errors: Any = (
        (from_optax, tx, params, (state, four), r"(?s)0 ScaleByAdamState\.count: 3.*1 ScaleByScheduleState\.count: 4"),
        (from_optax, tx, params, (state, state), r"(?s)mu of one parameter twice.*dense/bias.*dense/kernel.*scale"),
        (from_optax, adam_fn.amsgrad(1e-3), params, state, "no ScaleByAmsgradState"),
        (from_optax, adam_fn.laprop(1e-3), params, state, "no counterpart of LaProp"),
        (from_optax, theirs, params, state, "expected an optimizer of adam_fn"),
        (from_optax, tx, params, optax.sgd(1e-3).init(params), "which Adam needs in order to continue$"),
        (from_optax, tx, complex_, theirs.init(complex_), r"(?s)complex.*w"),
        (to_optax, tx, complex_, tx.init(complex_), theirs.init(complex_), r"(?s)complex.*w"),
        (to_optax, tx, params, adam_fn.lion(1e-3).init(params), (state, rate), form),
        (to_optax, frozen, params, frozen.init(params), (state, rate), lost),
        (to_optax, tx, params, tx.init(params), masked, r"(?s)bias: has no moments in.*scale: has no moments in"),
    )
    for call, *arguments, message in errors:
        with pytest.raises((ValueError, TypeError), match=message):
            call(*arguments)


def test_a_checkpoint_without_its_types_is_an_error_that_says_how_to_restore_it(tmp_path: Path) -> None:
    """Dictionaries and lists are refused; restored as the error says, the state converts."""
    params, state = adam_state()
    tx = adam_fn.adam(1e-3)
    by_flax: Any = serialization.msgpack_restore(serialization.to_bytes(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        by_orbax: Any = checkpointer.restore(tmp_path / "state")
    message = r"plain containers: restore it into optax_tx\.init\(params\).*from_state_dict"
    for plain in (by_flax, by_orbax):
        with pytest.raises(ValueError, match=message):
            from_optax(tx, params, plain)
    typed = serialization.from_state_dict(optax.adam(1e-3).init(params), by_flax)
    chex.assert_trees_all_equal(from_optax(tx, params, typed), from_optax(tx, params, state))
