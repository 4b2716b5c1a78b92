"""Checkpoints: Orbax, flax and pickle restore states bit for bit, and a state that does not fit is an error."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import MEMBERS
from flax import nnx
from helpers.layouts import assert_placed, mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_fn
from adam_fn import checkpoint

TXS: dict[str, optax.GradientTransformation] = {
    **{case.name: case.make(1e-2) for case in MEMBERS},
    "bfloat16": adam_fn.adamw(1e-2, mu_dtype="bfloat16", nu_dtype="bfloat16"),
    "24bit": adam_fn.adan(1e-2, storage="24bit"),
    "16bit": adam_fn.adamw(1e-2, storage="16bit"),
    "masters": adam_fn.master_weights(adam_fn.adam(1e-2, storage="16bit")),
    "masters of 24 bits": adam_fn.master_weights(adam_fn.adam(1e-2, storage="24bit"), bits=8),
    "rounding": adam_fn.stochastic_rounding(adam_fn.amsgrad(1e-2, storage="16bit"), 3),
    "swats": adam_fn.swats(1e-2, tolerance=1e3),
    "lamb": adam_fn.lamb(1e-2),
    "cautious": adam_fn.cautious(adam_fn.adam(1e-2)),
    "average": optax.chain(adam_fn.adam(1e-2), adam_fn.average_params(0.9)),
    "accumulated": optax.MultiSteps(adam_fn.adam(1e-2), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(adam_fn.adam)(optax.linear_schedule(1e-2, 0.0, 9)),
    "frozen": adam_fn.adam(1e-2, frozen=adam_fn.masks.path("b")),
    "partitioned": optax.partition({0: adam_fn.adam(1e-2), 1: adam_fn.lion(1e-3)}, {"w": 0, "b": 1, "n": 1}),
}
SHORT = {"masters", "masters of 24 bits", "rounding"}  # The parameters are bfloat16.
MATRIX = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)


def parameters(name: str) -> dict[str, jax.Array]:
    dtype = jnp.bfloat16 if name in SHORT else jnp.float32
    return {"w": jnp.asarray(MATRIX, dtype), "b": jnp.ones(3, dtype), "n": jnp.arange(2)}


def gradients(params: Any, at: int | jax.Array) -> Any:
    """Gradients that depend on the step and the parameter."""
    return jax.tree.map(lambda p: jnp.sin(p * (at + 2)) if p.dtype != jnp.int32 else jnp.zeros_like(p), params)


@jax.jit
def begin() -> Any:
    """The parameters and the state of every transformation."""
    params = {name: parameters(name) for name in TXS}
    return {name: {"params": params[name], "state": tx.init(params[name])} for name, tx in TXS.items()}


@jax.jit
def step(runs: Any, at: jax.Array) -> Any:
    """A step of every transformation."""
    after = {}
    for name, tx in TXS.items():
        params, state = runs[name]["params"], runs[name]["state"]
        updates, state = tx.update(gradients(params, at), state, params)
        after[name] = {"params": optax.apply_updates(params, updates), "state": state}
    return after


def trained(runs: Any, start: int, steps: int) -> Any:
    for at in range(start, start + steps):
        runs = step(runs, at)
    return runs


def by_orbax(runs: Any, folder: Path) -> Any:
    """Saves and restores as documented: descriptions and Orbax's own shapes are checked before anything is restored."""
    about: Any = {name: checkpoint.describe(tx, runs[name]["params"]) for name, tx in TXS.items()}
    with ocp.CheckpointManager(folder / "run", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        manager.save(7, args=ocp.args.StandardSave(runs), custom_metadata=about)
        manager.wait_until_finished()
        about, shapes = manager.metadata(7).custom_metadata, manager.item_metadata(7)
        for name, tx in TXS.items():
            checkpoint.check(about[name], tx, runs[name]["params"])
            checkpoint.check(shapes[name]["state"], tx, runs[name]["params"])
        return manager.restore(7, args=ocp.args.StandardRestore(jax.eval_shape(begin)))


def by_flax(runs: Any, folder: Path) -> Any:
    (folder / "saved").write_bytes(flax.serialization.to_bytes(runs))
    return flax.serialization.from_bytes(begin(), (folder / "saved").read_bytes())


def by_pickle(runs: Any, folder: Path) -> Any:
    (folder / "saved").write_bytes(pickle.dumps(runs))
    return pickle.loads((folder / "saved").read_bytes())


def assert_same(found: Any, expected: Any) -> None:
    """Asserts equality bit for bit, of structures and dtypes too."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Every state is saved and restored by Orbax, flax and pickle."""
    runs = trained(begin(), 0, 3)
    expected = trained(runs, 3, 3)
    for name, tx in TXS.items():
        checkpoint.check(runs[name]["state"], tx, runs[name]["params"])
    for way in (by_orbax, by_flax, by_pickle):
        place = tmp_path / way.__name__
        place.mkdir()
        restored = way(runs, place)
        assert_same(restored, runs)
        assert_same(trained(restored, 3, 3), expected)


@pytest.mark.parametrize(("kind", "storage"), [(AxisType.Auto, "24bit"), (AxisType.Explicit, "16bit")], ids=str)
def test_a_sharded_run_goes_on_bit_for_bit_on_another_mesh(tmp_path: Path, kind: AxisType, storage: Any) -> None:
    """It is saved from eight devices, and restored on them and on two by two with another layout."""
    tx = adam_fn.master_weights(adam_fn.adamw(1e-2, storage=storage))
    train = adam_fn.make_step(tx)
    one, two = mesh_of(kind), mesh_of(kind, (2, 2))
    places = [NamedSharding(one, PartitionSpec("data")), NamedSharding(two, PartitionSpec("model", "data"))]

    def begun(place: NamedSharding) -> dict[str, Any]:
        params = {"w": jax.device_put(MATRIX.astype(jnp.bfloat16), place)}
        return {"params": params, "state": tx.init(params)}

    def go(params: Any, state: Any) -> dict[str, Any]:
        for at in range(3):  # Gradients are computed off the mesh: XLA might round them differently on another.
            grads = jax.tree.map(lambda p: jax.device_put(gradients(np.asarray(p), at), p.sharding), params)  # noqa: B023
            params, state = train(params, state, grads)
        return {"params": params, "state": state}

    saved = go(**begun(places[0]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        kept = jax.device_get(saved)
        expected = jax.device_get(go(**saved))
        for place in places:
            like = begun(place)
            restored = checkpointer.restore(tmp_path / "saved", like)
            assert_same(jax.device_get(restored), kept)
            assert_placed(restored, like)
            checkpoint.check(restored["state"], tx, like["params"])
            found = go(**restored)
            assert_same(jax.device_get(found), expected)
            assert_placed(found["params"], {"w": place})


P: Any = {"w": jnp.ones((64, 128)), "b": [jnp.ones(3), jnp.ones(2)]}
ADAMW = adam_fn.adamw(1e-3, storage="24bit")

KINDS = {"mu": "int8", "nu": "bfloat16"}
CHANGE = "adam_fn.interop.change_storage converts a state to another"


def leaves(slot: str, found: str, expected: str) -> list[str]:
    """The lines about all leaves of a slot; one of the dtypes may be "nothing"."""
    shapes = {"w": "64,128", "b/0": "3", "b/1": "2"}
    forms = ([kind if kind == "nothing" else f"{kind}[{x}]" for x in shapes.values()] for kind in (found, expected))
    return [f"state/0/{slot}/{leaf}: {x}, expected {y}" for leaf, x, y in zip(shapes, *forms, strict=True)]


class Other(NamedTuple):
    """A transformation that continues instead of the saved one, and the lines of the error.

    Attributes:
      lines: those about a description.
      state: those about a state alone, which names neither rule nor parameters; None if they are the same.
      params: the parameters of the run that continues.
      saved: the transformation whose state was saved.
      all: whether there are no other lines.
    """

    tx: optax.GradientTransformation
    lines: list[str]
    state: list[str] | None = None
    params: Any = P
    saved: optax.GradientTransformation = ADAMW
    all: bool = True


def partitioned(first: Any, **labels: int) -> optax.GradientTransformation:
    return optax.partition({0: first, 1: adam_fn.adam(1e-3)}, {"w": 0, "b": [0, 1], **labels})


COSINE, LINEAR = optax.cosine_decay_schedule(1e-2, 9), optax.linear_schedule(1e-2, 0.0, 9)
OTHERS = {
    "another rule with the same slots": Other(
        adam_fn.yogi(1e-3, weight_decay=1e-4, storage="24bit"), ["rules: Adam, expected Yogi"]
    ),
    "another rule": Other(
        adam_fn.amsgrad(1e-3, weight_decay=1e-4, storage="24bit"),
        ["rules: Adam, expected AMSGrad", *leaves("nu_max", "nothing", "bfloat16")],
    ),
    "another storage": Other(
        adam_fn.adamw(1e-3, storage="16bit"),
        [
            "storage/mu: MuLaw(bound=7.27), expected nothing",
            "storage/nu: Cast('bfloat16'), expected nothing",
            "storage/mu_nu: nothing, expected Word(bound=7.27)",
            f"{CHANGE} storage",
        ],
        [*leaves("mu", "int8", "nothing"), *leaves("nu", "bfloat16", "nothing"), *leaves("mu_nu", "nothing", "uint16")],
    ),
    "another storage of one slot": Other(
        adam_fn.adamw(1e-3, mu_dtype="bfloat16"),
        ["storage/mu: Cast('float32'), expected Cast('bfloat16')", f"{CHANGE} storage"],
        leaves("mu", "float32", "bfloat16"),
        saved=adam_fn.adamw(1e-3),
    ),
    "another bound": Other(  # The codes would be read as other moments; a state alone cannot tell.
        adam_fn.adamw(1e-3, b1=0.95, storage="24bit"),
        ["storage/mu: MuLaw(bound=7.27), expected MuLaw(bound=5.087)", f"{CHANGE} storage"],
    ),
    "another storage of another rule": Other(
        adam_fn.lion(1e-3, storage="24bit"),
        [
            "rules: Adam, expected Lion",
            "storage/mu: MuLaw(bound=7.27), expected Cast('bfloat16')",
            *leaves("nu", "bfloat16", "nothing"),
        ],
        [*leaves("mu", "int8", "bfloat16"), *leaves("nu", "bfloat16", "nothing")],
    ),
    "another storage of one of two": Other(  # It does not hide the lines about the slots of the other.
        partitioned(adam_fn.adamw(1e-3, storage="bfloat16"), w=1),
        [
            "storage/0/mu: Cast('float32'), expected Cast('bfloat16')",
            "state/inner_states/1/inner_state/0/mu/w: nothing, expected float32[64,128]",
        ],
        saved=partitioned(adam_fn.adamw(1e-3)),
        all=False,
    ),
    "another mask": Other(  # Orbax compares these parts without leaves as well.
        adam_fn.adamw(1e-3, storage="24bit", mask=adam_fn.masks.rank(2)),
        ["state/1: EmptyState(), expected MaskedState(inner_state=EmptyState())", f"{CHANGE} mask"],
        [],
    ),
    "schedules": Other(
        adam_fn.adamw(COSINE, b2=LINEAR, weight_decay=COSINE, storage="24bit"),
        [f"state/{i}/count: nothing, expected int32[]" for i in (1, 2)]
        + [f"state/3/weights/0/{word}: nothing, expected float32[]" for word in ("main", "rest")],
    ),
    "a leaf more, one less, one of another dtype and one of another shape": Other(
        adam_fn.adamw(1e-3, storage="24bit", frozen=adam_fn.masks.path("b/0")),
        [
            "params/w: float32[64,128], expected bfloat16[64,128]",
            "params/b/1: float32[2], expected float32[1]",
            "params/b/2: nothing, expected float32[]",
        ]
        + [f"state/0/{slot}/b/0: {kind}[3], expected nothing" for slot, kind in KINDS.items()]
        + [f"state/0/{slot}/b/1: {kind}[2], expected {kind}[1]" for slot, kind in KINDS.items()]
        + [f"state/0/{slot}/b/2: nothing, expected {kind}[]" for slot, kind in KINDS.items()],
        params={"w": P["w"].astype(jnp.bfloat16), "b": [jnp.ones(3), jnp.ones(1), jnp.ones(())]},
    ),
    "another wrapper": Other(
        adam_fn.stochastic_rounding(ADAMW),
        ["state/inner/0/count: nothing, expected int32[]", "state/0/mu/w: int8[64,128], expected nothing"],
        all=False,
    ),
    "a state of optax": Other(
        adam_fn.lion(1e-3, storage="bfloat16"),
        [
            *leaves("mu", "float32", "bfloat16"),
            *leaves("nu", "float32", "nothing"),
            "adam_fn.interop.from_optax converts a state of optax, and to_optax converts back",
        ],
        saved=optax.adamw(1e-3),
    ),
}


def lines_of(saved: Any, tx: optax.GradientTransformation, params: Any) -> list[str]:
    with pytest.raises(ValueError, match="does not belong to this transformation and these parameters") as error:
        checkpoint.check(saved, tx, params)
    return sorted(line.strip() for line in str(error.value).splitlines()[1:])


def swapped(line: str) -> str:
    return re.sub("(.*?): (.*), expected (.*)", r"\1: \3, expected \2", line)


@pytest.mark.quick
@pytest.mark.parametrize("other", OTHERS)
def test_another_checkpoint_is_an_error_that_names_what_differs(other: str) -> None:
    """A description is checked in both directions, and a state alone with its types and as dictionaries."""
    tx, expected, of_state, params, saved, complete = OTHERS[other]
    about, after = (json.loads(json.dumps(checkpoint.describe(*x))) for x in ((saved, P), (tx, params)))
    checkpoint.check(about, saved, P)
    lines = lines_of(about, tx, params)
    assert lines == sorted(expected) if complete else set(expected) < set(lines)
    assert lines_of(after, saved, P) == sorted(map(swapped, lines))

    arrays = [line for line in lines if line.startswith("state") and "State(" not in line]
    seen = arrays if of_state is None else sorted(of_state)
    for state in (saved.init(P), flax.serialization.to_state_dict(saved.init(P))):
        checkpoint.check(state, saved, P)
        if seen:
            assert lines_of(state, tx, params) == seen
        else:
            checkpoint.check(state, tx, params)


@pytest.mark.parametrize(
    ("saved", "tx", "dtype"),
    [
        (ADAMW, adam_fn.adamw(1e-2, eps=1e-6, weight_decay=0.1, storage="24bit"), "float32"),
        (ADAMW, adam_fn.nadamw(1e-3, storage="24bit"), "float32"),  # Its moments are Adam's.
        (ADAMW, optax.GradientTransformation(ADAMW.init, ADAMW.update), "float32"),
        (adam_fn.adamw(1e-3), optax.adamw(1e-3), "float32"),
        # A cast to the dtype of the arithmetic is the same storage.
        (adam_fn.adamw(1e-3), adam_fn.adamw(1e-3, mu_dtype="float32", nu_dtype="float32"), "float32"),
        (adam_fn.adamw(1e-3), adam_fn.adamw(1e-3, mu_dtype="float32", nu_dtype="float32"), "bfloat16"),
        # Schedules count in the state, as in optax: one may be replaced by another.
        (adam_fn.adamw(COSINE), adam_fn.adamw(LINEAR, weight_decay=0.1), "float32"),
        (adam_fn.adamw(COSINE, weight_decay=COSINE), adam_fn.adamw(LINEAR, weight_decay=LINEAR), "float32"),
    ],
)
def test_hyperparameters_and_schedules_may_change_between_two_runs(saved: Any, tx: Any, dtype: str) -> None:
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), P)
    checkpoint.check(checkpoint.describe(saved, params), tx, params)
    checkpoint.check(checkpoint.describe(tx, params), saved, params)


def test_boxes_have_no_value_in_their_path() -> None:
    """Paths are those of masks and groups, also where a box was restored as a dictionary."""
    params, wider = (nnx.state(nnx.Linear(2, n, rngs=nnx.Rngs(0)), nnx.Param) for n in (3, 4))
    tx = adam_fn.lion(1e-3)
    boxed = {"kernel": {"value": jnp.ones((2, 3))}, "bias": {"value": jnp.ones(3)}}
    for state in (tx.init(params), {"0": {"count": jnp.int32(0), "mu": boxed}}):
        checkpoint.check(state, tx, params)
        assert "state/0/mu/kernel: float32[2,3], expected float32[2,4]" in lines_of(state, tx, wider)
    assert list(checkpoint.describe(tx, params)["params"]) == ["params/bias", "params/kernel"]
    # A parameter that is called "value" is no box.
    assert list(checkpoint.describe(tx, {"value": jnp.ones(2)})["params"]) == ["params/value"]


@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (lambda tx: tx, ["Adam"]),
        (lambda tx: optax.chain(optax.clip(1.0), tx, adam_fn.average_params()), ["Adam", "Average"]),
        (lambda tx: adam_fn.master_weights(optax.MultiSteps(tx, 3).gradient_transformation()), ["Adam"]),
        (lambda tx: optax.partition({0: tx, 1: adam_fn.lion(1e-3)}, {"w": 0, "b": 1}), ["Adam", "Lion"]),
        (lambda tx: optax.inject_hyperparams(adam_fn.adan)(1e-3), ["Adan"]),
        (lambda tx: adam_fn.cautious(adam_fn.swats(1e-3)), ["Switching"]),
        (lambda tx: optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update)), ["Adam"]),
        (lambda tx: optax.sgd(1e-3, momentum=0.9), []),
    ],
)
def test_rules_are_found_wherever_they_are(make: Callable[[Any], Any], rules: list[str]) -> None:
    tx = make(ADAMW)
    tx.init(P)
    for _ in range(2):  # JAX remembers what it traced before.
        assert checkpoint.describe(tx, P)["rules"] == rules
