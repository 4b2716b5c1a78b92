"""Arguments: values, errors, equality, hashing, pickling, decay, masks."""

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, MEMBERS, Case, name, rule_of
from flax import nnx
from helpers.runs import compilations, random_gradients, trajectory
from helpers.states import count_of, slots_of

import adam_fn
from adam_fn.algebra.values import method_of
from adam_fn.schedules import inverse_sqrt

pytestmark = pytest.mark.quick

ALIASES = tuple(dict.fromkeys(case.alias for case in CASES))  # in order: workers must collect the same
NAMESAKES = {
    alias: peer
    for alias in ALIASES
    if (peer := getattr(optax, alias.__name__, None) or getattr(optax.contrib, alias.__name__, None))
}
# Defaults that differ: the paper has no eps_root; a function by the same formula.
DEPARTURES = {"adan": "eps_root", "adopt": "clip_value_fn"}
UNTYPED: Any = adam_fn  # For arguments that a type checker refuses too.
GRADS = random_gradients(5, 16)
PARAMS = np.random.default_rng(1).standard_normal(16).astype(np.float32)


def _alias_name(alias: Callable[..., Any]) -> str:
    return alias.__name__


@pytest.mark.parametrize("alias", NAMESAKES, ids=_alias_name)
def test_optax_names_order_and_defaults(alias: Callable[..., Any]) -> None:
    ours = inspect.signature(alias).parameters
    theirs = inspect.signature(NAMESAKES[alias]).parameters
    for name_, parameter in theirs.items():
        assert (ours[name_].default == parameter.default) != (DEPARTURES.get(alias.__name__) == name_), name_
        assert ours[name_].kind == parameter.kind, name_
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("alias", ALIASES, ids=_alias_name)
def test_signature_lists_the_shared_options(alias: Callable[..., Any]) -> None:
    signature = inspect.signature(alias)
    names = set(signature.parameters)
    assert len(str(signature)) < 400  # `help` shows it in one line.
    assert {"weight_decay", "mask", "decay", "frozen", "mu_dtype", "nu_dtype"} <= names
    with pytest.raises(
        TypeError, match=rf"{alias.__name__}\(\) got an unexpected .* 'weight_decoy'; its arguments are"
    ):
        alias(1e-3, weight_decoy=0.1)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_optimizers_are_equal_by_value(case: Case) -> None:
    one, two = case.make(1e-3), case.make(1e-3)
    assert one == two
    assert hash(one) == hash(two)
    assert one != case.make(2e-3)
    assert pickle.loads(pickle.dumps(one)) == one


def test_equality_covers_masks_schedules_and_storage() -> None:
    def make(**options: Any) -> optax.GradientTransformation:
        return adam_fn.adamw(inverse_sqrt(1e-3), **options)

    for options in (
        {"mask": {"a": True, "b": None, "c": [False]}},
        {"mask": adam_fn.masks.path("*bias", invert=True), "frozen": adam_fn.masks.rank(3)},
        {"mu_dtype": "bfloat16", "nu_dtype": jnp.bfloat16},
        {"b1": optax.constant_schedule},
    ):
        assert make(**options) == make(**options)
        assert hash(make(**options)) == hash(make(**options))
        assert make(**options) != make()
        assert pickle.loads(pickle.dumps(make(**options))) == make(**options)
    assert make(mu_dtype="bfloat16") == make(mu_dtype=jnp.bfloat16)
    assert make(mask={"a": True}) != make(mask={"a": False})
    assert make(mask={"a": True}) != make(mask={"b": True})


def test_static_argument_of_jit() -> None:
    @jax.jit
    def plain(x: jax.Array) -> jax.Array:
        return x

    def step(tx: adam_fn.Transformation, p: jax.Array) -> jax.Array:
        return tx.update(p, tx.init(p), p)[0]

    jitted = jax.jit(step, static_argnums=0)
    for _ in range(3):
        jitted(adam_fn.adamw(1e-3, mask=True), plain(jnp.ones(3)))
    assert compilations(jitted) == 1
    jitted(adam_fn.adamw(2e-3, mask=True), jnp.ones(3))
    assert compilations(jitted) == 2


def test_equal_transformations_share_compilations() -> None:
    from adam_fn.trees.update import _init, _update

    p = jnp.ones(17)
    adam_fn.adam(1e-3).update(p, adam_fn.adam(1e-3).init(p), p)
    before = compilations(_init), compilations(_update)
    adam_fn.adam(1e-3).update(p, adam_fn.adam(1e-3).init(p), p)
    assert (compilations(_init), compilations(_update)) == before


@pytest.mark.parametrize("case", MEMBERS, ids=name)
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("b1", 1.0, r"b1 must be in \[0, 1\), got 1"),
        ("b1", -0.1, r"b1 must be in \[0, 1\), got -0.1"),
        ("b2", 1.5, r"b2 must be in \[0, 1\)"),
        ("b2", float("nan"), r"b2 must be in \[0, 1\), got nan"),
        ("b2", jnp.ones(2) / 2, r"b2 must be a scalar, got an array of shape \(2,\)"),
        ("b2", jnp.asarray(0.999, jnp.bfloat16), r"b2 is a bfloat16 array.*hyperparam_dtype=jnp.float32"),
        ("eps", -1e-8, r"eps must be in \[0, inf\), got -1e-08"),
        ("eps", "1e-8", r"eps must be a number, a 0-d array or a schedule, got '1e-8'"),
        ("learning_rate", -1.0, r"learning_rate must be in \[0, inf\)"),
        ("learning_rate", float("inf"), r"learning_rate must be in \[0, inf\), got inf"),
        ("learning_rate", None, r"learning_rate must be a number"),
        ("learning_rate", True, r"learning_rate must be a number"),
        ("learning_rate", np.asarray(False), "learning_rate must be a real number, got an array of"),
        ("learning_rate", jnp.asarray(1j), "learning_rate must be a real number, got an array of"),
        ("weight_decay", -0.1, r"weight_decay must be in \[0, inf\)"),
    ],
)
def test_bad_hyperparameters_name_the_argument(case: Case, argument: str, value: object, message: str) -> None:
    if argument not in inspect.signature(case.alias).parameters:  # Lion and Adam-atan2 have no ε.
        message = f"unexpected keyword argument '{argument}'"
    with pytest.raises((ValueError, TypeError), match=message):
        case.make(**{argument: value})


def test_a_rate_of_one_step_reaches_the_proximal_decay() -> None:
    p = jnp.asarray([1.0, -2.0])
    tx, other = (adam_fn.adan(rate, weight_decay=0.5, decay="proximal") for rate in (1e-3, 1e-1))
    found, _ = tx.update(p, tx.init(p), p, learning_rate=1e-1)
    expected, _ = other.update(p, other.init(p), p)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_schedule_that_returns_zero_does_not_change_what_is_stored() -> None:
    for b1 in (lambda count: 0.0, lambda count: jnp.zeros(())):
        tx = adam_fn.adam(1e-3, b1=b1)
        updates, state = tx.update(jnp.asarray(PARAMS), tx.init(jnp.asarray(PARAMS)))
        assert set(slots_of(state)) == {"mu", "nu"}
        plain = adam_fn.adam(1e-3, b1=0.0)
        expected, state = plain.update(jnp.asarray(PARAMS), plain.init(jnp.asarray(PARAMS)))
        assert set(slots_of(state)) == {"nu"}
        np.testing.assert_array_equal(updates, expected)


def _first(tx: adam_fn.Transformation) -> Any:
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)


class _Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, count: jax.Array) -> float:
        return 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UNTYPED.adam(1e-3, weight_decay=0.1, decay="L2"),
            r"decay must be one of .*'independent', 'l2', 'proximal'.*, got 'L2'",
        ),
        (lambda: adam_fn.adam(1e-3, mask=True), "no effect without weight_decay"),
        (lambda: adam_fn.adam(1e-3, momentum_decay=4e-3), r"momentum_decay .* needs nesterov=True"),
        (lambda: adam_fn.radam(1e-3, threshold=3.5), r"threshold must be in \[4, inf\), got 3.5"),
        (
            lambda: optax.inject_hyperparams(adam_fn.adam)(-0.1).init(PARAMS),
            r"learning_rate must be in \[0, inf\), got -0.1",
        ),
        (lambda: adam_fn.adam(1e-3, nu_dtype="int8"), "floating dtype, got int8"),
        (lambda: UNTYPED.adam(_Unhashable()), "hashable"),
        (lambda: adam_fn.Adan(nesterov=True), "nesterov must be False"),
        (lambda: _first(adam_fn.adam(lambda count: jnp.ones(3) * count)), r"learning_rate\(count\) must be a scalar"),
        (lambda: _first(adam_fn.adam(1e-3, b2=lambda count: 1.0)), r"b2\(count\) must be in \[0, 1\), got 1"),
        (lambda: _first(adam_fn.adam(1e-3, b2=lambda count: jnp.bfloat16(1))), r"b2\(count\) is a bfloat16 array"),
        (lambda: UNTYPED.make_step(adam_fn.adamw), r"make_step takes a transformation.*, got <function adamw"),
        (lambda: UNTYPED.transform(adam_fn.adam(1e-3)), "transform takes a rule"),
        (lambda: UNTYPED.Adam() >> optax.clip(1.0), "unsupported operand type"),
        (lambda: UNTYPED.transform(adam_fn.Adam(), storage={"mu": jnp.bfloat16}), r"storage\['mu'\] must be a codec"),
        (
            lambda: adam_fn.transform(adam_fn.Adam(), storage={"mo": adam_fn.Cast()}),
            "storage names 'mo', but the slots are mu, nu",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": True}, r"mask must have the structure of the parameters"),
        ({"w": True, "b": True, "c": True}, r"mask must have .*: c is not a parameter"),
        ({"w": {"x": True}, "b": True}, r"mask must have .*: w/x is not a parameter"),
        ({"w": None, "b": True}, r"mask must have .*it is None in place of a parameter"),
        ({"w": 1.0, "b": True}, r"mask of w must be a Python bool, got 1.0"),
        ("*bias", r"mask must be a tree of booleans or .* masks.path\('\*bias'\).*, got '\*bias'"),
        (adam_fn.masks.rank, r"mask must be a tree of booleans or .*, got <class"),
        (lambda p: {"w": True}, r"mask must have the structure of the parameters"),
        (lambda p: {"w": True, "b": jnp.ones(())}, r"mask of b must be a Python bool"),
    ],
)
def test_bad_masks(mask: Any, message: str) -> None:
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises((ValueError, TypeError), match=message):
        adam_fn.adamw(1e-3, mask=mask).init(params)


def test_a_composed_rule_whose_decay_would_make_weights_grow_is_an_error() -> None:
    """``p - αu + λp`` would let the weights grow."""
    rate, decay, independent = adam_fn.Rate(1e-3), adam_fn.Decay(0.1), adam_fn.Decay(0.1, independent=True)
    for rule in (decay >> rate, rate >> independent, decay >> adam_fn.Adam() >> rate >> independent):
        u, _ = adam_fn.transform(rule).update(jnp.zeros(2), adam_fn.transform(rule).init(jnp.ones(2)), jnp.ones(2))
        assert jnp.all(u < 0)
    adam, after = adam_fn.Adam(), r"after it Decay\(…, independent=True\)"
    before = r"before it stands (Proximal)?Decay\(…\)"
    for first, second, message in (
        (rate, decay, after),
        (adam >> rate, decay, after),
        (rate >> rate, decay, after),
        (independent, rate, before),
        (independent, adam >> rate, before),
        (adam >> independent, rate, before),
        (adam >> adam_fn.ProximalDecay(0.1, 0.1), rate, before),
    ):
        with pytest.raises(ValueError, match=f"would make the weights grow: .*{message}"):
            _ = first >> second


def test_decay_forms() -> None:
    """Three meanings of "weight decay", and what each does to the parameters."""
    lr, wd = 0.1, 0.01
    p = jnp.asarray(PARAMS)
    zero = jnp.zeros_like(p)
    state = adam_fn.adam(lr).init(p)
    bare, _ = adam_fn.adam(lr).update(GRADS[0], state, p)

    def first_update(g: Any, decay: Any, weight_decay: Any = wd, learning_rate: Any = lr) -> jax.Array:
        tx = adam_fn.adam(learning_rate, weight_decay=weight_decay, decay=decay)
        return tx.update(g, tx.init(p), p)[0]

    np.testing.assert_allclose(first_update(GRADS[0], "scaled"), bare - lr * wd * p, rtol=2e-6)
    np.testing.assert_allclose(first_update(GRADS[0], "independent"), bare - wd * p, rtol=2e-6)
    np.testing.assert_allclose(first_update(zero, "l2"), -lr * jnp.sign(p), rtol=1e-4)
    # A schedule of its own, and one for the rate that does not touch the decay.
    halved = first_update(zero, "independent", weight_decay=lambda count: wd / 2, learning_rate=lambda count: 7.0)
    np.testing.assert_allclose(halved, -wd / 2 * p, rtol=1e-6)


def test_learning_rate_override() -> None:
    from adam_fn.trees.update import _update

    p, g = jnp.asarray(PARAMS), jnp.asarray(GRADS[0])
    tx = optax.chain(optax.clip(100.0), adam_fn.adamw(1e-3))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(p)
    expected, _ = adam_fn.adamw(0.5).update(g, adam_fn.adamw(0.5).init(p), p)
    tx.update(g, state, p, learning_rate=0.25)
    before = compilations(_update)
    for rate in (0.5, np.float32(0.5), np.float64(0.5)):
        np.testing.assert_array_equal(tx.update(g, state, p, learning_rate=rate, value=3.0)[0], expected)
    tx.update(g, state, p, learning_rate=1)
    assert compilations(_update) == before
    np.testing.assert_array_equal(tx.update(g, state, p, learning_rate=jnp.asarray(0.5))[0], expected)
    with pytest.raises(ValueError, match=r"learning_rate must be a scalar, got an array of shape \(2,\)"):
        tx.update(g, state, p, learning_rate=jnp.ones(2))

    for bad, message in (
        (-1.0, r"learning_rate must be in \[0, inf\), got -1"),
        (float("nan"), r"learning_rate must be in \[0, inf\), got nan"),
        ("0.1", "learning_rate must be a number"),
        (True, "learning_rate must be a number"),
        (lambda count: 0.1, "of one update must be a number or a 0-d array"),
        (jnp.asarray(1), "learning_rate must be floating, got an array of int32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tx.update(g, state, p, learning_rate=bad)

    jitted = jax.jit(lambda rate: tx.update(g, state, p, learning_rate=rate)[0])
    np.testing.assert_allclose(jitted(0.5), expected, rtol=1e-6)
    jitted(0.1)
    assert compilations(jitted) == 1


def test_first_update_sees_schedule_of_zero() -> None:
    seen = [0.0, 1.0, 10.0]
    _, updates = trajectory(
        adam_fn.adam(lambda count: jnp.asarray(seen)[count]), np.ones((3, 2), np.float32), PARAMS[:2]
    )
    np.testing.assert_allclose(-updates[:, 0], seen, rtol=1e-6)


def test_hyperparameters_may_be_numpy_scalars_and_arrays() -> None:
    expected = trajectory(adam_fn.adam(0.5, 0.5, 0.75, 2.0**-10), GRADS, PARAMS)[1]
    for kind in (np.float32, np.float64, jnp.float32, np.asarray):
        tx = adam_fn.adam(kind(0.5), b1=kind(0.5), b2=kind(0.75), eps=kind(2.0**-10))
        np.testing.assert_allclose(trajectory(tx, GRADS, PARAMS)[1], expected, rtol=1e-5)


def test_masks_by_rank_and_path() -> None:
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}, "none": None}
    masks = adam_fn.masks
    assert masks.rank(2)(params) == {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}, "none": None}
    expected = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}, "none": None}
    assert masks.path("*/kernel")(params) == expected
    assert masks.path("*bias", "norm/*", invert=True)(params) == expected
    with pytest.raises(ValueError, match="pattern 'kernel' matches no parameter"):  # The whole path must match.
        masks.path("*bias", "kernel")(params)
    boxed = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.leaves(masks.path("*bias")(boxed)) == [True, False]
    assert jax.tree.leaves(masks.path("value")({"value": jnp.ones(1)})) == [True]  # A key of a dict is not a box.
    with pytest.raises(TypeError, match="a pattern must be a string"):
        masks.path(("a",))  # pyright: ignore[reportArgumentType]


def test_transform_of_a_rule_alone() -> None:
    tx = adam_fn.transform(adam_fn.Decay(0.1) >> adam_fn.Rate(1.0), mask={"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], -jnp.zeros(2))
    assert rule_of(tx) == adam_fn.Decay(0.1) >> adam_fn.Rate(1.0)


def test_array_hyperparameters_compare_by_identity() -> None:
    """So do the methods; the functions around them, where Equinox looks for arrays, are closures."""
    rate = jnp.asarray(1e-3)
    one, two = adam_fn.adam(rate), adam_fn.adam(rate)
    for a, b, other in zip(one, two, adam_fn.adam(jnp.asarray(1e-3)), strict=True):
        assert method_of(a) == method_of(b)
        assert hash(method_of(a)) == hash(method_of(b))
        assert method_of(a) != method_of(other)
    assert jax.jit(lambda tx, p: count_of(tx.init(p)), static_argnums=0)(one, jnp.ones(2)) == 0


@dataclasses.dataclass(frozen=True)
class _Sloppy(adam_fn.Rule):
    """A custom rule that returns what it should not."""

    fault: str = ""

    @property
    def slots(self) -> Any:
        return {"mu": adam_fn.Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Any, clock: adam_fn.Clock) -> Any:
        if self.fault == "update":
            return jnp.sum(g), slots
        if self.fault == "slot":
            return g, {"mu": jnp.sum(g)}
        return g, {}


@pytest.mark.parametrize("fault", ["update", "slot", "forgotten"])
def test_results_of_a_custom_rule_are_checked(fault: str) -> None:
    tx = adam_fn.transform(_Sloppy(fault))
    with pytest.raises(ValueError, match=r"_Sloppy\.leaf returned shapes .* expected"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
