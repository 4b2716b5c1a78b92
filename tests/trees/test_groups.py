"""Multipliers and frozen leaves by path: as `optax.partition` of the parts, within one state, for every member."""

import pickle
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS, Case, name
from flax import linen, nnx
from helpers.runs import random_gradients
from helpers.states import slots_of

import adam_fn
from adam_fn import Group, Groups

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
# Of (rate, decay), None where frozen; in the order of the leaves.
EXPECTED = [None, (0.25, 0.0), (0.25, 1.0), (1.0, 0.0), (1.0, 3.0)]
GRADS = [
    jax.tree.map(lambda p, i=i: jnp.asarray(random_gradients(1, p.size, seed=i)[0].reshape(p.shape)), PARAMS)
    for i in range(4)
]


def _run(tx: Any, grads: Any = GRADS, params: Any = PARAMS, **extra: Any) -> tuple[list[Any], Any]:
    """The updates of each step, and the last state, of one scan."""

    @jax.jit
    def run(grads: Any) -> Any:
        def step(carry: Any, g: Any) -> Any:
            p, state = carry
            updates, state = tx.update(g, state, p, **extra)
            return (optax.apply_updates(p, updates), state), updates

        (_, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
        return state, updates

    state, updates = run(jax.tree.map(lambda *g: jnp.stack(g), *grads))
    return [jax.tree.map(lambda u, i=i: u[i], updates) for i in range(len(grads))], state


def _parts(make: Any) -> Any:
    """The same by hand: a transformation for each leaf."""
    flat, treedef = jax.tree.flatten(PARAMS)
    labels = treedef.unflatten([str(i) for i in range(len(flat))])
    txs: Any = {str(i): optax.set_to_zero() if kind is None else make(*kind) for i, kind in enumerate(EXPECTED)}
    return optax.partition(txs, labels)


@pytest.mark.quick("adam")
@pytest.mark.parametrize("case", MEMBERS, ids=name)
def test_every_member_follows_its_groups(case: Case) -> None:
    tx = case.make(0.1, weight_decay=0.2, groups=GROUPS)
    found, state = _run(tx)
    expected, _ = _run(_parts(lambda rate, decay: case.make(0.1 * rate, weight_decay=0.2 * decay)))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-7)
    for slot in slots_of(state).values():
        assert slot["embed"]["table"] == optax.MaskedNode()
        assert len(jax.tree.leaves(slot)) == 4


@pytest.mark.parametrize("decay", ["independent", "l2", "proximal"])
def test_every_meaning_of_decay(decay: Any) -> None:
    def schedule(count: jax.Array) -> jax.Array:
        return 0.1 / (count + 1)

    tx = adam_fn.adam(schedule, weight_decay=0.2, decay=decay, groups=Groups(GROUPS))

    def part(rate: float, scale: float) -> Any:
        return adam_fn.adam(lambda count: rate * schedule(count), weight_decay=0.2 * scale, decay=decay)

    chex.assert_trees_all_close(_run(tx)[0], _run(_parts(part))[0], rtol=2e-5, atol=1e-7)


def test_the_rate_of_one_step_is_multiplied_too() -> None:
    tx = adam_fn.adamw(7.0, weight_decay=0.2, groups=GROUPS)
    expected, _ = _run(_parts(lambda rate, decay: adam_fn.adamw(0.1 * rate, weight_decay=0.2 * decay)))
    chex.assert_trees_all_close(_run(tx, learning_rate=jnp.float32(0.1))[0], expected, rtol=2e-5)


def test_mask_frozen_and_groups_together() -> None:
    mask, frozen = adam_fn.masks.path("*/kernel"), adam_fn.masks.path("layers/1/*")
    found, _ = _run(adam_fn.adamw(0.1, weight_decay=0.2, mask=mask, frozen=frozen, groups={"*": Group(rate=0.5)}))
    expected, _ = _run(adam_fn.adamw(0.05, weight_decay=0.2, mask=mask, frozen=frozen))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_groups_in_lamb_step_as_separate_optimizers() -> None:
    found, state = _run(adam_fn.lamb(0.1, weight_decay=0.2, groups=GROUPS))
    expected, _ = _run(_parts(lambda rate, decay: adam_fn.lamb(0.1 * rate, weight_decay=0.2 * decay)))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-7)
    assert len(jax.tree.leaves(slots_of(state[0]))) == 2 * 4


def test_swats_finds_one_rate_for_all_groups() -> None:
    """SGD's step is that of gradients times the groups' rates, and its rate makes that project on Adam's."""
    rate, params = 0.25, {"a": jnp.ones(3), "b": jnp.ones(3)}
    grads = [{"a": jnp.asarray(g[:3]), "b": jnp.asarray(g[3:])} for g in random_gradients(12, 6, 0.5)]

    def run(rate: float, grads: Any) -> Any:
        return _run(adam_fn.swats(0.1, tolerance=1e3, eps=0.0, groups={"a": Group(rate=rate)}), grads, params)

    ours, state = run(rate, grads)
    assert bool(state.switched)
    np.testing.assert_allclose(ours[0]["a"], rate * run(1.0, grads)[0][0]["a"], rtol=1e-6)
    # At every step, before the switch and after it, relative to the leaf that is not scaled.
    bare, _ = run(1.0, grads)
    ratio = [u["a"][0] * v["b"][0] / (v["a"][0] * u["b"][0]) for u, v in zip(ours, bare, strict=True)]
    np.testing.assert_allclose(ratio, rate, rtol=1e-4)
    # SGD's rate is the one of the scaled problem.
    steps = [(u, g) for u, g in zip(ours[:2], grads[:2], strict=True)]
    found = [
        sum(float((u[k] ** 2).sum()) for k in "ab")
        / -sum(float((u[k] * g[k]).sum()) * (rate if k == "a" else 1.0) for k in "ab")
        for u, g in steps
    ]
    b2 = 0.999
    expected = (b2 * (1 - b2) * found[0] + (1 - b2) * found[1]) / (1 - b2**2)
    np.testing.assert_allclose(state.sgd_rate, expected, rtol=1e-3)


def test_leaves_of_one_shape_share_a_program() -> None:
    layers = [jnp.ones((5, 7)) for _ in range(6)]
    patterns = {str(i): Group(rate=0.5**i, decay=2.0**i) for i in range(6)}
    tx = adam_fn.adamw(1e-3, groups=patterns)
    text = jax.jit(tx.update).lower(layers, tx.init(layers), layers).as_text()
    assert text.count("func.func private @step_leaf") == 1


@pytest.mark.parametrize("storage", ["bfloat16", "24bit", "16bit"])
def test_groups_with_low_precision(storage: Any) -> None:
    """Bit for bit."""
    params = {"a": jnp.ones((2, 64), jnp.bfloat16), "b": jnp.ones((2, 64), jnp.bfloat16)}
    grads = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape).astype(p.dtype), params)

    def make(rate: float, **options: Any) -> Any:
        return adam_fn.master_weights(adam_fn.adamw(rate, storage=storage, **options))

    step: Any = adam_fn.make_step(make(0.1, groups={"a": Group(rate=0.5)}))
    tx = make(0.1, groups={"a": Group(rate=0.5)})
    found, _ = step(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    for leaf, rate in (("a", 0.05), ("b", 0.1)):
        tx = make(rate)
        updates, _ = tx.update(grads, tx.init(params), params)
        expected: Any = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(found[leaf], expected[leaf])


def test_float64_keeps_its_digits() -> None:
    with jax.enable_x64(True):
        params = {"a": jnp.linspace(1, 2, 5, dtype=jnp.float64)}
        tx = adam_fn.adamw(0.1, weight_decay=0.3, groups={"a": Group(rate=0.1, decay=0.7)})
        plain = adam_fn.adamw(0.1 * 0.1, weight_decay=0.3 * 0.7)
        found, _ = tx.update(params, tx.init(params), params)
        expected, _ = plain.update(params, plain.init(params), params)
        np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-14)


@pytest.mark.quick
def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    message = r"pattern 'layer/\*' matches no parameter; their paths are embed/table, layers/0/bias"
    tx = adam_fn.adam(0.1, groups={"layer/*": Group(rate=0.5)})
    for function in (lambda: tx.init(PARAMS), lambda: adam_fn.masks.path("*bias", "layer/*", invert=True)(PARAMS)):
        with pytest.raises(ValueError, match=message):
            function()
    # A leaf that is None, or that another part of a partition has, is there all the same.
    params = {"a": jnp.ones(2), "bias": None, "c": optax.MaskedNode()}
    adam_fn.adam(0.1, groups={"bias": Group(rate=0.5), "c": Group(rate=0.5)}).init(params)
    assert adam_fn.masks.path("c", "bias", invert=True)(params) == {"a": True, "bias": None, "c": optax.MaskedNode()}
    state = tx.init({})
    assert optax.tree_utils.tree_map_params(tx, lambda x: x, state) == state


def test_complete_groups_name_every_leaf_that_is_left_over() -> None:
    tx = adam_fn.adam(0.1, groups=Groups({"*/kernel": Group(rate=0.5), "embed/*": Group(frozen=True)}, complete=True))
    with pytest.raises(ValueError, match=r"no pattern .* matches the parameters layers/0/bias, layers/1"):
        tx.init(PARAMS)
    adam_fn.adam(0.1, groups=Groups({"*": Group()}, complete=True)).init(PARAMS)


def test_groups_are_values_and_check_their_arguments() -> None:
    one, two = Groups({"a": Group(0.5), "b": Group(decay=0)}), Groups({"b": Group(decay=0.0), "a": Group(rate=0.5)})
    assert one == two
    assert hash(one) == hash(two)
    tx = adam_fn.adamw(0.1, groups=one)
    assert pickle.loads(pickle.dumps(tx)) == tx == adam_fn.adamw(0.1, groups=two) != adam_fn.adamw(0.1)
    for bad in (-1.0, float("inf"), True, "1"):
        with pytest.raises(ValueError, match=r"rate of a Group must be a number in \[0, inf\)"):
            Group(rate=bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="frozen of a Group must be a bool"):
        Group(frozen=1)  # pyright: ignore[reportArgumentType]
    for wrong in ({"a": 0.5}, [("a", Group())]):
        with pytest.raises(TypeError, match="groups must map patterns to Group"):
            adam_fn.adamw(0.1, groups=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group 'a' multiplies the decay, but weight_decay is not given"):
        adam_fn.adam(0.1, groups={"a": Group(decay=0.0)})


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(2, name="head")(linen.LayerNorm(name="norm")(linen.Dense(3, name="body")(x)))


class _Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.body, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)


class _Equinox(eqx.Module):
    body: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self) -> None:
        key = jax.random.key(0)
        self.body, self.norm = eqx.nn.Linear(4, 3, key=key), eqx.nn.LayerNorm(3)
        self.head = eqx.nn.Linear(3, 2, key=key)


FRAMEWORKS: dict[str, Callable[[], Any]] = {
    "linen": lambda: _Linen().init(jax.random.key(0), jnp.ones((1, 4)))["params"],
    "nnx": lambda: nnx.state(_Nnx(), nnx.Param),
    "equinox": lambda: eqx.filter(_Equinox(), eqx.is_array),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_paths_of_frameworks(framework: str) -> None:
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(FRAMEWORKS[framework]))
    groups = {"body/*": Group(frozen=True), "norm/*": Group(rate=0.5), "*/bias": Group(decay=0.0)}
    tx = adam_fn.adamw(0.1, weight_decay=0.5, groups=groups)
    state = tx.init(params)
    assert len(jax.tree.leaves(slots_of(state)["mu"])) == 4
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), state, params)
    scales: dict[str, set[float]] = {}
    for (keys, u), p in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        part = jax.tree_util.keystr(keys[:1], simple=True)
        bias = "bias" in jax.tree_util.keystr(keys)
        scales.setdefault(part, set()).update(np.round(-np.ravel(u / (1 + (0 if bias else 0.5) * p)), 5).tolist())
    assert {part: {round(x, 4) for x in found} for part, found in scales.items()} == {
        "body": {0.0},
        "norm": {0.05},
        "head": {0.1},
    }


def test_nnx_optimizer_keeps_one_state() -> None:
    model: Any = _Nnx()
    groups = {"body/*": Group(frozen=True), "*/bias": Group(decay=0.0)}
    optimizer = nnx.Optimizer(model, adam_fn.adamw(0.1, groups=groups), wrt=nnx.Param)
    before = np.array(model.body.kernel[...])
    optimizer.update(model, jax.tree.map(np.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.body.kernel[...], before)
    assert (model.head.bias[...] != 0).all()
