"""The rules by which frameworks divide a state over a mesh: with each, moments live where their parameters do.

Every form of a state is checked after it is made; each rule trains one of them.
"""

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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam_fn

AXES = ("fsdp", "tp")
TXS: dict[str, Callable[[], Any]] = {
    "float32": lambda: adam_fn.adamw(1e-2),
    "16bit": lambda: adam_fn.adamw(1e-2, storage="16bit"),
    "masters": lambda: adam_fn.master_weights(adam_fn.adamw(1e-2, storage="16bit"), bits=8),
    "frozen": lambda: adam_fn.adamw(1e-2, storage="24bit", frozen=adam_fn.masks.path("*norm*")),
    "rate 0": lambda: adam_fn.adamw(1e-2, storage="24bit", groups={"*norm*": adam_fn.Group(rate=0.0)}),
}
#: The place of each parameter, by its shape, which no other parameter has.
SPECS = {
    (32, 16): P("tp", "fsdp"),
    (16,): P(None),
    (16, 64): P("fsdp", "tp"),
    (64,): P("tp"),
    (64, 32): P("tp", "fsdp"),
    (32,): P("fsdp"),
}


def spec_of(x: Any) -> P:
    return SPECS.get(x.shape, P())


def mesh_of() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def by_shape(mesh: Any) -> Callable[[Any], NamedSharding]:
    return lambda x: NamedSharding(mesh, spec_of(x))


def parameters(name: str) -> Any:
    """Float32 parameters; under masters, all but the norm are bfloat16."""

    def normal(*shape: int) -> jax.Array:
        values = 0.1 * np.random.default_rng(len(shape)).standard_normal(shape)
        return jnp.asarray(values, jnp.bfloat16 if name == "masters" else jnp.float32)

    return {
        "embed": normal(32, 16),
        "norm": {"scale": jnp.ones(16)},
        "up": {"kernel": normal(16, 64), "bias": normal(64)},
        "down": {"kernel": normal(64, 32), "bias": normal(32)},
    }


def loss(params: Any) -> jax.Array:
    return sum((jnp.mean(jnp.square(p.astype(jnp.float32))) for p in jax.tree.leaves(params)), jnp.float32(0))


def check_places(name: str, state: Any, place: Callable[[Any], Any]) -> None:
    """Asserts that arrays of a parameter's shape are divided like it, and that every trained parameter has some."""
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    for x in arrays:
        assert x.sharding.is_equivalent_to(place(x), x.ndim), (x.shape, x.dtype, x.sharding)
    assert {x.shape for x in arrays} == SPECS.keys() - ({(16,)} if name == "frozen" else set())


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


def by_optax(tx: Any, mesh: Any, like: Any, params: Any, **options: Any) -> Any:
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, place: place,
        like,
        jax.tree.map(by_shape(mesh), params),
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        **options,
    )


def by_optax_with_masks(tx: Any, mesh: Any, like: Any, params: Any) -> Any:
    return by_optax(tx, mesh, like, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def by_names(tx: Any, mesh: Any, like: Any, params: Any) -> Any:
    """Places each array like the parameter whose path its own path ends with."""

    def name(keys: Any) -> str:
        return jax.tree_util.keystr(keys, simple=True, separator="/")

    def home(keys: Any, _: Any) -> NamedSharding:
        return next((homes[x] for x in homes if name(keys).endswith(x)), NamedSharding(mesh, P()))

    homes = {name(keys): by_shape(mesh)(p) for keys, p in jax.tree.leaves_with_path(params)}
    return jax.tree.map_with_path(home, like)


@pytest.mark.parametrize(
    ("rule", "turn"), [(by_optax, "float32"), (by_optax_with_masks, "frozen"), (by_names, "16bit")]
)
def test_rules_over_shapes_place_the_state_like_the_parameters(rule: Callable[..., Any], turn: str) -> None:
    mesh = mesh_of()
    for name, make in TXS.items():
        tx, params = make(), parameters(name)
        params = jax.device_put(params, jax.tree.map(by_shape(mesh), params))

        def init(tx: Any, params: Any = params) -> Any:
            homes = rule(tx, mesh, jax.eval_shape(tx.init, params), params)
            return jax.jit(tx.init, out_shardings=homes)(params)

        if name == "frozen" and rule in MASKED_FAILS:
            masked = optax.masked(optax.adamw(1e-2), jax.tree.map(lambda p: p.shape != (16,), params))
            for one in (tx, masked):
                with pytest.raises(ValueError, match="structure"):
                    init(one)
            continue
        state = init(tx)
        check_places(name, state, by_shape(mesh))
        if name == turn:
            trained(tx, params, state)


def test_fsdp_by_the_largest_axis_divides_the_state_like_the_parameters() -> None:
    mesh = mesh_of()

    def place(x: Any) -> NamedSharding:
        even = [axis for axis, n in enumerate(x.shape) if n % 8 == 0]
        largest = max(even, key=lambda axis: x.shape[axis], default=None)
        return NamedSharding(mesh, P(*(AXES if axis == largest else None for axis in range(len(x.shape)))))

    for name, make in TXS.items():
        tx, params = make(), jax.tree.map(lambda p: jax.device_put(p, place(p)), parameters(name))
        homes = jax.tree.map(place, jax.eval_shape(tx.init, params))
        for state in (jax.jit(tx.init, out_shardings=homes)(params), tx.init(params)):
            check_places(name, state, place)


# Flax's own ways, from parameters in boxes that name their axes.


@pytest.mark.parametrize(("box", "turn"), [(nn.Partitioned, "masters"), (nn.LogicallyPartitioned, "16bit")])
def test_boxes_place_a_train_state_like_its_parameters(box: Callable[..., Any], turn: str) -> None:
    mesh = mesh_of()
    for name, make in TXS.items():

        def create(name: str = name, make: Callable[[], Any] = make) -> train_state.TrainState:
            params = jax.tree.map(lambda p: box(p, names=tuple(spec_of(p))), parameters(name))
            return train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=make())

        with jax.set_mesh(mesh):
            specs = nn.get_partition_spec(jax.eval_shape(create))
            homes = spmd.logical_to_mesh_sharding(specs, mesh, [(axis, axis) for axis in AXES])
            state = jax.jit(create, out_shardings=homes)()
            check_places(name, state.opt_state, by_shape(mesh))
            if name == turn:
                step = jax.jit(
                    lambda state: state.apply_gradients(grads=jax.grad(lambda p: loss(nn.unbox(p)))(state.params)),
                    out_shardings=homes,
                )
                after = step(step(state))
                assert loss(nn.unbox(after.params)) < loss(nn.unbox(state.params))


class Model(nnx.Module):
    def __init__(self, name: str) -> None:
        self.params = nnx.data(jax.tree.map(lambda p: nnx.Param(p, out_sharding=tuple(spec_of(p))), parameters(name)))


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


#: Rules that fail on `optax.MaskedNode`, which frozen leaves have instead of moments, as with `optax.masked`.
#: A rate of 0 also leaves the leaves as they are, and every rule finds arrays.
MASKED_FAILS = (by_optax, by_shardings)


@pytest.mark.parametrize(("way", "turn"), [(eager, "rate 0"), (jitted, "masters"), (by_shardings, "16bit")])
def test_nnx_optimizers_place_their_state_like_the_model(way: Callable[..., Any], turn: str) -> None:
    mesh = mesh_of()
    for name in TXS:
        with jax.set_mesh(mesh):
            if name == "frozen" and way in MASKED_FAILS:
                with pytest.raises(AttributeError, match="MaskedNode"):
                    way(name, mesh)
                continue
            model, optimizer = way(name, mesh)
            check_places(name, nnx.state(optimizer, nnx.optimizer.OptState), by_shape(mesh))
            if name != turn:
                continue

            @nnx.jit
            def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
                value, grads = nnx.value_and_grad(lambda model: loss(nnx.as_pure(model.params)))(model)
                optimizer.update(model, grads)
                return value

            values = [float(step(model, optimizer)) for _ in range(4)]
            assert values[-1] < values[0]
            assert (model.params["norm"]["scale"][...] == 1).all() == (turn == "rate 0")
