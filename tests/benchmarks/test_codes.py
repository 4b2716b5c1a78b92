"""The storages that the benchmark emulates are those that the other libraries publish; ours err as said."""

import pathlib
import sys

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
    """Normal numbers with zeros and a row of them; squares if unsigned."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 256)) * np.exp(0.7 * rng.standard_normal((8, 256))) * (rng.random((8, 256)) > 0.05)
    x[3] = 0
    return x if signed else x * x


def stored(moment: peers.Moment, x: Array) -> Array:
    """What is decoded of x, in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(moment.stored)(jnp.asarray(x)))


def test_dynamic_maps() -> None:
    """The maps of bitsandbytes, 8 bits, and torchao, 4: as published, by their counts and some of their values."""
    signed, unsigned, four = (np.array(peers.dynamic(*sizes, sign)) for sizes, sign in
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


def test_tables_round_to_the_nearest() -> None:
    z, signed = np.random.default_rng(0).uniform(-1, 1, 999), np.array(peers.dynamic(8, 7, True))
    with jax.enable_x64(True):
        found = peers.table([*signed[::-1]])(jnp.asarray(z))
    np.testing.assert_allclose(found, signed[np.abs(signed - z[:, None]).argmin(1)], rtol=1e-15)


def test_peers_bytes() -> None:
    assert {name: mu.bytes + nu.bytes for name, (mu, nu) in peers.PEERS.items()} == {
        "plain bfloat16": 4,
        "bitsandbytes 8 bits": 2 + 8 / 256,
        "torchao 8 bits": 2 + 8 / 256,
        "torchao 4 bits": 1 + 8 / 128,
        "FlashOptim 8 bits": 2.125,
    }


def test_flashoptim() -> None:
    """Its formulas 2z/(1 + |z|) and √v, with scales in float16."""
    m, v, (mu, nu) = values(signed=True), values(signed=False), peers.PEERS["FlashOptim 8 bits"]
    groups = m.reshape(8, 8, 32)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-12)
    y = np.round(127 * 2 * groups / scale / (1 + np.abs(groups / scale))) / 127
    decoded = y / (2 - np.abs(y)) * np.float64(np.float16(scale))
    np.testing.assert_allclose(stored(mu, m), decoded.reshape(m.shape), rtol=1e-12)
    groups = np.sqrt(v.reshape(8, 8, 32))
    scale = np.maximum(groups.max(-1, keepdims=True), 1e-12)
    decoded = (np.round(255 * groups / scale) / 255 * np.float64(np.float16(scale))) ** 2
    np.testing.assert_allclose(stored(nu, v), decoded.reshape(v.shape), rtol=1e-12)
    assert (stored(nu, v * 1e-18) == 0).all(), "float16 scales underflow"


@pytest.mark.parametrize(("name", "group"), [("bitsandbytes 8 bits", 256), ("torchao 4 bits", 128)])
def test_the_largest_of_a_block_is_kept(name: str, group: int) -> None:
    v = values(signed=False)
    decoded, largest = (x.reshape(-1, group).max(-1) for x in (stored(peers.PEERS[name][1], v), v))
    np.testing.assert_allclose(decoded, largest, rtol=1e-7, atol=1e-12)  # 1e-12 is torchao's least scale.


def test_plain_bfloat16() -> None:
    m = values(signed=True)
    np.testing.assert_array_equal(
        stored(peers.PEERS["plain bfloat16"][0], m), np.asarray(jnp.asarray(m, jnp.bfloat16), float)
    )


def test_emulated_adam_is_that_of_numpy() -> None:
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


def test_a_peer_that_keeps_everything_is_exact() -> None:
    """The measures of no error."""
    scenario = next(own for own in codes.scenarios(codes.QUICK) if own.name == "sparse")
    (row,) = codes.compared([codes.emulated("exact", peers.EXACT, peers.EXACT)], scenario, codes.QUICK)
    assert row == {"storage": "exact", "bytes": 16, "ours": False, "scenario": "sparse", "case": ""} | row
    np.testing.assert_allclose([row["error"], row["rms"], row["largest"]], [0, 1, 1], atol=1e-6)


#: Of 24 bits the errors of the updates, and of the second half of them where the gradient falls, at the most.
MOST = {"random": 0.04, "wide": 0.04, "sparse": 0.035, "β₁ = β₂ = 0.95": 0.055, "periodic": 0.08, "golden": 0.08}


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Even with few steps and elements 24 bits keep to what the documentation says of them."""
    monkeypatch.setattr(sys, "argv", ["codes.py", "--quick", "--only", "24bit", "--out", str(tmp_path)])
    codes.main()
    rows = scripts.read(tmp_path / "codes.json")["rows"]
    assert {row["storage"] for row in rows} == {"24bit"}
    assert {row["scenario"] for row in rows} == {*MOST, "β₁ = 0.99", "steady", "noisy", "quiet", "falling", "slow"}
    for row in rows:
        name = row["scenario"], row["case"]
        if row["scenario"] in MOST:
            assert row["error"] <= MOST[row["scenario"]], name
        if row["scenario"] in ("random", "wide"):
            assert abs(row["rms"] - 1) <= 0.01 and row["largest"] <= 1.1, name
        assert abs(row.get("step", 1) - 1) <= (0.02 if row["scenario"] == "slow" else 0.01), name
        assert abs(row.get("moved", 1) - 1) <= 0.02 and row.get("last", 0) <= 1e-30, name
    (falling,) = scripts.where(rows, scenario="falling")
    assert falling["absolute"] <= 0.004 and abs(falling["mean"]) <= 0.0004
