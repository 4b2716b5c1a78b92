"""Changes of a running state: the chosen parts begin again, everything else goes on bit for bit."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.runs import scanned
from helpers.states import slots_of

import adam_fn
from adam_fn import surgery
from adam_fn.surgery import Rows

P = {"kernel": np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(6, 4), "bias": np.ones(6, np.float32)}


def labels(params: Any) -> Any:
    return jax.tree.map_with_path(lambda keys, _: "b" if "bias" in str(keys) else "a", params)


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
    "frozen": adam_fn.adam(1e-2, frozen=adam_fn.masks.path("bias")),
    "partition": optax.partition({"a": adam_fn.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, labels),
    "accumulated": optax.MultiSteps(adam_fn.adam(1e-2, storage="24bit"), 2),
    "stored": adam_fn.stored(optax.adam(1e-2)),
}
#: Rows 0 and 3 of the kernel and of the bias.
DEAD = np.asarray([True, False, False, True, False, False])
WHERE = {"kernel": DEAD[:, None], "bias": DEAD}
SOURCE = np.array([5, 3, 3, 0, -1, -1, 1])
MORE = {**P, "adapter": np.ones((6, 2), np.float32)}
MOVED = {name: p[SOURCE] for name, p in P.items()}
NOISE = np.random.default_rng(0).standard_normal((400, 24)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def ran(tx: Any, params: Any, steps: int = 31) -> Any:
    """The state after some steps."""
    grads = jax.tree.map(lambda p: NOISE[:steps, : p.size].reshape(steps, *p.shape).astype(p.dtype), params)
    return scanned(tx, params, grads)[0][1]


@functools.cache
def states() -> dict[str, Any]:
    """The states of all transformations after some steps, in one program."""
    return jax.device_get(jax.jit(lambda params: {name: ran(tx, params) for name, tx in TXS.items()})(P))


class Edited(NamedTuple):
    """A fresh state, and a state with rows reset, with rows moved, with one more leaf, and without that leaf again."""

    fresh: Any
    reset: Any
    moved: Any
    more: Any
    back: Any


@functools.cache
def edited() -> dict[str, Edited]:
    """The edits of all states, in one program."""

    def edit(tx: Any, state: Any) -> Edited:
        reset = surgery.reset(tx, state, P, WHERE, second="zero")
        moved = surgery.resize(tx, state, P, MOVED, {"*": Rows(SOURCE)}, second="zero")
        more = surgery.adapt(tx, state, P, MORE)
        return Edited(tx.init(P), reset, moved, more, surgery.adapt(tx, more, MORE, P))

    return jax.device_get(jax.jit(lambda x: {name: edit(tx, x[name]) for name, tx in TXS.items()})(states()))


@pytest.mark.parametrize("name", TXS)
def test_chosen_rows_and_leaves_begin_again_or_move_and_nothing_else_changes(name: str) -> None:
    """Rows are reset, or kept, permuted, repeated, dropped and new; leaves are kept, new and dropped."""
    tx, state, (fresh, reset, moved, more, back) = TXS[name], states()[name], edited()[name]
    assert jax.tree.structure(reset) == jax.tree.structure(state)
    chex.assert_trees_all_equal(back, state)
    for params, found in ((MOVED, moved), (MORE, more)):
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, jax.eval_shape(tx.init, params))
        jax.eval_shape(tx.update, params, found, params)
    kept = SOURCE >= 0
    for old, x, y, new in zip(*map(jax.tree.leaves, (state, reset, moved, fresh)), strict=True):
        if old.shape[:1] != (6,):
            chex.assert_trees_all_equal(old, x, y)
            continue
        np.testing.assert_array_equal(x[~DEAD], old[~DEAD])
        np.testing.assert_array_equal(y[kept], old[SOURCE[kept]])
        if name != "chain":
            np.testing.assert_array_equal(x[DEAD], new[DEAD])
            assert (old[DEAD] != new[DEAD]).any()


@pytest.mark.parametrize("name", ["adam", "24 bits", "16 bits", "amsgrad", "adan", "guarded", "partition"])
def test_a_reset_makes_no_spike(name: str) -> None:
    """The first steps are no larger than those of the others; with zeros they are three times the rate."""
    tx, ones = TXS[name], jax.tree.map(lambda p: np.ones((20, *p.shape), np.float32), P)

    def step(state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, P)
        return state, jnp.abs(updates["kernel"][DEAD])

    @jax.jit
    def largest(state: Any) -> list[jax.Array]:
        where = {"kernel": DEAD[:, None], "bias": False}
        begun = (surgery.reset(tx, state, P, where, second=second) for second in ("mean", "zero"))
        return [jnp.max(jax.lax.scan(step, each, ones)[1]) for each in begun]

    mean, zero = largest(ran(tx, P, 400))
    assert mean < 1.6e-2
    assert zero > 2 * mean


def test_second_moments_begin_at_the_mean_of_the_others() -> None:
    tx, state = TXS["adam"], states()["adam"]
    for where, kept in ((WHERE, ~DEAD), ("kernel", np.full(6, True))):
        found = surgery.reset(tx, state, P, where)
        mean = np.mean(np.asarray(state[0].nu["kernel"])[kept])
        np.testing.assert_allclose(found[0].nu["kernel"][0], mean, rtol=1e-6)
        np.testing.assert_array_equal(found[0].mu["kernel"][0], 0)
    np.testing.assert_array_equal(found[0].nu["bias"], state[0].nu["bias"])


def test_masters_and_averages_begin_at_the_parameters() -> None:
    short = jax.tree.map(lambda p: p.astype(jnp.bfloat16), P)
    tx = adam_fn.master_weights(adam_fn.adam(1e-2))
    state = ran(tx, short)
    before, after = (x.remainder["bias"] for x in (state, surgery.reset(tx, state, short, WHERE)))
    assert (before[DEAD] != 0).any()
    np.testing.assert_array_equal(after, np.where(DEAD, 0, before))

    averages = adam_fn.averaged_params(edited()["chain"][0], P)
    np.testing.assert_array_equal(averages["bias"][DEAD], P["bias"][DEAD])


def test_a_vocabulary_is_resized_along_any_axis() -> None:
    tx = adam_fn.adam(1e-2, storage="24bit")
    old = {"embedding": P["kernel"], "head": P["kernel"].T, "norm": np.ones(4, np.float32)}
    new = {"embedding": jnp.ones((8, 4)), "head": jnp.ones((4, 8)), "norm": old["norm"]}
    rows, state = Rows([*range(6), -1, -1]), ran(tx, old)
    moves = {"embedding": rows, "head": rows._replace(axis=-1)}
    found = jax.jit(lambda state: surgery.resize(tx, state, old, new, moves))(state)
    for slot, before in slots_of(state).items():
        after = slots_of(found)[slot]
        chex.assert_trees_all_equal(
            {**after, "embedding": after["embedding"][:6], "head": after["head"][:, :6]}, before
        )
    mean = np.mean(np.asarray(slots_of(state)["nu"]["head"], np.float32))
    np.testing.assert_allclose(np.asarray(slots_of(found)["nu"]["head"], np.float32)[:, 6:], mean, rtol=1e-2)


def test_errors_of_surgery_name_what_is_wrong() -> None:
    tx, factored = adam_fn.adam(1e-2), optax.adafactor(1e-2, min_dim_size_to_factor=2)
    reset: Any = functools.partial(surgery.reset, tx, tx.init(P), P)
    resize: Any = functools.partial(surgery.resize, tx, tx.init(P), P, P)
    for call, argument, message in (
        (reset, {"kernel": jnp.ones(6), "bias": False}, "where of kernel is float32, expected booleans"),
        (reset, {"kernel": DEAD, "bias": False}, r"kernel has shape \(6,\), which does not broadcast to \(6, 4\)"),
        (reset, "weights", "the pattern 'weights' matches no parameter"),
        (functools.partial(reset, second="median"), "bias", 'second must be "mean" or "zero"'),
        (resize, {"kernel": Rows([0, 1])}, r"new kernel has shape \(6, 4\), expected \(2, 4\) by its rows"),
        (resize, {"kernel": Rows(range(6)), "k*": Rows(range(6))}, "several patterns of rows match kernel"),
        (functools.partial(surgery.reset, factored, factored.init(P), P), WHERE, "reset the whole leaf"),
    ):
        with pytest.raises(ValueError, match=message):
            call(argument)


def test_muon_and_adam_train_in_two_bytes() -> None:
    """`stored` narrows the momentum of any transformation; training goes on as with float32."""

    def muon(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.partition({"a": tx, "b": adam_fn.adam(1e-2, storage="16bit")}, labels)

    wide, narrow = muon(optax.contrib.muon(1e-2)), muon(adam_fn.stored(optax.contrib.muon(1e-2)))
    kinds = {x.dtype for x in jax.tree.leaves(jax.eval_shape(narrow.init, P)) if x.size >= 6}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.uint16)}
    losses = []
    for tx in (wide, narrow):
        params, state, update = P, tx.init(P), jax.jit(tx.update)
        for _ in range(60):
            updates, state = update(jax.tree.map(lambda p: p - 0.5, params), state, params)
            params = optax.apply_updates(params, updates)
        losses.append(sum(float(np.sum((p - 0.5) ** 2)) for p in jax.tree.leaves(params)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_stored_averages_are_right_on_average() -> None:
    """A slow trace of a steady signal, which rounding to the nearest would stop early."""
    tx = adam_fn.stored(optax.trace(0.999))
    ones = jnp.ones((3000, 256))
    state: Any = jax.jit(lambda: jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(ones[0]), ones)[0])()
    expected = (1 - 0.999**3000) / (1 - 0.999)
    assert float(jnp.mean(state.inner.trace.astype(jnp.float32))) == pytest.approx(expected, rel=2e-3)
    assert state.inner.trace.dtype == jnp.bfloat16
