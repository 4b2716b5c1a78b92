"""The step inside the backward pass is `value_and_grad` and then `make_step`, bit for bit, whatever the optimizer."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.runs import full_jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import Group, backward, masks

LAYERS, WIDTH, HIDDEN, BATCH, WORDS = 4, 8, 16, 8, 11


def init(dtype: Any = jnp.float32, *, index: bool = True) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)

    layers = {"w1": normal(LAYERS, WIDTH, HIDDEN), "b": normal(LAYERS, HIDDEN), "w2": normal(LAYERS, HIDDEN, WIDTH)}
    layers |= {"index": jnp.arange(LAYERS)} if index else {}
    return {"embed": normal(WORDS, WIDTH), "layers": layers, "norm": jnp.ones(WIDTH, dtype)}


def embed(params: Any, batch: Any) -> Any:
    return params["embed"][batch[0]]


def layer(p: Any, h: Any, batch: Any) -> Any:
    scale = 1 + 0.1 * p["index"].astype(h.dtype) if "index" in p else 1
    return h + jax.nn.gelu(h @ p["w1"] + p["b"][None]) @ p["w2"] * scale


def head(params: Any, h: Any, batch: Any) -> Any:
    """The embedding is used again."""
    logits = (h * params["norm"][None]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean()


def loss(params: Any, batch: Any, layer: Callable[..., Any] = layer) -> Any:
    h, _ = jax.lax.scan(lambda h, p: (layer(p, h, batch), None), embed(params, batch), params["layers"])
    return head(params, h, batch)


BATCHES = [tuple(map(jnp.asarray, x)) for x in np.random.default_rng(1).integers(WORDS, size=(3, 2, BATCH))]


def train(
    step: Callable[..., Any], tx: Any, params: Any, batches: Any = BATCHES, other: Callable[..., Any] | None = None
) -> Any:
    """Losses, parameters and state after some steps, every second of which is by `other`."""
    state, losses = jax.jit(tx.init)(params), []
    for i, batch in enumerate(batches):
        value, params, state = (step, other or step)[i % 2](params, state, batch)
        losses.append(value)
    return losses, params, state


def ordinary(tx: Any, change: Callable[[Any], Any] = lambda grads: grads, jit: Any = jax.jit) -> Callable[..., Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, batch)
        return value, *adam_fn.make_step(tx)(params, state, change(grads))

    return jit(step)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_near(found: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    def near(x: Any, y: Any) -> None:
        np.testing.assert_allclose(np.asarray(x, complex), np.asarray(y, complex), rtol=rtol, atol=atol)

    jax.tree.map(near, found, expected)


def one_step(step: Any, tx: Any, params: Any, whole: Callable[[Any, Any], Any]) -> Any:
    """The result of a step and that of an ordinary one, whose loss is of the whole model."""

    @jax.jit
    def both(params: Any, batch: Any) -> Any:
        state = tx.init(params)
        value, grads = jax.value_and_grad(whole)(params, batch)
        return step(params, state, batch), (value, *adam_fn.make_step(tx)(params, state, grads))

    return both(params, BATCHES[0])


def labels(params: Any) -> Any:
    return jax.tree.map(lambda chosen: "w1" if chosen else "rest", masks.path("layers/w1")(params))


RATE = optax.cosine_decay_schedule(1e-2, 10)


class Row(NamedTuple):
    """An optimizer, the parameters' dtype, and how to compile: as users do, but where only the tree is special."""

    make: Callable[[], Any]
    dtype: Any = jnp.float32
    jit: Any = full_jit
    indexed: bool = True


SAME: dict[str, Row] = {
    "adam": Row(lambda: adam_fn.adam(RATE)),
    "adamw, 16 bits, by rank": Row(
        lambda: adam_fn.adamw(1e-2, storage="16bit", mask=masks.rank(3), weight_decay=0.1),
    ),
    "masters": Row(lambda: adam_fn.master_weights(adam_fn.adamw(1e-2, storage="16bit")), jnp.bfloat16),
    "stochastic rounding": Row(
        lambda: adam_fn.stochastic_rounding(adam_fn.adamw(1e-2, storage="24bit"), 3), jnp.bfloat16
    ),
    "groups and frozen": Row(
        lambda: adam_fn.adamw(
            1e-2,
            storage="bfloat16",
            groups={"layers/w1": Group(rate=0.5), "norm": Group(frozen=True)},
            frozen=masks.path("layers/b"),
        ),
        jit=jax.jit,
    ),
    "a chain, stored and averaged": Row(
        lambda: optax.chain(
            adam_fn.stored(adam_fn.scale_by_adam()),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(0.01),
            adam_fn.average_params(0.9),
        )
    ),
    "a partition": Row(lambda: optax.partition({"w1": adam_fn.lion(1e-3), "rest": adam_fn.adan(1e-2)}, labels)),
    "lamb, cautious": Row(
        lambda: adam_fn.cautious(adam_fn.lamb(1e-2, weight_decay=0.1, layers="layers"), layers="layers")
    ),
    "optax": Row(lambda: optax.adamw(1e-2), jit=jax.jit, indexed=False),
}


@functools.cache
def expected_of(name: str) -> tuple[Any, Any, Callable[..., Any], Any]:
    """An optimizer of `SAME`, the parameters, its ordinary step and the result of some of them."""
    row = SAME[name]
    tx, params = row.make(), init(row.dtype, index=row.indexed)
    step = ordinary(tx, jit=row.jit)
    return tx, params, step, train(step, tx, params)


@pytest.mark.parametrize("name", SAME)
def test_the_same_steps_bit_for_bit(name: str) -> None:
    """Also of a run that alternates between these and ordinary steps."""
    tx, params, theirs, expected = expected_of(name)
    ours = SAME[name].jit(backward.value_and_step(tx, embed, layer, head))
    assert_same(train(ours, tx, params), expected)
    assert_same(train(ours, tx, params, other=theirs), expected)
    assert np.abs(np.asarray(expected[1]["layers"]["w2"] - params["layers"]["w2"], np.float32)).max() > 1e-3


@pytest.mark.parametrize("name", ["adamw, 16 bits, by rank", "masters", "stochastic rounding"])
def test_the_path_of_gpus_and_tpus_takes_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One array after the other, each computed anew, to the rounding of the arithmetic."""

    def default(*arguments: Any, default: Any, **_: Any) -> Any:
        return default(*arguments)

    tx, params, _, expected = expected_of(name)
    monkeypatch.setattr(jax.lax, "platform_dependent", default)
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head)), tx, params)
    assert_near(found[:2], expected[:2], 1e-5 if SAME[name].dtype == jnp.float32 else 2**-7, 1e-6)


@pytest.mark.parametrize("keep_every", [2, 4])
def test_fewer_kept_inputs(keep_every: int) -> None:
    tx, params, _, expected = expected_of("adamw, 16 bits, by rank")
    step = full_jit(backward.value_and_step(tx, embed, layer, head, keep_every=keep_every))
    assert_same(train(step, tx, params), expected)


def test_complex_parameters() -> None:
    """Their moments have an axis of two before that of the layers."""

    def turn(p: Any, h: Any, batch: Any) -> Any:
        return h * p["z"][None]

    def ends(params: Any, h: Any, batch: Any) -> Any:
        return jnp.mean(jnp.abs(h - 3 - 2j) ** 2) + params["w"] ** 2

    z = jnp.exp(1j * jnp.linspace(0, 1, LAYERS * 3)).reshape(LAYERS, 3).astype(jnp.complex64)
    params, tx = {"layers": {"z": z}, "w": jnp.ones(())}, adam_fn.adam(1e-2, storage="24bit")
    h = jnp.ones((2, 3), jnp.complex64)

    def whole(params: Any) -> Any:
        return ends(params, jax.lax.scan(lambda h, p: (turn(p, h, None), None), h, params["layers"])[0], None)

    step = backward.value_and_step(tx, lambda p, batch: h, turn, ends)
    (_, found, state), (_, expected, after) = one_step(step, tx, params, lambda p, batch: whole(p))
    assert_near(found, expected, 1e-5)
    assert_same(state[0].mu, after[0].mu)


def test_microbatches_and_aux() -> None:
    tx, params = adam_fn.adamw(1e-2), init()

    def more(params: Any, h: Any, batch: Any) -> Any:
        return head(params, h, batch), h.mean()

    make: Any = backward.value_and_step
    step = jax.jit(make(tx, embed, layer, more, microbatches=4, has_aux=True))
    losses, found, state = train(step, tx, params)
    assert losses[0][1].shape == (4,)
    assert_near(([x for x, _ in losses], found, state), train(ordinary(tx), tx, params), 2e-4, 2e-6)
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of shape"):
        make(tx, embed, layer, head, microbatches=3)(params, state, BATCHES[0])


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_by_the_global_norm(max_norm: float) -> None:
    tx, params = adam_fn.adam(1e-2, eps=1e-2), init(index=False)
    clipped = optax.chain(optax.clip_by_global_norm(max_norm), tx)
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head, max_norm=max_norm)), tx, params)
    assert_near(found[:2], train(ordinary(clipped), clipped, params)[:2], 1e-4, 1e-6)


def test_clipping_by_layer() -> None:
    tx, params, max_norm = adam_fn.adam(1e-2, eps=1e-2), init(index=False), 0.05

    def clipped(grads: Any) -> Any:
        layers = [jax.tree.map(lambda g, i=i: g[i], grads["layers"]) for i in range(LAYERS)]
        rest = {"embed": grads["embed"], "norm": grads["norm"]}
        parts = []
        for part in (*layers, rest):
            total = optax.tree.norm(part)
            parts.append(jax.tree.map(lambda g, total=total: g * jnp.minimum(1, max_norm / total), part))
        return {**parts[-1], "layers": jax.tree.map(lambda *g: jnp.stack(g), *parts[:-1])}

    step = jax.jit(backward.value_and_step(tx, embed, layer, head, max_norm=max_norm, clip="layer"))
    assert_near(train(step, tx, params)[:2], train(ordinary(tx, clipped), tx, params)[:2], 1e-4, 1e-6)
    with pytest.raises(ValueError, match='clip must be "model" or "layer"'):
        backward.value_and_step(tx, embed, layer, head, clip="leaf")  # pyright: ignore[reportArgumentType]


def test_a_guard_skips_the_whole_step() -> None:
    tx, params = adam_fn.skip_nonfinite(adam_fn.adamw(1e-2, storage="16bit")), init()
    step = jax.jit(backward.value_and_step(tx, embed, layer, head))
    assert_same(train(step, tx, params), train(ordinary(tx), tx, params))
    broken = jax.tree.map(jnp.copy, params)
    broken["layers"]["w1"] = broken["layers"]["w1"].at[1, 0, 0].set(jnp.nan)
    _, after, state = step(broken, tx.init(params), BATCHES[0])
    assert_same(after, broken)
    assert int(state.skipped) == int(state.consecutive) == 1
    untouched: Any = tx.init(params)
    assert_same(state.inner, untouched.inner)


def test_norms_are_those_of_layers() -> None:
    """`lamb` takes a norm of each layer, as of layers apart, also where it does not know of the stack."""
    tx, params = adam_fn.lamb(1e-2), init(index=False)
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

    assert_near(*both(params), rtol=1e-5)


def test_what_needs_all_gradients_is_an_error() -> None:
    params = init(index=False)
    wrong: list[Any] = [
        optax.chain(optax.clip_by_global_norm(1.0), adam_fn.adam(1e-2)),
        optax.chain(adam_fn.clip_by_global_norm(1.0), adam_fn.adam(1e-2)),
        optax.apply_if_finite(adam_fn.adam(1e-2), 3),
        adam_fn.swats(1e-2),
        optax.chain(adam_fn.skip_nonfinite(adam_fn.adam(1e-2))),
        optax.chain(optax.snapshot("norm", optax.tree.norm), adam_fn.adam(1e-2)),
    ]
    for tx in wrong:
        with pytest.raises(ValueError, match=r"depends on the gradients of .*max_norm"):
            step = backward.value_and_step(tx, embed, layer, head)
            jax.eval_shape(step, params, jax.eval_shape(tx.init, params), BATCHES[0])
    # Of a single leaf only the state tells.
    alone = {"layers": {"w": jnp.ones((LAYERS, WIDTH))}}
    with pytest.raises(ValueError, match="the state's notfinite_count depends on the gradients of layers/w"):
        backward.value_and_step(wrong[2], lambda p, b: b, lambda p, h, b: h * p["w"][None], lambda p, h, b: h.mean())(
            alone, wrong[2].init(alone), jnp.ones((2, WIDTH))
        )


def test_factored_moments_keep_the_layers_first() -> None:
    """Adafactor's factored moments have the layers first; what has no axis for them is an error."""
    params = init(index=False)
    tx: Any = optax.adafactor(
        1e-2, min_dim_size_to_factor=8, multiply_by_parameter_scale=False, clipping_threshold=None
    )
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head)), tx, params)
    assert_near(found, train(ordinary(tx), tx, params), 1e-3, 1e-4)
    tx = optax.chain(optax.zero_nans(), adam_fn.adam(1e-2))
    with pytest.raises(ValueError, match=r"the state's 0/found_nan/.* depends on"):
        backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"keep_every": 2, "microbatches": 2}])
def test_a_guard_with_other_options(options: dict[str, Any]) -> None:
    params, plain = init(), adam_fn.adamw(1e-2)
    guarded = adam_fn.skip_nonfinite(plain)
    _, expected, state = train(jax.jit(backward.value_and_step(plain, embed, layer, head, **options)), plain, params)
    found = train(jax.jit(backward.value_and_step(guarded, embed, layer, head, **options)), guarded, params)
    assert_near(found[1], expected, 1e-5, 1e-7)
    assert int(found[2].inner[0].count) == int(state[0].count) == 3 and int(found[2].skipped) == 0


class Root(eqx.Module):
    decoder: Any
    rest: Any


def test_injected_hyperparameters_groups_and_nested_paths() -> None:
    groups = adam_fn.Groups({"*": Group(rate=0.5)}, complete=True)
    tx = optax.inject_hyperparams(lambda learning_rate: adam_fn.adam(learning_rate, groups=groups))(learning_rate=1e-2)
    rest = init(index=False)
    params = Root({"blocks": rest.pop("layers")}, rest)
    step = backward.value_and_step(
        tx,
        lambda p, batch: embed(p.rest, batch),
        layer,
        lambda p, h, batch: head(p.rest, h, batch),
        layers="decoder/blocks",
    )

    def whole(p: Any, batch: Any) -> Any:
        return loss({**p.rest, "layers": p.decoder["blocks"]}, batch)

    assert_near(*one_step(step, tx, params, whole), rtol=1e-4, atol=2e-6)


def test_errors_name_what_is_wrong() -> None:
    tx, params = adam_fn.adam(1e-2), init()
    state = tx.init(params)

    def run(params: Any = params, state: Any = state, **options: Any) -> Any:
        return backward.value_and_step(tx, embed, layer, head, **options)(params, state, BATCHES[0])

    with pytest.raises(ValueError, match="offload fetches the whole state"):
        backward.value_and_step(adam_fn.offload(tx), embed, layer, head)(params, state, BATCHES[0])
    with pytest.raises(ValueError, match=r"layers='blocks' names no parameters; there are embed, layers/b,"):
        run(layers="blocks")
    with pytest.raises(ValueError, match=r"must have one length, got .*layers/b.*3"):
        run({**params, "layers": {**params["layers"], "b": jnp.ones((3, HIDDEN))}})
    with pytest.raises(ValueError, match="keep_every=3 does not divide the number of layers, 4"):
        run(keep_every=3)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        run(keep_every=0)
    with pytest.raises(ValueError, match=r"does not have the structure of tx.init\(params\)"):
        run(state=adam_fn.lion(1e-2).init(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fully_sharded(kind: AxisType) -> None:
    """Parameters and state are divided over the mesh and stay so; the numbers are those of one device."""
    tx, params = adam_fn.adamw(1e-2, storage="16bit"), init(index=False)
    expected = train(ordinary(tx), tx, params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    last: dict[str, Any] = {"embed": PartitionSpec(None, "data"), "norm": PartitionSpec("data")}
    last["layers"] = {"w1": PartitionSpec(None, "data"), "b": PartitionSpec(), "w2": PartitionSpec(None, "data")}
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), last, is_leaf=lambda x: isinstance(x, PartitionSpec))
    params = jax.tree.map(jax.device_put, params, places)

    def whole(p: Any) -> Any:
        """Gathers a parameter where it is used."""
        everywhere = jax.tree.map(lambda _: PartitionSpec(), p)
        if kind == AxisType.Explicit:
            return jax.tree.map(jax.sharding.reshard, p, everywhere)
        return jax.lax.with_sharding_constraint(p, everywhere)

    with jax.set_mesh(mesh):
        batches = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec())) for batch in BATCHES]
        step = jax.jit(
            backward.value_and_step(
                tx,
                lambda p, batch: embed(whole(p), batch),
                lambda p, h, batch: layer(whole(p), h, batch),
                lambda p, h, batch: head(whole(p), h, batch),
            )
        )
        losses, found, state = train(step, tx, params, batches)
    assert_near((losses, found), expected[:2], 1e-5, 1e-6)
    for x in (found["layers"]["w1"], state[0].mu_nu["layers"]["w1"]):
        assert x.sharding.is_equivalent_to(places["layers"]["w1"], x.ndim)


@pytest.mark.parametrize(("dtype", "kind"), [(jnp.float32, AxisType.Explicit), (jnp.bfloat16, AxisType.Auto)])
def test_zero1(dtype: Any, kind: AxisType) -> None:
    """The state stays divided, also inside the loop; parameters stay whole, and the numbers are those without it."""
    tx, params = adam_fn.adamw(1e-2, eps=1e-2, storage="16bit"), init(dtype)
    tx = adam_fn.master_weights(tx) if dtype == jnp.bfloat16 else tx
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        spread = adam_fn.zero1(tx, params, mesh, layers="layers")
        batches = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec())) for batch in BATCHES]
        ways = [jax.jit(backward.value_and_step(x, embed, layer, head)) for x in (tx, spread)]
        expected, found = (train(step, x, params, batches) for step, x in zip(ways, (tx, spread), strict=True))

    def near(x: Any, y: Any) -> None:
        x, y = np.asarray(x, float), np.asarray(y, float)
        assert np.linalg.norm(x - y) <= (1e-5 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(y)

    jax.tree.map(near, found[:2], expected[:2])
    _, found, state = found

    def is_there(x: jax.Array, place: NamedSharding) -> bool:
        return x.sharding.is_equivalent_to(place, x.ndim)

    assert all(jax.tree.leaves(jax.tree.map(is_there, state, adam_fn.state_shardings(spread, params))))
    words = [x for x in jax.tree.leaves(state) if x.shape == (LAYERS, WIDTH, HIDDEN)]
    assert words and all(x.sharding.shard_shape(x.shape) == (LAYERS, 1, HIDDEN) for x in words)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: x.sharding.is_fully_replicated, found))), found


@pytest.mark.parametrize(("divide", "max_norm"), [(False, None), (True, None), (True, 0.1)])
def test_a_batch_divided_inside_shard_map_gives_the_ordinary_steps(divide: bool, max_norm: float | None) -> None:
    """Each device has a part of the batch; gradients are summed where `jax.grad` does, or where zero1 divides them."""
    tx, params = adam_fn.adam(1e-2, eps=1e-2, storage=None if divide else "24bit"), init(index=not divide)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = adam_fn.zero1(tx, params, mesh, layers="layers") if divide else tx
    places = jax.tree.map(lambda x: x.spec, adam_fn.state_shardings(spread, params)) if divide else PartitionSpec()

    def mean(params: Any, h: Any, batch: Any) -> Any:
        return jax.lax.pmean(head(params, h, batch), "data")

    step = jax.shard_map(
        backward.value_and_step(spread, embed, layer, mean, max_norm=max_norm),
        mesh=mesh,
        in_specs=(PartitionSpec(), places, PartitionSpec("data")),
        out_specs=(PartitionSpec(), PartitionSpec(), places),
    )
    peer = optax.chain(optax.clip_by_global_norm(max_norm), tx) if max_norm else tx
    losses, found, state = train(jax.jit(step), spread, params)
    assert_near((losses, found), train(ordinary(peer), peer, params)[:2], 1e-4, 2e-5)
    assert ("reduce_scatter" in str(jax.make_jaxpr(step)(params, state, BATCHES[0]))) == divide


def test_zero1_must_know_the_layers() -> None:
    """Divided along the axis of the layers, a layer's state would be on one device."""
    mesh, params = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), init(index=False)
    tx = adam_fn.zero1(adam_fn.adam(1e-2), params, mesh)
    with pytest.raises(ValueError, match=r"zero1 divides layers/b along the axis of the layers: give it layers="):
        backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])


# In the frameworks' own idioms: stacked layers, and how to apply one.


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


@pytest.mark.parametrize("framework", [linen_scan, nnx_vmap, equinox_filtered])
def test_layers_of_frameworks(framework: Callable[[], Any]) -> None:
    tx, (layers, apply) = adam_fn.adamw(1e-2), framework()
    step = backward.value_and_step(tx, embed, apply, head)
    params = {**init(), "layers": layers}
    assert_near(*one_step(step, tx, params, functools.partial(loss, layer=apply)), rtol=1e-4, atol=2e-6)


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
