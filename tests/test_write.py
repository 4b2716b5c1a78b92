"""What is written to bfloat16 parameters: exact masters, unbiased rounding, and updates that land where they should."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers.runs import full_jit
from helpers.short import BF16, bits_of, run

import adam_fn
from adam_fn import write
from adam_fn.noise import _key, _mix, random_bits

RNG = np.random.default_rng(0)
LARGEST = 0x7F7F7FFF  # The bits of the largest float32 that bfloat16 does not round to inf.


def _floats(bits: Any) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def _patterns() -> np.ndarray:
    """Every bfloat16, subnormals and both zeros included, times ties and their neighbours; and random bits."""
    low = np.array([0, 1, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF])
    every = (np.arange(0x10000)[:, None] << 16 | low).ravel()
    return np.concatenate([every, RNG.integers(0, 2**32, 2**24, np.uint32)]).astype(np.uint32)


# The masters.


def test_split_and_join_are_lossless() -> None:
    patterns = _patterns()
    x = _floats(patterns)

    @full_jit
    def there_and_back(x: jax.Array) -> Any:
        q = write.visible(x, 16)
        return q, write.join(q, write.remainder(x, q, 16), 16)

    q, back = there_and_back(x)
    finite = (patterns & 0x7FFFFFFF) < 0x7F800000
    inside = (patterns & 0x7FFFFFFF) <= LARGEST
    np.testing.assert_array_equal(bits_of(back)[inside], patterns[inside])
    np.testing.assert_array_equal(bits_of(q)[inside], (patterns[inside] + 0x8000) >> 16)
    # The few above bfloat16's reach stay below it; inf and nan are what they were.
    np.testing.assert_array_equal(bits_of(back)[finite & ~inside], (patterns & 0x80000000 | LARGEST)[finite & ~inside])
    np.testing.assert_array_equal(np.asarray(back)[~finite], x[~finite])


def test_masters_of_24_bits_are_the_nearest() -> None:
    patterns = _patterns()
    patterns = patterns[(patterns & 0x7FFFFFFF) <= 0x7F7F7F7F]

    @full_jit
    def there_and_back(x: jax.Array) -> Any:
        q = write.visible(x, 8)
        return q, write.join(q, write.remainder(x, q, 8), 8)

    q, back = there_and_back(_floats(patterns))
    expected = (patterns + 0x80) >> 8 << 8
    np.testing.assert_array_equal(bits_of(back), expected)
    np.testing.assert_array_equal(bits_of(q), (expected + 0x8000) >> 16)


@pytest.mark.parametrize("bits", [16, 8])
def test_any_parameter_joins_any_remainder(bits: int) -> None:
    """A parameter set to 0 keeps no negative remainder, which would be nan; inf stays inf."""
    q = jnp.asarray(
        np.array([0, 0x8000, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 1, 0x3F80], np.uint16).view(ml_dtypes.bfloat16)
    )
    low, high = (np.full(8, value, f"int{bits}") for value in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    down, up = (np.asarray(write.join(q, jnp.asarray(r), bits)) for r in (low, high))
    assert (bits_of(down)[:2] == np.array([0, 0x80000000])).all()
    assert not np.isnan(down).any() and not np.isnan(up).any()
    assert (down[4:6] == [np.inf, -np.inf]).all() and (up[4:6] == [np.inf, -np.inf]).all()
    assert np.isfinite(up[:4]).all() and up[7] > 1 > down[7]


PULL = jnp.asarray(RNG.standard_normal(64) * np.exp(RNG.uniform(-6, 3, 64)), jnp.float32)


@pytest.mark.parametrize("bits", [16, 8])
def test_training_is_that_of_float32(bits: int) -> None:
    """10,000 steps with decay and with noise in bfloat16: the masters are the float32 parameters, bit for bit."""
    steps = 10_000 if bits == 16 else 2000
    start = jnp.asarray(RNG.standard_normal(64), BF16)
    plain = adam_fn.adamw(3e-3, weight_decay=0.01)

    def grad(p: Any, t: jax.Array) -> jax.Array:
        noise = random_bits(0, t, 0, p.shape).astype(jnp.float32) * 2.0**-32 - 0.5
        return noise.astype(BF16).astype(jnp.float32) - PULL

    exact, _ = run(plain, start.astype(jnp.float32), grad, steps)
    short, states = run(write.master_weights(plain, bits), start, grad, steps)
    masters = np.asarray(full_jit(lambda p, r: write.join(p, r, bits))(short, states.remainder))
    expected = np.asarray(exact)
    np.testing.assert_array_equal(bits_of(short), (bits_of(masters).astype(np.uint64) + 0x8000) >> 16)
    if bits == 16:
        np.testing.assert_array_equal(bits_of(masters), bits_of(expected))
    else:
        assert 0 < np.abs(masters - expected).max() < 2e-2 * np.abs(expected - expected[0]).max()


def test_the_inner_transformation_sees_float32() -> None:
    seen = []

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append((g.dtype, params.dtype, extra["value"]))
        return -g, state

    make: Any = optax.GradientTransformationExtraArgs
    tx: Any = write.master_weights(make(lambda p: p, update))
    p = jnp.ones(3, BF16)
    state = tx.init(p)
    assert state.inner.dtype == jnp.float32
    u, _ = tx.update(p, state, p, value=7)
    assert seen == [(jnp.float32, jnp.float32, 7)] and u.dtype == jnp.float32
    adam: Any = write.master_weights(adam_fn.adam(1e-3))
    assert adam.init(p).inner.slots["mu"].dtype == jnp.float32
    eight: Any = write.master_weights(tx, 8)
    assert state.remainder.dtype == jnp.int16 and eight.init(p).remainder.dtype == jnp.int8


def test_any_transformation_trains_as_in_float32() -> None:
    """A norm over all leaves, a comparison of signs, stored codes, frozen leaves: they see the masters, bit for bit."""
    start = {"w": jnp.asarray(RNG.standard_normal((64, 64)), BF16), "f": jnp.ones(3, BF16)}
    noise = jax.tree.map(lambda p: jnp.asarray(RNG.standard_normal((20, *p.shape)), jnp.float32), start)
    storage = adam_fn.Storage(mu=adam_fn.Cast("bfloat16"), nu=adam_fn.Block(8))
    inner = adam_fn.cautious(adam_fn.adamw(0.01, storage=storage, frozen={"w": False, "f": True}))
    plain = optax.chain(optax.clip_by_global_norm(1.0), inner)
    grad = lambda p, t: jax.tree.map(lambda g: g[t], noise)  # noqa: E731
    exact, _ = run(plain, jax.tree.map(lambda p: p.astype(jnp.float32), start), grad, 20)
    short, states = run(write.master_weights(plain), start, grad, 20)
    for key, p in short.items():
        masters = np.asarray(write.join(p, states.remainder[key], 16))
        np.testing.assert_array_equal(bits_of(masters), bits_of(exact[key]))


@pytest.mark.parametrize("bits", [16, 8])
def test_nothing_drifts_where_float32_cannot_hold_the_difference(bits: int) -> None:
    """Steps from p to -p·2⁻ᵏ: the parameter and its remainder are one master, within float32's rounding of the step."""
    p = jnp.asarray(RNG.uniform(1, 2, 2**16) * RNG.choice([-1, 1], 2**16), BF16)
    wide = np.asarray(p, np.float32)
    aim = (-wide * np.exp2(-RNG.uniform(0, 40, p.shape))).astype(np.float32)
    tx: Any = write.master_weights(optax.stateless(lambda g, _: g), bits)
    updates, state = full_jit(tx.update)(jnp.asarray(aim - wide), tx.init(p), p)
    after: Any = optax.apply_updates(p, updates)
    master = np.asarray(write.join(after, state.remainder, bits))
    aim = (wide + (aim - wide)).astype(np.float32)
    missed = bits_of(after) != (bits_of(aim).astype(np.uint64) + 0x8000) >> 16
    error = np.abs(np.float64(master) - aim)
    assert (error <= 2.0**-24 * np.abs(wide) + (bits == 8) * 2.0**-16 * np.abs(aim)).all()
    assert (np.abs(aim[missed]) < (2.0**-15 if bits == 16 else 1) * np.abs(wide[missed])).all()


def test_a_parameter_that_misses_keeps_a_remainder_that_fits() -> None:
    """From p = 1 with a master below 1 a step of -1 ends at -k 2⁻²⁴; for odd k that minus 1 is not a float32."""
    tx: Any = write.master_weights(optax.sgd(1.0))
    p = jnp.ones(3, BF16)
    small = jnp.asarray([1.0, 255.0, 254.0]) * 2.0**-24
    updates, state = tx.update(small, tx.init(p), p)
    np.testing.assert_array_equal(optax.apply_updates(p, updates), p)
    updates, state = tx.update(jnp.ones(3), state, p)
    after: Any = optax.apply_updates(p, updates)
    # The first two land on the even neighbour, and the master is what is nearest to -k 2⁻²⁴ from there.
    np.testing.assert_array_equal(np.float32(after) * 2.0**24, np.array([0, -256, -254], np.float32))
    master = np.asarray(write.join(after, state.remainder, 16))
    np.testing.assert_array_equal(
        bits_of(master), bits_of(np.array([0, -255.5, -254], np.float32) * np.float32(2.0**-24))
    )


def test_changed_parameters_are_taken_as_they_are() -> None:
    tx: Any = write.master_weights(optax.sgd(1.0))
    p = jnp.asarray(RNG.standard_normal(1000), BF16)
    state = tx.init(p)
    updates, state = tx.update(jnp.full(1000, 1e-3), state, p)
    changed: Any
    for changed in (jnp.clip(p, -0.1, 0.1), jnp.zeros_like(p), -p):
        updates, new = tx.update(jnp.zeros(1000), state, changed)
        np.testing.assert_array_equal(optax.apply_updates(changed, updates), changed)
        master = np.asarray(write.join(changed, new.remainder, 16))
        wide = np.asarray(changed, np.float32)
        assert (np.abs(master - wide) <= 2.0**-8 * np.abs(wide) + 1e-40).all()


def test_infinite_parameters_stay() -> None:
    tx: Any = write.master_weights(optax.sgd(1.0))
    p = jnp.asarray([jnp.inf, -jnp.inf, 1.0], BF16)
    updates, _ = tx.update(jnp.asarray([0.0, 0.0, jnp.nan]), tx.init(p), p)
    np.testing.assert_array_equal(
        np.asarray(optax.apply_updates(p, updates), np.float32), np.array([np.inf, -np.inf, np.nan], np.float32)
    )


# Stochastic rounding.


def test_the_mean_over_all_random_bits_is_exact() -> None:
    """In value: subnormals, next to powers of two, both signs, up to the largest finite bfloat16."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7F0001, 0x7F8000, 0x7FFFFF])
    magnitudes = (np.array([0, 1, 2, 60, 126, 127, 128, 200, 253])[:, None] << 23 | low).ravel()
    x = _floats(np.concatenate([magnitudes, magnitudes | 0x80000000, [0x7F7EFFFF, 0xFF7EFFFF, 0x7F7F0000]]))
    random = jnp.arange(2**16, dtype=jnp.uint32)[:, None] << 16 | 0xABCD
    q = np.asarray(full_jit(write.round_stochastically)(jnp.asarray(x)[None], random))
    # A bfloat16 is a multiple of the unit of its neighbour: the sum is exact in float64.
    np.testing.assert_array_equal(q.astype(np.float64).mean(0), x.astype(np.float64))


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    """The same with the bits of one step, at every magnitude."""
    magnitudes = np.concatenate(
        [
            np.arange(0, 0x7F00, 0x80)[:, None] << 16
            | np.array([1, 0x100, 0x5555, 0x8000, 0xFFFF, 0x7FFFFF, 0x7F8001]),
            RNG.integers(0, 0x7F7F0000, (200, 7)),
        ]
    ).ravel()
    patterns = np.concatenate([magnitudes, magnitudes | 0x80000000]).astype(np.uint32)
    draws = 2048

    @full_jit
    def counted(x: jax.Array) -> Any:
        random = random_bits(3, 5, 7, (draws, x.shape[0]))
        q = jax.lax.bitcast_convert_type(write.round_stochastically(x[None], random), jnp.uint16)
        up = q - (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16)[None]
        return up.astype(jnp.uint32).sum(0), up.max()

    # Between two neighbours bfloat16 is linear in the bits, so that the mean is right where the share of steps up is.
    ups, most = counted(_floats(patterns))
    assert int(most) == 1
    share = (patterns & 0xFFFF) / 2**16
    z = (np.asarray(ups) - draws * share) / np.sqrt(draws * share * (1 - share) + 1e-9)
    certain = share == 0
    assert (np.asarray(ups)[certain] == 0).all()
    likely = (share * draws > 10) & ((1 - share) * draws > 10)
    assert np.abs(z[likely]).max() < 5 and abs(z[likely].mean()) < 5 / np.sqrt(likely.sum())
    assert 0.9 < z[likely].std() < 1.1
    rare = np.where(share < 0.5, ups, draws - np.asarray(ups))[~likely & ~certain].sum()
    mean = draws * np.minimum(share, 1 - share)[~likely & ~certain].sum()
    assert abs(rare - mean) < 5 * np.sqrt(mean)


def test_rounded_updates_land_where_they_cancel() -> None:
    """Where p + u is anything down to 0, p lands on x rounded with the bits of its leaf."""
    n = 2**18
    p = jnp.asarray(RNG.standard_normal((2, n)) * np.exp2(RNG.integers(-40, 40, n)), BF16)
    wide = np.asarray(p, np.float32)
    u = (-wide * (1 + RNG.standard_normal(n) * np.exp2(-RNG.integers(-20, 30, n)))).astype(np.float32)
    tx: Any = write.stochastic_rounding(9)
    state = tx.init(list(p))._replace(count=jnp.int32(7))
    updates, _ = full_jit(tx.update)(list(jnp.asarray(u)), state, list(p))
    after: Any = jnp.stack(jax.tree.leaves(optax.apply_updates(list(p), updates)))
    random = jnp.stack([random_bits(9, 7, ~i, (n,)) for i in range(2)])
    np.testing.assert_array_equal(bits_of(after), bits_of(write.round_stochastically(jnp.asarray(wide + u), random)))


def test_rounding_keeps_what_is_exact_and_finite() -> None:
    every = np.arange(0x10000, dtype=np.uint32) << 16
    ones = jnp.full(every.shape, 0xFFFFFFFF, jnp.uint32)
    x = jnp.asarray(_floats(every))
    np.testing.assert_array_equal(np.asarray(write.round_stochastically(x, ones), np.float32), x)
    largest = jnp.asarray(_floats([0x7F7FFFFF, 0xFF7FFFFF]))
    assert np.isfinite(np.asarray(write.round_stochastically(largest, ones[:2]), np.float32)).all()
    nan = jnp.asarray(_floats([0x7F800001]))  # Cut off it would be inf.
    assert np.isnan(np.asarray(write.round_stochastically(nan, ones[:1] * 0), np.float32)).all()


def test_streams_are_uniform_distinct_and_uncorrelated() -> None:
    n = 2**16
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (2**32 - 1, 0, 0), (0, 2**31 - 1, 0), (0, 0, 65536)]
    rows = np.stack([np.asarray(random_bits(*key, (n,))) for key in keys])
    for bit in range(32):
        centred = 2.0 * (rows >> bit & 1) - 1
        correlation = centred @ centred.T / np.sqrt(n)
        np.fill_diagonal(correlation, centred.sum(1) / np.sqrt(n))
        assert np.abs(correlation).max() < 5, bit
        for shift in (1, 2, 3, 256):
            assert np.abs((centred[:, shift:] * centred[:, :-shift]).sum(1) / np.sqrt(n)).max() < 5
    # No stream is another in another order, as it would be with one 32-bit key: the second changes the bijection.
    mixed = [np.asarray(_mix(jnp.arange(n, dtype=jnp.uint32), key)) for key in (0, 1)]
    assert np.intersect1d(mixed[0], mixed[1]).size < 10
    keyed = _mix(_key(0x9E3779B9, 4, 5, 6) ^ jnp.arange(4, dtype=jnp.uint32), _key(0x85EBCA6B, 4, 5, 6))
    np.testing.assert_array_equal(random_bits(4, 5, 6, (4,)), keyed)
    assert all(np.intersect1d(a, b).size < 10 for i, a in enumerate(rows) for b in rows[:i])
    np.testing.assert_array_equal(
        random_bits(0, 0, 0, (n,)).reshape(16, -1, 8), random_bits(0, 0, 0, (16, n // 128, 8))
    )
    # A million (step, leaf) pairs, a million streams.
    steps, leaves = jnp.arange(2000)[:, None], ~jnp.arange(500)[None]
    both = [np.asarray(_key(start, 0, steps, leaves)).astype(np.uint64) for start in (0x9E3779B9, 0x85EBCA6B)]
    assert np.unique(both[0] << 32 | both[1]).size == 2000 * 500
    assert random_bits(0, 0, 0, ()).shape == () and random_bits(0, 0, 0, (0, 3)).shape == (0, 3)


def test_reproducible_and_different_for_seed_step_and_leaf() -> None:
    params = {"a": jnp.ones(4096, BF16), "b": jnp.ones(4096, BF16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-9), params)
    tx: Any = write.stochastic_rounding(1)
    first, state = tx.update(updates, tx.init(params), params)
    again, _ = full_jit(tx.update)(updates, tx.init(params), params)
    second, _ = tx.update(updates, state, params)
    reseeded: Any = write.stochastic_rounding(2)
    other, _ = reseeded.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(first["a"], again["a"])
    # A code of the same step in the slot whose number is the seed, of the same leaf, has another stream.
    code = random_bits(1, 0, 0, (4096,)) >> 30 == 3
    draws = [first["a"], first["b"], second["a"], other["a"], code]
    centred = np.stack([np.asarray(x) > 0 for x in draws]) - 0.25
    correlation = np.corrcoef(centred) - np.eye(5)
    assert np.abs(correlation).max() < 5 / 64


# What both have in common.

WRITES: dict[str, Callable[[Any], Any]] = {
    "masters of 16 bits": write.master_weights,
    "masters of 8 bits": functools.partial(write.master_weights, bits=8),
    "stochastic": lambda tx: optax.chain(tx, write.stochastic_rounding(0)),
}


def test_small_steps_move_one_to_zero() -> None:
    """1,000 steps of 1e-3, which plain bfloat16 rounds away at the first."""

    def end(tx: Any) -> np.ndarray:
        return np.asarray(_run(tx, jnp.ones(1000, BF16), lambda p, t: jnp.full(1000, 1e-3), 1000)[0][-1], np.float32)

    sgd = optax.sgd(1.0)
    assert (end(sgd) == 1).all()
    # float32's own rounding of 1,000 differences is 2⁻²⁵ each; of 24-bit masters it is 2⁻¹⁷.
    assert np.abs(end(WRITES["masters of 16 bits"](sgd))).max() < 1000 * 2.0**-25
    assert np.abs(end(WRITES["masters of 8 bits"](sgd))).max() < 1000 * 2.0**-17
    moved = end(WRITES["stochastic"](sgd))
    # Each step's variance is at most a quarter of the square of the unit at the larger of the neighbours.
    sigma = np.sqrt(sum((2.0**-8 * max(1 - i / 1000, 2.0**-8)) * 1e-3 for i in range(1000)))
    assert 0.01 < moved.std() < 1.2 * sigma
    assert abs(moved.mean()) < 5 * sigma / np.sqrt(1000)


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=str)
def test_adam_learns(dtype: Any) -> None:
    start = jnp.zeros(32, BF16)
    target = np.asarray(RNG.uniform(0.5, 1, 32), np.float32)
    grad = lambda p, t: (p.astype(jnp.float32) - target).astype(dtype)  # noqa: E731

    def error(tx: Any) -> float:
        found = _run(tx, start, grad, 1600)[0][-1]
        assert found.dtype == BF16
        return float(np.abs(np.asarray(found, np.float32) - target).mean())

    assert error(adam_fn.adam(2e-3)) > 0.1
    for make in WRITES.values():
        assert error(make(adam_fn.adam(2e-3))) < 0.01


@pytest.mark.parametrize("kind", WRITES)
def test_landing_in_every_loop(kind: str) -> None:
    """Under jit XLA does not undo q - p: `apply_updates`, Flax linen's and NNX's loops land on the same bits."""
    # Powers of two, so that it does not matter where XLA contracts multiplications and additions.
    tx: Any = WRITES[kind](optax.chain(optax.add_decayed_weights(2.0**-4), optax.sgd(2.0**-6)))
    shapes = {"a": (), "b": (0,), "c": (1,), "d": (3, 5, 7), "e": (999,)}
    start = {key: jnp.asarray(RNG.standard_normal(shape), BF16) for key, shape in shapes.items()}
    noise = jax.tree.map(lambda p: jnp.asarray(RNG.standard_normal((20, *p.shape)), jnp.float32), start)
    grads = [jax.tree.map(lambda g, t=t: g[t], noise) for t in range(20)]

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
    scanned, _ = _run(tx, start, lambda p, t: jax.tree.map(lambda g: g[t], noise), 20)

    @jax.jit
    def unrolled(p: Any) -> Any:
        state = tx.init(p)
        for g in grads[:2]:
            u, state = tx.update(g, state, p)
            p = optax.apply_updates(p, u)
        return p

    train = TrainState.create(apply_fn=lambda: None, params=start, tx=tx)
    linen = jax.lax.scan(lambda s, g: (s.apply_gradients(grads=g), None), train, noise)[0].params

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.wide = nnx.Param(jnp.ones(2))
            for key, p in start.items():
                setattr(self, key, nnx.Param(p))

    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, g: dict[str, jax.Array]) -> None:
        optimizer.update(model, nnx.State(jax.tree.map(nnx.Param, g | {"wide": jnp.zeros(2)})))

    for g in grads:
        step(model, optimizer, g)
    early, donated = unrolled(start), adam_fn.make_step(tx)
    p, state = jax.tree.map(jnp.copy, start), tx.init(start)
    for g in grads:
        old, (p, state) = p, donated(p, state, g)
        assert all(x.is_deleted() for x in old.values() if x.size)
    assert compilations(donated) == 1
    for key in start:
        for found in (linen[key], scanned[key][-1], getattr(model, key)[...], p[key]):
            np.testing.assert_array_equal(_bits(found), _bits(expected[key]))
        np.testing.assert_array_equal(_bits(early[key]), _bits(scanned[key][1]))


@pytest.mark.parametrize("kind", ["masters of 16 bits", "stochastic"])
def test_members_and_shards_are_what_they_are_alone(kind: str) -> None:
    """Under `vmap` and in `shard_map` on 8 devices: also the random bits, unless the counts differ."""
    tx: Any = WRITES[kind](optax.sgd(2.0**-6))
    start = jnp.asarray(RNG.standard_normal((8, 33)), BF16)
    grads = jnp.asarray(RNG.standard_normal((8, 33)), jnp.float32)

    def train(p: Any, g: Any) -> Any:
        return jax.lax.scan(lambda c, _: (_step(tx, c[0], c[1], g), None), (p, tx.init(p)), None, 5)[0]

    alone, state = jax.jit(lambda p, g: jax.lax.map(lambda x: train(*x), (p, g)))(start, grads)
    members, states = jax.jit(jax.vmap(train))(start, grads)
    spec = PartitionSpec("a")
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(lambda p, g: train(p[0], g[0])[0][None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(_bits(jax.jit(sharded)(start, grads)), _bits(alone))
    np.testing.assert_array_equal(_bits(members), _bits(alone))
    jax.tree.map(np.testing.assert_array_equal, states, state)
    if kind == "stochastic":
        same, flat = jnp.ones((8, 4096), BF16), jnp.full((8, 4096), -0.125)
        counts = tx.init(same[0])[1]._replace(count=jnp.arange(8) << 20)
        apart = jax.vmap(lambda p, g, c: tx.update(g, (tx.init(p)[0], c), p)[0])(same, flat, counts)
        assert np.abs(np.corrcoef(np.asarray(apart) > 0) - np.eye(8)).max() < 5 / 64


@pytest.mark.parametrize("kind", ["masters of 16 bits", "stochastic"])
def test_the_same_bits_with_x64(kind: str) -> None:
    """Also with gradients in float64 and beside a float64 parameter, which is updated in float64."""
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
        assert wide[1].count.dtype == jnp.int32


@pytest.mark.parametrize("kind", ["masters of 16 bits", "stochastic"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_skipped_step_leaves_all_as_it_is(kind: str, inside: bool) -> None:
    p, g = jnp.asarray(RNG.standard_normal(99), BF16), jnp.asarray(RNG.standard_normal(99), jnp.float32)
    skip = lambda tx: optax.apply_if_finite(tx, 3)  # noqa: E731
    sgd, make = optax.sgd(2.0**-6), WRITES[kind]
    tx: Any = make(skip(sgd)) if inside else skip(make(sgd))
    before = _step(tx, p, tx.init(p), g)
    after, state = _step(tx, *before, g.at[3].set(jnp.nan).at[4].set(jnp.inf))
    assert not (_bits(before[0]) == _bits(p)).all()
    np.testing.assert_array_equal(_bits(after), _bits(before[0]))
    if isinstance(state, write.MasterState):
        np.testing.assert_array_equal(state.remainder, before[1].remainder)
    elif not inside:
        jax.tree.map(np.testing.assert_array_equal, state.inner_state, before[1].inner_state)


SPECS = {
    "first": PartitionSpec("a"),
    "last": PartitionSpec(None, "b"),
    "both": PartitionSpec("a", "b"),
    "stacked": PartitionSpec(("a", "b")),
    "none": PartitionSpec(),
}


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("kind", WRITES)
def test_sharded_like_the_parameters(kind: str, axes: AxisType) -> None:
    """The same bits as on one device, states where the parameters are, and no collective."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axes, axes))
    alone = {key: jnp.asarray(RNG.standard_normal((16, 8)), BF16) for key in SPECS}
    params = {key: jax.device_put(alone[key], NamedSharding(mesh, spec)) for key, spec in SPECS.items()}
    grads, here = (jax.tree.map(lambda p: jnp.sin(p.astype(jnp.float32)), tree) for tree in (params, alone))
    tx: Any = WRITES[kind](optax.sgd(2.0**-8))
    expected, _ = tx.update(here, tx.init(alone), alone)
    for init, update in ((tx.init, tx.update), (jax.jit(tx.init), jax.jit(tx.update))):
        state = init(params)
        updates, after = update(grads, state, params)
        for key, p in params.items():
            np.testing.assert_array_equal(np.asarray(updates[key]), np.asarray(expected[key]))
            assert updates[key].sharding.is_equivalent_to(p.sharding, 2)
            for x in (state, after):
                if isinstance(x, write.MasterState):
                    assert x.remainder[key].sharding.is_equivalent_to(p.sharding, 2)
    text = jax.jit(tx.update).lower(grads, tx.init(params), params).compile(compiling.FULL).as_text() or ""
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


@pytest.mark.parametrize("kind", WRITES)
def test_other_leaves_pass_through(kind: str) -> None:
    params = {
        "short": jnp.ones((3, 2), BF16),
        "wide": jnp.full(2, 1 / 3),
        "complex": jnp.ones(2, jnp.complex64),
        "whole": jnp.arange(2),
        "none": None,
        "empty": jnp.zeros((0, 2), BF16),
        "scalar": jnp.ones((), BF16),
    }
    grads = {**params, "whole": np.zeros(2, jax.dtypes.float0)}
    inner = adam_fn.adam(0.1)
    tx: Any = WRITES[kind](inner)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    plain, _ = inner.update(grads, inner.init(params), params)
    for key in ("wide", "complex", "whole"):
        np.testing.assert_array_equal(updates[key], plain[key])
        assert updates[key].dtype == plain[key].dtype
    assert updates["none"] is None and updates["short"].dtype == updates["scalar"].dtype == jnp.float32
    if isinstance(state, write.MasterState):
        assert state.remainder["wide"] == state.remainder["whole"] == optax.MaskedNode()
        assert state.remainder["none"] is None and state.remainder["short"].shape == (3, 2)
    after = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize("kind", WRITES)
def test_composes(kind: str) -> None:
    """With MultiSteps inside and outside, injected hyperparameters, masks, pickling; equal ones are equal."""
    p = {"a": jnp.ones(8, BF16), "b": jnp.ones(8, BF16)}
    g = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    make = WRITES[kind]
    for tx in (
        make(optax.MultiSteps(adam_fn.adam(0.1), 2).gradient_transformation()),
        optax.MultiSteps(make(adam_fn.adam(0.1)), 2).gradient_transformation(),
        make(optax.inject_hyperparams(adam_fn.adam, hyperparam_dtype=jnp.float32)(learning_rate=0.1)),
        optax.masked(make(adam_fn.adam(0.1)), {"a": True, "b": False}),
    ):
        after, state = _run(tx, p, lambda p, t: g, 2)
        assert np.asarray(after["a"][-1] < 0.95).all()
        jax.tree.map(np.testing.assert_array_equal, pickle.loads(pickle.dumps(state)), state)
    tx: Any = make(adam_fn.adam(0.1))
    if kind != "stochastic":
        assert tx == make(adam_fn.adam(0.1)) != make(adam_fn.adam(0.2)) and hash(tx) == hash(make(adam_fn.adam(0.1)))
        assert pickle.loads(pickle.dumps(tx)) == tx
        doubled = optax.tree_map_params(tx, lambda x: x * 2, tx.init(p))
        assert jax.tree.structure(doubled) == jax.tree.structure(tx.init(p))
    assert write.stochastic_rounding(1) == write.stochastic_rounding(1) != write.stochastic_rounding(2)


@pytest.mark.parametrize("kind", WRITES)
def test_errors_name_the_leaf(kind: str) -> None:
    tx: Any = WRITES[kind](optax.sgd(1.0))
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"expected parameters in bfloat16.*; a is {jnp.dtype(dtype)}"):
            tx.init({"a": jnp.ones(2, dtype)})
    p = {"a": jnp.ones(2, BF16)}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(p, tx.init(p))
    with pytest.raises(ValueError, match=r"of a has shape \(3,\), its parameter \(2,\)"):
        tx.update({"a": jnp.ones(3)}, tx.init(p), p)


def test_errors_of_arguments_and_states() -> None:
    p = {"a": jnp.ones(2, BF16)}
    sixteen, eight = (write.master_weights(optax.sgd(1.0), bits) for bits in (16, 8))
    with pytest.raises(ValueError, match=r"remainder of a \(.*bits=8.*int16"):
        eight.update(p, sixteen.init(p), p)
    with pytest.raises(TypeError, match="MasterState"):
        sixteen.update(p, optax.EmptyState(), p)
    with pytest.raises(TypeError, match="RoundingState"):
        write.stochastic_rounding(0).update(p, optax.EmptyState(), p)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), p)
    with pytest.raises(ValueError, match=r"a was bfloat16 when .* and is float32 now: .* optax.apply_updates"):
        sixteen.update(wide, sixteen.init(p), wide)
    for bits in (0, 12, 32):
        with pytest.raises(ValueError, match="bits must be 8 or 16"):
            write.master_weights(optax.sgd(1.0), bits)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be in"):
            write.stochastic_rounding(seed)
