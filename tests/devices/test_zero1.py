"""The state divided along the data axis, or on the host, with a mesh of eight host devices."""

import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiling
from helpers.layouts import KINDS, assert_placed, mesh_of
from helpers.states import count_of, slots_of
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adam_fn

P = PartitionSpec
BF16 = jnp.bfloat16


def _values(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, jax.Array]:
    """A kernel, a bias, a stack of which only the second axis can be divided, and a leaf that cannot be."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (256, 32), "bias": (32,), "stack": (3, 16, 5), "odd": (5, 3)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def _put(mesh: Mesh, tree: Any, specs: dict[str, PartitionSpec] | None = None) -> Any:
    return {key: jax.device_put(x, NamedSharding(mesh, (specs or {}).get(key, P()))) for key, x in tree.items()}


def _collectives(text: str) -> list[tuple[str, int]]:
    """The kind of each operation between devices, and the bytes of its result."""
    kinds, found = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shapes)
        sizes = (int(bits or 8) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in arrays)
        found.append((kind, sum(sizes)))
    return found


def _bytes(state: Any, device: int | None = None) -> int:
    arrays = jax.tree.leaves(state)
    if device is None:
        return sum(x.nbytes for x in arrays)
    return sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.device.id == device)


TXS: dict[str, tuple[optax.GradientTransformation, Any]] = {
    "adamw": (adam_fn.adamw(1e-2), jnp.float32),
    "16bit": (adam_fn.adam(1e-2, storage="16bit"), jnp.float32),
    "masters": (adam_fn.master_weights(adam_fn.adam(1e-2, storage="16bit", frozen=adam_fn.masks.rank(3))), BF16),
    "rounded": (adam_fn.stochastic_rounding(adam_fn.amsgrad(1e-2, storage="24bit")), BF16),
    "averaged, rounded": (
        adam_fn.stochastic_rounding(optax.chain(adam_fn.lion(1e-2, storage="bfloat16"), adam_fn.average_params(0.9))),
        BF16,
    ),
}
#: From JAX 0.12 on, XLA rounds some elements of the stack differently if a part of it is computed alone.
ROUNDS_PARTS = jax.__version_info__ >= (0, 12)


def _assert_same(path: tuple[Any, ...], found: jax.Array, expected: jax.Array) -> None:
    """Asserts equality bit for bit; where newer versions of XLA round, to the last digits and for nearly all codes."""
    if not ROUNDS_PARTS or "stack" not in jax.tree_util.keystr(path, simple=True, separator="/"):
        np.testing.assert_array_equal(found, expected)
    elif found.dtype in (jnp.int8, jnp.uint16):  # A number between two codes may become either.
        assert np.mean(np.asarray(found != expected)) < 1e-2
    else:
        few = 64 if found.dtype == jnp.int16 else 3e-8  # Remainders of masters; float32 numbers.
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=1e-6, atol=few)


@pytest.mark.quick("16bit")
@pytest.mark.parametrize("name", TXS)
def test_zero1_takes_the_same_steps_with_an_eighth_of_the_state(name: str) -> None:
    """Equal gradients give equal numbers, and the parameters stay whole."""
    tx, dtype = TXS[name]
    mesh = mesh_of(AxisType.Explicit if name == "16bit" else AxisType.Auto)
    alone, params = _values(dtype), _put(mesh, _values(dtype))
    spread = adam_fn.zero1(tx, params, mesh)
    state, expected = jax.jit(spread.init)(params), jax.jit(tx.init)(alone)
    assert adam_fn.undivided(spread) == {"odd": 15}
    small = _bytes({"odd": alone["odd"]}) * 8 + 200  # Counts, weights and the leaf that is not divided.
    assert _bytes(state, 0) <= _bytes(state) / 8 + small
    assert _bytes(state) - _bytes(expected) == 0
    given = ((spread, params, state, _put(mesh, alone)), (tx, alone, expected, alone))
    step, reference = (adam_fn.make_step(x).lower(*rest).compile(compiling.FULL) for x, *rest in given)
    for seed in range(1, 4):
        grads = _values(dtype, seed)
        params, state = step(params, state, _put(mesh, grads))
        alone, expected = reference(alone, expected, grads)
        jax.tree.map_with_path(_assert_same, (params, state), (alone, expected))
        assert_placed(state, adam_fn.state_shardings(spread, params))
        assert all(x.sharding.is_fully_replicated for x in params.values())
    assert _bytes(state, 0) <= _bytes(state) / 8 + small


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", AxisType.Auto), ("adamw", AxisType.Explicit), ("masters", AxisType.Auto)],
)
def test_gradients_are_reduced_once_and_parameters_gathered(name: str, kind: AxisType) -> None:
    """A whole step of training. (XLA for CPUs has an all-reduce and a slice instead of a reduce-scatter.)"""
    tx, dtype = TXS[name]
    mesh = mesh_of(kind)
    params = _put(mesh, {"first": jnp.ones((256, 32), dtype), "bias": jnp.ones(32, dtype)})
    batch = jax.device_put(jnp.ones((1024, 256), dtype), NamedSharding(mesh, P("data")))
    spread = adam_fn.zero1(tx, params, mesh)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(batch @ params["first"] + params["bias"][None]).astype(jnp.float32) ** 2)

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        return adam_fn.make_step(spread)(params, state, jax.grad(loss)(params, batch))

    state = jax.jit(spread.init)(params)
    compiled = step.lower(params, state, batch).compile()
    found = _collectives(compiled.as_text() or "")
    size = 4 * (256 * 32 + 32)  # On a CPU in float32, whatever the parameters are.
    assert {kind for kind, _ in found} == {"all-reduce", "all-gather"}, found
    for kind_of in ("all-reduce", "all-gather"):
        assert sum(n for kind, n in found if kind == kind_of) in (size, size // 2), found
    # A device is given its parameters, an eighth of the state and an eighth of the batch.
    memory = compiled.memory_analysis()
    assert memory is not None
    given = _bytes(params) + (_bytes(state) + batch.nbytes) / 8
    assert memory.argument_size_in_bytes <= given + 400


@pytest.mark.parametrize("exact", [True, False])
def test_zero1_reduce_scatters_local_gradients_inside_shard_map(exact: bool) -> None:
    """A reduce-scatter sums local gradients; all else is as outside, except that each shard has its own dither."""
    mesh = mesh_of()
    # With a small ε, the order of a sum would change the step visibly where the gradient is nearly 0.
    tx = adam_fn.adamw(1e-2, eps=1e-4, storage="float32" if exact else "16bit")
    params = _put(mesh, _values())
    spread = adam_fn.zero1(tx, params, mesh)
    places = jax.tree.map(lambda x: x.spec, adam_fn.state_shardings(spread, params))
    batch = jnp.asarray(np.random.default_rng(1).standard_normal((16, 256)), jnp.float32)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        small = sum(jnp.sum(params[x] ** 2) for x in ("stack", "odd"))
        return jnp.mean(jnp.tanh(batch @ params["kernel"] + params["bias"][None]) ** 2) + small

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        varying = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        grads = jax.grad(lambda p: loss(p, batch) / 8)(varying)
        updates, state = spread.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    init = jax.jit(jax.shard_map(spread.init, mesh=mesh, in_specs=P(), out_specs=places))
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), places, P("data")), out_specs=(P(), places)))
    state = init(params)
    text = run.lower(params, state, batch).compile().as_text() or ""
    assert {kind for kind, _ in _collectives(text)} == {"reduce-scatter", "all-gather", "all-reduce"}
    assert sum(n for kind, n in _collectives(text) if kind == "all-reduce") == 15 * 4  # For the leaf that stays whole.
    alone, expected = _values(), jax.jit(tx.init)(_values())
    for _ in range(3):
        params, state = run(params, state, batch)
        updates, expected = jax.jit(tx.update)(jax.grad(loss)(alone, batch), expected, alone)
        alone = optax.apply_updates(alone, updates)
    found, wanted = ((params, state), (alone, expected)) if exact else (params, alone)
    atol = 1e-6 if exact else 5e-3  # After three steps of up to 1e-2.
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=atol)


@KINDS
def test_zero1_divides_further_what_tensor_parallelism_divides(kind: AxisType) -> None:
    """The divisions of tensor parallelism are kept; a leaf already divided along the data axis is left alone."""
    mesh = mesh_of(kind, (4, 2))
    specs = {"kernel": P(None, "model"), "stack": P(None, ("data", "model")), "bias": P("model")}
    tx = adam_fn.adam(1e-2)
    params = _put(mesh, _values(), specs)
    spread = adam_fn.zero1(tx, params, mesh)
    found = jax.tree.map(lambda x: x.spec, slots_of(adam_fn.state_shardings(spread, params))["mu"])
    assert found["kernel"] == P("data", "model")
    assert found["bias"] == P(("model", "data"))
    assert found["stack"] == P(None, ("data", "model"), None)
    assert found["odd"] == P(None, None)
    assert adam_fn.undivided(spread) == {"odd": 15}
    updates, state = jax.jit(spread.update)(params, jax.jit(spread.init)(params), params)
    expected = jax.jit(tx.update)(_values(), tx.init(_values()), _values())
    chex.assert_trees_all_equal((updates, state), expected)
    assert_placed(updates, params)


def test_a_warning_names_the_leaf_that_stays_whole() -> None:
    """Neither 90 rows nor 490 columns can be divided by 8; 8 rows can, in any storage."""
    params = {"w": jax.ShapeDtypeStruct((90, 490), "float32"), "v": jax.ShapeDtypeStruct((8, 3), "float32")}
    with pytest.warns(UserWarning, match=r"w of shape \(90, 490\).* stays whole on each of the 8 devices of 'data'"):
        tx = adam_fn.zero1(adam_fn.adam(1e-3, storage="16bit"), params, mesh_of())
    assert adam_fn.undivided(tx) == adam_fn.undivided(adam_fn.offload(tx)) == {"w": 90 * 490}
    places = slots_of(adam_fn.state_shardings(tx, params))["mu_nu"]
    assert (places["v"].spec, places["w"].spec) == (P("data", None), P(None, None))


def test_the_state_is_fetched_after_the_gradients() -> None:
    """XLA must not move the copies before the backward pass, whose activations need the memory."""
    params = {"w": jnp.ones((64, 64))}
    tx = adam_fn.offload(adam_fn.adam(1e-3))
    program = jax.make_jaxpr(lambda g, s: tx.update(g, s, params))(params, jax.eval_shape(tx.init, params)).jaxpr
    (barrier,) = (x for x in program.eqns if x.primitive.name == "optimization_barrier")
    assert program.invars[0] in barrier.invars  # The gradients.
    fetched = [x.invars[0] for x in program.eqns if x.primitive.name == "device_put"][:2]
    assert len(fetched) == 2 and all(x in barrier.outvars for x in fetched)


def test_zero1_transformations_are_equal_by_value() -> None:
    one, other = (adam_fn.zero1(adam_fn.adam(1e-3), _values(), mesh_of()) for _ in range(2))
    assert one == other != adam_fn.zero1(adam_fn.adam(1e-2), _values(), mesh_of())
    assert hash(one) == hash(other)


@pytest.mark.quick
def test_errors_of_zero1_and_offload_name_what_is_wrong() -> None:
    mesh, params, adam = mesh_of(), _values(), adam_fn.adam(1e-3)
    tx = adam_fn.zero1(adam, params, mesh)
    state, fewer = tx.init(params), {key: x for key, x in params.items() if key != "odd"}
    elsewhere, chained = _put(mesh_of(shape=(4, 2)), params), optax.chain(optax.clip(1.0), tx)
    calls: dict[str, Callable[[], object]] = {
        r"the mesh has the axes \('data',\), not 'batch'": lambda: adam_fn.zero1(adam, params, mesh, "batch"),
        r"zero1: bias lives on the mesh .*, expected \{'data': 8\}": lambda: adam_fn.zero1(adam, elsewhere, mesh),
        r"zero1: kernel of the gradients has shape \(3,\), expected \(256, 32\)": lambda: tx.update(
            {**params, "kernel": jnp.ones(3)}, state, params
        ),
        "structure of the parameters it was made for: odd is missing": lambda: tx.update(fewer, state, params),
        "expected its own state": lambda: tx.update(params, optax.adamw(1e-3).init(params), params),
        "zero1 must be outermost": lambda: adam_fn.state_shardings(chained, _put(mesh, params)),
        "that zero1 made": lambda: adam_fn.undivided(adam),
        ": w has no sharding": lambda: adam_fn.state_shardings(adam, {"w": np.ones(3)}),
        "offload must be outermost": lambda: adam_fn.state_shardings(optax.chain(adam_fn.offload(tx)), params),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


# --- shardings of the state ---


def test_state_shardings_cover_states_of_optax_and_shapes_without_arrays() -> None:
    """Momentum of optax, complex and integer leaves, and shapes without arrays have shardings."""
    mesh = mesh_of()
    place = NamedSharding(mesh, P("data"))
    shapes = {"w": ((64, 128), "float32"), "c": ((8, 3), "complex64"), "i": ((8,), "int32")}
    params = {name: jax.ShapeDtypeStruct(*x, sharding=place) for name, x in shapes.items()} | {"none": None}
    tx = optax.chain(optax.trace(0.9), adam_fn.adam(1e-3, storage="16bit"))
    found = adam_fn.state_shardings(tx, params)
    assert found[0].trace["w"].spec == P("data", None)
    assert slots_of(found[1])["mu_nu"]["w"].spec == P("data", None)
    assert slots_of(found[1])["mu_nu"]["c"].spec == P(None, "data", None)
    assert count_of(found[1]).spec == P()
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(tx.init, params))
    real = {"w": jax.device_put(jnp.ones((64, 128)), place)}
    adam = optax.adam(1e-3)
    state = jax.jit(adam.init, out_shardings=adam_fn.state_shardings(adam, real))(real)
    assert_placed(state[0].mu, {"w": place})
    whole = {"w": jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P()))}
    spread = jax.jit(adam_fn.zero1(adam, whole, mesh).init)(whole)
    assert_placed(spread[0].mu, {"w": place})
    assert adam_fn.state_shardings(adam, {"w": jnp.ones(3)})[0].mu["w"] == jnp.ones(3).sharding


# --- the memory of the host ---


@KINDS
def test_offload_keeps_large_arrays_of_the_state_on_the_host(kind: AxisType) -> None:
    """Only large arrays move, divided as they were; the steps are those of a state on the devices."""
    mesh = mesh_of(kind)
    params = _put(mesh, _values())
    inner = adam_fn.zero1(adam_fn.adamw(1e-2), params, mesh)
    tx = adam_fn.offload(inner)
    places = adam_fn.state_shardings(tx, params)
    state, expected = jax.jit(tx.init)(params), jax.jit(inner.init)(params)
    kinds = jax.tree.map(lambda x: "pinned_host" if x.size >= 4096 else "device", state)
    assert jax.tree.map(lambda place: place.memory_kind, places) == kinds
    step, plain = adam_fn.make_step(tx), adam_fn.make_step(inner)
    for seed in range(2):
        assert_placed(state, places)
        grads = _put(mesh, _values(seed=seed))
        found = step(jax.tree.map(jnp.copy, params), state, grads)
        wanted = plain(jax.tree.map(jnp.copy, params), expected, grads)
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(wanted))
        (params, state), expected = found, wanted[1]
    updates, state = jax.jit(tx.update)(params, state, params)
    assert_placed(state, places)
    assert all(x.sharding.memory_kind == "device" for tree in (params, updates) for x in tree.values())
