"""Complex leaves with one second moment of |g|² for both parts, as in optax and as NetKet's drivers expect."""

from typing import Any

import chex
import jax
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.runs import scanned

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


# `optax.contrib.adopt` fails on complex leaves; `optax.amsgrad` takes another maximum.
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "yogi", "adabelief", "lamb", "ademamix"])
def test_steps_with_magnitudes_equal_those_of_optax(name: str) -> None:
    ours, theirs = getattr(adam_fn, name), getattr(optax, name, None) or getattr(optax.contrib, name)
    with jax.enable_x64(True):
        problem = _problem()
        (expected, _), _ = scanned(theirs(1e-2), *problem)
        (found, _), _ = scanned(ours(1e-2, complex="magnitude"), *problem)
        # optax rectifies RAdam in float32, and its moments of Yogi begin at 1e-6 + 0i.
        chex.assert_trees_all_close(found, expected, rtol=2e-5 if name in ("radam", "yogi") else 1e-9)
        if name == "adam":
            (parts, _), _ = scanned(ours(1e-2), *problem)
            assert np.abs(parts["wave"] - expected["wave"]).max() > 1e-3  # The option is what makes them agree.
            chex.assert_trees_all_equal(parts["pair"], found["pair"])


def test_a_complex_state_of_optax_is_converted_there_and_back() -> None:
    with jax.enable_x64(True):
        params, grads = _problem()
        tx, theirs = adam_fn.adam(1e-2, complex="magnitude"), optax.adam(1e-2)
        (half, state), _ = scanned(theirs, params, grads)
        (expected, last), _ = scanned(theirs, half, grads, state)
        (found, ours), _ = scanned(tx, half, grads, adam_fn.interop.from_optax(tx, half, state))
        chex.assert_trees_all_close(found, expected, rtol=1e-7)
        chex.assert_trees_all_close(adam_fn.interop.to_optax(tx, found, ours, state), last, rtol=1e-7)
        with pytest.raises(ValueError, match=r'(?s)complex="magnitude".*scale'):
            adam_fn.interop.from_optax(adam_fn.adam(1e-2), half, state)


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 0.02), ("24bit", 0.04), ("16bit", 0.15)])
def test_magnitudes_are_stored_in_codes(storage: Any, tolerance: float) -> None:
    params, grads = jax.tree.map(lambda x: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32), _problem())
    txs = [adam_fn.adam(1e-2, complex="magnitude", storage=kind) for kind in (storage, None)]
    ends = [scanned(tx, params, grads)[0][0] for tx in txs]
    for name, start in params.items():
        moved, expected = (np.abs(end[name] - start) for end in ends)
        assert np.abs(moved - expected).max() < tolerance * expected.max(), name


def test_a_rule_that_squares_nothing_has_no_magnitude() -> None:
    with pytest.raises(ValueError, match="Lion"):
        adam_fn.lion(1e-3, complex="magnitude")
    with pytest.raises(ValueError, match=r"complex must be one of \['parts', 'magnitude'\], got 'abs'"):
        adam_fn.adam(1e-3, complex="abs")  # pyright: ignore[reportArgumentType]
