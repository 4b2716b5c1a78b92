"""A state goes on in another storage."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_fn
from adam_fn import Block
from adam_fn.interop import change_storage, from_optax, to_optax

PARAMS = {"w": jax.random.normal(jax.random.key(0), (64, 128)), "b": jnp.ones(3), "n": jnp.arange(2)}
SHORT = {name: p.astype(jnp.bfloat16) if p.dtype == jnp.float32 else p for name, p in PARAMS.items()}
PLAIN, CODED = adam_fn.adamw(1e-3), adam_fn.adamw(1e-3, storage=Block(8))


def falling(count: Any) -> Any:
    return 0.9 - 0.1 * jnp.exp(-count / 3.0)


def after(tx: Any, params: Any, steps: int = 3) -> Any:
    """Parameters and state after some steps."""

    @jax.jit
    def run(params: Any) -> Any:
        state = tx.init(params)
        for i in range(steps):
            grads = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 2)) if p.dtype != jnp.int32 else 0 * p, params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return run(params)


def same(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_it_is_the_way_through_optax() -> None:
    for old, new in ((PLAIN, CODED), (CODED, PLAIN), (CODED, adam_fn.adamw(1e-3, mu_dtype="bfloat16"))):
        params, state = after(old, PARAMS)
        blank: Any = optax.adamw(1e-3).init(params)
        found: Any = change_storage(old, new, params, state)
        expected: Any = from_optax(new, params, to_optax(old, params, state, blank))
        same(found._replace(weights=()), expected._replace(weights=()))
        same(found.weights, state.weights)
        assert np.any(np.asarray(jax.tree.leaves(found.slots)[0]) != 0)
    same(change_storage(PLAIN, PLAIN, params, after(PLAIN, PARAMS)[1]), after(PLAIN, PARAMS)[1])


def test_what_has_no_counterpart_elsewhere() -> None:
    """A rule that only this package has, and weights of a scheduled β that the new schedule would not have come to."""
    old, new = (adam_fn.laprop(1e-3, b1=b1, storage=storage) for b1, storage in ((falling, None), (0.9, Block(4))))
    params, state = after(old, PARAMS)
    found: Any = change_storage(old, new, params, state)
    same(found.weights, state.weights)
    assert found.count == 3
    updates, _ = new.update(PARAMS, found, params)
    expected, _ = old.update(PARAMS, state, params)
    chex.assert_trees_all_close(updates, expected, atol=3e-4)


def test_masters_keep_their_remainders() -> None:
    old, new = adam_fn.master_weights(PLAIN), adam_fn.master_weights(CODED)
    params, state = after(old, SHORT)
    found: Any = change_storage(old, new, params, state)
    same(found.remainder, state.remainder)
    assert np.any(np.asarray(found.remainder["w"]) != 0)
    masters = {name: p.astype(jnp.float32) if p.dtype == jnp.bfloat16 else p for name, p in params.items()}
    same(found.inner, change_storage(PLAIN, CODED, masters, state.inner))

    # Where there were none they begin at the parameters.
    params, state = after(PLAIN, SHORT)
    found = change_storage(PLAIN, new, params, state)
    blank: Any = new.init(params)
    plain: Any = change_storage(PLAIN, CODED, params, state)
    same(found.remainder, blank.remainder)
    same(found.inner.slots, plain.slots)


def test_errors() -> None:
    params, state = after(PLAIN, PARAMS)
    wrong: Any = optax.EmptyState()
    with pytest.raises(TypeError, match="expected the same optimizer with two storages, got Adam, AMSGrad"):
        change_storage(PLAIN, adam_fn.amsgrad(1e-3), params, state)
    with pytest.raises(TypeError, match="expected an optimizer of adam_fn"):
        change_storage(PLAIN, optax.adamw(1e-3), params, state)
    with pytest.raises(TypeError, match=r"expected an adam_fn.State with the slots"):
        change_storage(PLAIN, CODED, params, wrong)
    frozen = adam_fn.adamw(1e-3, frozen=adam_fn.masks.path("b"))
    blank: Any = frozen.init(params)
    with pytest.raises(ValueError, match="b: no mu, nu"):
        change_storage(frozen, CODED, params, blank)
    assert isinstance(change_storage(PLAIN, frozen, params, state), adam_fn.State)
    sixteen = adam_fn.master_weights(PLAIN)
    masters: Any = sixteen.init(SHORT)
    for tx, bits in ((adam_fn.master_weights(CODED, bits=8), 8), (CODED, 0)):
        with pytest.raises(ValueError, match=f"the state's masters have 16 bits .*, but those of tx have {bits}: pass"):
            change_storage(sixteen, tx, SHORT, masters)


def test_a_state_of_another_storage_is_an_error_that_says_so() -> None:
    for old, new in ((PLAIN, CODED), (CODED, PLAIN)):
        with pytest.raises(ValueError, match=r"was made with a different storage; adam_fn.interop.change_storage"):
            new.update(PARAMS, old.init(PARAMS), PARAMS)
    # Parameters that are called like the parts of a code are no codes.
    named = {"codes": jnp.ones(2), "scales": jnp.ones(3)}
    PLAIN.update(named, PLAIN.init(named), named)
