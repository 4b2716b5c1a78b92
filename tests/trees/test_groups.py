"""Multipliers and frozen leaves by path: the steps of `optax.partition`, with one state, for every member."""

import pickle
from collections.abc import Callable
from typing import Any, cast

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS
from flax import linen, nnx
from helpers.runs import random_gradients, scanned
from helpers.states import slots_of

import adam_fn
from adam_fn import Group, Groups
from adam_fn.trees.leaves import by_path

PARAMS = {
    "embed": {"table": jnp.ones((2, 3))},
    "layers": [{"kernel": jnp.full((2, 3), 0.5 + i), "bias": jnp.full(3, 2.0 + i)} for i in range(2)],
}
GROUPS = {
    "embed/*": Group(frozen=True),
    "layers/0/*": Group(rate=0.25),
    "*/bias": Group(decay=0.0),
    "layers/1/kernel": Group(decay=3.0),
}
# The multipliers of (rate, decay), None if frozen, in the order of the leaves.
EXPECTED = [None, (0.25, 0.0), (0.25, 1.0), (1.0, 0.0), (1.0, 3.0)]
GRADS = jax.tree.map(lambda p: random_gradients(4, p.size, seed=p.size).reshape(4, *p.shape), PARAMS)


def _by_hand(make: Any) -> Any:
    """A transformation for each leaf."""
    flat, treedef = jax.tree.flatten(PARAMS)
    labels = treedef.unflatten([str(i) for i in range(len(flat))])
    txs: Any = {str(i): optax.set_to_zero() if kind is None else make(*kind) for i, kind in enumerate(EXPECTED)}
    return optax.partition(txs, labels)


def _scheduled(decay: Any) -> Any:
    def make(rate: float, scale: float, **options: Any) -> Any:
        return adam_fn.adam(lambda count: rate * 0.1 / (count + 1), weight_decay=0.2 * scale, decay=decay, **options)

    return make


def _make(alias: Any) -> Any:
    return lambda rate, scale, **options: alias(0.1 * rate, weight_decay=0.2 * scale, **options)


#: Functions that make optimizers from the multipliers of rate and decay.
MAKE = {
    **{case.name: _make(case.make) for case in MEMBERS},
    **{decay: _scheduled(decay) for decay in ("independent", "l2", "proximal")},
    "lamb": _make(adam_fn.lamb),
}


@pytest.mark.quick("adam")
@pytest.mark.parametrize("name", MAKE)
def test_groups_step_as_separate_optimizers(name: str) -> None:
    (_, state), found = scanned(MAKE[name](1.0, 1.0, groups=GROUPS), PARAMS, GRADS)
    _, expected = scanned(_by_hand(MAKE[name]), PARAMS, GRADS)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-7)
    for slot in slots_of(state).values():
        assert slot["embed"]["table"] == optax.MaskedNode()
        assert len(jax.tree.leaves(slot)) == 4


def test_the_rate_of_one_step_is_multiplied_too() -> None:
    tx = adam_fn.adamw(7.0, weight_decay=0.2, groups=GROUPS)
    _, expected = scanned(_by_hand(_make(adam_fn.adamw)), PARAMS, GRADS)
    _, found = scanned(tx, PARAMS, GRADS, learning_rate=jnp.float32(0.1))
    chex.assert_trees_all_close(found, expected, rtol=2e-5)


def test_mask_frozen_and_groups_work_together() -> None:
    options: Any = {"mask": adam_fn.masks.path("*/kernel"), "frozen": adam_fn.masks.path("layers/1/*")}
    _, found = scanned(_make(adam_fn.adamw)(1.0, 1.0, groups={"*": Group(rate=0.5)}, **options), PARAMS, GRADS)
    _, expected = scanned(_make(adam_fn.adamw)(0.5, 1.0, **options), PARAMS, GRADS)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_swats_finds_one_rate_for_all_groups() -> None:
    """SGD steps along gradients times the groups' rates; at its rate, this step projects onto Adam's."""
    grads, rates = random_gradients(12, 6, 0.5), np.repeat([0.25, 1.0], 3)
    params, split = {"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": grads[:, :3], "b": grads[:, 3:]}

    def run(rate: float) -> Any:
        tx = adam_fn.swats(0.1, tolerance=1e3, eps=0.0, groups={"a": Group(rate=rate)})
        (_, state), updates = scanned(tx, params, split)
        return np.concatenate([updates["a"], updates["b"]], axis=1), state

    (ours, state), (bare, _) = run(0.25), run(1.0)
    assert bool(state.switched)
    np.testing.assert_allclose(ours[0], rates * bare[0], rtol=1e-6)
    # At every step, before the switch and after it, relative to the leaf that is not scaled.
    ratio = ours / bare
    np.testing.assert_allclose(ratio[:, :3] / ratio[:, 3:], 0.25, rtol=1e-4)
    # SGD's rate is the one of the scaled problem.
    first, second = (ours[:2] ** 2).sum(1) / -(rates * ours[:2] * grads[:2]).sum(1)
    np.testing.assert_allclose(state.sgd_rate, (0.999 * first + second) / 1.999, rtol=1e-3)


def test_leaves_of_one_shape_share_a_program() -> None:
    layers = [jnp.ones((5, 7)) for _ in range(6)]
    patterns = {str(i): Group(rate=0.5**i, decay=2.0**i) for i in range(6)}
    tx = adam_fn.adamw(1e-3, groups=patterns)
    text = jax.jit(tx.update).lower(layers, tx.init(layers), layers).as_text()
    assert text.count("func.func private @step_leaf") == 1


@pytest.mark.parametrize("storage", ["bfloat16", "24bit", "16bit"])
def test_groups_in_low_precision_step_as_separate_optimizers(storage: Any) -> None:
    """The steps are equal bit for bit, with masters and in place."""
    params = {x: jnp.ones((2, 64), jnp.bfloat16) for x in "ab"}
    grads = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape).astype(p.dtype), params)

    def make(rate: float, **options: Any) -> Any:
        return adam_fn.master_weights(adam_fn.adamw(rate, storage=storage, **options))

    tx = make(0.1, groups={"a": Group(rate=0.5)})
    found, _ = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    for leaf, rate in (("a", 0.05), ("b", 0.1)):
        tx = make(rate)
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_array_equal(found[leaf], cast(Any, optax.apply_updates(params, updates))[leaf])


def test_float64_keeps_its_digits() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.linspace(1, 2, 5, dtype=jnp.float64)}
        txs = (
            adam_fn.adamw(0.1, weight_decay=0.3, groups={"a": Group(rate=0.1, decay=0.7)}),
            adam_fn.adamw(0.1 * 0.1, weight_decay=0.3 * 0.7),
        )
        found, expected = (tx.update(params, tx.init(params), params)[0] for tx in txs)
        chex.assert_trees_all_close(found, expected, rtol=1e-14)


@pytest.mark.quick
def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    message = r"pattern 'layer/\*' matches no parameter; their paths are embed/table, layers/0/bias"
    tx = adam_fn.adam(0.1, groups={"layer/*": Group(rate=0.5)})
    for function in (lambda: tx.init(PARAMS), lambda: adam_fn.masks.path("*bias", "layer/*", invert=True)(PARAMS)):
        with pytest.raises(ValueError, match=message):
            function()
    # A leaf counts even if it is None, or belongs to another part of a partition.
    params = {"a": jnp.ones(2), "bias": None, "c": optax.MaskedNode()}
    adam_fn.adam(0.1, groups={"bias": Group(rate=0.5), "c": Group(rate=0.5)}).init(params)
    assert adam_fn.masks.path("c", "bias", invert=True)(params) == {"a": True, "bias": None, "c": optax.MaskedNode()}
    state = tx.init({})
    assert optax.tree_utils.tree_map_params(tx, lambda x: x, state) == state


ONE, TWO = Groups({"a": Group(0.5), "b": Group(decay=0)}), Groups({"b": Group(decay=0.0), "a": Group(rate=0.5)})
UNTYPED: Any = adam_fn  # For arguments that a type checker refuses too.
PARTLY = Groups({"*/kernel": Group(rate=0.5), "embed/*": Group(frozen=True)}, complete=True)


def test_groups_are_equal_by_value() -> None:
    assert ONE == TWO
    assert hash(ONE) == hash(TWO)
    tx = adam_fn.adamw(0.1, groups=ONE)
    assert pickle.loads(pickle.dumps(tx)) == tx == adam_fn.adamw(0.1, groups=TWO) != adam_fn.adamw(0.1)
    adam_fn.adam(0.1, groups=Groups({"*": Group()}, complete=True)).init(PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda bad=bad: UNTYPED.Group(rate=bad), r"rate of a Group must be a number in \[0, inf\)")
            for bad in (-1.0, float("inf"), True, "1")
        ),
        (lambda: UNTYPED.Group(frozen=1), "frozen of a Group must be a bool"),
        (lambda: UNTYPED.adamw(0.1, groups={"a": 0.5}), "groups must map patterns to Group"),
        (lambda: UNTYPED.adamw(0.1, groups=[("a", Group())]), "groups must map patterns to Group"),
        (
            lambda: adam_fn.adam(0.1, groups={"a": Group(decay=0.0)}),
            "group 'a' multiplies the decay, but weight_decay is not given",
        ),
        (
            lambda: adam_fn.adam(0.1, groups=PARTLY).init(PARAMS),
            "no pattern .* matches the parameters layers/0/bias, layers/1",
        ),
    ],
)
def test_errors_of_groups_name_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


KEY = jax.random.key(0)
#: A linear layer and a norm of each framework.
LAYERS: dict[str, tuple[Any, Any]] = {
    "linen": (
        lambda n, m: linen.Dense(m).init(KEY, jnp.ones((1, n)))["params"],
        lambda n: linen.LayerNorm().init(KEY, jnp.ones((1, n)))["params"],
    ),
    "nnx": (lambda n, m: nnx.Linear(n, m, rngs=nnx.Rngs(0)), lambda n: nnx.LayerNorm(n, rngs=nnx.Rngs(0))),
    "equinox": (lambda n, m: eqx.nn.Linear(n, m, key=KEY), eqx.nn.LayerNorm),
}


def _model(framework: str) -> Any:
    linear, norm = LAYERS[framework]
    parts = {"body": linear(4, 3), "norm": norm(3), "head": linear(3, 2)}
    return nnx.Dict(parts) if framework == "nnx" else parts


@pytest.mark.parametrize("framework", LAYERS)
def test_groups_match_the_paths_of_frameworks(framework: str) -> None:
    model = _model(framework)
    params = nnx.state(model, nnx.Param) if framework == "nnx" else eqx.filter(model, eqx.is_array)
    ones = jax.tree.map(jnp.ones_like, params)
    groups = {"body/*": Group(frozen=True), "norm/*": Group(rate=0.5), "*/bias": Group(decay=0.0)}
    tx = adam_fn.adamw(0.1, weight_decay=0.5, groups=groups)
    state = tx.init(ones)
    assert len(jax.tree.leaves(slots_of(state)["mu"])) == 4
    for path, u in by_path(tx.update(ones, state, ones)[0]).items():
        rate = {"body": 0.0, "norm": 0.05, "head": 0.1}[path.partition("/")[0]]
        expected = -rate * (1 if path.endswith("bias") else 1.5)
        np.testing.assert_allclose(u, np.full(u.shape, expected), rtol=1e-5, err_msg=path)


def test_nnx_optimizer_keeps_one_state() -> None:
    model = _model("nnx")
    groups = {"body/*": Group(frozen=True), "*/bias": Group(decay=0.0)}
    optimizer = nnx.Optimizer(model, adam_fn.adamw(0.1, groups=groups), wrt=nnx.Param)
    before = np.array(model.body.kernel[...])
    optimizer.update(model, jax.tree.map(np.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.body.kernel[...], before)
    assert (model.head.bias[...] != 0).all()
