"""The step inside the backward pass is `value_and_grad` and then `make_step`, bit for bit, whatever the optimizer."""

import re
from collections.abc import Callable
from typing import Any

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
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "embed": (WORDS, WIDTH),
        "w1": (LAYERS, WIDTH, HIDDEN),
        "b": (LAYERS, HIDDEN),
        "w2": (LAYERS, HIDDEN, WIDTH),
    }
    found = {k: (0.3 * jax.random.normal(key, shapes[k])).astype(dtype) for k, key in zip(shapes, keys, strict=True)}
    layers = {k: found[k] for k in ("w1", "b", "w2")} | ({"index": jnp.arange(LAYERS)} if index else {})
    return {"embed": found["embed"], "layers": layers, "norm": jnp.ones(WIDTH, dtype)}


def embed(params: Any, batch: Any) -> Any:
    return params["embed"][batch[0]]


def layer(p: Any, h: Any, batch: Any) -> Any:
    scale = 1 + 0.1 * p["index"].astype(h.dtype) if "index" in p else 1
    return h + jax.nn.gelu(h @ p["w1"] + p["b"][None]) @ p["w2"] * scale


def head(params: Any, h: Any, batch: Any) -> Any:
    """The embedding is used again."""
    logits = (h * params["norm"][None]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[1]).mean()


def loss(params: Any, batch: Any) -> Any:
    h, _ = jax.lax.scan(lambda h, p: (layer(p, h, batch), None), embed(params, batch), params["layers"])
    return head(params, h, batch)


BATCHES = [tuple(jax.random.randint(jax.random.key(2 * i + j), (BATCH,), 0, WORDS) for j in range(2)) for i in range(3)]


def train(step: Callable[..., Any], tx: Any, params: Any, batches: Any = BATCHES) -> Any:
    """Losses, parameters and state after some steps."""
    state, losses = tx.init(params), []
    for batch in batches:
        value, params, state = step(params, state, batch)
        losses.append(value)
    return losses, params, state


def ordinary(tx: Any, change: Callable[[Any], Any] = lambda grads: grads) -> Callable[..., Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss, allow_int=True)(params, batch)
        return value, *adam_fn.make_step(tx)(params, state, change(grads))

    return full_jit(step)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda chosen: "w1" if chosen else "rest", masks.path("layers/w1")(params))


RATE = optax.cosine_decay_schedule(1e-2, 10)
SAME: dict[str, tuple[Callable[[], Any], Any]] = {
    "adam": (lambda: adam_fn.adam(RATE), jnp.float32),
    "adamw, 16 bits, by rank": (
        lambda: adam_fn.adamw(1e-2, storage="16bit", mask=masks.rank(3), weight_decay=0.1),
        jnp.float32,
    ),
    "24 bits": (lambda: adam_fn.adam(1e-2, storage="24bit"), jnp.float32),
    "groups": (
        lambda: adam_fn.adamw(1e-2, groups={"layers/w1": Group(rate=0.5), "norm": Group(frozen=True)}),
        jnp.float32,
    ),
    "frozen": (lambda: adam_fn.adamw(1e-2, storage="bfloat16", frozen=masks.path("layers/b")), jnp.float32),
    "a chain": (
        lambda: optax.chain(
            adam_fn.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01)
        ),
        jnp.float32,
    ),
    "a partition": (
        lambda: optax.partition({"w1": adam_fn.lion(1e-3), "rest": adam_fn.adan(1e-2)}, labels),
        jnp.float32,
    ),
    "masters": (lambda: adam_fn.master_weights(adam_fn.adamw(1e-2, storage="16bit")), jnp.bfloat16),
    "stochastic rounding": (lambda: adam_fn.stochastic_rounding(adam_fn.adamw(1e-2, storage="24bit"), 3), jnp.bfloat16),
    "stored": (lambda: optax.chain(adam_fn.stored(adam_fn.scale_by_adam()), optax.scale(-0.01)), jnp.float32),
    "lamb": (lambda: adam_fn.lamb(1e-2, weight_decay=0.1, layers="layers"), jnp.float32),
    "cautious": (lambda: adam_fn.cautious(adam_fn.adamw(1e-2), layers="layers"), jnp.float32),
    "average": (lambda: optax.chain(adam_fn.adam(1e-2), adam_fn.average_params(0.9)), jnp.float32),
}


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["adamw, 16 bits, by rank", "24 bits", "masters", "stochastic rounding"])
def test_the_path_of_gpus_and_tpus_takes_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One array after the other, each computed anew, to the rounding of the arithmetic."""

    def default(*arguments: Any, default: Any, **_: Any) -> Any:
        return default(*arguments)

    make, dtype = SAME[name]
    tx, params = make(), init(dtype)
    expected = train(ordinary(tx), tx, params)
    monkeypatch.setattr(jax.lax, "platform_dependent", default)
    found = train(jax.jit(backward.value_and_step(tx, embed, layer, head)), tx, params)
    rtol, atol = (1e-5, 1e-6) if dtype == jnp.float32 else (2**-7, 1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=rtol, atol=atol),
        found[:2],
        expected[:2],
    )


@pytest.mark.parametrize("name", SAME)
def test_the_same_steps_bit_for_bit(name: str) -> None:
    make, dtype = SAME[name]
    tx, params = make(), init(dtype)
    expected = train(ordinary(tx), tx, params)
    assert_same(train(full_jit(backward.value_and_step(tx, embed, layer, head)), tx, params), expected)
    assert np.abs(np.asarray(expected[1]["layers"]["w2"] - params["layers"]["w2"], np.float32)).max() > 1e-3


def test_a_run_may_alternate_between_these_and_ordinary_steps() -> None:
    params = init(index=False)
    tx = optax.adamw(1e-2)
    ours, theirs = full_jit(backward.value_and_step(tx, embed, layer, head)), ordinary(tx)
    expected = train(theirs, tx, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), train(ours, tx, params), expected)
    tx = adam_fn.adamw(1e-2)
    ours, theirs = full_jit(backward.value_and_step(tx, embed, layer, head)), ordinary(tx)
    expected, state = train(theirs, tx, params), tx.init(params)
    for i, batch in enumerate(BATCHES):
        _, params, state = (ours, theirs)[i % 2](params, state, batch)
    assert_same((params, state), expected[1:])


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

    step = full_jit(backward.value_and_step(tx, lambda p, batch: h, turn, ends))
    _, found, state = step(params, tx.init(params), None)
    grads = jax.grad(whole)(params)
    expected, after = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, after[0].mu)


@pytest.mark.parametrize("keep_every", [2, 4])
def test_fewer_kept_inputs(keep_every: int) -> None:
    tx, params = adam_fn.adamw(1e-2, storage="24bit"), init()
    step = full_jit(backward.value_and_step(tx, embed, layer, head, keep_every=keep_every))
    assert_same(train(step, tx, params), train(ordinary(tx), tx, params))


def test_microbatches_and_aux() -> None:
    tx, params = adam_fn.adamw(1e-2), init()

    def more(params: Any, h: Any, batch: Any) -> Any:
        return head(params, h, batch), h.mean()

    make: Any = backward.value_and_step
    step = full_jit(make(tx, embed, layer, more, microbatches=4, has_aux=True))
    losses, found, state = train(step, tx, params)
    expected = train(ordinary(tx), tx, params)
    assert losses[0][1].shape == (4,)
    for a, b in ((([x for x, _ in losses], found, state), expected),):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of shape"):
        make(tx, embed, layer, head, microbatches=3)(params, state, BATCHES[0])


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_by_the_global_norm(max_norm: float) -> None:
    tx, params = adam_fn.adam(1e-2, eps=1e-2), init(index=False)
    clipped = optax.chain(optax.clip_by_global_norm(max_norm), tx)
    losses, expected, _ = train(ordinary(clipped), clipped, params)
    found = train(full_jit(backward.value_and_step(tx, embed, layer, head, max_norm=max_norm)), tx, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found[:2], (losses, expected))


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

    losses, expected, _ = train(ordinary(tx, clipped), tx, params)
    run = backward.value_and_step(tx, embed, layer, head, max_norm=max_norm, clip="layer")
    found = train(full_jit(run), tx, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found[:2], (losses, expected))
    with pytest.raises(ValueError, match='clip must be "model" or "layer"'):
        backward.value_and_step(tx, embed, layer, head, clip="leaf")  # pyright: ignore[reportArgumentType]


def test_a_guard_skips_the_whole_step() -> None:
    tx, params = adam_fn.skip_nonfinite(adam_fn.adamw(1e-2, storage="16bit")), init()
    step = full_jit(backward.value_and_step(tx, embed, layer, head))
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
    _, found, _ = backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])
    with pytest.raises(ValueError, match="layers='blocks' names no parameters; there are embed"):
        adam_fn.lamb(1e-2, layers="blocks").update(params, tx.init(params), params)
    apart = {f"{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(LAYERS)}
    grads = jax.grad(loss)(params, BATCHES[0])["layers"]
    grads = {i: jax.tree.map(lambda x, i=i: x[int(i)], grads) for i in apart}
    expected, _ = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, apart), tx.init(apart), grads)
    for i in apart:
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[int(i)], y, rtol=1e-5), found["layers"], expected[i]
        )


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
            backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])
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
    _, found, state = train(full_jit(backward.value_and_step(tx, embed, layer, head)), tx, params)
    _, expected, after = train(ordinary(tx), tx, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), (found, state), (expected, after))
    tx = optax.chain(optax.zero_nans(), adam_fn.adam(1e-2))
    with pytest.raises(ValueError, match=r"the state's 0/found_nan/.* depends on"):
        backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"keep_every": 2}, {"microbatches": 2}])
def test_a_guard_with_other_options(options: dict[str, Any]) -> None:
    params, plain = init(), adam_fn.adamw(1e-2)
    guarded = adam_fn.skip_nonfinite(plain)
    _, expected, state = train(jax.jit(backward.value_and_step(plain, embed, layer, head, **options)), plain, params)
    found = train(jax.jit(backward.value_and_step(guarded, embed, layer, head, **options)), guarded, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found[1], expected)
    assert int(found[2].inner[0].count) == int(state[0].count) == 3 and int(found[2].skipped) == 0


def test_injected_hyperparameters_groups_and_nested_paths() -> None:
    groups = adam_fn.Groups({"*": Group(rate=0.5)}, complete=True)
    tx = optax.inject_hyperparams(lambda learning_rate: adam_fn.adam(learning_rate, groups=groups))(learning_rate=1e-2)
    params = {
        "decoder": {"blocks": init(index=False)["layers"]},
        "rest": {"embed": init()["embed"], "norm": init()["norm"]},
    }
    step = backward.value_and_step(
        tx,
        lambda p, batch: embed(p["rest"], batch),
        layer,
        lambda p, h, batch: head(p["rest"], h, batch),
        layers="decoder/blocks",
    )

    def whole(p: Any, batch: Any) -> Any:
        return loss({**p["rest"], "layers": p["decoder"]["blocks"]}, batch)

    _compare(step, tx, params, whole)


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


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_fully_sharded(axes: AxisType) -> None:
    """Parameters and state are divided over the mesh and stay so; the numbers are those of one device."""
    tx, params = adam_fn.adamw(1e-2, storage="16bit"), init(index=False)
    expected = train(ordinary(tx), tx, params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    last: dict[str, Any] = {"embed": PartitionSpec(None, "data"), "norm": PartitionSpec("data")}
    last["layers"] = {"w1": PartitionSpec(None, "data"), "b": PartitionSpec(), "w2": PartitionSpec(None, "data")}
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), last, is_leaf=lambda x: isinstance(x, PartitionSpec))
    params = jax.tree.map(jax.device_put, params, places)

    def whole(p: Any, *axes: Any) -> Any:
        """Gathers a parameter where it is used."""
        everywhere = jax.tree.map(lambda _: PartitionSpec(), p)
        if axis_type == AxisType.Explicit:
            return jax.tree.map(jax.sharding.reshard, p, everywhere)
        return jax.lax.with_sharding_constraint(p, everywhere)

    axis_type = axes
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
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), (losses, found), expected[:2])
    for x in (found["layers"]["w1"], state[0].mu_nu["layers"]["w1"]):
        assert x.sharding.is_equivalent_to(places["layers"]["w1"], x.ndim)


def test_a_batch_divided_inside_shard_map_gives_the_ordinary_steps() -> None:
    """Each device has a part of the batch; gradients are summed where `jax.grad` sums them."""
    tx, params = adam_fn.adamw(1e-2, storage="24bit"), init()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def mean(params: Any, h: Any, batch: Any) -> Any:
        return jax.lax.pmean(head(params, h, batch), "data")

    run = jax.shard_map(
        backward.value_and_step(tx, embed, layer, mean),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    losses, found, _ = train(jax.jit(run), tx, params)
    expected = train(ordinary(tx), tx, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), (losses, found), expected[:2])


def _divided(tx: Any, params: Any, mesh: Any) -> Any:
    return adam_fn.zero1(tx, params, mesh, layers="layers")


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero1(dtype: Any, axes: AxisType) -> None:
    """The state stays divided, also inside the loop; parameters stay whole, and the numbers are those without it."""
    tx, params = adam_fn.adamw(1e-2, eps=1e-2, storage="16bit"), init(dtype)
    tx = adam_fn.master_weights(tx) if dtype == jnp.bfloat16 else tx
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        spread = _divided(tx, params, mesh)
        batches = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec())) for batch in BATCHES]
        ways = [full_jit(backward.value_and_step(x, embed, layer, head)) for x in (tx, spread)]
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


def test_zero1_inside_shard_map() -> None:
    """The gradients of a layer, of each device's part of the batch, are summed where they are divided."""
    tx, params = adam_fn.adamw(1e-2), init(index=False)
    expected = train(ordinary(tx), tx, params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = _divided(tx, params, mesh)
    places = jax.tree.map(lambda x: x.spec, adam_fn.state_shardings(spread, params))

    def mean(params: Any, h: Any, batch: Any) -> Any:
        return jax.lax.pmean(head(params, h, batch), "data")

    def run(**options: Any) -> Any:
        step = jax.shard_map(
            backward.value_and_step(spread, embed, layer, mean, **options),
            mesh=mesh,
            in_specs=(PartitionSpec(), places, PartitionSpec("data")),
            out_specs=(PartitionSpec(), PartitionSpec(), places),
        )
        return train(jax.jit(step), spread, params), step

    (losses, found, state), step = run()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), (losses, found), expected[:2])
    text = str(jax.make_jaxpr(step)(params, state, BATCHES[0]))
    assert "reduce_scatter" in text
    clipped = optax.chain(optax.clip_by_global_norm(0.1), adam_fn.adam(1e-2, eps=1e-2))
    tx = adam_fn.adam(1e-2, eps=1e-2)
    expected = train(ordinary(clipped), clipped, params)
    spread = _divided(tx, params, mesh)
    places = jax.tree.map(lambda x: x.spec, adam_fn.state_shardings(spread, params))
    (losses, found, _), _ = run(max_norm=0.1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), (losses, found), expected[:2])


def test_zero1_must_know_the_layers() -> None:
    """Divided along the axis of the layers, a layer's state would be on one device."""
    mesh, params = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), init(index=False)
    tx = adam_fn.zero1(adam_fn.adam(1e-2), params, mesh)
    with pytest.raises(ValueError, match=r"zero1 divides layers/b along the axis of the layers: give it layers="):
        backward.value_and_step(tx, embed, layer, head)(params, tx.init(params), BATCHES[0])


# In the frameworks' own idioms.


class Block(nn.Module):
    @nn.compact
    def __call__(self, h: Any, _: Any) -> Any:
        return h + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(h))), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        h = nn.Embed(WORDS, WIDTH)(tokens)
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        h, _ = scan(name="layers")(h, None)
        return nn.Dense(WORDS)(h)


def cross_entropy(logits: Any, batch: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def test_linen_scan() -> None:
    model, tx = Stacked(), adam_fn.adamw(1e-2)
    params = model.init(jax.random.key(0), BATCHES[0][0])["params"]
    step = backward.value_and_step(
        tx,
        lambda p, batch: nn.Embed(WORDS, WIDTH).apply({"params": p["Embed_0"]}, batch[0]),
        lambda p, h, batch: Block().apply({"params": p}, h, None)[0],  # pyright: ignore[reportIndexIssue]
        lambda p, h, batch: cross_entropy(nn.Dense(WORDS).apply({"params": p["Dense_0"]}, h), batch),
    )
    _compare(step, tx, params, lambda p, batch: cross_entropy(model.apply({"params": p}, batch[0]), batch))


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one, self.two = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        return h + self.two(nnx.gelu(self.one(h)))


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.head = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WORDS, rngs=rngs)
        self.layers = nnx.vmap(NNXBlock, in_axes=0)(rngs.split(LAYERS))


def test_nnx_scan() -> None:
    model, tx = NNXModel(nnx.Rngs(0)), adam_fn.adamw(1e-2)
    block = nnx.graphdef(NNXBlock(nnx.Rngs(0)))
    embedding, final = nnx.graphdef(model.embed), nnx.graphdef(model.head)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def merged(graphdef: Any, p: Any) -> Any:
        return nnx.merge(graphdef, p)

    def whole(p: Any, batch: Any) -> Any:
        h = merged(embedding, p["embed"])(batch[0])
        h, _ = jax.lax.scan(lambda h, q: (merged(block, q)(h), None), h, p["layers"])
        return cross_entropy(merged(final, p["head"])(h), batch)

    step = backward.value_and_step(
        tx,
        lambda p, batch: merged(embedding, p["embed"])(batch[0]),
        lambda p, h, batch: merged(block, p)(h),
        lambda p, h, batch: cross_entropy(merged(final, p["head"])(h), batch),
    )
    _compare(step, tx, params, whole)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    layers: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        first, second, third = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=first)
        keys = jax.random.split(second, LAYERS)
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=key))(keys)
        self.head = eqx.nn.Linear(WIDTH, WORDS, key=third)


def test_equinox_filtered_layers() -> None:
    tx = adam_fn.adamw(1e-2)
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)

    def layer(p: Any, h: Any, batch: Any) -> Any:
        return h + jax.vmap(eqx.combine(p, static.layers))(h)

    def ends(p: Any, h: Any, batch: Any) -> Any:
        return cross_entropy(jax.vmap(p.head)(h), batch)

    def whole(p: Any, batch: Any) -> Any:
        h, _ = jax.lax.scan(lambda h, q: (layer(q, h, batch), None), jax.vmap(p.embed)(batch[0]), p.layers)
        return ends(p, h, batch)

    step = backward.value_and_step(tx, lambda p, batch: jax.vmap(p.embed)(batch[0]), layer, ends)
    _compare(step, tx, params, whole)


def _compare(step: Any, tx: Any, params: Any, whole: Any) -> None:
    """A step beside that of a whole model."""
    value, found, state = jax.jit(step)(params, tx.init(params), BATCHES[0])
    expected, grads = jax.value_and_grad(whole)(params, BATCHES[0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    new, after = adam_fn.make_step(tx)(jax.tree.map(jnp.copy, params), tx.init(params), grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6), (found, state), (new, after))


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
