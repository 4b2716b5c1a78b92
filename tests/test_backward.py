"""The step inside the backward pass equals `value_and_grad` and then `make_step`, bit for bit, with any optimizer."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.layouts import KINDS, assert_placed, mesh_of
from helpers.runs import full_jit, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam_fn
from adam_fn import Group, backward, masks

LAYERS, WIDTH, HIDDEN, BATCH, WORDS = 4, 8, 16, 8, 11


def init(dtype: Any = jnp.float32, *, index: bool = False, turn: bool = False) -> Any:
    """The parameters; on request with an index of each layer, which is not trained, or with a complex leaf."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)

    layers = {"w1": normal(LAYERS, WIDTH, HIDDEN), "b": normal(LAYERS, HIDDEN), "w2": normal(LAYERS, HIDDEN, WIDTH)}
    layers |= {"index": jnp.arange(LAYERS)} if index else {}
    layers |= {"turn": jnp.exp(1j * normal(LAYERS, WIDTH))} if turn else {}
    return {"embed": normal(WORDS, WIDTH), "layers": layers, "norm": jnp.ones(WIDTH, dtype)}


def embed(params: Any, batch: Any) -> Any:
    return params["embed"][batch[0]]


def layer(p: Any, h: Any, batch: Any) -> Any:
    scale = 1 + 0.1 * p["index"].astype(h.dtype) if "index" in p else 1
    h = (h * p["turn"][None]).real if "turn" in p else h
    return h + jax.nn.gelu(h @ p["w1"] + p["b"][None]) @ p["w2"] * scale


def head(params: Any, h: Any, batch: Any) -> Any:
    """The loss, with the embedding used again."""
    logits = (h * params["norm"][None]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean()


def loss(params: Any, batch: Any, layer: Callable[..., Any] = layer) -> Any:
    h, _ = jax.lax.scan(lambda h, p: (layer(p, h, batch), None), embed(params, batch), params["layers"])
    return head(params, h, batch)


BATCHES = [tuple(map(jnp.asarray, x)) for x in np.random.default_rng(1).integers(WORDS, size=(3, 2, BATCH))]


def train(
    step: Callable[..., Any], tx: Any, params: Any, batches: Any = BATCHES, other: Callable[..., Any] | None = None
) -> Any:
    """Losses, parameters and state after some steps, every second of which is taken by `other`."""
    state, losses = jax.jit(tx.init)(params), []
    for i, batch in enumerate(batches):
        value, params, state = (step, other or step)[i % 2](params, state, batch)
        losses.append(value)
    return losses, params, state


def ordinary(tx: Any, jit: Any = jax.jit) -> Callable[..., Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, batch)
        return value, *adam_fn.make_step(tx)(params, state, grads)

    return jit(step)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda chosen: "w1" if chosen else "rest", masks.path("layers/w1")(params))


RATE = optax.cosine_decay_schedule(1e-2, 10)


CODED = "adamw, 16 bits, by rank"
SAME: dict[str, Any] = {
    "adam": adam_fn.adam(RATE),
    CODED: adam_fn.adamw(1e-2, storage="16bit", mask=masks.rank(3), weight_decay=0.1),
    "masters": adam_fn.master_weights(adam_fn.adamw(1e-2, storage="16bit")),
    "stochastic rounding": adam_fn.stochastic_rounding(adam_fn.adamw(1e-2, storage="24bit"), 3),
    "groups and frozen": adam_fn.adamw(
        1e-2,
        storage="bfloat16",
        groups={"layers/w1": Group(rate=0.5), "norm": Group(frozen=True)},
        frozen=masks.path("layers/b"),
    ),
    "a chain, stored and averaged": optax.chain(
        adam_fn.stored(adam_fn.scale_by_adam()),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
        adam_fn.average_params(0.9),
    ),
    "a partition": optax.partition({"w1": adam_fn.lion(1e-3), "rest": adam_fn.adan(1e-2)}, labels),
    "lamb, cautious": adam_fn.cautious(adam_fn.lamb(1e-2, weight_decay=0.1, layers="layers"), layers="layers"),
    "guard": adam_fn.skip_nonfinite(adam_fn.adamw(1e-2, storage="16bit")),
    "optax": optax.adamw(1e-2),
}
SHORT = {"masters", "stochastic rounding"}  # The parameters are bfloat16.


@functools.cache
def expected_of(name: str) -> tuple[Any, Any, Callable[..., Any], Any]:
    """An optimizer of `SAME`, the parameters, its ordinary step and the result of some of them."""
    tx, params = SAME[name], init(jnp.bfloat16 if name in SHORT else jnp.float32, index=name != "optax")
    step = ordinary(tx, jit=full_jit)
    return tx, params, step, train(step, tx, params)


@pytest.mark.parametrize(("name", "keep_every"), [*((name, 1) for name in SAME), (CODED, 2), (CODED, 4)])
def test_steps_in_the_backward_pass_equal_ordinary_steps_bit_for_bit(name: str, keep_every: int) -> None:
    """A run may also alternate between these and ordinary steps."""
    tx, params, theirs, expected = expected_of(name)
    ours = full_jit(backward.value_and_step(tx, embed, layer, head, keep_every=keep_every))
    chex.assert_trees_all_equal(train(ours, tx, params), expected)
    chex.assert_trees_all_equal(train(ours, tx, params, other=theirs), expected)
    assert np.abs(np.asarray(expected[1]["layers"]["w2"] - params["layers"]["w2"], np.float32)).max() > 1e-3


@pytest.mark.parametrize("name", [CODED, "masters", "stochastic rounding"])
def test_the_path_of_gpus_and_tpus_takes_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the arrays are computed one after the other, each anew; the steps are equal up to rounding."""

    def default(*arguments: Any, default: Any, **_: Any) -> Any:
        return default(*arguments)

    tx, params, _, expected = expected_of(name)
    monkeypatch.setattr(jax.lax, "platform_dependent", default)
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head)), tx, params)
    rtol = 2**-7 if name in SHORT else 1e-5
    chex.assert_trees_all_close(found[:2], expected[:2], rtol=rtol, atol=1e-6)


def clipped_by_layer(grads: Any, params: Any = None) -> Any:
    """The gradients of each layer, and those of all other parameters, with a norm of at most 0.05."""

    def clipped(part: Any) -> Any:
        return optax.clip_by_global_norm(0.05).update(part, optax.EmptyState())[0]

    return {**clipped({**grads, "layers": {}}), "layers": jax.vmap(clipped)(grads["layers"])}


class Options(NamedTuple):
    """Options of `value_and_step`, the optimizer, that of the ordinary steps, and the tolerance."""

    options: dict[str, Any]
    tx: Any
    peer: Any
    rtol: float = 1e-4
    atol: float = 1e-6


ADAM, ADAMW = adam_fn.adam(1e-2, eps=1e-2), adam_fn.adamw(1e-2)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), ADAM)
TURNED = adam_fn.adam(1e-2, storage="24bit")
GUARDED = adam_fn.skip_nonfinite(ADAM)
FACTORED = optax.adafactor(1e-2, min_dim_size_to_factor=8, multiply_by_parameter_scale=False, clipping_threshold=None)
OPTIONS = {
    "clipping by the global norm": Options({"max_norm": 0.1}, ADAM, CLIPPED),
    "a norm below the limit": Options({"max_norm": 1e9}, ADAM, ADAM),
    "clipping by layer": Options(
        {"max_norm": 0.05, "clip": "layer"}, ADAM, optax.chain(optax.stateless(clipped_by_layer), ADAM)
    ),
    "microbatches": Options({"microbatches": 4}, ADAMW, ADAMW, 2e-4, 2e-6),
    "a guard and clipping": Options({"max_norm": 0.1}, GUARDED, CLIPPED),
    "a guard and microbatches": Options({"keep_every": 2, "microbatches": 2}, GUARDED, GUARDED),
    # The moments of a complex leaf have an axis of two before that of the layers.
    "complex": Options({}, TURNED, TURNED, 1e-5),
    "factored moments": Options({}, FACTORED, FACTORED, 1e-3, 1e-4),  # Their first axis is that of the layers.
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_takes_the_ordinary_steps(name: str) -> None:
    options, tx, peer, rtol, atol = OPTIONS[name]
    params = init(turn=name == "complex")
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head, **options)), tx, params)
    compared = 3 if peer is tx else 2  # The same optimizer has the same state.
    expected = train(ordinary(peer), peer, params)
    chex.assert_trees_all_close(found[:compared], expected[:compared], rtol=rtol, atol=atol)


def test_the_aux_of_microbatches_is_stacked() -> None:
    def more(params: Any, h: Any, batch: Any) -> Any:
        return head(params, h, batch), h.mean()

    params = init(index=True)
    step = backward.value_and_step(ADAMW, embed, layer, more, microbatches=4, has_aux=True)
    (value, aux), *_ = jax.jit(step)(params, ADAMW.init(params), BATCHES[0])
    np.testing.assert_allclose(value, loss(params, BATCHES[0]), rtol=1e-5)
    assert aux.shape == (4,)


def test_a_guard_skips_the_whole_step() -> None:
    tx, params, *_ = expected_of("guard")
    step = jax.jit(backward.value_and_step(tx, embed, layer, head))
    broken = {**params, "layers": {**params["layers"], "b": params["layers"]["b"].at[1, 0].set(jnp.nan)}}
    start: Any = tx.init(params)
    _, after, state = step(broken, start, BATCHES[0])
    chex.assert_trees_all_equal((after, state.inner), (broken, start.inner))
    assert int(state.skipped) == int(state.consecutive) == 1


def test_lamb_takes_the_norm_of_each_layer() -> None:
    """Layers step as they would as separate leaves, even if `lamb` is not told that they are stacked."""
    tx, params = adam_fn.lamb(1e-2), init()
    with pytest.raises(ValueError, match="layers='blocks' names no parameters; there are embed"):
        adam_fn.lamb(1e-2, layers="blocks").update(params, tx.init(params), params)

    def apart(layers: Any) -> Any:
        return {f"{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(LAYERS)}

    @jax.jit
    def both(params: Any) -> Any:
        _, found, _ = backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])
        layers, grads = apart(params["layers"]), apart(jax.grad(loss)(params, BATCHES[0])["layers"])
        expected, _ = adam_fn.make_step(tx)(layers, tx.init(layers), grads)
        return apart(found["layers"]), expected

    chex.assert_trees_all_close(*both(params), rtol=1e-5)


def not_separate(tx: Any) -> tuple[str, dict[str, Any]]:
    return r"depends on the gradients of .*max_norm", {"tx": tx}


PARAMS = init()
SHORT_B = {**PARAMS, "layers": {**PARAMS["layers"], "b": jnp.ones((3, HIDDEN))}}


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("offload fetches the whole state", {"tx": adam_fn.offload(ADAM)}),
        # Divided along the axis of the layers, a layer's state would be on one device.
        (
            "zero1 divides layers/b along the axis of the layers: give it layers=",
            {"tx": adam_fn.zero1(ADAM, PARAMS, mesh_of(shape=(4,)))},
        ),
        ("layers='blocks' names no parameters; there are embed, layers/b,", {"layers": "blocks"}),
        (r"must have one length, got .*layers/b.*3", {"params": SHORT_B}),
        ("keep_every=3 does not divide the number of layers, 4", {"keep_every": 3}),
        ("must be at least 1, got 0 and 1", {"keep_every": 0}),
        ("3 microbatches do not divide a batch of shape", {"microbatches": 3}),
        ('clip must be "model" or "layer"', {"clip": "leaf"}),
        (r"does not have the structure of tx.init\(params\)", {"state": adam_fn.lion(1e-2).init(PARAMS)}),
        not_separate(optax.chain(optax.clip_by_global_norm(1.0), ADAM)),
        not_separate(optax.chain(adam_fn.clip_by_global_norm(1.0), ADAM)),
        not_separate(optax.apply_if_finite(ADAM, 3)),
        not_separate(adam_fn.swats(1e-2)),
        not_separate(optax.chain(GUARDED)),
        not_separate(optax.chain(optax.snapshot("norm", optax.tree.norm), ADAM)),
        (r"the state's 0/found_nan/.* depends on", {"tx": optax.chain(optax.zero_nans(), ADAM)}),
    ],
)
def test_errors_name_what_is_wrong(message: str, wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"tx": ADAM, "params": PARAMS, "state": None, **wrong}
    tx, params, state = (given.pop(key) for key in ("tx", "params", "state"))
    state = jax.eval_shape(tx.init, params) if state is None else state
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(backward.value_and_step(tx, embed, layer, head, **given), params, state, BATCHES[0])


def test_a_dependence_of_a_single_leaf_is_found_in_the_state() -> None:
    tx, params = optax.apply_if_finite(ADAM, 3), {"layers": {"w": jnp.ones((LAYERS, WIDTH))}}
    step = backward.value_and_step(tx, lambda p, b: b, lambda p, h, b: h * p["w"][None], lambda p, h, b: h.mean())
    with pytest.raises(ValueError, match="the state's notfinite_count depends on the gradients of layers/w"):
        step(params, tx.init(params), jnp.ones((2, WIDTH)))


def on_mesh(kind: AxisType) -> tuple[Any, Any]:
    """A mesh of eight devices, and the batches on each of them."""
    mesh = mesh_of(kind)
    return mesh, jax.device_put(BATCHES, NamedSharding(mesh, P()))


@KINDS
def test_fully_sharded_steps_equal_those_of_one_device(kind: AxisType) -> None:
    """Parameters and state are divided over the mesh and stay so."""
    tx, params = adam_fn.adamw(1e-2, storage="16bit"), init()
    expected = train(ordinary(tx), tx, params)
    mesh, batches = on_mesh(kind)
    last: dict[str, Any] = {"embed": P(None, "data"), "norm": P("data")}
    last["layers"] = {"w1": P(None, "data"), "b": P(), "w2": P(None, "data")}
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), last, is_leaf=lambda x: isinstance(x, P))
    params = jax.device_put(params, places)

    def gathered(function: Callable[..., Any]) -> Callable[..., Any]:
        """Gathers the parameters where they are used."""
        gather = jax.sharding.reshard if kind == AxisType.Explicit else jax.lax.with_sharding_constraint
        return lambda p, *rest: function(jax.tree.map(lambda x: gather(x, P()), p), *rest)

    with jax.set_mesh(mesh):
        step = jax.jit(backward.value_and_step(tx, *map(gathered, (embed, layer, head))))
        losses, found, state = train(step, tx, params, batches)
    chex.assert_trees_all_close((losses, found), expected[:2], rtol=1e-5, atol=1e-6)
    assert_placed((found, state[0].mu_nu), (places, places))


@pytest.mark.parametrize(("dtype", "kind"), [(jnp.float32, AxisType.Explicit), (jnp.bfloat16, AxisType.Auto)])
def test_zero1_keeps_the_state_divided_inside_the_loop(dtype: Any, kind: AxisType) -> None:
    """The parameters stay whole, and the numbers are those without `zero1`."""
    tx = adam_fn.adamw(1e-2, eps=1e-2, storage="16bit")
    tx = adam_fn.master_weights(tx) if dtype == jnp.bfloat16 else tx
    mesh, batches = on_mesh(kind)
    params = jax.device_put(init(dtype, index=True), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        spread = adam_fn.zero1(tx, params, mesh, layers="layers")
        expected, (losses, found, state) = (
            train(jax.jit(backward.value_and_step(x, embed, layer, head)), x, params, batches) for x in (tx, spread)
        )
    for x, y in zip(jax.tree.leaves((losses, found)), jax.tree.leaves(expected[:2]), strict=True):
        assert relative_error(np.asarray(x), np.asarray(y, np.float64)) <= (1e-5 if dtype == jnp.float32 else 1e-2)
    assert_placed(found, params)
    assert_placed(state, adam_fn.state_shardings(spread, params))
    words = [x for x in jax.tree.leaves(state) if x.shape == (LAYERS, WIDTH, HIDDEN)]
    assert words and all(x.sharding.shard_shape(x.shape) == (LAYERS, 1, HIDDEN) for x in words)


@pytest.mark.parametrize(("divide", "max_norm"), [(False, None), (True, None), (True, 0.1)])
def test_a_batch_divided_inside_shard_map_gives_the_ordinary_steps(divide: bool, max_norm: float | None) -> None:
    """Each device has a part of the batch; `jax.grad` sums the gradients, or zero1 as it divides them."""
    tx, params = adam_fn.adam(1e-2, eps=1e-2, storage=None if divide else "24bit"), init(index=not divide)
    mesh = mesh_of()
    spread = adam_fn.zero1(tx, params, mesh, layers="layers") if divide else tx
    places = jax.tree.map(lambda x: x.spec, adam_fn.state_shardings(spread, params)) if divide else P()

    def mean(params: Any, h: Any, batch: Any) -> Any:
        return jax.lax.pmean(head(params, h, batch), "data")

    step = jax.shard_map(
        backward.value_and_step(spread, embed, layer, mean, max_norm=max_norm),
        mesh=mesh,
        in_specs=(P(), places, P("data")),
        out_specs=(P(), P(), places),
    )
    peer = optax.chain(optax.clip_by_global_norm(max_norm), tx) if max_norm else tx
    losses, found, state = train(jax.jit(step), spread, params)
    chex.assert_trees_all_close((losses, found), train(ordinary(peer), peer, params)[:2], rtol=1e-4, atol=2e-5)
    assert ("reduce_scatter" in str(jax.make_jaxpr(step)(params, state, BATCHES[0]))) == divide


# Stacked layers in the frameworks' own idioms, and how to apply one.


class Block(nn.Module):
    @nn.compact
    def __call__(self, h: Any, _: Any) -> Any:
        return h + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(h))), None


def linen_scan() -> tuple[Any, Callable[..., Any]]:
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
    params = jax.jit(scan().init)(jax.random.key(0), jnp.ones((BATCH, WIDTH)), None)["params"]
    return params, lambda p, h, batch: Block().apply({"params": p}, h, None)[0]  # pyright: ignore[reportIndexIssue]


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one, self.two = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        return h + self.two(nnx.gelu(self.one(h)))


def nnx_vmap() -> tuple[Any, Callable[..., Any]]:
    layers = nnx.jit(lambda: nnx.vmap(NNXBlock, in_axes=0)(nnx.Rngs(0).split(LAYERS)))()
    graphdef, params = nnx.split(layers, nnx.Param)
    return nnx.to_pure_dict(params), lambda p, h, batch: nnx.merge(graphdef, p)(h)


def equinox_filtered() -> tuple[Any, Callable[..., Any]]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    layers = eqx.filter_jit(eqx.filter_vmap(lambda key: eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=key)))(keys)
    params, static = eqx.partition(layers, eqx.is_inexact_array)
    return params, lambda p, h, batch: h + jax.vmap(eqx.combine(p, static))(h)


class Root(eqx.Module):
    decoder: Any
    rest: Any


@pytest.mark.parametrize("framework", [linen_scan, nnx_vmap, equinox_filtered])
def test_stacked_layers_of_frameworks_take_the_ordinary_step(framework: Callable[[], Any]) -> None:
    """They are in a nested tree, with injected hyperparameters and groups."""
    groups = adam_fn.Groups({"*": Group(rate=0.5)}, complete=True)
    tx = optax.inject_hyperparams(lambda learning_rate: adam_fn.adamw(learning_rate, groups=groups))(learning_rate=1e-2)
    layers, apply = framework()
    params = Root({"blocks": layers}, init() | {"layers": None})

    def whole(params: Any, batch: Any) -> Any:
        return loss({**params.rest, "layers": params.decoder["blocks"]}, batch, apply)

    step = backward.value_and_step(
        tx,
        lambda p, batch: embed(p.rest, batch),
        apply,
        lambda p, h, batch: head(p.rest, h, batch),
        layers="decoder/blocks",
    )

    @jax.jit
    def both(params: Any, batch: Any) -> Any:
        state = tx.init(params)
        value, grads = jax.value_and_grad(whole)(params, batch)
        return step(params, state, batch), (value, *adam_fn.make_step(tx)(params, state, grads))

    chex.assert_trees_all_close(*both(params, BATCHES[0]), rtol=1e-4, atol=2e-6)


def test_no_gradient_of_all_layers_is_stored() -> None:
    """The program holds one layer's gradient beside the parameters, the state and the layers' inputs."""
    wide = {"layers": {"w": jnp.ones((16, 256, 256))}, "b": jnp.ones(256)}
    tx = adam_fn.adamw(1e-2)
    step = backward.value_and_step(
        tx,
        lambda p, batch: batch,
        lambda p, h, batch: jnp.tanh(h @ p["w"]),
        lambda p, h, batch: jnp.mean((h + p["b"][None]) ** 2),
    )
    text = jax.jit(step).lower(wide, tx.init(wide), jnp.ones((4, 256))).as_text()
    # The only arrays of the size of all layers are the parameters and the moments, changed in their places.
    assert {*re.findall(r"stablehlo\.(\w+)[^\n]*-> tensor<16x256x256xf32>", text)} == {"dynamic_update_slice"}
