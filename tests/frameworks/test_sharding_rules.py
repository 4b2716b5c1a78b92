"""The rules by which frameworks divide a state over a mesh: with each, moments live where their parameters do.

Every form of a state is checked where it is made; one after the other is trained. Frozen leaves have no moments, and
`optax.MaskedNode` in their place: two of the rules cannot take it, from `optax.masked` neither (`MASKED_FAILS`). With
a rate of 0 the leaves stay as they are too, and every rule finds arrays.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import spmd
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn

P = PartitionSpec
AXES = ("fsdp", "tp")
TXS: dict[str, Callable[[], Any]] = {
    "float32": lambda: adam_fn.adamw(1e-2),
    "16bit": lambda: adam_fn.adamw(1e-2, storage="16bit"),
    "masters": lambda: adam_fn.master_weights(adam_fn.adamw(1e-2, storage="16bit"), bits=8),
    "frozen": lambda: adam_fn.adamw(1e-2, storage="24bit", frozen=adam_fn.masks.path("*norm*")),
    "rate 0": lambda: adam_fn.adamw(1e-2, storage="24bit", groups={"*norm*": adam_fn.Group(rate=0.0)}),
}
#: Where the parameters live; the norm is float32 among bfloat16 ones under masters.
SPECS = {
    "embed": P("tp", "fsdp"),
    "norm": {"scale": P(None)},
    "up": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
    "down": {"kernel": P("tp", "fsdp"), "bias": P("fsdp")},
}
SHAPES = {
    "embed": (32, 16),
    "norm": {"scale": (16,)},
    "up": {"kernel": (16, 64), "bias": (64,)},
    "down": {"kernel": (64, 32), "bias": (32,)},
}
TOKENS = jnp.arange(64) % 32


def is_spec(x: object) -> bool:
    return isinstance(x, P)


def mesh_of() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def dtype_of(name: str) -> Any:
    return jnp.bfloat16 if name == "masters" else jnp.float32


def parameters(name: str) -> Any:
    def leaf(shape: tuple[int, ...]) -> jax.Array:
        values = 0.1 * np.random.default_rng(len(shape)).standard_normal(shape)
        return jnp.ones(shape) if shape == (16,) else jnp.asarray(values, dtype_of(name))

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def loss(params: Any) -> jax.Array:
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    hidden = wide["embed"][TOKENS] * wide["norm"]["scale"][None]
    hidden = jax.nn.relu(hidden @ wide["up"]["kernel"] + wide["up"]["bias"][None])
    logits = hidden @ wide["down"]["kernel"] + wide["down"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, (TOKENS + 1) % 32).mean()


def check_places(state: Any, places: dict[tuple[int, ...], Any]) -> None:
    """Every array of a parameter's shape is divided like it; each shape occurs once."""
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert arrays
    for x in arrays:
        assert x.sharding.is_equivalent_to(places[x.shape], x.ndim), (x.shape, x.dtype, x.sharding)


def places_of(mesh: Any, specs: Any = None) -> dict[tuple[int, ...], NamedSharding]:
    shapes = jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    found = jax.tree.leaves(SPECS if specs is None else specs, is_leaf=is_spec)
    return {shape: NamedSharding(mesh, spec) for shape, spec in zip(shapes, found, strict=True)}


def trained(tx: Any, params: Any, state: Any) -> None:
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    homes = jax.tree.map(lambda x: x.sharding, (params, state))
    run = jax.jit(step, out_shardings=(*homes, None))
    values = []
    for _ in range(4):
        params, state, value = run(params, state)
        values.append(float(value))
    assert values[-1] < values[0]


# Rules over a state in shapes: each returns the shardings with which `jit(tx.init)` makes it.


def by_optax(tx: Any, mesh: Any, like: Any, **options: Any) -> Any:
    specs = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, like, SPECS, transform_non_params=lambda _: P(), **options
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def by_optax_with_masks(tx: Any, mesh: Any, like: Any) -> Any:
    return by_optax(tx, mesh, like, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


PATTERNS = [
    (r"embed$", P("tp", "fsdp")),
    (r"(^|/)norm/scale$", P(None)),
    (r"up/kernel$", P("fsdp", "tp")),
    (r"up/bias$", P("tp")),
    (r"down/kernel$", P("tp", "fsdp")),
    (r"down/bias$", P("fsdp")),
    (r"(^|/)count$", P()),
]


def by_names(tx: Any, mesh: Any, like: Any) -> Any:
    def rule(keys: Any, _: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
        return NamedSharding(mesh, next(spec for pattern, spec in PATTERNS if re.search(pattern, name)))

    return jax.tree_util.tree_map_with_path(rule, like)


def by_shape(tx: Any, mesh: Any, like: Any) -> Any:
    places = places_of(mesh)
    return jax.tree.map(lambda x: places.get(x.shape, NamedSharding(mesh, P())), like)


def by_function(tx: Any, mesh: Any, like: Any) -> Any:
    shapes = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=is_spec)
    params = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        SHAPES,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return adam_fn.state_shardings(tx, params)


def test_a_rate_of_0_leaves_parameters_as_they_are() -> None:
    tx: Any = TXS["rate 0"]()
    params: Any = parameters("rate 0")
    before, state = params, tx.init(params)
    for _ in range(2):
        updates, state = tx.update(before, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["norm"]["scale"] == before["norm"]["scale"]).all()
    assert (params["embed"] != before["embed"]).all()
    assert jax.tree.map(jnp.shape, state[0].nu) == SHAPES


RULES = (by_optax, by_optax_with_masks, by_names, by_shape, by_function)


@pytest.mark.parametrize("rule", RULES)
def test_rules_over_the_shapes_of_a_state(rule: Callable[..., Any]) -> None:
    mesh = mesh_of()
    places = places_of(mesh)
    turn = list(TXS)[RULES.index(rule)]
    for name, make in TXS.items():
        tx, params = make(), jax.tree.map(lambda p: jax.device_put(p, places[p.shape]), parameters(name))
        if name == "frozen" and rule in MASKED_FAILS:
            masked = optax.masked(optax.adamw(1e-2), jax.tree.map(lambda s: s != P(None), SPECS, is_leaf=is_spec))
            for one in (tx, masked):
                with pytest.raises(ValueError, match="structure"):
                    jax.jit(one.init, out_shardings=rule(one, mesh, jax.eval_shape(one.init, params)))(params)
            continue
        state = jax.jit(tx.init, out_shardings=rule(tx, mesh, jax.eval_shape(tx.init, params)))(params)
        check_places(state, places)
        if name == turn:
            trained(tx, params, state)


def test_fsdp_by_the_largest_axis() -> None:
    mesh = mesh_of()

    def place(x: Any) -> NamedSharding:
        even = [axis for axis, n in enumerate(x.shape) if n % 8 == 0]
        largest = max(even, key=lambda axis: x.shape[axis], default=None)
        return NamedSharding(mesh, P(*(AXES if axis == largest else None for axis in range(len(x.shape)))))

    for name, make in TXS.items():
        tx, params = make(), jax.tree.map(lambda p: jax.device_put(p, place(p)), parameters(name))
        state = jax.jit(tx.init, out_shardings=jax.tree.map(place, jax.eval_shape(tx.init, params)))(params)
        check_places(state, {p.shape: p.sharding for p in jax.tree.leaves(params)})
        check_places(tx.init(params), {p.shape: p.sharding for p in jax.tree.leaves(params)})


# Flax's own ways, from parameters in boxes that name their axes.


def boxed(box: Callable[..., Any], name: str) -> Any:
    def leaf(spec: PartitionSpec, p: jax.Array) -> Any:
        return box(p, names=tuple(spec))

    return jax.tree.map(leaf, SPECS, parameters(name), is_leaf=is_spec)


@pytest.mark.parametrize("logical", [False, True], ids=["Partitioned", "LogicallyPartitioned"])
def test_boxes_in_a_train_state(logical: bool) -> None:
    mesh = mesh_of()
    turn = "16bit" if logical else "masters"
    for name, make in TXS.items():

        def create(name: str = name, make: Callable[[], Any] = make) -> train_state.TrainState:
            params = boxed(nn.LogicallyPartitioned if logical else nn.Partitioned, name)
            return train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=make())

        with jax.set_mesh(mesh):
            specs = nn.get_partition_spec(jax.eval_shape(create))
            if logical:
                homes = spmd.logical_to_mesh_sharding(specs, mesh, [(axis, axis) for axis in AXES])
            else:
                homes = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
            state = jax.jit(create, out_shardings=homes)()
            check_places(state.opt_state, places_of(mesh))
            if name == turn:
                step = jax.jit(
                    lambda state: state.apply_gradients(grads=jax.grad(lambda p: loss(nn.unbox(p)))(state.params)),
                    out_shardings=homes,
                )
                after = step(step(state))
                assert loss(nn.unbox(after.params)) < loss(nn.unbox(state.params))


class Model(nnx.Module):
    """Kernels, biases, a norm and an embedding."""

    def __init__(self, name: str) -> None:
        random, self.dtype = nnx.Rngs(0), dtype_of(name)

        def init(initializer: Any, *axes: str | None) -> Any:
            return nnx.with_partitioning(initializer, axes)

        zeros, normal = nnx.initializers.zeros, nnx.initializers.normal(0.1)
        kinds = {"param_dtype": self.dtype, "rngs": random}
        self.embed = nnx.Embed(32, 16, embedding_init=init(normal, "tp", "fsdp"), **kinds)
        ones = init(nnx.initializers.ones, None)
        self.norm = nnx.RMSNorm(16, scale_init=ones, rngs=random)
        self.up = nnx.Linear(16, 64, kernel_init=init(normal, "fsdp", "tp"), bias_init=init(zeros, "tp"), **kinds)
        self.down = nnx.Linear(64, 32, kernel_init=init(normal, "tp", "fsdp"), bias_init=init(zeros, "fsdp"), **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(self.norm(self.embed(x))))).astype(jnp.float32)


def nnx_loss(model: Model) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(TOKENS), (TOKENS + 1) % 32).mean()


def pair(name: str) -> tuple[Model, nnx.Optimizer]:
    model = Model(name)
    return model, nnx.Optimizer(model, TXS[name](), wrt=nnx.Param)


def eager(name: str, mesh: Any) -> Any:
    return pair(name)


def jitted(name: str, mesh: Any) -> Any:
    @nnx.jit
    def create() -> Any:
        both = pair(name)
        state = nnx.state(both)
        nnx.update(both, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return both

    return create()


def by_shardings(name: str, mesh: Any) -> Any:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: pair(name)))
    homes = nnx.get_named_sharding(shapes, mesh)
    return nnx.merge(graph, jax.jit(lambda: nnx.split(pair(name))[1], out_shardings=homes)())


def constrained_later(name: str, mesh: Any) -> Any:
    both = pair(name)
    state = nnx.state(both[1])
    specs = nnx.get_partition_spec(state)
    nnx.update(both[1], jax.jit(lambda state: jax.lax.with_sharding_constraint(state, specs))(state))
    return both


WAYS = (eager, jitted, by_shardings, constrained_later)
#: The rules that cannot take `optax.MaskedNode`, whoever makes it.
MASKED_FAILS = (by_optax, by_shardings)


@pytest.mark.parametrize("way", WAYS)
def test_nnx_optimizers_place_their_state_like_the_model(way: Callable[..., Any]) -> None:
    mesh = mesh_of()
    turn = ("rate 0", "masters", "16bit", "frozen")[WAYS.index(way)]
    for name in TXS:
        with jax.set_mesh(mesh):
            if name == "frozen" and way in MASKED_FAILS:
                with pytest.raises(AttributeError, match="MaskedNode"):
                    way(name, mesh)
                continue
            model, optimizer = way(name, mesh)
            check_places(nnx.state(optimizer, nnx.optimizer.OptState), places_of(mesh))
            if name != turn:
                continue

            @nnx.jit
            def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
                value, grads = nnx.value_and_grad(nnx_loss)(model)
                optimizer.update(model, grads)
                return value

            values = [float(step(model, optimizer)) for _ in range(4)]
            assert values[-1] < values[0]
