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
