"""Complex leaves with one second moment of |g|² for both parts, as in optax and as NetKet's drivers expect."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import adam_fn

STEPS = 30


def _problem() -> tuple[Any, Any]:
    """Parameters, and gradients for all steps; one real leaf looks like the two parts of a complex one."""
    rng = np.random.default_rng(0)
    shapes = {"wave": (3, 4), "pair": (2, 3), "scale": ()}

    def draw(name: str, *more: int) -> Any:
        parts = rng.normal(size=(2, *more, *shapes[name]))
        return parts[0] if name == "pair" else parts[0] + 1j * parts[1]

    params = {name: draw(name) for name in shapes}
    # The imaginary parts are steady and 100 times the real ones: with moments of their own both would move alike.
    grads = {name: draw(name, STEPS) for name in shapes}
    return params, grads | {"wave": grads["wave"] * 0.01 + 1j}


def _run(tx: Any, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
    """The parameters and the state after all steps."""

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda g: jnp.asarray(g)[i], grads), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda *carry: jax.lax.fori_loop(0, STEPS, step, carry))(
        params, tx.init(params) if state is None else state
    )


# `optax.contrib.adopt` fails on complex leaves; `optax.amsgrad` takes another maximum.
SAME: dict[str, tuple[Any, Any]] = {
    "adam": (adam_fn.adam, optax.adam),
    "adamw": (adam_fn.adamw, optax.adamw),
    "nadam": (adam_fn.nadam, optax.nadam),
    "radam": (adam_fn.radam, optax.radam),
    "yogi": (adam_fn.yogi, optax.yogi),
    "adabelief": (adam_fn.adabelief, optax.adabelief),
    "lamb": (adam_fn.lamb, optax.lamb),
    "ademamix": (adam_fn.ademamix, optax.contrib.ademamix),
}


@pytest.mark.parametrize("name", SAME)
def test_magnitudes_as_in_optax(name: str) -> None:
    ours, theirs = SAME[name]
    with jax.enable_x64(True):
        params, grads = _problem()
        expected, _ = _run(theirs(1e-2), params, grads)
        found, _ = _run(ours(1e-2, complex="magnitude"), params, grads)
        # optax rectifies RAdam in float32, and its moments of Yogi begin at 1e-6 + 0i.
        chex.assert_trees_all_close(found, expected, rtol=2e-5 if name in ("radam", "yogi") else 1e-9)
        if name == "adam":
            parts, _ = _run(ours(1e-2), params, grads)
            assert np.abs(parts["wave"] - expected["wave"]).max() > 1e-3  # The option is what makes them agree.
            chex.assert_trees_all_equal(parts["pair"], found["pair"])


def test_a_complex_run_of_optax_goes_on_and_back() -> None:
    with jax.enable_x64(True):
        params, grads = _problem()
        tx, theirs = adam_fn.adam(1e-2, complex="magnitude"), optax.adam(1e-2)
        half, state = _run(theirs, params, grads)
        expected, last = _run(theirs, half, grads, state)
        found, ours = _run(tx, half, grads, adam_fn.interop.from_optax(tx, half, state))
        chex.assert_trees_all_close(found, expected, rtol=1e-7)
        chex.assert_trees_all_close(adam_fn.interop.to_optax(tx, found, ours, state), last, rtol=1e-7)
        with pytest.raises(ValueError, match=r'(?s)complex="magnitude".*scale'):
            adam_fn.interop.from_optax(adam_fn.adam(1e-2), half, state)


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 0.02), ("24bit", 0.04), ("16bit", 0.15)])
def test_magnitudes_in_codes(storage: Any, tolerance: float) -> None:
    params, grads = jax.tree.map(lambda x: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32), _problem())
    ends = [_run(adam_fn.adam(1e-2, complex="magnitude", storage=kind), params, grads)[0] for kind in (storage, None)]
    for name, start in params.items():
        moved, expected = (np.abs(end[name] - start) for end in ends)
        assert np.abs(moved - expected).max() < tolerance * expected.max(), name


def test_what_has_no_square_has_no_magnitude() -> None:
    with pytest.raises(ValueError, match="Lion"):
        adam_fn.lion(1e-3, complex="magnitude")
    with pytest.raises(ValueError, match=r"complex must be one of \['parts', 'magnitude'\], got 'abs'"):
        adam_fn.adam(1e-3, complex="abs")  # pyright: ignore[reportArgumentType]
