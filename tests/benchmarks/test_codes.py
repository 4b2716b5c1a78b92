"""The codes that the benchmark emulates are those of adam_fn and those that the other libraries publish."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codes import LIBRARY, Comparison, Data, Entry, m_code, mu_law, peers, places, v_octave
from emulation.block_codes import Bend, Code, Log, MuLaw, Scale, dynamic

import adam_fn
from adam_fn.block import CODES_PER_OCTAVE
from adam_fn.execute.store import store
from adam_fn.noise import random_bits

SHAPE = (256, 64)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def values(*, signed: bool, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normal numbers with zeros and a row of them; squares if unsigned. All far from where float32 would round."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp(0.7 * rng.standard_normal(shape)) * (rng.random(shape) > 0.05)
    x[3] = 0
    return (x if signed else x * x).astype(np.float32)


def library(bits: int, *, signed: bool, steps: int = 1) -> jax.Array:
    """What `adam_fn.Block` decodes of the values, in float32, for each of the steps."""
    codec, x = adam_fn.Block(bits).of(signed=signed), jnp.asarray(values(signed=signed)).reshape(-1, 32)

    @jax.jit
    def decoded(step: jax.Array) -> jax.Array:
        chance = None if signed else codec.chance(random_bits(0, step, 0, (len(x), 1)))
        scale = codec.scale(x, chance).max(-1, keepdims=True)
        return codec.decode(codec.encode(x, scale, chance), scale, jnp.float32).reshape(SHAPE)

    return jax.lax.map(decoded, jnp.arange(steps))


def emulated(code: Code, *, signed: bool, steps: int = 1) -> jax.Array:
    """What the benchmark decodes of the values, in float64."""
    x = jnp.asarray(values(signed=signed), jnp.float64)
    decoded = jax.jit(lambda key: code.stored(x, jax.random.uniform(key, x.shape)))
    return jax.lax.map(decoded, jax.random.split(jax.random.key(0), steps))


@pytest.mark.parametrize("bits", list(LIBRARY))
def test_nearest_codes_are_those_of_the_library(bits: int) -> None:
    code, x = LIBRARY[bits][0], values(signed=True)
    np.testing.assert_array_equal(code.bytes, stored_bytes(bits, signed=True))
    found, expected = (np.asarray(y[0], np.float64) for y in (library(bits, signed=True), emulated(code, signed=True)))
    # Of two as large in 14 bits the library takes a positive one for the largest, the emulation the largest itself.
    assert (np.abs(found - expected) > 2e-5 * np.abs(expected)).mean() < 0.01
    other = Code(Bend.symmetric(bits, 1.0))
    assert not np.allclose(library(bits, signed=True)[0], emulated(other, signed=True)[0], rtol=1e-3)
    assert (emulated(code, signed=True)[0][x == 0] == 0).all()


@pytest.mark.parametrize("bits", list(LIBRARY))
def test_random_codes_are_those_of_the_library_on_average(bits: int) -> None:
    """The mean of many, its spread, and the two values between which an element is rounded."""
    steps, code = 200, LIBRARY[bits][1]
    assert code.bytes == stored_bytes(bits, signed=False)
    ours, theirs = (np.asarray(z, np.float64) for z in (emulated(code, signed=False, steps=steps),
                                                        library(bits, signed=False, steps=steps)))  # fmt: skip
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / steps)
    # Where an element is nearly a code, neither may have rounded the other way yet: one in `steps` of the distance.
    slack = 6 * spread + 1e-5 * theirs.mean(0) + 10 / steps * np.maximum(np.ptp(ours, 0), np.ptp(theirs, 0))
    x = values(signed=False)
    # The lowest code depends on the rounded largest of a block in the library, on the largest itself here.
    highest = x.reshape(*x.shape[:-1], -1, 32).max(-1).repeat(32, -1)
    inside = (x > 2.0 ** (1.0 - (2**bits - 1) / CODES_PER_OCTAVE[bits]) * highest) | (highest == 0)
    assert inside.mean() > 0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= slack)[inside].all()
    likely = inside & (np.minimum(x - ours.min(0), ours.max(0) - x) > 0.1 * np.ptp(ours, 0))
    assert likely.mean() > 0.3
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(ours, 0)[likely], end(theirs, 0)[likely], rtol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def stored(code: Code, x: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
    """What is decoded of x; compiled, as it is many operations."""
    return code.stored(x, jnp.broadcast_to(noise, x.shape))


def stored_bytes(bits: int, *, signed: bool) -> float:
    """Bytes per element that `adam_fn.Block` stores."""
    codec, x = adam_fn.Block(bits).of(signed=signed), jnp.asarray(values(signed=signed))
    return (
        sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(jax.eval_shape(functools.partial(store, codec), x))
        )
        / x.size
    )


def test_dynamic_maps() -> None:
    """The maps of bitsandbytes, 8 bits, and torchao, 4: as published, by their counts and some of their values."""
    signed, unsigned, four = (np.array(dynamic(*sizes, signed=sign).values) for sizes, sign in
                              (((8, 7), True), ((8, 7), False), ((4, 3), True)))  # fmt: skip
    for table, count in ((signed, 256), (unsigned, 256), (four, 16)):
        assert len(set(table)) == count
        assert (np.diff(table) > 0).all()
        assert {0.0, 1.0} <= set(table)
    np.testing.assert_allclose(-signed[:127], signed[254:127:-1], rtol=1e-15)  # Symmetric but for the 1.
    assert signed[0] > -1 < four[0]
    np.testing.assert_allclose(signed[-2:], [0.99296875, 1], rtol=1e-15)
    np.testing.assert_allclose(signed[128:131], [5.5e-7, 3.25e-6, 7.75e-6])
    assert unsigned[0] == 0
    np.testing.assert_allclose(unsigned[1:3], [3.25e-7, 7.75e-7])
    # Table 1 of arXiv 2309.01507 and torchao's list of 16.
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    np.testing.assert_allclose(four, [*np.negative(positive[::-1]), 0, *positive, 1])
    # Tables round to the nearest value.
    z = np.random.default_rng(0).uniform(-1, 1, 999)
    grid = dynamic(8, 7, signed=True)
    found = grid.value(jnp.round(grid.code(jnp.asarray(z))))
    np.testing.assert_allclose(found, signed[np.abs(signed - z[:, None]).argmin(1)], rtol=1e-12)


def test_peers() -> None:
    """Bytes, the block's largest element, and FlashOptim's formulas 2z/(1 + |z|) and √v in float16 scales."""
    found = {entry.label: entry for entry in peers()}
    expected = {
        "bitsandbytes 8": 2 + 8 / 256,
        "torchao 8": 2 + 8 / 256,
        "torchao 4": 1 + 8 / 128,
        "FlashOptim 8": 2.125,
    }
    assert {label: entry.bytes for label, entry in found.items()} == expected
    m, v = (jnp.asarray(values(signed=signed, shape=(8, 256)), jnp.float64) for signed in (True, False))
    flash = found["FlashOptim 8"]
    assert flash.m is not None
    assert flash.v is not None
    groups = np.asarray(m).reshape(8, 8, 32)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-12)
    y = np.round(127 * 2 * groups / scale / (1 + np.abs(groups / scale))) / 127
    decoded = y / (2 - np.abs(y)) * np.float64(np.float16(scale))
    np.testing.assert_allclose(stored(flash.m, m), decoded.reshape(m.shape), rtol=1e-12)
    groups = np.sqrt(np.asarray(v).reshape(8, 8, 32))
    scale = np.maximum(groups.max(-1, keepdims=True), 1e-12)
    decoded = (np.round(255 * groups / scale) / 255 * np.float64(np.float16(scale))) ** 2
    np.testing.assert_allclose(stored(flash.v, v), decoded.reshape(v.shape), rtol=1e-12)
    assert (stored(flash.v, v * 1e-18) == 0).all(), "float16 scales underflow"
    for label in ("bitsandbytes 8", "torchao 4"):
        code = found[label].v
        assert code is not None
        largest = v.reshape(-1, code.scale.group).max(-1)
        decoded = stored(code, v).reshape(-1, code.scale.group).max(-1)
        np.testing.assert_allclose(decoded, largest, rtol=1e-7, atol=1e-13)  # 1e-12 is torchao's least scale.


CODES = [*(code for codes in LIBRARY.values() for code in codes), m_code(4, 3, sign=True), m_code(7, 3),
         mu_law(8, sign=False), mu_law(4, scale="bfloat16"), places(8, 24), places(4, 2.25, group=16, shared=False),
         v_octave(8, 20), v_octave(4, 2, "unbiased", group=16)]  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=str)
def test_what_is_decoded_is_coded_as_it_was(code: Code) -> None:
    x = jnp.asarray(values(signed=isinstance(code.grid, Bend | MuLaw)), jnp.float64)
    noise = jax.random.uniform(jax.random.key(0), x.shape)
    once = stored(code, x, noise)
    assert (once != x).mean() > 0.5
    np.testing.assert_allclose(stored(code, once, 1 - noise), once, rtol=1e-12)


def test_a_scale_is_not_below_the_largest() -> None:
    x = jnp.asarray([[1.0, -0.5], [2.0 + 2**-20, 0.0], [-3.1e-30, 1e-30], [0.0, 0.0]], jnp.float64)
    expected = {"power of 2": [1.0, 4.0, 2.0**-98, 0.0], "bfloat16": [1.0, 2.015625, None, 0.0]}
    for kind, scales in expected.items():
        divisor, multiplier = Scale(kind, 2).of(x)  # pyright: ignore[reportArgumentType]
        largest = jnp.abs(x).max(-1, keepdims=True)
        assert (multiplier >= largest).all()
        assert (jnp.abs(x / divisor) <= 1).all()
        for found, scale in zip(multiplier[:, 0], scales, strict=True):
            assert scale is None or found == scale
    divisor, multiplier = Scale("bfloat16", 2, sign=True).of(x)
    assert (divisor[:3, 0] > 0).tolist() == [True, True, False]
    assert ((x / divisor).max(-1)[:3] > 0.99).all()


def test_values_below_a_power_of_two_do_not_depend_on_it() -> None:
    """With whole codes an octave an element that is on a code stays there when its block's scale doubles."""
    x = jnp.exp2(-jnp.arange(32) / 4)[None]
    doubled = x.at[0, 0].set(2.0)
    for rounding in ("nearest", "unbiased", "dithered"):
        found = stored(v_octave(8, 20, rounding), doubled, 0.5)
        np.testing.assert_allclose(found[0, 1:], x[0, 1:], rtol=1e-12)
    assert (stored(Code(Log(255, 21.2), "dithered"), doubled, 0.5)[0, 1:] != x[0, 1:]).any()


def test_comparison() -> None:
    """Exact codes have no error; of codes that lose something it is that of a transcription in NumPy."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((230, 64)).astype(np.float32)
    gradients[:, 5] = 0
    data = Data("synthetic", gradients, (1e-3,))
    entry = Entry("m", m_code(4, 1), None)
    (row,) = Comparison(data).rows(entry)
    m = kept = v = np.zeros(64)
    errors, norm, size, largest = 0.0, 0.0, 0.0, [0.0, 0.0]
    assert entry.m is not None
    code = jax.jit(entry.m.stored)
    for t, g in enumerate(gradients.astype(np.float64) * 1e-3, 1):
        m, new, v = 0.9 * m + 0.1 * g, 0.9 * kept + 0.1 * g, 0.999 * v + 0.001 * g * g
        kept = np.asarray(code(jnp.asarray(new), jnp.zeros(64)))
        if t > 30:
            root = np.where(v > 0, np.sqrt(v / (1 - 0.999**t)), 1.0)
            a, b = (x / (1 - 0.9**t) / root for x in (new, m))
            errors, size, norm = errors + ((a - b) ** 2).sum(), size + (a**2).sum(), norm + (b**2).sum()
            largest = [max(largest[0], np.abs(a).max()), max(largest[1], np.abs(b).max())]
    expected = [np.sqrt(errors / norm), np.sqrt(size / norm), largest[0] / largest[1]]
    np.testing.assert_allclose([row[key] for key in ("error", "rms", "largest")], expected, rtol=1e-5)  # pyright: ignore
    assert row["bytes"] == 4.5625
    assert not row["ours"]
    (row,) = Comparison(data).rows(Entry("", *LIBRARY[8]))
    assert row["ours"]
    assert 0 < float(str(row["error"])) < 0.2
