"""Arguments: values, errors, equality, hashing, pickling, decay, masks."""

import dataclasses
import functools
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
from helpers.runs import compilations, random_gradients, trajectories, trajectory
from helpers.states import count_of, slots_of

import adam_fn
from adam_fn.algebra.values import method_of
from adam_fn.schedules import inverse_sqrt

pytestmark = pytest.mark.quick

ALIASES = tuple(dict.fromkeys(case.alias for case in CASES))  # in order: workers must collect the same
# Defaults that differ: Adan's paper has no eps_root; ADOPT's default is another function of the same formula.
DEPARTURES = {"adan": "eps_root", "adopt": "clip_value_fn"}
UNTYPED: Any = adam_fn  # For arguments that a type checker refuses too.
PARAMS = np.random.default_rng(1).standard_normal(16).astype(np.float32)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_signatures_are_those_of_optax_with_the_common_options(alias: Callable[..., Any]) -> None:
    """The names, order and defaults are those of optax; all functions share the other options."""
    signature = inspect.signature(alias)
    ours = signature.parameters
    assert len(str(signature)) < 400  # `help` shows it in one line.
    assert {"weight_decay", "mask", "decay", "frozen", "mu_dtype", "nu_dtype"} <= ours.keys()
    unexpected = rf"{alias.__name__}\(\) got an unexpected .* 'weight_decoy'; its arguments are"
    with pytest.raises(TypeError, match=unexpected):
        alias(1e-3, weight_decoy=0.1)
    if peer := getattr(optax, alias.__name__, None) or getattr(optax.contrib, alias.__name__, None):
        theirs = inspect.signature(peer).parameters
        for name_, parameter in theirs.items():
            assert (ours[name_].default == parameter.default) != (DEPARTURES.get(alias.__name__) == name_), name_
            assert ours[name_].kind == parameter.kind, name_
        positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"mask": {"a": True}},
    {"mask": {"a": False}},
    {"mask": {"b": True}},
    {"mask": {"a": True, "b": None, "c": [False]}},
    {"mask": adam_fn.masks.path("*bias", invert=True), "frozen": adam_fn.masks.rank(3)},
    {"mu_dtype": "bfloat16", "nu_dtype": jnp.bfloat16},
    {"b1": optax.constant_schedule},
)


def test_optimizers_are_equal_by_value() -> None:
    """Their masks, schedules and storage are equal by value as well."""
    makes = [*(case.make for case in CASES), *(functools.partial(adam_fn.adamw, **options) for options in OPTIONS)]
    for make in makes:
        one, two = make(inverse_sqrt(1e-3)), make(inverse_sqrt(1e-3))
        assert one == two == pickle.loads(pickle.dumps(one))
        assert hash(one) == hash(two)
        assert one != make(1e-3) != make(2e-3)
    assert len({make(1e-3) for make in makes[-len(OPTIONS) :]}) == len(OPTIONS)
    assert adam_fn.adamw(1e-3, mu_dtype="bfloat16") == adam_fn.adamw(1e-3, mu_dtype=jnp.bfloat16)


def test_equal_transformations_share_compilations() -> None:
    """They do so as static arguments of a jitted function, and in eager use."""
    from adam_fn.trees.update import _init, _update

    def step(tx: adam_fn.Transformation, p: jax.Array) -> jax.Array:
        return tx.update(p, tx.init(p), p)[0]

    jitted, p = jax.jit(step, static_argnums=0), jnp.ones(17)
    jitted(adam_fn.adamw(2e-3), p)
    for run, functions in ((jitted, [jitted]), (step, [_init, _update])):
        run(adam_fn.adamw(1e-3), p)
        before = [compilations(function) for function in functions]
        run(adam_fn.adamw(1e-3), p)
        assert [compilations(function) for function in functions] == before
    assert compilations(jitted) == 2


def _first(tx: optax.GradientTransformationExtraArgs, **extra: Any) -> Any:
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)


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


def test_a_schedule_that_returns_zero_does_not_change_what_is_stored() -> None:
    expected, state = _first(adam_fn.adam(1e-3, b1=0.0))
    assert set(slots_of(state)) == {"nu"}
    for b1 in (lambda count: 0.0, lambda count: jnp.zeros(())):
        updates, state = _first(adam_fn.adam(1e-3, b1=b1))
        assert set(slots_of(state)) == {"mu", "nu"}
        np.testing.assert_array_equal(updates, expected)


def _masked(mask: Any) -> Any:
    return adam_fn.adamw(1e-3, mask=mask).init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})


def _stepped(learning_rate: Any) -> Any:
    return _first(adam_fn.adamw(1e-3), learning_rate=learning_rate)


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
        (
            lambda: adam_fn.transform(adam_fn.Adam(), storage={"mo": adam_fn.Cast()}),
            "storage names 'mo', but the slots are mu, nu",
        ),
        (lambda: adam_fn.masks.path(("a",)), "a pattern must be a string"),  # pyright: ignore[reportArgumentType]
        (lambda: _masked({"w": True}), "mask must have the structure of the parameters"),
        (lambda: _masked({"w": True, "b": True, "c": True}), "mask must have .*: c is not a parameter"),
        (lambda: _masked({"w": {"x": True}, "b": True}), "mask must have .*: w/x is not a parameter"),
        (lambda: _masked({"w": None, "b": True}), "mask must have .*it is None in place of a parameter"),
        (lambda: _masked({"w": 1.0, "b": True}), "mask of w must be a Python bool, got 1.0"),
        (lambda: _masked("*bias"), r"a tree of booleans or .* masks.path\('\*bias'\).*, got '\*bias'"),
        (lambda: _masked(adam_fn.masks.rank), "mask must be a tree of booleans or .*, got <class"),
        (lambda: _masked(lambda p: {"w": True}), "mask must have the structure of the parameters"),
        (lambda: _masked(lambda p: {"w": True, "b": jnp.ones(())}), "mask of b must be a Python bool"),
        (lambda: _stepped(jnp.ones(2)), r"learning_rate must be a scalar, got an array of shape \(2,\)"),
        (lambda: _stepped(-1.0), r"learning_rate must be in \[0, inf\), got -1"),
        (lambda: _stepped(float("nan")), r"learning_rate must be in \[0, inf\), got nan"),
        (lambda: _stepped("0.1"), "learning_rate must be a number"),
        (lambda: _stepped(True), "learning_rate must be a number"),
        (lambda: _stepped(lambda count: 0.1), "of one update must be a number or a 0-d array"),
        (lambda: _stepped(jnp.asarray(1)), "learning_rate must be floating, got an array of int32"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_composed_rule_whose_decay_would_make_weights_grow_is_an_error() -> None:
    """The step ``p - αu + λp`` would let the weights grow."""
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


def test_an_independent_decay_follows_its_own_schedule_and_not_the_rate() -> None:
    tx = adam_fn.adam(lambda count: 7.0, weight_decay=lambda count: 0.005, decay="independent")
    updates, _ = tx.update(0 * PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates, -0.005 * PARAMS, rtol=1e-6)


def test_update_takes_a_learning_rate_for_one_step() -> None:
    """It is any kind of number, passes through a chain, sets the proximal decay too, and needs no new compilation."""
    from adam_fn.trees.update import _update

    for make in (adam_fn.adamw, functools.partial(adam_fn.adan, weight_decay=0.5, decay="proximal")):
        tx: Any = optax.chain(optax.clip(100.0), make(1e-3))
        expected, _ = _first(make(0.5))
        _first(tx, learning_rate=0.25)
        before = compilations(_update)
        for rate in (0.5, np.float32(0.5), np.float64(0.5)):
            np.testing.assert_array_equal(_first(tx, learning_rate=rate, value=3.0)[0], expected)
        _first(tx, learning_rate=1)
        assert compilations(_update) == before
        np.testing.assert_array_equal(_first(tx, learning_rate=jnp.asarray(0.5))[0], expected)
        jitted = jax.jit(lambda rate, tx=tx: _first(tx, learning_rate=rate)[0])
        np.testing.assert_allclose(jitted(0.5), expected, rtol=1e-6)
        jitted(0.1)
        assert compilations(jitted) == 1


def test_the_first_update_sees_the_schedule_at_zero() -> None:
    tx = adam_fn.adam(lambda count: count * 1.0)
    np.testing.assert_allclose(trajectory(tx, np.ones((3, 2)), PARAMS[:2])[1][:, 0], [0, -1, -2], rtol=1e-6)


def test_hyperparameters_may_be_numpy_scalars_and_arrays() -> None:
    kinds: tuple[Any, ...] = (float, np.float32, np.float64, jnp.float32, np.asarray)
    txs = [adam_fn.adam(kind(0.5), kind(0.5), kind(0.75), kind(2.0**-10)) for kind in kinds]
    expected, *found = trajectories(txs, random_gradients(5, 16), PARAMS)[1]
    np.testing.assert_allclose(found, [expected] * 4, rtol=1e-5)


def test_masks_by_rank_and_by_path_choose_the_same_leaves() -> None:
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}, "none": None}
    expected = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}, "none": None}
    masks = adam_fn.masks
    for mask in (masks.rank(2), masks.path("*/kernel"), masks.path("*bias", "norm/*", invert=True)):
        assert mask(params) == expected


def test_transform_makes_an_optimizer_of_a_rule_without_moments() -> None:
    tx = adam_fn.transform(adam_fn.Decay(0.1) >> adam_fn.Rate(1.0), mask={"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], -jnp.zeros(2))
    assert rule_of(tx) == adam_fn.Decay(0.1) >> adam_fn.Rate(1.0)


def test_array_hyperparameters_compare_by_identity() -> None:
    """The methods do so too; the functions around them, in which Equinox looks for arrays, are closures."""
    rate = jnp.asarray(1e-3)
    one, two = adam_fn.adam(rate), adam_fn.adam(rate)
    for a, b, other in zip(one, two, adam_fn.adam(jnp.asarray(1e-3)), strict=True):
        assert method_of(a) == method_of(b)
        assert hash(method_of(a)) == hash(method_of(b))
        assert method_of(a) != method_of(other)
    assert jax.jit(lambda tx, p: count_of(tx.init(p)), static_argnums=0)(one, jnp.ones(2)) == 0


@dataclasses.dataclass(frozen=True)
class _Sloppy(adam_fn.Rule):
    """A custom rule that returns wrong results."""

    returned: Callable[[jax.Array, Any], Any]

    @property
    def slots(self) -> Any:
        return {"mu": adam_fn.Slot()}

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Any, clock: adam_fn.Clock) -> Any:
        return self.returned(g, slots)


def test_results_of_a_custom_rule_are_checked() -> None:
    for returned in (lambda g, slots: (g.sum(), slots), lambda g, _: (g, {"mu": g.sum()}), lambda g, _: (g, {})):
        with pytest.raises(ValueError, match=r"_Sloppy\.leaf returned shapes .* expected"):
            _first(adam_fn.transform(_Sloppy(returned)))
