"""Writing to bfloat16 parameters: exact masters, unbiased rounding, and updates that land where they should."""

import functools
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
from adam_fn.storage import parameter_bits
from adam_fn.storage.parameter_bits import round_stochastically

RNG = np.random.default_rng(0)
LARGEST = 0x7F7F7FFF  # The bits of the largest float32 that bfloat16 does not round to inf.


def _floats(bits: Any) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def _upper(q: Any) -> np.ndarray:
    """The bits of bfloat16 numbers, or of float32 numbers that equal bfloat16 ones."""
    bits = bits_of(q)
    if bits.dtype == np.uint16:
        return bits
    assert not (bits[np.isfinite(np.asarray(q))] & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def _patterns() -> np.ndarray:
    """Every bfloat16, subnormals and both zeros included, with low bits at and around ties; and random bits."""
    low = np.array([0, 1, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF])
    every = (np.arange(0x10000)[:, None] << 16 | low).ravel()
    return np.concatenate([every, RNG.integers(0, 2**32, 2**24, np.uint32)]).astype(np.uint32)


# The masters.


@functools.partial(full_jit, static_argnums=1)
def there_and_back(x: jax.Array, bits: int) -> Any:
    q = parameter_bits.visible(x, bits)
    return q, parameter_bits.join(q.astype(BF16), parameter_bits.remainder_of(x, q, bits), bits)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [16, 8])
def test_masters_are_the_nearest_numbers_and_lossless_with_32_bits(bits: int) -> None:
    patterns, drop = _patterns(), 16 - bits
    x = _floats(patterns)
    q, back = there_and_back(x, bits)
    finite = (patterns & 0x7FFFFFFF) < 0x7F800000
    inside = (patterns & 0x7FFFFFFF) <= LARGEST >> drop << drop
    expected = (patterns[inside] + (1 << drop >> 1)) >> drop << drop
    np.testing.assert_array_equal(bits_of(back)[inside], expected)
    np.testing.assert_array_equal(_upper(q)[inside], (expected + 0x8000) >> 16)
    if bits == 16:  # The few beyond bfloat16's range become LARGEST; inf and nan stay as they are.
        most = (patterns & 0x80000000 | LARGEST)[finite & ~inside]
        np.testing.assert_array_equal(bits_of(back)[finite & ~inside], most)
        np.testing.assert_array_equal(np.asarray(back)[~finite], x[~finite])


@pytest.mark.quick
@pytest.mark.parametrize("bits", [16, 8])
def test_any_parameter_joins_any_remainder(bits: int) -> None:
    """A parameter set to 0 keeps no negative remainder, which would be nan; inf stays inf."""
    q = jnp.asarray(
        np.array([0, 0x8000, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 1, 0x3F80], np.uint16).view(ml_dtypes.bfloat16)
    )
    low, high = (np.full(8, value, f"int{bits}") for value in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    down, up = (np.asarray(parameter_bits.join(q, jnp.asarray(r), bits)) for r in (low, high))
    assert (bits_of(down)[:2] == np.array([0, 0x80000000])).all()
    assert not np.isnan(down).any() and not np.isnan(up).any()
    assert (down[4:6] == [np.inf, -np.inf]).all() and (up[4:6] == [np.inf, -np.inf]).all()
    assert np.isfinite(up[:4]).all() and up[7] > 1 > down[7]


DECAYED = adam_fn.adamw(3e-3, weight_decay=0.01)
FROZEN: Any = {"frozen": adam_fn.masks.path("f")}
CAUTIOUS = adam_fn.cautious(adam_fn.adamw(0.01, storage="16bit", **FROZEN))
TRAINED: dict[str, tuple[Any, int, int]] = {
    "16 bits": (DECAYED, 16, 4000),
    "8 bits": (DECAYED, 8, 2000),
    "narrow moments": (adam_fn.adamw(0.01, storage="24bit", **FROZEN), 16, 20),
    "norms and signs": (optax.chain(optax.clip_by_global_norm(1.0), CAUTIOUS), 16, 20),
}


@pytest.mark.quick("8")
@pytest.mark.parametrize("kind", TRAINED)
def test_training_with_masters_equals_training_in_float32(kind: str) -> None:
    """Masters of 32 bits are the float32 parameters bit for bit, with decay and with noise in bfloat16."""
    plain, bits, steps = TRAINED[kind]
    pull = jnp.asarray(RNG.standard_normal(64) * np.exp(RNG.uniform(-6, 3, 64)), jnp.float32)
    start = {"w": jnp.asarray(RNG.standard_normal(64), BF16), "f": jnp.ones(3, BF16)}
    noise = jnp.asarray(RNG.uniform(-0.5, 0.5, (500, 64)), BF16)

    def grad(p: Any, t: jax.Array) -> Any:
        return {"w": noise[t % 500].astype(jnp.float32) - pull, "f": jnp.ones(3)}

    exact, _ = run(plain, jax.tree.map(lambda p: p.astype(jnp.float32), start), grad, steps, full_jit)
    short, states = run(adam_fn.master_weights(plain, bits), start, grad, steps, full_jit)
    join = full_jit(functools.partial(parameter_bits.join, bits=bits))
    for key, p in short.items():
        r = states.remainder[key]  # An optimizer of this package knows which leaves it freezes: these have none.
        assert isinstance(r, optax.MaskedNode) == (key == "f" and kind == "narrow moments")
        master = np.asarray(p.astype(jnp.float32) if isinstance(r, optax.MaskedNode) else join(p, r))
        expected = np.asarray(exact[key])
        np.testing.assert_array_equal(bits_of(p), (bits_of(master).astype(np.uint64) + 0x8000) >> 16)
        if bits == 16:
            np.testing.assert_array_equal(bits_of(master), bits_of(expected))
        else:
            assert 0 < np.abs(master - expected).max() < 2e-2 * np.abs(expected - expected[0]).max()


def test_the_inner_transformation_sees_float32_and_extra_arguments() -> None:
    seen = []

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append((g.dtype, state.dtype, params.dtype, extra["value"]))
        return -g, state

    make: Any = optax.GradientTransformationExtraArgs
    tx: Any = adam_fn.master_weights(make(lambda p: p, update))
    p: Any = jnp.ones(3, BF16)
    u, _ = tx.update(p, tx.init(p), p, value=7)
    assert seen == [(jnp.float32, jnp.float32, jnp.float32, 7)] and u.dtype == jnp.float32


@pytest.mark.parametrize("bits", [16, 8])
def test_nothing_drifts_where_float32_cannot_hold_the_difference(bits: int) -> None:
    """Steps from p to -p·2⁻ᵏ: the parameter and its remainder are one master, within float32's rounding of the step."""
    p = jnp.asarray(RNG.uniform(1, 2, 2**16) * RNG.choice([-1, 1], 2**16), BF16)
    wide = np.asarray(p, np.float32)
    aim = (-wide * np.exp2(-RNG.uniform(0, 40, p.shape))).astype(np.float32)
    tx: Any = adam_fn.master_weights(optax.stateless(lambda g, _: g), bits)
    updates, state = full_jit(tx.update)(jnp.asarray(aim - wide), tx.init(p), p)
    after: Any = optax.apply_updates(p, updates)
    master = np.asarray(parameter_bits.join(after, state.remainder, bits))
    aim = (wide + (aim - wide)).astype(np.float32)
    missed = bits_of(after) != (bits_of(aim).astype(np.uint64) + 0x8000) >> 16
    error = np.abs(np.float64(master) - aim)
    assert (error <= 2.0**-24 * np.abs(wide) + (bits == 8) * 2.0**-16 * np.abs(aim)).all()
    assert (np.abs(aim[missed]) < (2.0**-15 if bits == 16 else 1) * np.abs(wide[missed])).all()


def test_a_parameter_that_misses_keeps_a_remainder_that_fits() -> None:
    """From p = 1 with a master below 1 a step of -1 ends at -k 2⁻²⁴; for odd k that minus 1 is not a float32."""
    tx: Any = adam_fn.master_weights(optax.sgd(1.0))
    p = jnp.ones(3, BF16)
    unit = np.float32(2.0**-24)
    _, state = tx.update(jnp.asarray([1.0, 255.0, 254.0]) * unit, tx.init(p), p)
    updates, state = tx.update(jnp.ones(3), state, p)
    after: Any = optax.apply_updates(p, updates)
    # The first two land on the even neighbour, and the master is what is nearest to -k 2⁻²⁴ from there.
    np.testing.assert_array_equal(np.float32(after) / unit, np.array([0, -256, -254], np.float32))
    master = np.asarray(parameter_bits.join(after, state.remainder, 16))
    np.testing.assert_array_equal(master / unit, np.array([0, -255.5, -254], np.float32))


def test_changed_parameters_are_taken_as_they_are() -> None:
    tx: Any = adam_fn.master_weights(optax.sgd(1.0))
    p = jnp.asarray([*RNG.standard_normal(1000), jnp.inf, -jnp.inf], BF16)
    small = jnp.full(1002, 1e-3)
    _, state = tx.update(small, tx.init(p), p)
    changed: Any
    for changed in (p, jnp.clip(p, -0.1, 0.1), jnp.zeros_like(p), -p):
        updates, new = tx.update(0 * small, state, changed)
        np.testing.assert_array_equal(optax.apply_updates(changed, updates), changed)
        master = np.asarray(parameter_bits.join(changed, new.remainder, 16))
        wide = np.asarray(changed, np.float32)
        np.testing.assert_allclose(master, wide, rtol=2.0**-8, atol=1e-40)
    assert np.isnan(tx.update(jnp.nan * small, state, p)[0]).all()


# Stochastic rounding.


def test_the_mean_over_all_dithers_is_exact() -> None:
    """The numbers are subnormal, next to powers of two, of both signs, and up to the largest finite bfloat16."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7F0001, 0x7F8000, 0x7FFFFF])
    magnitudes = (np.array([0, 1, 2, 60, 126, 127, 128, 200, 253])[:, None] << 23 | low).ravel()
    x = _floats(np.concatenate([magnitudes, magnitudes | 0x80000000, [0x7F7EFFFF, 0xFF7EFFFF, 0x7F7F0000]]))
    dither = jnp.arange(2**16, dtype=jnp.int32)[:, None] << 16 | 0xABCD
    q = np.asarray(full_jit(round_stochastically)(jnp.asarray(x)[None], dither))
    _upper(q)
    # A bfloat16 is a multiple of the unit of its neighbour: the sum is exact in float64.
    np.testing.assert_array_equal(q.astype(np.float64).mean(0), x.astype(np.float64))


@pytest.mark.quick
def test_rounding_is_even_in_time_and_to_a_neighbour() -> None:
    """The number of steps that go up, of 2,048, is right within one, at every magnitude and from any parameter."""
    magnitudes = RNG.integers(0x10000000, 0x7F7F0000, 4000)
    patterns = np.concatenate([magnitudes, magnitudes | 0x80000000]).astype(np.uint32)
    steps, x, lower = 2048, _floats(patterns), patterns >> 16
    p = jnp.asarray(lower.astype(np.uint16).view(ml_dtypes.bfloat16))
    tx: Any = adam_fn.stochastic_rounding(optax.identity(), 5)

    @full_jit
    def counted(u: jax.Array) -> Any:
        def landed(count: jax.Array) -> jax.Array:
            updates, _ = tx.update(u, tx.init(p)._replace(count=count), p)
            after: Any = optax.apply_updates(p, updates)
            return jax.lax.bitcast_convert_type(after, jnp.uint16).astype(jnp.int32) - lower.astype(np.int32)

        up = jax.lax.map(landed, jnp.arange(3 * steps, 4 * steps))
        return up.sum(0), up.min(), up.max()

    # Between two neighbours bfloat16 is linear in the bits, so that the mean is right where the share of steps up is.
    ups, least, most = counted(jnp.asarray(x - np.asarray(p, np.float32)))
    assert (int(least), int(most)) == (0, 1)
    assert np.abs(np.asarray(ups) - steps * (patterns & 0xFFFF) / 2**16).max() <= 1


@pytest.mark.quick
@pytest.mark.parametrize("inside", [True, False])
def test_rounded_updates_land_where_they_cancel(inside: bool) -> None:
    """Where p + u is anything down to 0, p lands on the two bfloat16 around it, on each as often as it should."""
    n = 2**18
    p = jnp.asarray(RNG.standard_normal((2, n)) * np.exp2(RNG.integers(-40, 40, n)), BF16)
    wide = np.asarray(p, np.float32)
    u = (-wide * (1 + RNG.standard_normal(n) * np.exp2(-RNG.integers(-20, 30, n)))).astype(np.float32)
    tx: Any = adam_fn.stochastic_rounding(adam_fn.transform(adam_fn.Rate(1.0)) if inside else optax.scale(-1.0), 9)
    state = tx.init(list(p))._replace(count=jnp.int32(7))
    updates, after = full_jit(tx.update)(list(jnp.asarray(-u)), state, list(p))
    landed = bits_of(jnp.stack(jax.tree.leaves(optax.apply_updates(list(p), updates))))
    aim = bits_of(wide + u)
    up, share = landed - (aim >> 16).astype(np.uint16), (aim & 0xFFFF) / 2**16
    assert np.isin(up, (0, 1)).all() and not up[share == 0].any()
    np.testing.assert_allclose(up.mean(1), share.mean(1), atol=2e-3)
    assert int(after.count) == 8


def test_rounding_keeps_what_is_exact_and_finite() -> None:
    every = np.arange(0x10000, dtype=np.uint32) << 16
    ones = jnp.full(every.shape, -1)
    x = jnp.asarray(_floats(every))
    np.testing.assert_array_equal(np.asarray(round_stochastically(x, ones), np.float32), x)
    largest = jnp.asarray(_floats([0x7F7FFFFF, 0xFF7FFFFF]))
    assert np.isfinite(np.asarray(round_stochastically(largest, ones[:2]), np.float32)).all()
    nan = jnp.asarray(_floats([0x7F800001]))  # Truncated, it would be inf.
    assert np.isnan(np.asarray(round_stochastically(nan, ones[:1] * 0), np.float32)).all()


def test_seeds_and_steps_have_dithers_of_their_own() -> None:
    """So do distant steps, at which the members of a `vmap` may begin."""
    p = jnp.ones(4096, BF16)
    quarter = jnp.full(p.shape, 2.0**-9)  # Of the distance from 1 to the next bfloat16.
    counts = jnp.asarray([*range(16), *(i << 20 for i in range(1, 8))])
    rows = []
    for seed in (1, 2):
        tx: Any = adam_fn.stochastic_rounding(optax.identity(), seed)
        one = tx.init(p)
        rows += list(jax.vmap(lambda count: tx.update(quarter, one._replace(count=count), p)[0])(counts))  # noqa: B023
    assert len({np.asarray(row).tobytes() for row in rows}) == 2 * len(counts)
