"""Mistakes of the first hour: each error says what to do, and following it works."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adam_fn
from adam_fn import diagnostics, interop, masks, surgery
from adam_fn.checkpoint import check, describe

pytestmark = pytest.mark.quick

P: Any = {"embed": {"table": jnp.ones((3, 2))}, "layers": [{"bias": jnp.ones(2)}]}
SHORT = jax.tree.map(lambda p: p.astype(jnp.bfloat16), P)
GRADS = jax.tree.map(jnp.cos, P)
adamw: Any = functools.partial(adam_fn.adamw, 1e-3)
ADAMW: Any = adamw()
MASKED: Any = adamw(mask=masks.rank(2))
FROZEN: Any = adamw(frozen=masks.path("embed/*"))


@functools.cache
def of_flax() -> tuple[Any, Any]:
    """An optimizer of Flax and the parameters of its model."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return nnx.Optimizer(model, ADAMW, wrt=nnx.Param), nnx.state(model, nnx.Param)


def rate_of_flax(*, pure_state: bool, pure_params: bool) -> jax.Array:
    optimizer, params = of_flax()
    state = nnx.as_pure(optimizer.opt_state) if pure_state else optimizer.opt_state
    return diagnostics.learning_rate(ADAMW, state, nnx.as_pure(params) if pure_params else params)


def no_transformation(name: str) -> str:
    return rf"{name} takes a transformation, such as adam_fn.adamw\(1e-3\), got "


NO_DESCRIPTION = r"no description: save describe\(tx, params\) as custom_metadata, or pass"
VARIABLES = r"pass nnx\.as_pure\(…\) of trees with variables of NNX"
OTHER_STATE = r"not have the structure of tx\.init\(params\): was it made by this trans"
PATTERNS = r"a list of patterns .* adam_fn\.masks\.path\('embed/\*'\)"
MEANT = r"matches no parameter; .*; did you mean 'layers/0/\*'\?"
ABOUT: Any = describe(ADAMW, P)
CHAIN = optax.chain(optax.clip(1.0), ADAMW)
#: Each message with the calls that raise it.
ERRORS: dict[str, tuple[Callable[[], object], ...]] = {
    NO_DESCRIPTION: (lambda: check({}, ADAMW, P), lambda: check(None, ADAMW, P)),
    no_transformation("check"): (lambda: check(ADAMW, ABOUT, P),),
    no_transformation("describe"): (lambda: describe(P, ADAMW),),
    no_transformation("summary"): (lambda: diagnostics.summary(ADAMW.init(P), ADAMW, P),),
    no_transformation("learning_rate"): (lambda: diagnostics.learning_rate(tx=P, state=ADAMW.init(P), params=P),),
    "takes a transformation, .* got Optimizer: pass its tx": (
        lambda: adam_fn.make_step(of_flax()[0]),
        lambda: diagnostics.summary(of_flax()[0], {}, {}),
    ),
    VARIABLES: (
        lambda: rate_of_flax(pure_state=False, pure_params=False),
        lambda: rate_of_flax(pure_state=True, pure_params=False),
        lambda: rate_of_flax(pure_state=False, pure_params=True),
    ),
    OTHER_STATE: tuple(lambda x=x: diagnostics.summary(CHAIN, x, P) for x in (ADAMW.init(P), P, None)),
    f"frozen: {PATTERNS}": (lambda: adamw(frozen=["embed/*"]),),
    f"mask: {PATTERNS}": (lambda: adamw(mask=["embed/*"]),),
    MEANT: tuple(lambda x=x: masks.path(x)(P) for x in ("layers/0", "layers.0", "layers.0.*")),
    r"matches no parameter; .*layers/0/bias$": (lambda: masks.path("nothing")(P),),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_to_do(message: str) -> None:
    for call in ERRORS[message]:
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call()
        assert len(str(error.value)) < 400


def test_the_rate_is_read_from_pure_trees_of_flax() -> None:
    assert rate_of_flax(pure_state=True, pure_params=True) == np.float32(1e-3)


def test_a_state_is_converted_to_another_mask() -> None:
    found = interop.change_storage(ADAMW, MASKED, P, ADAMW.init(P))
    assert jax.tree.structure(found) == jax.tree.structure(MASKED.init(P))


def held(state: Any) -> list[Any]:
    """The trees of the parameters' structure that a state of Adam holds, with masters or without."""
    masters = hasattr(state, "remainder")
    moments = (state.inner if masters else state)[0]
    return [moments.mu, moments.nu, *([state.remainder] if masters else [])]


@pytest.mark.parametrize(
    ("wrap", "bytes_each"),
    [
        (lambda tx: tx, 8),
        (adam_fn.master_weights, 10),
        (functools.partial(adam_fn.master_weights, bits=8), 9),
    ],
    ids=["plain", "masters", "masters of 24 bits"],
)
def test_leaves_are_frozen_and_trained_again(wrap: Callable[[Any], Any], bytes_each: int) -> None:
    """Frozen leaves have no moments; conversions drop and begin these moments, and errors name the conversions."""
    trains, freezes = wrap(ADAMW), wrap(FROZEN)
    start = P if bytes_each == 8 else SHORT
    state: Any = freezes.init(start)
    assert adam_fn.state_bytes(freezes, start) == 4 + 2 * bytes_each  # A count, and two elements.
    check(describe(freezes, start), freezes, start)
    params, state = adam_fn.make_step(freezes)(jax.tree.map(jnp.copy, start), state, GRADS)
    np.testing.assert_array_equal(params["embed"]["table"], start["embed"]["table"])

    for function in (
        lambda: trains.update(GRADS, state, params),
        lambda: surgery.reset(trains, state, params, "embed/*"),
        lambda: surgery.resize(trains, state, params, params, {"embed/*": surgery.Rows([0, 1, 1])}),
    ):
        with pytest.raises(ValueError, match=r" of embed/table, .*surgery\.adapt\(tx, state, params, params\)"):
            function()
    thawed: Any = surgery.adapt(trains, state, params, params)
    assert not any(x["embed"]["table"].any() for x in held(thawed))
    for old, new in zip(held(state), held(thawed), strict=True):
        np.testing.assert_array_equal(new["layers"][0]["bias"], old["layers"][0]["bias"])
    _, thawed = trains.update(GRADS, thawed, params)

    with pytest.raises(ValueError, match=r"moments of embed/table, .*interop\.change_storage drops them"):
        freezes.update(GRADS, thawed, params)
    frozen: Any = interop.change_storage(trains, freezes, params, thawed)
    assert {x["embed"]["table"] for x in held(frozen)} == {optax.MaskedNode()}
    for old, new in zip(held(thawed), held(frozen), strict=True):
        np.testing.assert_array_equal(new["layers"][0]["bias"], old["layers"][0]["bias"])
    freezes.update(GRADS, frozen, params)


OPTAX: Any = optax.adamw(1e-3).init(P)


@pytest.mark.parametrize(
    ("tx", "state", "params", "message"),
    [
        (adam_fn.adamw(optax.constant_schedule(1e-3)), OPTAX, P, r"ScheduleState expected, got an Empty.*from_optax"),
        (MASKED, OPTAX, P, r"MaskedState expected, got an EmptyState; .*interop\.from_optax converts a state of optax"),
        (FROZEN, OPTAX, P, r"moments of embed/table.* or from_optax those of a state of optax"),
        (ADAMW, optax.adamw(1e-3).init(SHORT), SHORT, r"is bfloat16\[3, 2\].*from_optax converts a state of optax"),
    ],
    ids=["schedule", "mask", "frozen", "bfloat16"],
)
def test_a_state_of_optax_that_does_not_fit_is_converted(tx: Any, state: Any, params: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tx.update(GRADS, state, params)
    tx.update(GRADS, interop.from_optax(tx, params, state), params)


@pytest.mark.parametrize("wrapper", [adam_fn.skip_nonfinite, adam_fn.stochastic_rounding, adam_fn.master_weights])
def test_a_wrapper_says_how_to_use_the_state_of_the_optimizer_inside(wrapper: Callable[[Any], Any]) -> None:
    tx = wrapper(ADAMW)
    with pytest.raises(TypeError, match=r"own state.*got a tuple: .*tx\.init\(params\)\._replace\(inner=state\)"):
        tx.update(GRADS, OPTAX, P)
    if wrapper is not adam_fn.master_weights:
        with pytest.raises(TypeError, match=r"got S\w+\(tx=.*tx\.init\(params\)\._replace\(inner=state\)") as error:
            interop.from_optax(tx, P, OPTAX)
        assert len(str(error.value)) < 600
    tx.update(GRADS, tx.init(P)._replace(inner=interop.from_optax(ADAMW, P, OPTAX)), P)
