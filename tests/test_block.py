"""Block codecs: what they store, what they lose, and what every rule makes of them."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS, Case, name
from helpers.runs import full_jit

import adam_fn
from adam_fn import Block, Cast
from adam_fn.block import CODES_PER_OCTAVE, SKEW
from adam_fn.execute.store import load, store, stored_spec
from adam_fn.layout import SMALL, layout
from adam_fn.noise import even_bits, random_bits

CODECS = [Block(bits).of(signed=signed) for bits in (8, 4) for signed in (True, False)]
SHAPES = [(128, 64), (5000,), (130, 50), (700, 7), (16, 3, 3, 33), (64, 12, 8)]
Q = {8: 32, 4: 2}


def values(shape: tuple[int, ...], *, signed: bool, scale: float = 1.0) -> jax.Array:
    """Normal numbers whose sizes span four decades from block to block, with zeros among them; squares if unsigned."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-4, 4, (*shape[:-1], 1))) * (rng.random(shape) > 0.1)
    return jnp.asarray((x if signed else x * x) * scale, jnp.float32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_storage_law_and_bytes(codec: Block) -> None:
    """``encode(decode(encode(x))) = encode(x)`` for every shape, at any scale of x."""
    encode: Any = full_jit(functools.partial(store, codec))
    decode: Any = full_jit(functools.partial(load, codec), static_argnums=(1, 2))
    for shape, scale in itertools.product(SHAPES, (1e-30, 1.0, 1e30)):
        x = values(shape, signed=bool(codec.signed), scale=scale)
        stored = encode(x)
        decoded = decode(stored, jnp.dtype(jnp.float32), shape)
        assert decoded.shape == shape
        again = encode(decoded)
        for key in ("codes", "scales"):
            np.testing.assert_array_equal(stored[key], again[key], err_msg=f"{shape} {scale}")
        assert (decoded[x == 0] == 0).all() or not codec.signed
        assert jnp.abs(decoded).max() <= 2 ** (1 / CODES_PER_OCTAVE[codec.bits]) * 1.001 * jnp.abs(x).max()
        if shape[0] % 32 == 0:
            assert sum(y.nbytes for y in stored.values()) == x.size * (codec.bits / 8 + 2 / 32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_any_chance_leaves_what_is_on_the_grid(codec: Block) -> None:
    """Of every code there is, at several scales: coded again with the largest and the smallest random number."""
    codes = jnp.broadcast_to(jnp.arange(2**codec.bits, dtype=jnp.uint8)[:, None], (2**codec.bits, 5))
    last = 255 * CODES_PER_OCTAVE[codec.bits] - 2**codec.bits
    scales = jnp.asarray(
        [0x3F80, 0x0400, 0x7F01, 0x4049, 0x4D11] if codec.signed else [0, 17, last // 2, last - 5, last]
    )
    scales = scales.astype(jnp.int16)[None]
    x = codec.decode(codes, scales, jnp.float32)
    for random in (0, 2**32 - 1):
        noise = codec.chance(jnp.full((1, 5), random, jnp.uint32))
        found = codec.decode(codec.encode(x, scales, noise), scales, jnp.float32)
        # What is subnormal is 0 to XLA.
        np.testing.assert_array_equal(np.where(np.abs(x) < 1e-37, 0, found), np.where(np.abs(x) < 1e-37, 0, x))


@pytest.mark.parametrize("bits", [8, 4])
def test_signed_codes_are_the_nearest_of_the_docstring(bits: int) -> None:
    """By a search, in float64, over all values that the docstring gives; blocks are 32 rows of a column."""
    codec = Block(bits).of(signed=True)
    x = np.asarray(values((32, 1024), signed=True))
    found = np.asarray(load(codec, store(codec, jnp.asarray(x)), jnp.dtype(jnp.float32), x.shape), np.float64)
    # Of those that are as large in 14 bits, a positive one.
    held = (np.abs(x).view(np.int32) >> 17 << 1 | (x >= 0)).max(0)
    scale, side = (held >> 1 << 17).view(np.float32).astype(np.float64), np.where(held & 1, 1, -1)
    octaves, steps = np.divmod(np.arange(2 ** (bits - 1) + 1), Q[bits])
    positive = scale[:, None] * (2.0**octaves * (1 + steps / Q[bits]) - 1) / 15
    np.testing.assert_allclose(positive[:, -1], scale)
    nearest = side[:, None] * np.concatenate([positive, -positive[:, :-1]], -1)
    distances = np.abs(x[..., None] - nearest).min(-1)
    assert (np.abs(found - x) <= distances + 4e-6 * scale).all()
    assert (np.abs(found).max(0) <= scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_unsigned_codes_are_those_of_the_docstring_and_unbiased(bits: int) -> None:
    """The two neighbours on the grid of the bits 2²³k/n, whose places have the right mean; low values are raised."""
    codec, n = Block(bits).of(signed=False), CODES_PER_OCTAVE[bits]
    rng = np.random.default_rng(0)
    z = (10 ** rng.uniform(-1.9, 0.0, (32, 128))).astype(np.float32)
    steps = 2000
    exact = n * z.view(np.int32).astype(np.float64) / 2**23

    def decoded(bits: Any, step: jax.Array) -> jax.Array:
        noise = codec.chance(bits(1, step, 3, (1, 128)))
        scale = codec.scale(jnp.asarray(z), noise).max(0, keepdims=True)
        return codec.decode(codec.encode(jnp.asarray(z), scale, noise), scale, jnp.float32)

    for bits_of in (random_bits, even_bits):
        values_ = np.asarray(
            full_jit(lambda of=bits_of: jax.lax.map(functools.partial(decoded, of), jnp.arange(steps)))()
        )
        found = n * values_.view(np.int32).astype(np.float64) / 2**23
        np.testing.assert_allclose(found, np.round(found), atol=1e-4)
        assert (np.abs(found - exact) < 1 + 1e-3).all()
        # Up where u + k u(1-u) is at least what is missing.
        missing, k = 1 - exact % 1, 2.0 ** -SKEW[bits]
        up = 1 - ((1 + k) - np.sqrt((1 + k) ** 2 - 4 * k * missing)) / (2 * k)
        # What happens once in 2,000 steps may not have happened yet; even numbers leave nothing but that.
        spread = 6 * found.std(0) / np.sqrt(steps) if bits_of is random_bits else 0
        assert (np.abs(found.mean(0) - np.floor(exact) - up) <= spread + 10 / steps).all()
    low = jnp.asarray(z).at[1:].mul(1e-9)
    found = load(codec, store(codec, jnp.tile(low, (2, 1))), jnp.dtype(jnp.float32), (64, 128))
    floor = np.asarray(found)[:1] * 2.0 ** (-(2**bits - 1) / n)
    assert (found[1:32] >= 0.9 * floor).all(), "a second moment must not become 0 beside others"


def test_an_element_moves_no_other() -> None:
    """The grid is one for all blocks: a largest that grows by an octave leaves the codes' values where they are."""
    codec = Block(8).of(signed=False)
    x = values((64, 128), signed=False) + 1e-3
    before, after = (
        load(codec, store(codec, y), jnp.dtype(jnp.float32), x.shape) for y in (x, x.at[0].set(8 * x.max()))
    )
    kept = np.asarray(x) > 2.0**-8 * np.asarray(x).max()
    assert kept[1:].sum() > 1000
    np.testing.assert_array_equal(np.asarray(before)[1:][kept[1:]], np.asarray(after)[1:][kept[1:]])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_not_hidden(bits: int) -> None:
    for signed in (True, False):
        codec, x = Block(bits).of(signed=signed), jnp.ones((64, 128))
        for bad in (jnp.nan, -jnp.nan, jnp.inf):
            found = load(codec, store(codec, x.at[5, 3].set(bad)), jnp.dtype(jnp.float32), x.shape)
            assert not jnp.isfinite(found[5, 3])
            if jnp.isnan(bad):
                assert jnp.isnan(found[:32, 3]).all()
            if signed:
                assert not jnp.isfinite(found[:32, 3]).any()
            assert jnp.isfinite(found[32:]).all() and jnp.isfinite(found[:, 4:]).all()


def test_blocks_are_rows_of_a_column() -> None:
    """The second-to-last axis, or the nearest before it that holds whole blocks, or the longest; vectors in 128s."""
    matrices = {(128, 64): (0, 4), (16, 128, 64): (1, 4), (64, 12, 64): (0, 2), (9, 7, 128): (0, 1)}
    expected = {**matrices, (1, 8192): (1, 256), (8192,): (0, 2), (5000, 1): (0, 157)}
    for shape, (axis, blocks) in expected.items():
        found = layout(shape)
        assert found is not None
        assert (found.axis, found.blocks) == (axis, blocks)
    x = jnp.zeros((64, 128)).at[3, 7].set(5.0)
    scales: Any = store(Block(8).of(signed=True), x)
    assert np.flatnonzero(scales["scales"] > 1).tolist() == [7]


def test_small_arrays_stay_as_they_are() -> None:
    x = values((SMALL // 8 - 1, 8), signed=True)
    stored: Any = store(Block(8).of(signed=True), x)
    assert stored["codes"] is x
    assert stored["scales"] == optax.MaskedNode()
    assert jax.tree.leaves(stored_spec(Block(4).of(signed=True), (SMALL,), jnp.dtype("float32")))[0].dtype == jnp.uint8
    with pytest.raises(ValueError, match="must be 8 or 4, got 6"):
        Block(6)


@pytest.mark.parametrize(
    ("bits", "error", "low", "high", "largest"), [(8, 0.06, 0.98, 1.02, 1.2), (4, 0.37, 0.95, 1.05, 1.8)]
)
def test_adam_with_codes_follows_exact_adam_at_any_scale(
    bits: int, error: float, low: float, high: float, largest: float
) -> None:
    """Random gradients of lognormal(0.7) scales times sigma, 1,200 steps: the last 100 updates against float32."""
    sigmas = (1.0, 1e-3, 1e-6, 1e-9, 1e-15)
    size, steps, last = 64 * 64, 1200, 100
    scales = jnp.asarray(sigmas)[None] * jnp.exp(0.7 * jax.random.normal(jax.random.key(1), (size, 1)))
    pair = (adam_fn.adam(1.0, eps=0.0, storage=Block(bits)), adam_fn.adam(1.0, eps=0.0))

    @full_jit
    def run() -> jax.Array:
        def step(states: Any, t: jax.Array) -> Any:
            g = scales * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), scales.shape)
            (a, one), (b, two) = (tx.update(g, state) for tx, state in zip(pair, states, strict=True))
            a, b = jnp.asarray(a), jnp.asarray(b)
            sums = [(x * x).sum(0) for x in (a - b, a, b)] + [jnp.abs(x).max(0) for x in (a, b)]
            return (one, two), jnp.stack(sums)

        params = jnp.zeros_like(scales)
        return jax.lax.scan(step, tuple(tx.init(params) for tx in pair), jnp.arange(steps))[1]

    found = np.asarray(run(), np.float64)[-last:]
    difference, ours, exact = found[:, :3].sum(0)
    assert (np.sqrt(difference / exact) <= error).all(), np.sqrt(difference / exact)
    ratio = np.sqrt(ours / exact)
    assert ((low <= ratio) & (ratio <= high)).all(), ratio
    assert (found[:, 3].max(0) <= largest * found[:, 4].max(0)).all()


@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_rule_with_block_codes(case: Case) -> None:
    """Finite, near the exact update, of a state that does not change its dtypes, through `scan`."""
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(3), "n": jnp.arange(2), "none": None}
    exact, *coded = (case.make(1e-3, **options) for options in ({}, {"storage": Block(8)}, {"storage": Block(4)}))

    @jax.jit
    def run() -> Any:
        def step(states: Any, t: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.key(0), t)
            g = {"w": jax.random.normal(key, (64, 64)) + 1, "b": jnp.ones(3), "n": jnp.zeros(2, int), "none": None}
            out = [tx.update(g, state, params) for tx, state in zip((exact, *coded), states, strict=True)]
            return tuple(state for _, state in out), tuple((u["w"], u["b"]) for u, _ in out)

        return jax.lax.scan(step, tuple(tx.init(params) for tx in (exact, *coded)), jnp.arange(30))

    states, ((w, b), *found) = run()
    for tx, state, (w_coded, b_coded), bound in zip(coded, states[1:], found, (0.1, 0.8), strict=True):
        before = jax.eval_shape(tx.init, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))
        np.testing.assert_allclose(b_coded, b, rtol=3e-7)
        assert np.linalg.norm(w_coded[-1] - w[-1]) / np.linalg.norm(w[-1]) < bound


def test_zeros_are_stored_for_zeros() -> None:
    for codec in (*CODECS, Cast("bfloat16"), Cast()):
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored_spec(codec, (64, 65), jnp.dtype("float32")))
        assert (load(codec, blank, jnp.dtype("float32"), (64, 65)) == 0).all()
