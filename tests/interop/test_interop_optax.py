"""optax's states to ours and back: training goes on as if nothing had happened."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers.runs import relative_error
from helpers.states import bias_weights, count_of, kept_weights, slots_of

import adam_fn
from adam_fn.interop import from_optax, to_optax

# Their complements are exact in float32: what optax loses elsewhere (`1 - float32(0.999)`) is not what is tested.
BETAS: dict[str, Any] = {"b1": 0.875, "b2": 0.96875}
BEFORE, AFTER = 10, 100
PARAMS: Any = {
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
    parts: Any = {"decays": optax.adamw(1e-3, **BETAS, weight_decay=0.02), "stays": optax.adam(1e-3, **BETAS)}
    return Pair(optax.partition(parts, LABELS), adam_fn.adamw(1e-3, **BETAS, weight_decay=0.02, mask=DECAYS))


def frozen() -> Pair:
    stays = {"dense": {"kernel": False, "bias": True}, "scale": True}
    theirs = optax.chain(optax.masked(optax.adam(1e-3, **BETAS), DECAYS), optax.masked(optax.set_to_zero(), stays))
    return Pair(theirs, adam_fn.adam(1e-3, **BETAS, frozen=stays))


def namesakes(name: str, *arguments: Any, **options: Any) -> Pair:
    theirs = getattr(optax, name, None) or getattr(optax.contrib, name)
    return Pair(theirs(*arguments, **options), getattr(adam_fn, name)(*arguments, **options))


PAIRS = {
    **{x: namesakes(x, 1e-3, **BETAS) for x in ("adam", "nadam", "adamax", "radam", "adabelief", "yogi", "adopt")},
    "adam-b1_zero": namesakes("adam", 1e-3, b1=0.0, b2=0.875),
    "adamw-chain": chained(),
    "adamw-partition": partitioned(),
    "adam-masked": frozen(),
    "adam-inject": Pair(optax.inject_hyperparams(optax.adam)(falling, **BETAS), adam_fn.adam(falling, **BETAS)),
    "adam-finite": Pair(optax.apply_if_finite(optax.adam(1e-3, **BETAS), 3), adam_fn.adam(1e-3, **BETAS)),
    "amsgrad": namesakes("amsgrad", 1e-3, **BETAS, bias_correction_nu=False),
    "lion": namesakes("lion", 1e-4, b1=0.75, b2=0.875),
    # optax has 1 - b2 where b2 belongs: at a half, the same.
    "adan": Pair(optax.adan(1e-3, b2=0.5, b3=0.96875), adam_fn.adan(1e-3, b2=0.5, b3=0.96875, eps_root=1e-8)),
    "ademamix": namesakes("ademamix", 1e-3, **BETAS, b3=0.96875),
}


def gradients(steps: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.standard_normal((steps, *p.shape)).astype(np.float32), PARAMS)


def runner(txs: Any) -> Any:
    """``run(params, states, grads) -> (params, states, all updates)``: several transformations, each by itself."""

    @jax.jit
    def chunk(params: Any, states: Any, grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            params, states = carry
            done = {name: tx.update(g, states[name], params[name]) for name, tx in txs.items()}
            updates = {name: u for name, (u, _) in done.items()}
            params = {name: optax.apply_updates(params[name], u) for name, u in updates.items()}
            return (params, {name: s for name, (_, s) in done.items()}), updates

        (params, states), updates = jax.lax.scan(step, (params, states), grads)
        return params, states, updates

    def run(params: Any, states: Any, grads: Any) -> tuple[Any, Any, Any]:
        chunks = []
        for i in range(0, len(jax.tree.leaves(grads)[0]), BEFORE):  # One program for both lengths.
            params, states, updates = chunk(params, states, jax.tree.map(lambda g, i=i: g[i : i + BEFORE], grads))
            chunks.append(updates)
        return params, states, jax.tree.map(lambda *x: np.concatenate(x), *chunks)

    return run


class Run(NamedTuple):
    start: Any
    blank: Any
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
    params: Any = dict.fromkeys(PAIRS, jax.tree.map(jnp.asarray, PARAMS))
    blank = jax.jit(lambda params: {name: tx.init(params[name]) for name, tx in theirs.items()})(params)
    run = runner(theirs)
    params, before, _ = run(params, blank, gradients(BEFORE, 0))
    converted = {name: from_optax(tx, params[name], before[name]) for name, tx in ours.items()}
    _, after, updates = run(params, before, gradients(AFTER, 1))
    ended, ours_after, our_updates = runner(ours)(params, converted, gradients(AFTER, 1))
    return Run(params, blank, converted, updates, our_updates, ended, after, ours_after)


def flat(tree: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on_from_a_state_of_optax(name: str, ran: Run) -> None:
    # Two optimizers in float32, each with roundings of its own; a moment, count or weight that was wrong shows at 1e-3.
    assert relative_error(flat(ran.our_updates[name]), flat(ran.updates[name])) < 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_the_converted_state_is_what_ours_would_be(name: str, ran: Run) -> None:
    found, fresh = ran.converted[name], jax.eval_shape(PAIRS[name].ours.init, ran.start[name])
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, fresh)
    assert [(x.dtype, x.weak_type) for x in jax.tree.leaves(found)] == [
        (x.dtype, x.weak_type) for x in jax.tree.leaves(fresh)
    ]
    counts = [int(x) for x in jax.tree.leaves(found) if x.dtype == jnp.int32]
    assert counts and set(counts) == {BEFORE}


def adam_state(mu_dtype: Any = None) -> tuple[Any, Any]:
    """Parameters and a state of optax's Adam after three steps."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, PARAMS)
    mu = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), mu_dtype or p.dtype), PARAMS)
    nu = jax.tree.map(lambda m: jnp.square(m).astype(jnp.float32), mu)
    return params, (optax.ScaleByAdamState(jnp.int32(3), mu, nu), optax.EmptyState())


@pytest.mark.quick
def test_bias_weights_follow_from_the_count() -> None:
    params, state = adam_state()
    state = state[0]._replace(count=jnp.int32(2000))
    b1, b2, steps = np.float32(0.9), np.float32(0.9999), np.arange(1, 2001)
    adam: Any = from_optax(adam_fn.adam(1e-3, jnp.asarray(b1), jnp.asarray(b2)), params, state)
    radam: Any = from_optax(adam_fn.radam(1e-3, jnp.asarray(b1), jnp.asarray(b2)), params, state)
    b1, b2 = float(b1), float(b2)
    expected = [1 - b1**2000, 1 - b2**2000, np.sum((1 - b2) * b2 ** (2000 - steps) * (1 - b2**steps))]
    np.testing.assert_allclose(kept_weights(adam).sum(axis=1), expected[:2], rtol=1e-7)
    np.testing.assert_allclose(kept_weights(radam).sum(axis=1), expected, rtol=1e-7)
    for make in (adam_fn.adam, adam_fn.radam):  # Of numbers the count is all there is.
        tx = make(1e-3, b1, b2)
        plain: Any = from_optax(tx, params, state)
        jax.tree.map(np.testing.assert_array_equal, plain, (state, optax.EmptyState()))
        found = bias_weights(tx, plain)
        np.testing.assert_allclose(found, expected[: len(found)], rtol=4e-7)
    fast: Any = adam_fn.schedules.nadam_momentum(0.9, 1.0)
    nadam: Any = from_optax(adam_fn.nadam(1e-3, momentum_decay=1.0), params, state._replace(count=jnp.int32(3)))
    product = np.prod([float(fast(i)) for i in range(3)])
    np.testing.assert_allclose(kept_weights(nadam)[0].sum(), 1 - product, rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_our_state_becomes_that_of_optax(name: str, ran: Run) -> None:
    """After 100 steps of ours, optax's state is what 100 steps of optax made of it."""
    found: Any = to_optax(PAIRS[name].ours, ran.params[name], ran.ours[name], ran.blank[name])
    expected = ran.after[name]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        if ("hyperparams" in where and "count" not in where) or (name == "adam-b1_zero" and ".mu" in where):
            continue  # Computed anew at every step; and with β₁ = 0 of no use.
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        if jnp.issubdtype(x.dtype, jnp.integer):
            assert int(x) == int(y), where
        else:
            assert relative_error(np.asarray(x), np.asarray(y, np.float64)) < 2e-6, where


@pytest.mark.parametrize("name", PAIRS)
def test_there_and_back_is_exact(name: str, ran: Run) -> None:
    found: Any = to_optax(PAIRS[name].ours, ran.start[name], ran.converted[name], ran.blank[name])
    again = from_optax(PAIRS[name].ours, ran.start[name], found)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(ran.converted[name]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_amsgrad_of_corrected_maxima() -> None:
    """The maximum of optax is of the corrected v: what we divide by is the same now, and each knows the other's."""
    theirs, ours = optax.amsgrad(1e-3, **BETAS), adam_fn.amsgrad(1e-3, **BETAS)
    params, (adam, _) = adam_state()
    maxima = jax.tree.map(lambda v: 2 * v / (1 - BETAS["b2"] ** 2), adam.nu)
    optax_state: Any = optax.ScaleByAmsgradState(adam.count, adam.mu, adam.nu, maxima)
    state: Any = from_optax(ours, params, optax_state)
    weight = 1 - BETAS["b2"] ** 3
    np.testing.assert_allclose(flat(slots_of(state)["nu_max"]) / weight, flat(optax_state.nu_max), rtol=1e-6)
    back: Any = to_optax(ours, params, state, theirs.init(params))
    np.testing.assert_allclose(flat(back[0].nu_max), flat(optax_state.nu_max), rtol=1e-6)


def test_into_any_storage() -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.ones((64, 64)), "scale": jnp.ones(())}
    mu = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    state: Any = optax.ScaleByAdamState(jnp.int32(7), mu, jax.tree.map(jnp.square, mu))
    storages: dict[Any, dict[str, float]] = {
        "bfloat16": {"mu": 2**-7, "nu": 2**-7},
        "24bit": {"mu": 0.06, "nu": 2**-7},
        "16bit": {"mu": 0.22, "nu": 0.25},
    }
    for storage, most in storages.items():
        tx = adam_fn.adam(1e-3, storage=storage)
        found: Any = from_optax(tx, params, state)
        back: Any = to_optax(tx, params, found, optax.adam(1e-3).init(params))
        for slot, theirs in (("mu", state.mu), ("nu", state.nu)):
            decoded = tx.update.decoded(found, params)[slot]
            assert most[slot] / 100 < relative_error(flat(decoded), flat(theirs)) < most[slot]
            np.testing.assert_array_equal(flat(getattr(back[0], slot)), flat(decoded))
        tx.update(params, found, params)
    short: Any = from_optax(adam_fn.adam(1e-3, mu_dtype="bfloat16"), params, state)
    bits = np.asarray(state.mu["w"]).view(np.uint32), np.asarray(slots_of(short)["mu"]["w"]).view(np.uint16)
    assert np.isin(bits[1] - (bits[0] >> 16), (0, 1)).all()  # One of the two around it.
    np.testing.assert_array_equal(slots_of(short)["nu"]["w"], state.nu["w"])


def test_out_of_optax_bfloat16() -> None:
    params, state = adam_state(jnp.bfloat16)
    found: Any = from_optax(adam_fn.adam(1e-3), params, state)
    assert slots_of(found)["mu"]["scale"].dtype == jnp.float32
    back: Any = to_optax(adam_fn.adam(1e-3), params, found, optax.adam(1e-3, mu_dtype="bfloat16").init(params))
    assert back[0].mu["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back[0].mu["dense"]["kernel"], state[0].mu["dense"]["kernel"])


def test_master_weights() -> None:
    params, state = adam_state()
    short = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = adam_fn.master_weights(adam_fn.adam(1e-3))
    found: Any = from_optax(tx, short, state)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(short))
    assert not np.any(flat(found.remainder))
    np.testing.assert_array_equal(flat(slots_of(found.inner)["mu"]), flat(state[0].mu))
    back: Any = to_optax(tx, short, found, optax.adam(1e-3).init(params))
    np.testing.assert_array_equal(flat(back), flat(state))


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


def test_leaves_without_moments() -> None:
    params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32), "none": None}
    theirs = optax.adam(1e-3)
    found: Any = from_optax(adam_fn.adam(1e-3), params, theirs.init(params))
    assert jax.tree.structure(found) == jax.tree.structure(adam_fn.adam(1e-3).init(params))
    back: Any = to_optax(adam_fn.adam(1e-3), params, found, theirs.init(params))
    assert back[0].mu["steps"].dtype == jnp.int32


def test_inside_other_wrappers() -> None:
    params, (state, _) = adam_state()
    expected: Any = from_optax(adam_fn.adam(1e-3), params, state)
    steps: Any = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adam(1e-3)), 2).init(params)
    steps = steps._replace(inner_opt_state=(optax.EmptyState(), (state, optax.EmptyState())))
    boxed = {"optimizer": [None, steps]}
    for holder in (steps, boxed):
        jax.tree.map(np.testing.assert_array_equal, from_optax(adam_fn.adam(1e-3), params, holder), expected)
        back: Any = to_optax(adam_fn.adam(1e-3), params, expected, jax.tree.map(jnp.zeros_like, holder))
        np.testing.assert_array_equal(flat(back), flat(holder))


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


def restored_by_flax(state: Any, target: Any, folder: Path) -> tuple[Any, Any]:
    """Without the target, and with it."""
    found: Any = serialization.msgpack_restore(serialization.to_bytes(state))
    return found, serialization.from_state_dict(target, found)


def restored_by_orbax(state: Any, target: Any, folder: Path) -> tuple[Any, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state"), checkpointer.restore(folder / "state", target)


@pytest.mark.parametrize("restored", [restored_by_flax, restored_by_orbax])
def test_a_checkpoint_without_its_types(restored: Any, tmp_path: Path) -> None:
    """Dictionaries and lists are an error that says how to restore it; done so, it is the state."""
    params, state = adam_state()
    tx = adam_fn.adam(1e-3)
    plain, typed = restored(state, optax.adam(1e-3).init(params), tmp_path)
    with pytest.raises(
        ValueError, match=r"plain containers: restore it into optax_tx\.init\(params\).*from_state_dict"
    ):
        from_optax(tx, params, plain)
    jax.tree.map(np.testing.assert_array_equal, from_optax(tx, params, typed), from_optax(tx, params, state))
