"""Narrow moments in use: their bytes, options, masks and errors, and in other people's transformations and loops."""

import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS
from flax import nnx
from flax.training.train_state import TrainState
from helpers.runs import compilations
from helpers.states import slots_of

import adam_fn
from adam_fn import Cast, MuLaw, Storage, Word

NAMES: tuple[Any, ...] = ("bfloat16", "24bit", "16bit")


def test_options_of_storage() -> None:
    both = {"mu": MuLaw(), "nu": Cast("bfloat16")}
    named: dict[Any, Any] = {"float32": Cast("float32"), "bfloat16": Cast("bfloat16"), "24bit": both}
    for storage, same in named.items():
        tx = adam_fn.adam(1e-3, storage=storage)
        assert (
            tx == adam_fn.adam(1e-3, storage=same) == adam_fn.adam(1e-3, storage=Storage(tx.update.definition.codecs))
        )
        assert pickle.loads(pickle.dumps(tx)) == tx
        assert hash(pickle.loads(pickle.dumps(tx))) == hash(tx)
    assert adam_fn.adam(1e-3, storage="16bit") == adam_fn.adam(1e-3, storage={"mu_nu": Word()})
    assert adam_fn.adam(1e-3, mu_dtype="bfloat16") == adam_fn.adam(1e-3, storage=Storage(mu=Cast("bfloat16")))
    assert adam_fn.adam(1e-3, storage="24bit") != adam_fn.adam(1e-3, b1=0.95, storage="24bit")
    rule = adam_fn.Adam() >> adam_fn.Rate(1e-3)
    assert adam_fn.adam(1e-3, storage="16bit") == adam_fn.transform(rule, storage="16bit")
    slots = slots_of(adam_fn.amsgrad(1e-3, storage=Storage(nu=Cast("bfloat16"))).init(jnp.ones(3)))
    assert {key: str(x.dtype) for key, x in slots.items()} == {"mu": "float32", "nu": "bfloat16", "nu_max": "bfloat16"}


#: Of what each error says, in its words.
ERRORS: dict[str, tuple[Any, dict[str, Any]]] = {
    r"storage must be one of \['float32', 'bfloat16', '24bit', '16bit'\], .* got '8bit'": (
        adam_fn.adam,
        {"storage": "8bit"},
    ),
    "storage must be one of .* got 8": (adam_fn.adam, {"storage": 8}),
    r"storage\['mu'\] must be a codec, such as .* got 'bfloat16'": (adam_fn.adam, {"storage": {"mu": "bfloat16"}}),
    "mu_dtype and storage both specify how mu is stored": (
        adam_fn.adam,
        {"storage": "24bit", "mu_dtype": "bfloat16"},
    ),
    "nu_dtype and storage both specify how nu is stored": (
        adam_fn.adam,
        {"storage": "16bit", "nu_dtype": "bfloat16"},
    ),
    "storage of nu is given, but Lion has no slot nu; its slots are mu": (adam_fn.lion, {"storage": {"nu": Cast()}}),
    "storage says twice how nu is stored": (adam_fn.adam, {"storage": {"mu_nu": Word(), "nu": Cast("bfloat16")}}),
    "its name in storage is 'mu_nu', not 'mu'": (adam_fn.adam, {"storage": {"mu": Word()}}),
    "MuLaw cannot store nu": (adam_fn.adam, {"storage": MuLaw()}),
    r"MuLaw cannot store mu, which has no bound here: use Cast\('bfloat16'\)": (
        adam_fn.adam,
        {"b1": 0.99, "b2": 0.9, "storage": {"mu": MuLaw()}},
    ),
    "Word cannot store mu, which has no bound here": (adam_fn.adabelief, {"storage": {"mu_nu": Word()}}),
    r"Word\(bound=8\) is to store 'nu', but the slots are mu": (adam_fn.lion, {"storage": {"mu_nu": Word(bound=8.0)}}),
    "no effect without storage": (adam_fn.adam, {"storage_mask": True}),
    'one word has no place for two float32 moments: use storage="24bit"': (
        adam_fn.adam,
        {"storage": "16bit", "storage_mask": adam_fn.masks.rank(2)},
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_storage(message: str) -> None:
    make, options = ERRORS[message]
    with pytest.raises((ValueError, TypeError), match=message):
        make(1e-3, **options)


@pytest.mark.quick
@pytest.mark.parametrize(("storage", "least"), [("float32", 8), ("bfloat16", 4), ("24bit", 3), ("16bit", 2)])
def test_state_bytes(storage: Any, least: int) -> None:
    """Of both moments, for each parameter, without an allocation: these parameters would be 4 TB."""
    params = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    assert adam_fn.state_bytes(adam_fn.adam(1e-3, storage=storage), params) == least * params.size + 4


def test_every_array_of_every_state_has_its_parameters_shape() -> None:
    params = {"w": jnp.ones((5, 3)), "scalar": jnp.ones(()), "empty": jnp.ones((0, 2)), "n": jnp.arange(2)}
    for case, storage in itertools.product(MEMBERS, NAMES):
        state = jax.eval_shape(case.make(storage=storage).init, params)
        wanted = {key: p.shape for key, p in params.items() if key != "n"}
        for slot in slots_of(state).values():
            assert {key: x.shape for key, x in slot.items() if key != "n"} == wanted
            assert slot["n"] == optax.MaskedNode()
        assert all(x.dtype.itemsize <= 2 for x in jax.tree.leaves(slots_of(state)))


@pytest.mark.parametrize("storage", NAMES)
def test_complex_and_wide_parameters(storage: Any) -> None:
    """Complex ones are stored as two reals, float64 ones as narrow as others; each is stepped in its own precision."""
    g = np.random.default_rng(0).standard_normal((2, 9))
    tx = adam_fn.adam(1e-3, storage=storage)
    with jax.enable_x64(True):
        found = []
        for x in (jnp.asarray(g, jnp.float32), jnp.asarray(g[0] + 1j * g[1], jnp.complex64), jnp.asarray(g)):
            state, updates = jax.jit(tx.init)(x), x
            for _ in range(3):
                updates, state = tx.update(x, state, x)
            assert jnp.asarray(updates).dtype == x.dtype
            found.append((updates, slots_of(state)))
        (real, slots), (both, pairs), (wide, same) = found
    jax.tree.map(np.testing.assert_array_equal, (pairs, same), (slots, slots))
    np.testing.assert_allclose(np.stack([both.real, both.imag]), real, rtol=1e-6)
    np.testing.assert_allclose(wide, real, rtol=1e-6)


@pytest.mark.parametrize("storage", NAMES)
def test_every_storage_works_inside_flax_and_optax(storage: Any) -> None:
    params = {"w": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)}
    grads = jax.tree.map(jnp.sin, params)
    injected = optax.inject_hyperparams(lambda learning_rate: adam_fn.adamw(learning_rate, storage=storage))(1e-2)
    plain = adam_fn.adamw(1e-2, storage=storage)
    doubled = optax.MultiSteps(plain, 2).gradient_transformation()

    def trained(tx: Any, steps: int) -> jax.Array:
        state: Any = TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
        for _ in range(steps):
            state = state.apply_gradients(grads=grads)
        return state.params["w"]

    expected, *found = jax.jit(lambda: [trained(plain, 2), trained(injected, 2), trained(doubled, 4)])()
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-6)
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, plain, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 64))) ** 2))(model))
    mapped: Any = optax.tree_utils.tree_map_params(plain, lambda x, p: x + p.shape[0], plain.init(params), params)
    assert all((x["w"] == 64).all() for x in slots_of(mapped).values())
    step = adam_fn.make_step(plain)
    p, state = jax.tree.map(jnp.copy, params), plain.init(params)
    for _ in range(3):
        p, state = step(p, state, grads)
    assert compilations(step) == 1
    update = jax.jit(plain.update)
    updates, after = update(grads, pickle.loads(pickle.dumps(state)), p)
    again, _ = update(grads, state, p)
    np.testing.assert_array_equal(updates["w"], again["w"])
    both = jax.tree.map(lambda *x: jnp.stack(x), (grads, state, p), (updates, after, params))
    members, _ = jax.jit(jax.vmap(plain.update))(*both)
    np.testing.assert_allclose(members["w"][0], again["w"], rtol=1e-6)
    np.testing.assert_allclose(members["w"][1], update(updates, after, params)[0]["w"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_a_cast_moment_is_one_of_the_two_numbers_around_the_exact_one(dtype: str) -> None:
    """The state has the dtype, and each step's first moment is one of the two numbers around Adam's."""
    g = jax.random.normal(jax.random.key(0), (40, 64, 8))
    tx = adam_fn.adam(1.0, storage=Storage(mu=Cast(dtype)))
    state = tx.init(g[0])
    mu = np.zeros((64, 8))
    for x in g:
        _, state = tx.update(x, state)
        expected, mu = 0.9 * mu + 0.1 * np.float64(x), np.float64(slots_of(state)["mu"])
        unit = np.maximum(np.abs(expected) * float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal))
        assert (np.abs(mu - expected) < unit * (1 + 1e-4)).all()
    assert slots_of(state)["mu"].dtype == jnp.dtype(dtype)
    assert adam_fn.state_bytes(tx, g[0]) == g[0].size * (jnp.dtype(dtype).itemsize + 4) + 4


def test_second_moments_in_a_dtype_of_short_range() -> None:
    """They work where gradients are large enough, and a warning says that they may not be."""
    for dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
        with pytest.warns(UserWarning, match=f"{dtype} cannot represent small second moments"):
            tx = adam_fn.adam(1.0, nu_dtype=dtype)
        updates, state = tx.update(jnp.full(3, 100.0), tx.init(jnp.ones(3)))
        np.testing.assert_allclose(updates, -1.0, rtol=1e-3)
        assert slots_of(state)["nu"].dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("storage", NAMES)
def test_strict_promotion_and_states_of_another_storage(storage: Any) -> None:
    g, plain = jnp.sin(jnp.arange(64.0)), adam_fn.adamw(1e-3)
    tx = adam_fn.adamw(1e-3, storage=storage)
    with jax.numpy_dtype_promotion("strict"):
        assert jnp.isfinite(tx.update(g, tx.init(g), g)[0]).all()
    for ours, theirs in ((tx, plain), (plain, tx)):
        with pytest.raises((TypeError, ValueError), match=r"adam_fn\.interop\.change_storage converts one"):
            ours.update(g, theirs.init(g), g)


def test_masks_are_no_schedules() -> None:
    """`inject_hyperparams` calls every function with the step, unless it is told not to."""
    params = {"embedding": jnp.ones((64, 128)), "w": jnp.ones((64, 128))}
    mask = adam_fn.masks.path("w")
    for mask_ in (mask, adam_fn.masks.rank(2)):
        with pytest.raises(TypeError, match="is a mask, but was called with a step count"):
            optax.inject_hyperparams(adam_fn.adamw)(1e-2, storage="24bit", storage_mask=mask_).init(params)
    tx = optax.inject_hyperparams(adam_fn.adamw, static_args="storage_mask")(1e-2, storage="24bit", storage_mask=mask)
    mu: Any = optax.tree.get(tx.init(params), "mu")
    assert {key: str(x.dtype) for key, x in mu.items()} == {"embedding": "float32", "w": "int8"}


@pytest.mark.quick
def test_storage_mask() -> None:
    """What it leaves out is stored, and updated, as without storage=."""
    params = {"embedding": jnp.ones((8, 16)), "w": jnp.ones((8, 16)), "n": jnp.arange(3), "none": None}
    mask = adam_fn.masks.path("*embedding*", invert=True)
    grads = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape) * p, params)
    exact, size = adam_fn.adamw(1e-2), params["w"].size
    for storage in ("24bit", Cast("bfloat16")):
        tx = adam_fn.adamw(1e-2, storage=storage, storage_mask=mask)
        states, updates = [tx.init(params), exact.init(params)], []
        for _ in range(3):
            pairs = [t.update(grads, state, params) for t, state in zip((tx, exact), states, strict=True)]
            updates, states = map(list, zip(*pairs, strict=True))
        np.testing.assert_array_equal(updates[0]["embedding"], updates[1]["embedding"])
        assert (updates[0]["w"] != updates[1]["w"]).any()
        alone = adam_fn.state_bytes(adam_fn.adamw(1e-2, storage=storage), {"w": params["w"]})
        assert adam_fn.state_bytes(tx, params) == 8 * size + alone
        assert pickle.loads(pickle.dumps(tx)) == tx != adam_fn.adamw(1e-2, storage=storage)
        with pytest.raises(ValueError, match=r"state's mu of embedding is float32\[8, 16\], expected (int8|bfloat16)"):
            adam_fn.adamw(1e-2, storage=storage).update(grads, states[0], params)
    for alias, narrow in ((adam_fn.swats, {"bfloat16"}), (adam_fn.lamb, {"int8", "bfloat16"})):
        found = alias(1e-2, storage="24bit", storage_mask=mask).init(params)
        assert {str(x.dtype) for x in jax.tree.leaves(found) if x.size == size} == {"float32", *narrow}
    with pytest.raises(ValueError, match=r"storage_mask must have the structure .*: v is not a parameter"):
        adam_fn.adamw(1e-2, storage="24bit", storage_mask={"v": True}).init(params)
