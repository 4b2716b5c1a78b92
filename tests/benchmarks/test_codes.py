"""Emulated storages are those that the other libraries publish; our storages stay within the bars."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import codes
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from emulation import peers
from measure import scripts

Array = npt.NDArray[np.float64]


def values(*, signed: bool) -> Array:
    """Normal numbers and some zeros, with a row of zeros and a row of tiny numbers; squared if unsigned."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 256)) * np.exp(0.7 * rng.standard_normal((8, 256))) * (rng.random((8, 256)) > 0.05)
    x[3], x[4] = 0, 1e-9 * x[4]
    return x if signed else x * x


def stored(moment: peers.Moment, x: Array) -> Array:
    """The numbers decoded after x was stored, in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(moment.stored)(jnp.asarray(x)))


def nearest(group: int, floor: float, tables: Sequence[Sequence[float]], x: Array, *, signed: bool) -> Array:
    """The nearest value of a table, in units of the largest magnitude of a block."""
    blocks, table = x.reshape(-1, group), np.array(tables[not signed])
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True), floor)
    z = blocks / np.where(scale > 0, scale, 1)
    return table[np.abs(table - z[..., None]).argmin(-1)] * np.float64(np.float32(scale))


def flashoptim(x: Array, *, signed: bool) -> Array:
    """FlashOptim's storage: 2z/(1 + |z|) in 127 codes on each side of 0, or √v in 256, with scales in float16."""
    blocks = (x if signed else np.sqrt(x)).reshape(-1, 32)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True), 1e-12)
    z, rounded = blocks / scale, np.float64(np.float16(scale))
    y = np.round(127 * 2 * z / (1 + np.abs(z))) / 127
    return y / (2 - np.abs(y)) * rounded if signed else (np.round(255 * z) / 255 * rounded) ** 2


EIGHT = [peers.dynamic(8, 7, signed) for signed in (True, False)]
FOUR = [peers.dynamic(4, 3, True), [i / 16 for i in range(1, 17)]]


def test_dynamic_maps_are_those_published() -> None:
    """The maps of bitsandbytes (8 bits) and torchao (4 bits) have the published counts and values."""
    signed, unsigned = map(np.array, EIGHT)
    assert len(np.unique(signed)) == len(np.unique(unsigned)) == 256
    np.testing.assert_allclose(-signed[:127], signed[254:127:-1], rtol=1e-15)  # Symmetric but for the 1.
    np.testing.assert_allclose(signed[-2:], [0.99296875, 1], rtol=1e-15)
    np.testing.assert_allclose(signed[127:131], [0, 5.5e-7, 3.25e-6, 7.75e-6])
    np.testing.assert_allclose(unsigned[[0, 1, 2, -1]], [0, 3.25e-7, 7.75e-7, 1])
    # Table 1 of arXiv 2309.01507 and torchao's list of 16.
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    np.testing.assert_allclose(FOUR[0], [*np.negative(positive[::-1]), 0, *positive, 1])


STORED: dict[str, tuple[float, Callable[..., Array]]] = {
    "plain bfloat16": (4, lambda x, *, signed: np.asarray(jnp.asarray(x, jnp.bfloat16), float)),
    "bitsandbytes 8 bits": (2 + 8 / 256, functools.partial(nearest, 256, 0.0, EIGHT)),
    "torchao 8 bits": (2 + 8 / 256, functools.partial(nearest, 256, 1e-12, EIGHT)),
    "torchao 4 bits": (1 + 8 / 128, functools.partial(nearest, 128, 1e-12, FOUR)),
    "FlashOptim 8 bits": (2.125, flashoptim),
}


@pytest.mark.parametrize("name", peers.PEERS)
def test_moments_are_stored_as_published(name: str) -> None:
    size, expected = STORED[name]
    assert sum(moment.bytes for moment in peers.PEERS[name]) == size
    for moment, signed in zip(peers.PEERS[name], (True, False), strict=True):
        x = values(signed=signed)
        np.testing.assert_allclose(stored(moment, x), expected(x, signed=signed).reshape(x.shape), rtol=1e-12)


def test_emulated_adam_equals_adam_in_numpy() -> None:
    gradients = np.random.default_rng(0).standard_normal((30, 64))
    gradients[:, 5] = 0
    coarse = peers.blocks(8, peers.companded, 32)
    storage = codes.emulated("coarse", coarse, peers.EXACT)
    with jax.enable_x64(True):
        found = codes.trajectory(storage, 0.9, 0.999, 1e-8, jnp.asarray(gradients))
    m = v = np.zeros(64)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(found[t - 1], expected, rtol=1e-12)
        m = stored(coarse, m)


def test_misses_lists_every_bar_that_is_missed() -> None:
    """Bars have one side or two; that of periodic gradients is relative to random ones; nan misses every bar."""

    def row(scenario: str, case: str = "", **found: float) -> scripts.Row:
        return {"storage": "16bit", "scenario": scenario, "case": case, **found}

    good = [row("random", "σ = 1", error=0.1, rms=0.98, largest=0.5), row("golden", error=0.19)]
    assert codes.misses([*good, row("steady", step=1.019)]) == []
    assert codes.misses([*good, row("steady", "β₁ = 0.9", step=0.97), row("periodic", "period 2", error=0.3)]) == [
        "16bit, steady β₁ = 0.9: step 0.97, not 1 ± 0.02",
        "16bit, periodic period 2: error 0.3, not at most 0.2",
    ]
    assert codes.misses([row("quiet", moved=1.0, last=float("nan"))]) == ["16bit, quiet: last nan, not at most 1e-30"]


def test_a_quick_run_stays_within_the_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """With few steps and elements, 24 bits still stay within all bars except those that need many steps."""
    monkeypatch.setattr(sys, "argv", ["codes.py", "--quick", "--only", "24bit", "--out", str(tmp_path)])
    codes.main()
    rows = scripts.read(tmp_path / "codes.json")["rows"]
    assert {row["storage"] for row in rows} == {"24bit"}
    assert {bar.scenario for bar in codes.BARS} - {row["scenario"] for row in rows} == {"recorded"}
    assert codes.misses(row for row in rows if row["scenario"] not in {"periodic", "golden", "β₁ = 0.99"}) == []
