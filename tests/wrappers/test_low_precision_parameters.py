"""bfloat16 parameters in training: loops, frameworks, members, other leaves, errors."""

import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.runs import compilations, full_jit, scanned
from helpers.short import BF16, WRITES, bits_of, run, step
from jax.sharding import AxisType, PartitionSpec

import adam_fn
from adam_fn.wrappers import masters as write

RNG = np.random.default_rng(0)


def test_small_steps_move_one_to_zero() -> None:
    """They are 1,000 steps of 1e-3, which plain bfloat16 rounds away."""

    def end(tx: Any) -> np.ndarray:
        return np.asarray(run(tx, jnp.ones(100, BF16), lambda p, t: jnp.full(100, 1e-3), 1000)[0][-1], np.float32)

    sgd = optax.sgd(1.0)
    assert (end(sgd) == 1).all()
    # Each of 1,000 differences is rounded by 2⁻²⁵ in float32, and by 2⁻¹⁷ in 24-bit masters.
    assert np.abs(end(WRITES["masters of 16 bits"](sgd))).max() < 1000 * 2.0**-25
    assert np.abs(end(WRITES["masters of 8 bits"](sgd))).max() < 1000 * 2.0**-17
    moved = end(WRITES["stochastic"](sgd))
    assert 0 < np.abs(moved).max() < 0.01  # Random bits would leave a standard deviation of 0.044.


@pytest.mark.parametrize(
    ("kind", "ours"),
    [("masters of 16 bits", True), ("masters of 8 bits", False), ("stochastic", True), ("stochastic", False)],
)
def test_every_training_loop_lands_on_the_same_bits(kind: str, ours: bool) -> None:
    """Under jit XLA does not undo q - p: `apply_updates`, Flax linen's and NNX's loops land on the same bits."""
    # Powers of two, so that it does not matter where XLA contracts multiplications and additions.
    rule, peer = adam_fn.Decay(2.0**-4) >> adam_fn.Rate(2.0**-6), optax.add_decayed_weights(2.0**-4)
    tx: Any = WRITES[kind](adam_fn.transform(rule) if ours else optax.chain(peer, optax.sgd(2.0**-6)))
    shapes = {"a": (), "b": (0,), "c": (1,), "d": (3, 5, 7), "e": (999,)}
    start = {key: jnp.asarray(RNG.standard_normal(shape), BF16) for key, shape in shapes.items()}
    noise = {key: RNG.standard_normal((20, *shape)).astype(np.float32) for key, shape in shapes.items()}
    grads = [{key: jnp.asarray(g[t]) for key, g in noise.items()} for t in range(20)]

    def loop(update: Any, apply: Any) -> Any:
        p, state = start, tx.init(start)
        for g in grads:
            u, state = update(g, state, p)
            aim = jax.tree.map(lambda p, u: np.asarray(p, np.float64) + np.asarray(u, np.float64), p, u)
            p = apply(p, u)
            for key, x in p.items():
                assert (np.asarray(x, np.float64) == aim[key]).all()  # No rounding at all: the sum is a bfloat16.
        return p

    expected = loop(full_jit(tx.update), optax.apply_updates)
    (in_scan, _), _ = scanned(tx, start, noise, jit=full_jit)
    train = TrainState.create(apply_fn=lambda: None, params=start, tx=tx)
    linen = jax.lax.scan(lambda s, g: (s.apply_gradients(grads=g), None), train, noise)[0].params

    model = nnx.Dict({key: nnx.Param(p) for key, p in start.items()}, wide=nnx.Param(jnp.ones(2)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_nnx(model: Any, optimizer: nnx.Optimizer, g: dict[str, jax.Array]) -> None:
        optimizer.update(model, nnx.State(jax.tree.map(nnx.Param, g | {"wide": jnp.zeros(2)})))

    donated = adam_fn.make_step(tx)
    placed, state = jax.tree.map(jnp.copy, start), tx.init(start)
    for g in grads:
        train_nnx(model, optimizer, g)
        old, (placed, state) = placed, donated(placed, state, g)
        assert all(x.is_deleted() for x in old.values() if x.size)
    assert compilations(donated) == 1
    for found in (linen, in_scan, {key: model[key][...] for key in start}, placed):
        np.testing.assert_equal(jax.tree.map(bits_of, found), jax.tree.map(bits_of, expected))


@pytest.mark.parametrize("kind", ["masters of 16 bits", "stochastic"])
def test_vmapped_and_sharded_runs_equal_separate_runs(kind: str) -> None:
    """Even the dither is the same under `vmap` and in `shard_map` on 8 devices."""
    tx: Any = WRITES[kind](optax.sgd(2.0**-6))
    start = jnp.asarray(RNG.standard_normal((8, 33)), BF16)
    grads = jnp.asarray(RNG.standard_normal((8, 33)), jnp.float32)

    def train(p: Any, g: Any) -> Any:
        return jax.lax.scan(lambda c, _: (step(tx, c[0], c[1], g), None), (p, tx.init(p)), None, 5)[0]

    alone, state = jax.jit(lambda p, g: jax.lax.map(lambda x: train(*x), (p, g)))(start, grads)
    members, states = jax.jit(jax.vmap(train))(start, grads)
    spec = PartitionSpec("a")
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(lambda p, g: train(p[0], g[0])[0][None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(bits_of(jax.jit(sharded)(start, grads)), bits_of(alone))
    np.testing.assert_array_equal(bits_of(members), bits_of(alone))
    jax.tree.map(np.testing.assert_array_equal, states, state)


@pytest.mark.parametrize("kind", ["masters of 16 bits", "stochastic"])
def test_x64_does_not_change_the_bits(kind: str) -> None:
    """They stay the same with gradients in float64 and beside a float64 parameter, which is updated in float64."""
    p, g = jnp.asarray(RNG.standard_normal(999), BF16), jnp.asarray(RNG.standard_normal(999), jnp.float32)
    tx: Any = WRITES[kind](optax.sgd(2.0**-6))
    expected, state = tx.update({"a": g}, tx.init({"a": p}), {"a": p})
    with jax.enable_x64(True):
        params = {"a": p, "wide": jnp.full(3, 1 / 3)}
        grads = {"a": g.astype(jnp.float64), "wide": params["wide"]}
        found, wide = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(found["a"], expected["a"])
    assert found["a"].dtype == jnp.float32 and found["wide"].dtype == jnp.float64
    assert (np.asarray(found["wide"]) == -(2.0**-6) / 3).all()
    if isinstance(state, write.MasterState):
        np.testing.assert_array_equal(wide.remainder["a"], state.remainder["a"])
        assert wide.remainder["a"].dtype == state.remainder["a"].dtype
    else:
        assert wide.count.dtype == jnp.int32


@pytest.mark.parametrize("kind", WRITES)
def test_other_leaves_pass_through(kind: str) -> None:
    others = {"wide": jnp.full(2, 1 / 3), "complex": jnp.ones(2, jnp.complex64), "whole": jnp.arange(2), "none": None}
    shorts = {"short": jnp.ones((3, 2), BF16), "empty": jnp.zeros((0, 2), BF16), "scalar": jnp.ones((), BF16)}
    params = {**others, **shorts}
    grads = {**params, "whole": np.zeros(2, jax.dtypes.float0)}
    inner = adam_fn.adam(0.1)
    tx: Any = WRITES[kind](inner)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    plain, _ = inner.update(grads, inner.init(params), params)
    chex.assert_trees_all_equal({x: updates[x] for x in others}, {x: plain[x] for x in others}, strict=True)
    assert {updates[x].dtype for x in shorts} == {jnp.dtype("float32")}
    if isinstance(state, write.MasterState):
        assert state.remainder["whole"] == optax.MaskedNode() and state.remainder["none"] is None
        for key, p in {**shorts, "wide": params["wide"], "complex": params["complex"]}.items():
            assert state.remainder[key].shape == p.shape
            assert (state.remainder[key].dtype == bool) == (key not in shorts)
    chex.assert_trees_all_equal_dtypes(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize("kind", WRITES)
def test_masters_and_rounding_compose_with_optax_wrappers_and_pickle(kind: str) -> None:
    """They work with MultiSteps inside and outside, injected hyperparameters and masks, and are equal by value."""
    p = {"a": jnp.ones(8, BF16), "b": jnp.ones(8, BF16)}
    g = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    make = WRITES[kind]
    for tx in (
        make(optax.MultiSteps(adam_fn.adam(0.1), 2).gradient_transformation()),
        optax.MultiSteps(make(adam_fn.adam(0.1)), 2).gradient_transformation(),
        make(optax.inject_hyperparams(adam_fn.adam, hyperparam_dtype=jnp.float32)(learning_rate=0.1)),
        optax.masked(make(adam_fn.adam(0.1)), {"a": True, "b": False}),
    ):
        after, state = run(tx, p, lambda p, t: g, 2)
        assert np.asarray(after["a"][-1] < 0.95).all()
        jax.tree.map(np.testing.assert_array_equal, pickle.loads(pickle.dumps(state)), state)
    assert adam_fn.stochastic_rounding(optax.identity(), 1) != adam_fn.stochastic_rounding(optax.identity(), 2)
    tx: Any = make(adam_fn.adam(0.1))
    assert tx == make(adam_fn.adam(0.1)) != make(adam_fn.adam(0.2)) and hash(tx) == hash(make(adam_fn.adam(0.1)))
    assert pickle.loads(pickle.dumps(tx)) == tx
    doubled = optax.tree_map_params(tx, lambda x: x * 2, tx.init(p))
    assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(p))


P: Any = {"a": jnp.ones(2, BF16)}
WIDE: Any = {"a": jnp.ones(2)}
SGD = optax.sgd(1.0)
SIXTEEN, EIGHT, ROUNDING = (make(SGD) for make in WRITES.values())
BAD = r"expected parameters in bfloat16.*; a is "


def update(tx: Any, state: Any = None, params: Any = P, grads: Any = P) -> Any:
    return tx.update(grads, tx.init(P) if state is None else state, params)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda tx=tx: tx.init({"a": jnp.ones(2, "float16")}), BAD + "float16") for tx in (SIXTEEN, EIGHT, ROUNDING)),
        *((lambda tx=tx: tx.init({"a": jnp.ones(2, "float8_e4m3fn")}), BAD + "float8") for tx in (SIXTEEN, ROUNDING)),
        *((lambda tx=tx: tx.update(P, tx.init(P)), "needs the parameters") for tx in (SIXTEEN, EIGHT, ROUNDING)),
        *(
            (lambda tx=tx: update(tx, grads={"a": jnp.ones(3)}), r"of a has shape \(3,\), its parameter \(2,\)")
            for tx in (SIXTEEN, EIGHT, ROUNDING)
        ),
        (lambda: update(EIGHT, SIXTEEN.init(P)), r"remainder of a \(.*bits=8.*int16"),
        (lambda: update(SIXTEEN, optax.EmptyState()), "MasterState"),
        (lambda: update(ROUNDING, optax.EmptyState()), "RoundingState"),
        (
            lambda: update(SIXTEEN, SIXTEEN.init(P), WIDE, WIDE),
            r"a was bfloat16 when .* and is float32 now: .* optax.apply_updates",
        ),
        *((lambda bits=bits: write.master_weights(SGD, bits), "bits must be 8 or 16") for bits in (0, 12, 32)),
        *((lambda seed=seed: adam_fn.stochastic_rounding(SGD, seed), "seed must be in") for seed in (-1, 2**32)),
    ],
)
def test_errors_name_the_leaf(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
