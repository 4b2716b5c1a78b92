"""Changes of a running state: what is chosen begins again, everything else goes on bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.states import slots_of

import adam_fn
from adam_fn import surgery
from adam_fn.surgery import Rows

P = {"kernel": jnp.linspace(-1.0, 1.0, 24).reshape(6, 4), "bias": jnp.ones(6)}
LABELS = {"kernel": "a", "bias": "b"}
TXS = {
    "adam": adam_fn.adam(1e-2),
    "24 bits": adam_fn.adamw(1e-2, storage="24bit"),
    "16 bits": adam_fn.adamw(1e-2, storage="16bit"),
    "amsgrad": adam_fn.amsgrad(1e-2),
    "adan": adam_fn.adan(1e-2),
    "lion": adam_fn.lion(1e-2),
    "swats": adam_fn.swats(1e-2),
    "optax": optax.adam(1e-2),
    "guarded": adam_fn.skip_nonfinite(adam_fn.adam(1e-2, storage="16bit")),
    "chain": optax.chain(optax.trace(0.9), adam_fn.adam(1e-2), adam_fn.average_params(0.9)),
    "frozen": adam_fn.adam(1e-2, frozen={"kernel": False, "bias": True}),
    "partition": optax.partition({"a": adam_fn.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, LABELS),
    "accumulated": optax.MultiSteps(adam_fn.adam(1e-2, storage="24bit"), 2),
    "stored": adam_fn.stored(optax.adam(1e-2)),
}
EVERY = pytest.mark.parametrize("name", TXS)
#: Rows 0 and 3 of the kernel and of the bias.
DEAD = jnp.asarray([True, False, False, True, False, False])
WHERE = {"kernel": DEAD[:, None], "bias": DEAD}


def grads_of(params: Any, t: int = 0) -> Any:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(t + p.ndim), p.shape, p.dtype), params)


def ran(tx: Any, params: Any, steps: int = 31) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        _, state = update(grads_of(params, t), state, params)
    return state


def same_elements(before: Any, after: Any, kept: Any) -> None:
    """Arrays of the rows that stay are the same, and all arrays of no rows."""
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        rows = x.ndim and x.shape[0] == 6
        np.testing.assert_array_equal(x[kept] if rows else x, y[kept] if rows else y)


@EVERY
def test_reset_forgets_what_is_chosen_and_nothing_else(name: str) -> None:
    tx = TXS[name]
    state = ran(tx, P)
    found = jax.jit(lambda state: surgery.reset(tx, state, P, WHERE, second="zero"))(state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    same_elements(state, found, ~np.asarray(DEAD))
    fresh = tx.init(P)
    for x, y, old in zip(*map(jax.tree.leaves, (found, fresh, state)), strict=True):
        if x.ndim and x.shape[0] == 6 and name != "chain":
            np.testing.assert_array_equal(x[DEAD], y[DEAD])
            assert (np.asarray(old[DEAD]) != np.asarray(y[DEAD])).any()


@pytest.mark.parametrize("name", ["adam", "24 bits", "16 bits", "amsgrad", "adan", "guarded", "partition"])
def test_a_reset_makes_no_spike(name: str) -> None:
    """The first steps are no larger than those of the others; with zeros they are three times the rate."""
    tx = TXS[name]
    state = ran(tx, P, 400)
    sizes = {}
    for second in ("mean", "zero"):
        now = surgery.reset(tx, state, P, {"kernel": DEAD[:, None], "bias": False}, second=second)
        largest = []
        for _ in range(20):
            updates, now = tx.update(jax.tree.map(jnp.ones_like, P), now, P)
            largest.append(float(jnp.abs(updates["kernel"][DEAD]).max()))
        sizes[second] = max(largest)
    assert sizes["mean"] < 1.6e-2
    assert sizes["zero"] > 2 * sizes["mean"]


def test_second_moments_begin_at_the_mean_of_the_others() -> None:
    tx = adam_fn.adam(1e-2)
    state = ran(tx, P)
    for where, kept in ((WHERE, ~np.asarray(DEAD)), ("kernel", np.full(6, True))):
        found = surgery.reset(tx, state, P, where)
        mean = np.mean(np.asarray(state[0].nu["kernel"])[kept])
        np.testing.assert_allclose(found[0].nu["kernel"][0], mean, rtol=1e-6)
        np.testing.assert_array_equal(found[0].mu["kernel"][0], 0)
    np.testing.assert_array_equal(found[0].nu["bias"], state[0].nu["bias"])


def test_masters_and_averages_begin_at_the_parameters() -> None:
    short = jax.tree.map(lambda p: p.astype(jnp.bfloat16), P)
    tx = adam_fn.master_weights(adam_fn.adam(1e-2))
    state = ran(tx, short)
    assert (np.asarray(state.remainder["bias"])[DEAD] != 0).any()
    found = surgery.reset(tx, state, short, WHERE)
    np.testing.assert_array_equal(np.asarray(found.remainder["bias"])[DEAD], 0)
    np.testing.assert_array_equal(
        np.asarray(found.remainder["bias"])[~DEAD], np.asarray(state.remainder["bias"])[~DEAD]
    )

    tx = optax.chain(adam_fn.adam(1e-2), adam_fn.average_params(0.9))
    averages = adam_fn.averaged_params(surgery.reset(tx, ran(tx, P), P, WHERE), P)
    np.testing.assert_array_equal(averages["bias"][DEAD], P["bias"][DEAD])


@EVERY
def test_resize_moves_rows(name: str) -> None:
    """Kept, permuted, repeated, dropped and new."""
    tx = TXS[name]
    state = ran(tx, P)
    source = [5, 3, 3, 0, -1, -1, 1]
    rows = {"*": Rows(source)}
    new = {name: jnp.concatenate([p[jnp.asarray([5, 3, 3, 0])], p[:2] * 0, p[1:2]]) for name, p in P.items()}
    found = surgery.resize(tx, state, P, new, rows, second="zero")
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tx.init(new))
    kept = np.asarray(source) >= 0
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        if x.ndim and x.shape[0] == 6:
            np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(x)[np.asarray(source)[kept]])
        else:
            np.testing.assert_array_equal(x, y)
    tx.update(grads_of(new), found, new)


def test_resize_of_a_vocabulary_along_another_axis() -> None:
    tx = adam_fn.adam(1e-2, storage="24bit")
    old = {"embedding": P["kernel"], "head": P["kernel"].T, "norm": jnp.ones(4)}
    new = {"embedding": jnp.ones((8, 4)), "head": jnp.ones((4, 8)), "norm": old["norm"]}
    grown = [*range(6), -1, -1]
    state = ran(tx, old)
    found = surgery.resize(tx, state, old, new, {"embedding": Rows(grown), "head": Rows(grown, axis=-1)})
    for slot in ("mu", "nu"):
        before, after = slots_of(state)[slot], slots_of(found)[slot]
        np.testing.assert_array_equal(after["embedding"][:6], before["embedding"])
        np.testing.assert_array_equal(after["head"][:, :6], before["head"])
        np.testing.assert_array_equal(after["norm"], before["norm"])
    mean = np.mean(np.asarray(slots_of(state)["nu"]["head"], np.float32))
    np.testing.assert_allclose(np.asarray(slots_of(found)["nu"]["head"], np.float32)[:, 6:], mean, rtol=1e-2)


@pytest.mark.parametrize("name", ["adam", "16 bits", "swats", "guarded", "chain", "optax", "accumulated"])
def test_adapt_keeps_begins_and_drops_leaves(name: str) -> None:
    tx = TXS[name]
    state = ran(tx, P)
    more = {**P, "adapter": jnp.ones((6, 2))}
    found = surgery.adapt(tx, state, P, more)
    fresh = tx.init(more)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, fresh)
    back = surgery.adapt(tx, found, more, P)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    tx.update(grads_of(more), found, more)


def test_errors_of_surgery_name_what_is_wrong() -> None:
    tx = adam_fn.adam(1e-2)
    state = tx.init(P)
    with pytest.raises(ValueError, match="where of kernel is float32, expected booleans"):
        surgery.reset(tx, state, P, {"kernel": jnp.ones(6), "bias": False})
    with pytest.raises(ValueError, match=r"where of kernel has shape \(6,\), which does not broadcast to \(6, 4\)"):
        surgery.reset(tx, state, P, {"kernel": DEAD, "bias": False})
    with pytest.raises(ValueError, match="the pattern 'weights' matches no parameter"):
        surgery.reset(tx, state, P, "weights")
    with pytest.raises(ValueError, match='second must be "mean" or "zero"'):
        surgery.reset(tx, state, P, "bias", second="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the new kernel has shape \(6, 4\), expected \(2, 4\) by its rows"):
        surgery.resize(tx, state, P, P, {"kernel": Rows([0, 1])})
    with pytest.raises(ValueError, match="several patterns of rows match kernel"):
        surgery.resize(tx, state, P, P, {"kernel": Rows(range(6)), "k*": Rows(range(6))})
    factored = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match="reset the whole leaf"):
        surgery.reset(factored, factored.init(P), P, WHERE)


def test_muon_and_adam_in_two_bytes() -> None:
    """`stored` narrows the momentum of any transformation; training goes as with float32."""

    def muon(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.partition({"a": tx, "b": adam_fn.adam(1e-2, storage="16bit")}, LABELS)

    wide, narrow = muon(optax.contrib.muon(1e-2)), muon(adam_fn.stored(optax.contrib.muon(1e-2)))
    kinds = {x.dtype for x in jax.tree.leaves(narrow.init(P)) if x.size >= 6}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.uint16)}
    losses = []
    for tx in (wide, narrow):
        params, state, update = P, tx.init(P), jax.jit(tx.update)
        for _ in range(60):
            updates, state = update(jax.tree.map(lambda p: p - 0.5, params), state, params)
            params = optax.apply_updates(params, updates)
        losses.append(sum(float(jnp.sum((p - 0.5) ** 2)) for p in jax.tree.leaves(params)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_stored_averages_are_right_on_average() -> None:
    """A slow trace of a steady signal, which rounding to the nearest would stop early."""
    tx = adam_fn.stored(optax.trace(0.999))
    state: Any = tx.init(jnp.zeros(256))
    update = jax.jit(tx.update)
    for _ in range(3000):
        _, state = update(jnp.ones(256), state)
    expected = (1 - 0.999**3000) / (1 - 0.999)
    assert float(jnp.mean(state.inner.trace.astype(jnp.float32))) == pytest.approx(expected, rel=2e-3)
    assert state.inner.trace.dtype == jnp.bfloat16
