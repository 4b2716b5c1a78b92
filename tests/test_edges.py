"""Edge cases that users of other libraries meet: names, kinds of leaves and numbers, and JAX's settings."""

import dataclasses
import functools
import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS
from flax import nnx
from flax.core import freeze

import adam_fn
from adam_fn import Cast, Group, checkpoint, diagnostics, interop, masks
from adam_fn.trees.leaves import Leaves, by_path

ADAMW = adam_fn.adamw(1e-3)
FAMILY: dict[str, Any] = {
    **{case.name: case.make() for case in MEMBERS},
    "adamw": ADAMW,
    "lamb": adam_fn.lamb(1e-3),
    "swats": adam_fn.swats(1e-3),
    "masters": adam_fn.master_weights(ADAMW),
    "rounding": adam_fn.stochastic_rounding(ADAMW),
    "guard": adam_fn.skip_nonfinite(ADAMW),
    "cautious": adam_fn.cautious(ADAMW),
    "clip": optax.chain(adam_fn.clip_by_global_norm(1.0), ADAMW),
    "average": optax.chain(ADAMW, adam_fn.average_params(0.9)),
    "stored": optax.chain(adam_fn.stored(optax.trace(0.9)), optax.scale(-1e-3)),
    "16bit": adam_fn.adamw(1e-3, storage="16bit"),
    "24bit": adam_fn.adamw(1e-3, storage="24bit"),
    "schedules": adam_fn.adam(lambda count: 1e-3, b1=lambda count: 0.9),
    "nadam's schedule": adam_fn.nadam(1e-3, momentum_decay=0.004),
    "radam's least threshold": adam_fn.radam(1e-3, threshold=4.0),
    "groups": adam_fn.adamw(1e-3, groups={"w": Group(rate=0.5)}),
    **{kind: adam_fn.adamw(1e-3, decay=kind) for kind in ("l2", "proximal", "independent")},
}


def first_updates(txs: Sequence[Any], params: Any, grads: Any = None) -> list[Any]:
    """The first update of each, in one program; the gradients are the parameters if none are given."""
    grads = params if grads is None else grads
    return jax.jit(lambda p, g: [tx.update(g, tx.init(p), p)[0] for tx in txs])(params, grads)


def step(tx: Any, params: Any) -> tuple[Any, Any]:
    """The first update, and the parameters after a second step, made in place."""
    grads = jax.tree.map(lambda x: x * jnp.asarray(0.5, x.dtype), params)
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, adam_fn.make_step(tx)(params, state, grads)[0]


# Names of leaves.


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    key: jax.Array
    value: jax.Array


class Module(eqx.Module):
    key: jax.Array
    value: jax.Array


def test_a_field_called_value_keeps_its_name_and_a_box_has_none() -> None:
    x, linear = jnp.ones(3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for tree, names in (
        ({"attn": Attention(x, x, x)}, ["attn/query", "attn/key", "attn/value"]),
        ({"attn": Pair(x, x)}, ["attn/key", "attn/value"]),
        ({"attn": Module(x, x)}, ["attn/key", "attn/value"]),
        (Pair(x, x), ["key", "value"]),
        ({"k": nn.Partitioned(x, names=("a",))}, ["k"]),
        ({"k": nn.LogicallyPartitioned({"a": x}, names=("a",))}, ["k/a"]),
        (nnx.state(linear), ["bias", "kernel"]),
        (linear, ["bias", "kernel"]),
    ):
        assert Leaves(tree).names == [*by_path(tree)] == names
        for path in names:
            assert jax.tree.leaves(masks.path(path)(tree)) == [name == path for name in names]


def test_two_leaves_with_the_same_path_are_not_merged() -> None:
    params = {"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(3)}
    old, new = adam_fn.adam(1e-3), adam_fn.adam(1e-3, storage=Cast("bfloat16"))
    state: Any = old.init(params)
    peer = optax.adam(1e-3).init(params)
    for call in (
        lambda: interop.change_storage(old, new, params, state),
        lambda: interop.from_optax(old, params, peer),
        lambda: interop.to_optax(old, params, state, peer),
        lambda: checkpoint.describe(old, params),
        lambda: diagnostics.summary(old, state, params, per_leaf=True),
        lambda: adam_fn.surgery.adapt(old, state, params, params),
    ):
        with pytest.raises(ValueError, match="two leaves have the same path, a/b"):
            call()
    updates, _ = old.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# Kinds of leaves.


def test_an_integer_leaf_with_a_gradient_stays_as_it_is() -> None:
    params = {"w": np.ones(3, np.float32), "i": np.arange(3, dtype=np.int32)}
    txs = [optax.chain(optax.scale(0.5), FAMILY[x]) for x in ("adam", "swats", "lamb", "cautious", "masters")]
    for dtype in (np.float32, np.int32):
        for updates in first_updates(txs, params, {"w": params["w"], "i": np.zeros(3, dtype)}):
            after: Any = optax.apply_updates(params, updates)
            np.testing.assert_array_equal(after["i"], params["i"])


def test_float8_leaves_keep_their_dtype() -> None:
    params = {"w": jnp.ones(3, jnp.float8_e4m3fn)}
    txs = [FAMILY[name] for name in ("adamw", "lamb", "cautious", "swats", "guard", "clip", "average")]
    for updates, after in jax.jit(lambda params: [step(tx, params) for tx in txs])(params):
        assert updates["w"].dtype == after["w"].dtype == jnp.float8_e4m3fn


def test_an_equinox_model_may_keep_its_functions() -> None:
    """It may be params of `init` and `update`, as in optax: leaves that are no arrays pass through."""
    model = eqx.nn.MLP(2, 2, 2, 0, key=jax.random.key(0))
    arrays, functions = eqx.partition(model, eqx.is_inexact_array)
    txs = [FAMILY[name] for name in ("adamw", "masters", "guard", "lamb", "16bit")]

    @jax.jit
    def first(arrays: Any) -> Any:
        model = eqx.combine(arrays, functions)
        places = ((arrays, arrays), (model, model), (arrays, model))
        return [[tx.update(arrays, tx.init(start), p)[0] for tx in txs] for start, p in places]

    expected, *found = first(arrays)
    assert all(eqx.tree_equal(updates, expected) for updates in found)
    eqx.apply_updates(model, expected[0])


def test_keys_of_random_streams_get_no_update() -> None:
    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    grads = {"w": jnp.ones(2), "key": np.zeros((), jax.dtypes.float0)}
    tx = adam_fn.adam(1e-3)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["key"] is None
    after, _ = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), state, grads)
    assert after["key"] == params["key"]


# Kinds of numbers.


@pytest.mark.parametrize("name", ["nadam's schedule", "average", "schedules", "radam", "radam's least threshold"])
def test_updates_stay_finite_in_the_first_steps_and_past_the_largest_count(name: str) -> None:
    """No update uses the number after the largest count, which is negative."""
    tx, params = FAMILY[name], jnp.ones(2)
    state = tx.init(params)
    for _ in range(8):
        updates, state = tx.update(params, state, params)
        assert np.isfinite(updates).all()
    last = jnp.asarray(2**31 - 2, jnp.int32)
    state = jax.tree.map(lambda x: last if x.dtype == jnp.int32 else x, state)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        assert np.isfinite(updates).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["lamb", "adan", "lion", "adamw"])
@pytest.mark.parametrize("options", [{"mask": {"w": True}}, {"decay": "l2"}, {"groups": {"w": Group(decay=2.0)}}])
def test_decay_options_without_a_weight_decay_are_errors(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        getattr(adam_fn, name)(1e-3, weight_decay=None, **options)


def test_mutable_variables_of_flax_are_stepped_as_by_optax() -> None:
    """The model has such variables; `nnx.grad` cannot differentiate it yet, not with optax either."""
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        grads = jax.tree.map(jnp.ones_like, nnx.as_pure(nnx.state(model, nnx.Param)))
        found = []
        for tx in (adam_fn.adam(1e-2), optax.adam(1e-2)):
            optimizer = nnx.Optimizer(nnx.clone(model), tx, wrt=nnx.Param)
            found.append(tx.update(grads, nnx.as_pure(optimizer.opt_state)))
            jax.jit(tx.init)(nnx.state(model, nnx.Param))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *found)


@pytest.mark.parametrize("name", FAMILY)
def test_every_array_of_a_state_is_checked(name: str) -> None:
    """A training state that was cast to bfloat16 would count to 256 and stay there."""
    tx, params = FAMILY[name], {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    if name != "stored":  # Wide arrays belong to the inner transformation, here `optax.trace`.
        params["short"] = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(tx.init, params))
    jax.eval_shape(tx.update, params, treedef.unflatten(leaves), params)
    for i, x in enumerate(leaves):
        cast = x.update(dtype=jnp.float32 if x.dtype == jnp.bfloat16 else jnp.bfloat16)
        with pytest.raises((TypeError, ValueError), match="state"):
            jax.eval_shape(tx.update, params, treedef.unflatten([*leaves[:i], cast, *leaves[i + 1 :]]), params)


# JAX's settings.


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Hides older objects from the garbage collector, which the search for leaked tracers runs again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", FAMILY)
def test_a_step_promotes_no_dtypes_and_leaks_no_tracers(name: str) -> None:
    """Tracing a step shows both."""
    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
            jax.eval_shape(functools.partial(step, FAMILY[name]), {"w": jax.ShapeDtypeStruct((2, 3), dtype)})


def test_the_whole_family_steps_the_same_without_jit() -> None:
    params = {"w": np.ones((2, 3), np.float32)}
    for (name, tx), expected in zip(FAMILY.items(), first_updates([*FAMILY.values()], params), strict=True):
        with jax.disable_jit():
            found, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, err_msg=name)


def test_python_numbers_are_parameters_without_jit() -> None:
    tx = adam_fn.adam(1e-3)
    with jax.disable_jit():
        state = tx.init({"w": 1.0})
        updates, _ = tx.update({"w": 1.0}, state, {"w": 1.0}, learning_rate=0.1)
        assert float(updates["w"]) == pytest.approx(-0.1)
        found = diagnostics.summary(tx, state, {"w": jnp.ones(())}, learning_rate=0.1)
        assert found["learning_rate"] == np.float32(0.1)


# Arrays in a transformation, and the libraries that look for them.


def test_array_hyperparameters_are_leaves_to_equinox_and_not_to_flax() -> None:
    """Three rates trace once, optimizers can be mapped over, and `nnx.Optimizer` takes them."""
    traced = []

    @eqx.filter_jit
    def first(tx: Any, params: jax.Array) -> jax.Array:
        traced.append(tx)
        return tx.update(params, tx.init(params), params)[0]

    for wrap in (lambda tx: tx, adam_fn.master_weights, lambda tx: optax.chain(tx, optax.identity())):
        traced.clear()
        for rate in (1e-3, 1e-2, 1e-1):
            tx = eqxi.closure_to_pytree(wrap(adam_fn.adam(jnp.asarray(rate))))
            np.testing.assert_allclose(first(tx, jnp.ones(3)), -rate, rtol=1e-5)
        assert len(traced) == 1

    many = eqx.filter_vmap(lambda rate: eqxi.closure_to_pytree(adam_fn.adam(rate)))(jnp.asarray([0.1, 0.2]))
    np.testing.assert_allclose(eqx.filter_vmap(lambda tx: first(tx, jnp.ones(3)))(many)[:, 0], [-0.1, -0.2], rtol=1e-5)

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    nnx.Optimizer(model, adam_fn.adam(jnp.asarray(1e-2)), wrt=nnx.Param)


# Error messages.


def test_errors_say_what_was_expected() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = adam_fn.adam(1e-3)
    with pytest.raises(ValueError, match="the tree is a dict, not a FrozenDict"):
        tx.update(params, tx.init(freeze(params)), freeze(params))
    for wrapper in (adam_fn.stochastic_rounding, adam_fn.master_weights, adam_fn.cautious, adam_fn.skip_nonfinite):
        name = wrapper.__name__
        with pytest.raises(TypeError, match=rf"{name} wraps a transformation, as in {name}\(adam_fn.adamw\(1e-3\)\)"):
            wrapper(42)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"lamb expected the state that tx\.init"):
        adam_fn.lamb(1e-3).update(params, (), params)


def test_a_summary_works_where_updates_are_wider_than_the_parameters() -> None:
    short = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = optax.apply_if_finite(adam_fn.stochastic_rounding(adam_fn.adam(1e-3)), 2)
    _, state = tx.update({"w": jnp.ones(3)}, tx.init(short), short)
    assert diagnostics.summary(tx, state, short)["learning_rate"] == np.float32(1e-3)


def test_a_state_without_an_array_for_each_parameter_stays_whole() -> None:
    """`optax.flatten` makes one array of all parameters: it is not divided, and cannot be edited by parameter."""
    mesh = jax.make_mesh((8,), ("data",))
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    tx = optax.flatten(adam_fn.adam(1e-3))
    state = tx.init(params)
    assert {x.spec for x in jax.tree.leaves(adam_fn.state_shardings(tx, params))} == {jax.P()}
    divided = adam_fn.zero1(tx, params, mesh, "data")
    updates: Any = divided.update(params, divided.init(params), params)[0]
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)
    with pytest.raises(ValueError, match=r"cannot tell which arrays of the state .* as under optax.flatten"):
        adam_fn.surgery.reset(tx, state, params, "w")
