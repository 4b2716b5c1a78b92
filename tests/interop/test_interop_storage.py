"""Conversion of a state to another storage."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.states import count_of, kept_weights, slots_of

import adam_fn
from adam_fn.interop import change_storage, from_optax, to_optax

W = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
PARAMS = {"w": jnp.asarray(W), "b": jnp.ones(3), "n": jnp.arange(2)}
SHORT = {name: p.astype(jnp.bfloat16) if p.dtype == jnp.float32 else p for name, p in PARAMS.items()}
PLAIN = adam_fn.adamw(1e-3)
NARROW: dict[Any, Any] = {name: adam_fn.adamw(1e-3, storage=name) for name in ("bfloat16", "24bit", "16bit")}
EVERY = pytest.mark.parametrize("storage", NARROW)
CODED = NARROW["16bit"]


def falling(count: Any) -> Any:
    return 0.9 - 0.1 * jnp.exp(-count / 3.0)


@functools.cache
def after(tx: Any, short: bool = False) -> Any:
    """The parameters, in bfloat16 if `short`, and the state after three steps."""

    @jax.jit
    def run(params: Any) -> Any:
        state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 2)) if p.dtype != jnp.int32 else 0 * p, params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return run(SHORT if short else PARAMS)


def same(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


@EVERY
def test_a_change_of_storage_equals_a_conversion_through_optax(storage: str) -> None:
    coded = NARROW[storage]
    for old, new in ((PLAIN, coded), (coded, PLAIN), (coded, adam_fn.adamw(1e-3, mu_dtype="bfloat16"))):
        params, state = after(old)
        blank: Any = optax.adamw(1e-3).init(params)
        found: Any = change_storage(old, new, params, state)
        expected: Any = from_optax(new, params, to_optax(old, params, state, blank))
        same(found, expected)
        assert count_of(found) == 3
        assert np.any(np.asarray(jax.tree.leaves(slots_of(found))[0]) != 0)


@pytest.mark.quick
@EVERY
def test_a_change_of_storage_there_and_back_keeps_the_codes(storage: str) -> None:
    """Decoded numbers get their codes back; a float32 number becomes one of the two codes around it."""
    coded = NARROW[storage]
    params, state = after(coded)
    wide: Any = change_storage(coded, PLAIN, params, state)
    same(coded.update.decoded(state, params), slots_of(wide))
    for again in (change_storage(PLAIN, coded, params, wide), change_storage(coded, coded, params, state)):
        for x, y in zip(*map(jax.tree.leaves, (again, state)), strict=True):
            assert np.mean(np.asarray(x != y)) < 1e-3
    _, exact = after(PLAIN)
    same(change_storage(PLAIN, PLAIN, params, exact), exact)
    found: Any = change_storage(coded, PLAIN, params, change_storage(PLAIN, coded, params, exact))
    # The width of a code; for m, plus half that of v, in whose root it is measured.
    for slot, widest in (("mu", {"24bit": 1 / 18 + 2**-8, "16bit": 2 / 21 + 1 / 8}), ("nu", {"16bit": 1 / 4})):
        for leaf in ("w", "b"):
            x, y = (np.asarray(slots_of(each)[slot][leaf]) for each in (found, exact))
            # Near 0 the narrow codes of m are evenly spaced, by a share of √v.
            least = (
                0 if slot == "nu" or storage == "bfloat16" else 0.02 * np.sqrt(np.asarray(slots_of(exact)["nu"][leaf]))
            )
            error, most = np.abs(x - y), widest.get(storage, 2**-7) * np.abs(y) + least
            assert (error <= most).all() and error.max() > 0


@EVERY
def test_a_state_without_a_counterpart_in_optax_changes_its_storage(storage: Any) -> None:
    """The rule is only in this package, and the kept weights of the scheduled β are not those of the new β."""
    kinds: Any = ((falling, None), (jnp.float32(0.9), storage))
    old, new = (adam_fn.laprop(1e-3, b1=b1, storage=kind) for b1, kind in kinds)
    params, state = after(old)
    found: Any = change_storage(old, new, params, state)
    same(found[-1], state[-1])
    np.testing.assert_allclose(kept_weights(found)[0].sum(), 1 - np.prod([float(falling(i)) for i in range(3)]), 1e-6)
    assert count_of(found) == 3
    updates, _ = new.update(PARAMS, found, params)
    expected, _ = old.update(PARAMS, state, params)
    chex.assert_trees_all_close(updates, expected, atol=3e-4)


def test_masters_keep_their_remainders() -> None:
    old, new = adam_fn.master_weights(PLAIN), adam_fn.master_weights(CODED)
    params, state = after(old, short=True)
    found: Any = change_storage(old, new, params, state)
    same(found.remainder, state.remainder)
    assert np.any(np.asarray(found.remainder["w"]) != 0)
    masters = {name: p.astype(jnp.float32) if p.dtype == jnp.bfloat16 else p for name, p in params.items()}
    same(found.inner, change_storage(PLAIN, CODED, masters, state.inner))

    # New masters begin at the parameters.
    params, state = after(PLAIN, short=True)
    blank: Any = new.init(params)
    expected = blank._replace(inner=change_storage(PLAIN, CODED, params, state))
    same(change_storage(PLAIN, new, params, state), expected)


def test_errors_of_change_storage_name_what_is_wrong() -> None:
    params, state = after(PLAIN)
    frozen, masters = adam_fn.adamw(1e-3, frozen=adam_fn.masks.path("b")), adam_fn.master_weights(PLAIN)
    assert jax.tree.structure(change_storage(PLAIN, frozen, params, state)) == jax.tree.structure(frozen.init(params))
    form = r"form of tx.init\(params\), \(ScaleByAdamState, EmptyState, EmptyState\): a tuple"
    kind = r"\[0\]: MomentsState\S* expected, got a ScaleByAdamState.*change_storage converts"
    bits = "the state's masters have 16 bits .*, but those of tx have {}: pass"
    errors: Any = (
        (PLAIN, adam_fn.amsgrad(1e-3), state, "expected the same optimizer with two storages, got Adam, AMSGrad"),
        (PLAIN, optax.adamw(1e-3), state, "expected an optimizer of adam_fn"),
        (PLAIN, CODED, optax.EmptyState(), form),
        (CODED, PLAIN, state, kind),
        (frozen, CODED, frozen.init(params), "b: no mu, nu"),
        (masters, adam_fn.master_weights(CODED, bits=8), masters.init(SHORT), bits.format(8)),
        (masters, CODED, masters.init(SHORT), bits.format(0)),
    )
    for old, new, given, message in errors:
        with pytest.raises((TypeError, ValueError), match=message):
            change_storage(old, new, SHORT if old is masters else params, given)
