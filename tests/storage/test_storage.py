"""Narrow moments in use: their bytes, options, masks and errors, and in other people's transformations and loops."""

import itertools
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEMBERS
from helpers.runs import scanned
from helpers.states import slots_of

import adam_fn
from adam_fn import Cast, MuLaw, Storage, Word

NAMES: tuple[Any, ...] = ("bfloat16", "24bit", "16bit")
ADAM: Any = adam_fn.adam
LION: Any = adam_fn.lion


def test_storages_are_equal_however_they_are_given() -> None:
    both = {"mu": MuLaw(), "nu": Cast("bfloat16")}
    word = adam_fn.transform(adam_fn.Adam() >> adam_fn.Rate(1e-3), storage="16bit")
    for one, other in (
        ({"storage": "float32"}, {"storage": Cast("float32")}),
        ({"storage": "bfloat16"}, {"storage": Cast("bfloat16")}),
        ({"storage": "24bit"}, {"storage": both}),
        ({"storage": "24bit"}, {"storage": Storage(ADAM(1e-3, storage="24bit").update.definition.codecs)}),
        ({"storage": "16bit"}, {"storage": {"mu_nu": Word()}}),
        ({"mu_dtype": "bfloat16"}, {"storage": Storage(mu=Cast("bfloat16"))}),
    ):
        tx = ADAM(1e-3, **one)
        again = pickle.loads(pickle.dumps(tx))
        assert tx == ADAM(1e-3, **other) == again != ADAM(1e-3, b1=0.95, **one)
        assert hash(again) == hash(tx)
    assert ADAM(1e-3, storage="16bit") == word
    slots = slots_of(adam_fn.amsgrad(1e-3, storage=Storage(nu=Cast("bfloat16"))).init(jnp.ones(3)))
    assert {key: str(x.dtype) for key, x in slots.items()} == {"mu": "float32", "nu": "bfloat16", "nu_max": "bfloat16"}


KINDS = r"\['float32', 'bfloat16', '24bit', '16bit'\]"
UNBOUNDED = {"b1": 0.99, "b2": 0.9, "storage": {"mu": MuLaw()}}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ADAM, {"storage": "8bit"}, f"storage must be one of {KINDS}, .* got '8bit'"),
        (ADAM, {"storage": 8}, "storage must be one of .* got 8"),
        (ADAM, {"storage": {"mu": "bfloat16"}}, r"storage\['mu'\] must be a codec, such as .* got 'bfloat16'"),
        (ADAM, {"storage": "24bit", "mu_dtype": "bfloat16"}, "mu_dtype and storage both specify how mu is stored"),
        (ADAM, {"storage": "16bit", "nu_dtype": "bfloat16"}, "nu_dtype and storage both specify how nu is stored"),
        (LION, {"storage": {"nu": Cast()}}, "storage of nu is given, but Lion has no slot nu; its slots are mu"),
        (ADAM, {"storage": {"mu_nu": Word(), "nu": Cast("bfloat16")}}, "storage says twice how nu is stored"),
        (ADAM, {"storage": {"mu": Word()}}, "its name in storage is 'mu_nu', not 'mu'"),
        (ADAM, {"storage": MuLaw()}, "MuLaw cannot store nu"),
        (ADAM, UNBOUNDED, r"MuLaw cannot store mu, which has no bound here: use Cast\('bfloat16'\)"),
        (adam_fn.adabelief, {"storage": {"mu_nu": Word()}}, "Word cannot store mu, which has no bound here"),
        (LION, {"storage": {"mu_nu": Word(bound=8.0)}}, r"Word\(bound=8\) is to store 'nu', but the slots are mu"),
        (ADAM, {"storage_mask": True}, "no effect without storage"),
        (ADAM, {"storage": "16bit", "storage_mask": adam_fn.masks.rank(2)}, 'no place for .*: use storage="24bit"'),
    ],
)
def test_errors_of_storage_name_what_is_wrong(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(1e-3, **options)


@pytest.mark.parametrize("storage", NAMES)
def test_states_of_another_storage_are_errors(storage: Any) -> None:
    g = jnp.ones(3)
    pair = adam_fn.adamw(1e-3, storage=storage), adam_fn.adamw(1e-3)
    for ours, theirs in (pair, pair[::-1]):
        with pytest.raises((TypeError, ValueError), match=r"adam_fn\.interop\.change_storage converts one"):
            ours.update(g, theirs.init(g), g)


@pytest.mark.quick
@pytest.mark.parametrize(("storage", "least"), [("float32", 8), ("bfloat16", 4), ("24bit", 3), ("16bit", 2)])
def test_a_state_has_the_bytes_of_its_storage(storage: Any, least: int) -> None:
    """Both moments are counted without an allocation: these parameters would be 4 TB."""
    params = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    assert adam_fn.state_bytes(adam_fn.adam(1e-3, storage=storage), params) == least * params.size + 4
    assert adam_fn.state_bytes(optax.adam(1e-3), params) == 8 * params.size + 4


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
def test_complex_and_float64_parameters_have_narrow_moments(storage: Any) -> None:
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
def test_every_storage_works_inside_optax_and_vmap(storage: Any) -> None:
    params = {"w": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64)}
    twice = {"w": jnp.stack([jnp.sin(params["w"])] * 2)}
    plain = adam_fn.adamw(1e-2, storage=storage)
    (expected, state), _ = scanned(plain, params, twice)
    injected = optax.inject_hyperparams(lambda learning_rate: adam_fn.adamw(learning_rate, storage=storage))(1e-2)
    doubled = optax.MultiSteps(plain, 2).gradient_transformation()
    for tx, grads in ((injected, twice), (doubled, {"w": jnp.repeat(twice["w"], 2, axis=0)})):
        (found, _), _ = scanned(tx, params, grads)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
    mapped: Any = optax.tree_utils.tree_map_params(plain, lambda x, p: x + p.shape[0], plain.init(params), params)
    assert all((x["w"] == 64).all() for x in slots_of(mapped).values())
    each = [(params, twice, plain.init(params)), (expected, twice, state)]
    batch, _ = jax.vmap(lambda *run: scanned(plain, *run)[0])(*jax.tree.map(lambda *x: jnp.stack(x), *each))
    for i, run in enumerate(each):
        np.testing.assert_allclose(batch["w"][i], scanned(plain, *run)[0][0]["w"], rtol=1e-6)


def test_second_moments_in_a_dtype_of_short_range_work_with_a_warning() -> None:
    """They work if gradients are large enough; the warning says that they may not be."""
    for dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
        with pytest.warns(UserWarning, match=f"{dtype} cannot represent small second moments"):
            tx = adam_fn.adam(1.0, nu_dtype=dtype)
        updates, state = tx.update(jnp.full(3, 100.0), tx.init(jnp.ones(3)))
        np.testing.assert_allclose(updates, -1.0, rtol=1e-3)
        assert slots_of(state)["nu"].dtype == jnp.dtype(dtype)


def test_masks_are_not_taken_for_schedules() -> None:
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
def test_leaves_outside_the_storage_mask_stay_wide() -> None:
    """They are stored, and updated, as without `storage`."""
    params = {"embedding": jnp.ones((8, 16)), "w": jnp.ones((8, 16)), "n": jnp.arange(3), "none": None}
    mask = adam_fn.masks.path("*embedding*", invert=True)
    size, steps = params["w"].size, jnp.linspace(-1, 1, 3 * 8 * 16).reshape(3, 8, 16)
    grads = {"embedding": steps, "w": steps, "n": np.zeros((3, 3), jax.dtypes.float0), "none": None}
    _, exact = scanned(adam_fn.adamw(1e-2), params, grads)
    for storage in ("24bit", Cast("bfloat16")):
        narrow = adam_fn.adamw(1e-2, storage=storage)
        tx = adam_fn.adamw(1e-2, storage=storage, storage_mask=mask)
        (_, state), found = scanned(tx, params, grads)
        np.testing.assert_array_equal(found["embedding"], exact["embedding"])
        assert (found["w"] != exact["w"]).any()
        assert adam_fn.state_bytes(tx, params) == 8 * size + adam_fn.state_bytes(narrow, {"w": params["w"]})
        assert pickle.loads(pickle.dumps(tx)) == tx != narrow
        with pytest.raises(ValueError, match=r"state's mu of embedding is float32\[8, 16\], expected (int8|bfloat16)"):
            narrow.update(params, state, params)
    for alias, dtypes in ((adam_fn.swats, {"bfloat16"}), (adam_fn.lamb, {"int8", "bfloat16"})):
        found = alias(1e-2, storage="24bit", storage_mask=mask).init(params)
        assert {str(x.dtype) for x in jax.tree.leaves(found) if x.size == size} == {"float32", *dtypes}
    with pytest.raises(ValueError, match=r"storage_mask must have the structure .*: v is not a parameter"):
        adam_fn.adamw(1e-2, storage="24bit", storage_mask={"v": True}).init(params)
