"""Mistakes of a first hour: each error says what to do, and following it works."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import adam_fn
from adam_fn import diagnostics, interop, masks, surgery
from adam_fn.checkpoint import check, describe

pytestmark = pytest.mark.quick

P: Any = {"embed": {"table": jnp.ones((3, 2))}, "layers": [{"bias": jnp.ones(2)}]}
SHORT = jax.tree.map(lambda p: p.astype(jnp.bfloat16), P)
GRADS = jax.tree.map(jnp.cos, P)
ADAMW: Any = adam_fn.adamw(1e-3)
MASKED: Any = adam_fn.adamw(1e-3, mask=masks.rank(2))
FROZEN: Any = adam_fn.adamw(1e-3, frozen=masks.path("embed/*"))


def saved(tx: optax.GradientTransformation) -> Any:
    return json.loads(json.dumps(describe(tx, P)))


def lines_of(error: pytest.ExceptionInfo[ValueError]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_change_of_parts_without_leaves_is_found(tmp_path: Path) -> None:
    """Orbax compares these parts as well; the conversion that the error names makes the state that it restores."""
    with pytest.raises(ValueError, match="does not belong") as error:
        check(saved(ADAMW), MASKED, P)
    assert lines_of(error) == [
        "state/1: EmptyState(), expected MaskedState(inner_state=EmptyState())",
        "adam_fn.interop.change_storage converts a state to another mask",
    ]
    with pytest.raises(ValueError, match=re.escape("state/1: MaskedState(inner_state=EmptyState()), expected Empty")):
        check(saved(MASKED), ADAMW, P)
    check(saved(MASKED), MASKED, P)
    converted = interop.change_storage(ADAMW, MASKED, P, ADAMW.init(P))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", ADAMW.init(P))
        checkpointer.save(tmp_path / "masked", converted)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="tree structures do not match"):
            checkpointer.restore(tmp_path / "plain", MASKED.init(P))
        checkpointer.restore(tmp_path / "masked", MASKED.init(P))


def test_a_checkpoint_of_optax_is_checked_by_its_leaves() -> None:
    theirs = optax.adamw(1e-3)
    check(saved(theirs), ADAMW, P)
    check(saved(ADAMW), theirs, P)
    with pytest.raises(ValueError, match="does not belong") as error:
        check(saved(theirs), adam_fn.lion(1e-3, storage="bfloat16"), P)
    expected = [f"state/0/mu/{path}" for path in ("embed/table", "layers/0/bias")]
    assert [line.partition(":")[0] for line in lines_of(error)[:2]] == expected
    assert lines_of(error)[-1] == "adam_fn.interop.from_optax converts a state of optax, and to_optax converts back"


@pytest.mark.parametrize("description", [{}, None])
def test_a_checkpoint_without_description(description: Any) -> None:
    with pytest.raises(ValueError, match=r"no description: save describe\(tx, params\) as custom_metadata, or pass"):
        check(description, ADAMW, P)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: check(ADAMW, saved(ADAMW), P), "check"),
        (lambda: describe(P, ADAMW), "describe"),
        (lambda: diagnostics.summary(ADAMW.init(P), ADAMW, P), "summary"),
        (lambda: diagnostics.learning_rate(tx=P, state=ADAMW.init(P), params=P), "learning_rate"),
    ],
)
def test_what_is_no_transformation_is_named(function: Callable[[], object], name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"{name} takes a transformation, such as adam_fn.adamw\(1e-3\), got "
    ) as error:
        function()
    assert len(str(error.value)) < 200


def test_an_optimizer_of_flax_is_no_transformation() -> None:
    optimizer: Any = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ADAMW, wrt=nnx.Param)
    for function in (adam_fn.make_step, lambda tx: diagnostics.summary(tx, {}, {})):
        with pytest.raises(TypeError, match=r"takes a transformation, .* got Optimizer: pass its tx"):
            function(optimizer)


def test_variables_of_flax_are_named() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer: Any = nnx.Optimizer(model, ADAMW, wrt=nnx.Param)
    state, params = optimizer.opt_state, nnx.state(model, nnx.Param)
    plain = nnx.as_pure(state), nnx.as_pure(params)
    for mixed in ((state, params), (plain[0], params), (state, plain[1])):
        with pytest.raises(ValueError, match=r"pass nnx\.as_pure\(…\) of trees with variables of NNX"):
            diagnostics.learning_rate(ADAMW, *mixed)
    assert diagnostics.learning_rate(ADAMW, *plain) == np.float32(1e-3)


def test_diagnostics_of_another_state() -> None:
    chain = optax.chain(optax.clip(1.0), ADAMW)
    for state in (ADAMW.init(P), P, None):
        with pytest.raises(
            ValueError, match=r"not have the structure of tx\.init\(params\): was it made by this trans"
        ):
            diagnostics.summary(chain, state, P)


@pytest.mark.parametrize("bits", [16, 8])
def test_frozen_leaves_have_no_remainders(bits: int) -> None:
    """Nor bytes; conversions drop and add them, and errors name these conversions."""
    trains, freezes = (adam_fn.master_weights(tx, bits) for tx in (ADAMW, FROZEN))
    state: Any = freezes.init(SHORT)
    assert state.remainder["embed"]["table"] == optax.MaskedNode()
    assert adam_fn.state_bytes(freezes, SHORT) == 4 + 2 * (8 + bits // 8)  # A count, and two elements.
    check(describe(freezes, SHORT), freezes, SHORT)
    params, state = adam_fn.make_step(freezes)(jax.tree.map(jnp.copy, SHORT), state, GRADS)
    np.testing.assert_array_equal(params["embed"]["table"], SHORT["embed"]["table"])

    with pytest.raises(ValueError, match=r"no remainder of embed/table, .*surgery\.adapt\(tx, state, params, params\)"):
        trains.update(GRADS, state, params)
    thawed: Any = surgery.adapt(trains, state, params, params)
    assert not thawed.remainder["embed"]["table"].any()
    np.testing.assert_array_equal(thawed.remainder["layers"][0]["bias"], state.remainder["layers"][0]["bias"])
    _, thawed = trains.update(GRADS, thawed, params)

    with pytest.raises(ValueError, match=r"moments of embed/table, .*interop\.change_storage drops them"):
        freezes.update(GRADS, thawed, params)
    frozen: Any = interop.change_storage(trains, freezes, params, thawed)
    assert frozen.remainder["embed"]["table"] == optax.MaskedNode()
    np.testing.assert_array_equal(frozen.remainder["layers"][0]["bias"], thawed.remainder["layers"][0]["bias"])
    freezes.update(GRADS, frozen, params)


def test_frozen_leaves_have_no_remainders_on_a_mesh() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    params = jax.device_put(SHORT, jax.NamedSharding(mesh, jax.P()))
    tx = adam_fn.zero1(adam_fn.master_weights(FROZEN), params, mesh, "data")
    state: Any = jax.jit(tx.init)(params)
    assert state.remainder["embed"]["table"] == optax.MaskedNode()
    assert state.remainder["layers"][0]["bias"].sharding.spec == jax.P("data")
    adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), state, GRADS)


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
def test_a_wrapper_takes_the_state_of_what_is_inside(wrapper: Callable[[Any], Any]) -> None:
    tx = wrapper(ADAMW)
    with pytest.raises(TypeError, match=r"own state.*got a tuple: .*tx\.init\(params\)\._replace\(inner=state\)"):
        tx.update(GRADS, OPTAX, P)
    if wrapper is not adam_fn.master_weights:
        with pytest.raises(TypeError, match=r"got S\w+\(tx=.*tx\.init\(params\)\._replace\(inner=state\)") as error:
            interop.from_optax(tx, P, OPTAX)
        assert len(str(error.value)) < 600
    tx.update(GRADS, tx.init(P)._replace(inner=interop.from_optax(ADAMW, P, OPTAX)), P)


def test_leaves_that_were_frozen() -> None:
    """`adapt` begins what the state lacks and keeps the rest; everything else says so."""
    _, state = FROZEN.update(GRADS, FROZEN.init(P), P)
    for function in (
        lambda: ADAMW.update(GRADS, state, P),
        lambda: surgery.reset(ADAMW, state, P, "embed/*"),
        lambda: surgery.resize(ADAMW, state, P, P, {"embed/*": surgery.Rows([0, 1, 1])}),
    ):
        with pytest.raises(
            ValueError, match=r"of embed/table, which is trained: was it frozen .* adapt|surgery\.adapt"
        ):
            function()
    adapted = surgery.adapt(ADAMW, state, P, P)
    assert not adapted[0].mu["embed"]["table"].any()
    np.testing.assert_array_equal(adapted[0].mu["layers"][0]["bias"], state[0].mu["layers"][0]["bias"])
    _, after = ADAMW.update(GRADS, adapted, P)
    assert after[0].count == 2


@pytest.mark.parametrize("option", ["frozen", "mask"])
def test_a_list_of_patterns_is_no_mask(option: str) -> None:
    with pytest.raises(TypeError, match=rf"{option}: a list of patterns .* adam_fn\.masks\.path\('embed/\*'\)"):
        adam_fn.adamw(1e-3, **{option: ["embed/*"]})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pattern", ["layers/0", "layers.0", "layers.0.*"])
def test_a_pattern_that_was_meant_otherwise(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"matches no parameter; .*; did you mean 'layers/0/\*'\?"):
        masks.path(pattern)(P)
    with pytest.raises(ValueError, match=r"layers/0/bias$"):
        masks.path("nothing")(P)
