"""The codecs: the numbers that they store, their rounding, which is right on average, and its dithers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MEMBERS, Case, name
from helpers.runs import random_gradients, trajectories
from jax.typing import DTypeLike

import adam_fn
from adam_fn import Cast, MuLaw, Slot, Unit, Word
from adam_fn.storage import noise
from adam_fn.storage.codec import Codec, narrowed

SLOTS = {"mu": Slot(bound=7.27, unit=Unit("nu")), "nu": Slot(signed=False)}
CODECS: dict[str, Codec] = {
    "mu-law": MuLaw().for_slot("mu", SLOTS),
    "word": Word().for_slot("mu_nu", SLOTS),
    "bfloat16": Cast("bfloat16").for_slot("mu", SLOTS),
    "float16": Cast("float16").for_slot("mu", SLOTS),
    "float8": Cast("float8_e5m2").for_slot("mu", SLOTS),
    "float8_e4m3fn": Cast("float8_e4m3fn").for_slot("mu", SLOTS),
}
#: The ranges of the logarithms of the numbers that a codec may get, if they are not those of float32.
RANGES = {"mu-law": (-9, 1.9), "float16": (-16, 10), "float8": (-10, 10), "float8_e4m3fn": (-10, 6)}
#: Dithers that fill their interval evenly, ends included.
DITHERS = jnp.asarray(np.linspace(-(2**31), 2**31 - 1, 4001).astype(np.int32))
N = 512


def numbers(codec: str, seed: int = 0) -> tuple[jax.Array, ...]:
    """Numbers of all sizes that a codec may get: two moments for the word, else one array."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], N)
    if codec == "word":
        s, r = np.exp(rng.uniform(-30, 7, N)), signs * np.exp(rng.uniform(-6, 1.9, N))
        return jnp.asarray(r * s, jnp.float32), jnp.asarray(s * s, jnp.float32)
    low, high = {"mu-law": (-9, 1.9), "float16": (-16, 10), "float8": (-10, 10), "float8_e4m3fn": (-10, 6)}.get(
        codec, (-60, 60)
    )
    return (jnp.asarray(signs * np.exp(rng.uniform(low, high, N)), jnp.float32),)


def spread(codec: Codec, x: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """The decoded values of every number with every dither: ``[dithers, numbers]`` for each slot."""

    def one(dither: jax.Array) -> tuple[jax.Array, ...]:
        u = jnp.full(x[0].shape, dither)
        return codec.decode(codec.encode(x, (u,) * len(x)), jnp.float32)

    return tuple(np.asarray(y, np.float64) for y in jax.jit(lambda: jax.lax.map(one, DITHERS))())


@pytest.mark.parametrize("kind", CODECS)
def test_numbers_round_to_two_neighbours_and_to_themselves_on_average(kind: str) -> None:
    codec, x = CODECS[kind], numbers(kind)
    found = spread(codec, x)
    exact = [np.asarray(y, np.float64) for y in x]
    if kind == "word":  # It rounds the root of v, and r = m/√v.
        root = np.sqrt(found[1])
        found, exact = (found[0] / root, root), [exact[0] / np.sqrt(exact[1]), np.sqrt(exact[1])]
    for values, wanted in zip(found, exact, strict=True):
        low, high = values.min(0), values.max(0)
        step = high - low
        assert (np.abs(values - low) * np.abs(values - high) <= 1e-5 * step**2 + 1e-60).all(), "more than two values"
        assert (low <= wanted * (1 + np.sign(wanted) * 1e-6) + 1e-45).all()
        assert (high >= wanted * (1 - np.sign(wanted) * 1e-6) - 1e-45).all()
        # 4,001 dithers find a threshold to 1/4,000 of a step; the bits of μ-laws are those of 1 + c|r|.
        assert (np.abs(values.mean(0) - wanted) <= 1e-3 * step + 2e-6 * np.abs(wanted)).all()
        if kind in ("mu-law", "word"):
            assert (step <= np.abs(wanted) / 7.9 + 7.27 / 239 / 7.9).all()


@pytest.mark.parametrize("kind", CODECS)
def test_a_decoded_code_is_encoded_as_itself_with_any_dither(kind: str) -> None:
    """The identity ``encode(decode(code)) = code`` holds for every code, nan included; code 0 stands for 0."""
    codec = CODECS[kind]
    if isinstance(codec, MuLaw):
        codec = dataclasses.replace(codec, unit=None)  # Then -128 is a code, for nan.
    bits = 8 if kind.startswith(("mu-law", "float8")) else 16
    every = jnp.arange(2**bits, dtype=f"uint{bits}")
    code = {"word": every}.get(kind, jax.lax.bitcast_convert_type(every, getattr(codec, "dtype", jnp.int8)))

    def again(code: jax.Array, dither: jax.Array) -> jax.Array:
        x = codec.decode(code, jnp.float32)
        return codec.encode(x, (jnp.full(code.shape, dither),) * len(x))

    values = [np.asarray(y, np.float32) for y in codec.decode(code, jnp.float32)]
    assert all(y[0] == 0 for y in values)
    # XLA takes subnormal numbers for 0, and a word with s = 0 or s = nan does not determine r.
    normal = np.all([np.isnan(y) | (np.abs(y) >= 2.0**-126) for y in values], axis=0)
    for dither in (-(2**31), 2**30, -(2**30)):  # u = 1/2, 1/4, 3/4
        found = np.asarray(jax.jit(again)(code, jnp.int32(dither)), np.float32)
        same = (found == np.asarray(code, np.float32)) | np.isnan(found)
        if kind == "word":  # A word of nan keeps no r.
            same |= np.isnan(values[1]) & (found % 512 == 511)
        assert same[normal].all(), (np.asarray(code)[normal][~same[normal]], dither)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_an_element_that_is_not_finite_stays_so_and_changes_no_other(bad: float) -> None:
    codecs = {**CODECS, "mu-law": MuLaw().for_slot("mu", {"mu": Slot(bound=7.27)})}  # With a unit, the unit is nan.
    for kind, codec in codecs.items():
        if kind == "word" and np.isinf(bad):
            continue  # A rule turns it into nan.
        x = tuple(np.asarray([y, y, bad, y, y], np.float32) for y in (0.5, 0.25)[: len(codec.slots)])

        def stored(x: Any, dither: jax.Array, codec: Codec = codec) -> Any:
            return codec.decode(codec.encode(x, (dither,) * len(x)), jnp.float32)

        found = jax.jit(jax.vmap(stored, in_axes=(None, 0)))(x, np.full((3, 5), [[0], [-1], [2**30]], np.int32))
        for y in found:
            np.testing.assert_array_equal(np.isfinite(y), [np.arange(5) != 2] * 3, err_msg=kind)
    every_bit = jax.lax.bitcast_convert_type(jnp.int32(-1), jnp.float32)  # A nan that an addition would turn into 0.
    assert jnp.isnan(narrowed(every_bit, np.dtype(jnp.bfloat16), jnp.int32(-1)))


def test_numbers_that_are_too_large_or_too_small_saturate() -> None:
    """The limits are the bound (which a running sum may exceed by rounding), the word's range, and float16's."""
    u = jnp.full(3, -1, jnp.int32)

    def stored(kind: str, *x: Any) -> Any:
        codec = CODECS[kind]
        return map(np.asarray, jax.jit(lambda x: codec.decode(codec.encode(x, (u,) * len(x)), jnp.float32))(x))

    (r,) = stored("mu-law", np.asarray([9.0, -9.0, 1e30], np.float32))
    np.testing.assert_allclose(r, np.asarray([1, -1, 1]) * float(r[0]), rtol=1e-6)
    assert 7.27 <= float(r[0]) <= 7.27 * 17 / 16, "the bound, or less than a code beyond it"
    v = np.asarray([1e-36, 1e12, 1e30], np.float32)
    m, nu = stored("word", np.sqrt(v), v)
    np.testing.assert_allclose(nu, [2.0**-104, (1.625 * 2**11) ** 2, (1.625 * 2**11) ** 2], rtol=1e-6)
    np.testing.assert_allclose(m[1:] / np.sqrt(nu[1:]), 1, rtol=0.14)
    assert 1e-18 <= float(m[0]) <= 1e-18 + 7.27 / 200 / 8 * 2.0**-52, "m as it is, in units of the least s"
    half = narrowed(jnp.asarray([1e6, -1e6, 65519.0]), np.dtype(jnp.float16), u)
    np.testing.assert_array_equal(half, np.asarray([65504, -65504, 65504], np.float16))


@pytest.mark.parametrize("shape", [(4096,), (64, 96), (3, 1, 64, 128)], ids=str)
def test_the_lattice_is_even_along_every_axis(shape: tuple[int, ...]) -> None:
    found = np.asarray(noise.lattice(jnp.zeros(shape))).astype(np.int64) % 2**32
    for axis, n in enumerate(shape):
        if n >= 64:
            assert (np.diff(np.sort(found, axis), axis=axis).max() <= 2.1 * 2**32 / n).all()
    assert np.unique(found).size > 0.99 * found.size


def test_time_offsets_are_even_and_without_a_period() -> None:
    """Each 1/2ⁿ of the interval has one of 2ⁿ steps; no frequency stands out; each slot has offsets of its own."""
    names = ["mu", "nu", "parameters"]
    steps = jnp.arange(4096) + 3 * 4096
    found = jax.jit(jax.vmap(lambda t: noise.time_offsets(t, names)))(steps)
    streams = np.stack([np.asarray(found[x]).astype(np.int64) % 2**32 / 2**32 for x in names])
    for n in (4, 64, 1024):
        parts = np.floor(streams.reshape(3, -1, n) * n).astype(int)
        np.testing.assert_array_equal(np.sort(parts, axis=-1), np.broadcast_to(np.arange(n), parts.shape))
    spectrum = np.abs(np.fft.rfft(np.cos(2 * np.pi * streams))) / np.sqrt(4096 / 2)
    assert spectrum.max() < 4.5, "random numbers have about 3"
    assert np.abs(np.corrcoef(streams) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize(
    "case", [x for x in MEMBERS if any(s.bound is not None for s in x.member.slots.values())], ids=name
)
def test_bounds_hold_for_the_worst_gradients(case: Case) -> None:
    """Gradients that grow as in the proof, spikes and random walks bring slots near their bounds, not beyond."""
    rule, steps = case.member, 1500
    bounded = {slot: x for slot, x in rule.slots.items() if x.bound is not None}
    rng = np.random.default_rng(0)
    rates = np.concatenate([[0.0], np.linspace(-0.3, 0.3, 61), rng.uniform(-0.02, 0.02, 60)])
    t = np.arange(steps)[:, None]
    grown = np.exp(np.clip(rates * (t - steps), -30, 30))
    spikes = np.where(t % np.asarray([[1, 7, 50, 400, 1499]]) == 0, 1.0, 0.0)
    walks = rng.standard_normal((steps, 20)).cumsum(0)
    g = jnp.asarray(np.concatenate([grown, spikes, walks], axis=1), jnp.float32)
    tx = adam_fn.transform(rule)

    def step(carry: Any, g: jax.Array) -> Any:
        state, most = carry
        _, state = tx.update(g, state)
        slots: Any = tx.update.decoded(state, g)
        for slot, x in bounded.items():
            unit = 1.0 if x.unit is None else jnp.sqrt(slots[x.unit.slot]) if x.unit.root else slots[x.unit.slot]
            most = {**most, slot: jnp.maximum(most[slot], jnp.max(jnp.abs(slots[slot]) / (unit + 1e-30)))}
        return (state, most), None

    start = (tx.init(g[0]), dict.fromkeys(bounded, jnp.zeros(())))
    (_, most), _ = jax.jit(lambda g: jax.lax.scan(step, start, g))(g)
    for slot, x in bounded.items():
        assert x.bound is not None
        assert float(most[slot]) <= x.bound * 1.001, slot
        if case.alias is not adam_fn.adopt:  # Its bound is that of a million steps of clipping.
            assert float(most[slot]) > 0.35 * x.bound, f"{slot}: {most[slot]} of {x.bound}"


def test_bounds_depend_on_the_betas() -> None:
    bounds = {beta: adam_fn.Adam(b1=beta).slots["mu"].bound for beta in (0.9, 0.99)}
    assert bounds == {0.9: pytest.approx(7.2703, rel=1e-4), 0.99: pytest.approx(2.2991, rel=1e-4)}
    assert adam_fn.Adam(b1=jnp.float32(0.5)).slots["mu"].bound == bounds[0.9], "arrays have the bound of the defaults"
    assert adam_fn.Adam(b1=0.999, b2=0.9).slots["mu"].bound is adam_fn.AdEMAMix().slots["slow"].bound is None


class Half(Codec):
    """A user's own codec, which stores half of the number."""

    def encode(self, x: tuple[jax.Array, ...], dither: tuple[jax.Array, ...]) -> jax.Array:
        return (x[0] / 2).astype(jnp.float32)

    def decode(self, code: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        return (2 * code.astype(dtype),)


def test_a_users_own_codec_stores_moments() -> None:
    txs = [adam_fn.adam(1e-2, storage=storage) for storage in (Half(), None)]
    _, (half, plain) = trajectories(txs, random_gradients(3, 60), np.zeros(60))
    np.testing.assert_allclose(half, plain, rtol=1e-6, atol=1e-8)


def test_derivatives_pass_through_narrow_moments() -> None:
    """A narrow float has the derivative of the number; a code has none, but the update still has one."""
    g = jnp.asarray([0.3, -2.0, 0.01])

    def second(storage: Any, g: jax.Array) -> jax.Array:
        tx = adam_fn.adam(1.0, storage=storage)
        _, state = tx.update(g, tx.init(g))
        return jnp.sum(jnp.sin(jnp.asarray(tx.update(jnp.cos(g), state)[0])))

    storages = (None, "bfloat16", "24bit")
    exact, short, coded = jax.jit(lambda: [jax.grad(functools.partial(second, x))(g) for x in storages])()
    np.testing.assert_allclose(short, exact, rtol=2e-2, atol=2e-3)
    assert jnp.isfinite(coded).all() and jnp.abs(coded).max() > 0
