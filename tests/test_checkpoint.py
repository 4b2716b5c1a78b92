"""States in and out of checkpoints: bit for bit with Orbax, flax and pickle, and the right one or an error."""

import json
import pickle
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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", runs)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", jax.eval_shape(begin))


def by_flax(runs: Any, folder: Path) -> Any:
    (folder / "saved").write_bytes(flax.serialization.to_bytes(runs))
    return flax.serialization.from_bytes(begin(), (folder / "saved").read_bytes())


def by_pickle(runs: Any, folder: Path) -> Any:
    (folder / "saved").write_bytes(pickle.dumps(runs))
    return pickle.loads((folder / "saved").read_bytes())


def assert_same(found: Any, expected: Any) -> None:
    """Equal bit for bit, structures and dtypes too."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Every state, saved and restored by Orbax, flax and pickle."""
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
    """Saved from eight devices; back on them, and on two by two laid out otherwise, training goes on, bit for bit."""
    tx = adam_fn.master_weights(adam_fn.adamw(1e-2, storage=storage))
    train = adam_fn.make_step(tx)
    places = [
        NamedSharding(jax.make_mesh((8,), ("a",), axis_types=(kind,)), PartitionSpec("a")),
        NamedSharding(
            jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind), devices=jax.devices()[:4]),
            PartitionSpec("b", "a"),
        ),
    ]

    def go(params: Any, state: Any) -> Any:
        for at in range(3):  # The gradients of any mesh, which XLA might round otherwise on another.
            grads = jax.tree.map(lambda p: jax.device_put(gradients(np.asarray(p), at), p.sharding), params)  # noqa: B023
            params, state = train(params, state, grads)
        return params, state

    w = MATRIX.astype(jnp.bfloat16)
    params = {"w": jax.device_put(w, places[0])}
    params, state = go(params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        kept = jax.tree.map(np.asarray, {"params": params, "state": state})
        expected = jax.tree.map(np.asarray, go(**jax.tree.map(jnp.copy, {"params": params, "state": state})))
        for place in places:
            like = {"w": jax.device_put(w, place)}
            like = {"params": like, "state": tx.init(like)}
            restored = checkpointer.restore(tmp_path / "saved", like)
            assert_same(jax.tree.map(np.asarray, restored), kept)
            jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(), restored, like)
            checkpoint.check(restored["state"], tx, like["params"])
            found = go(**restored)
            assert_same(jax.tree.map(np.asarray, found), expected)
            assert found[0]["w"].sharding.is_equivalent_to(place, 2)


P: Any = {"w": jnp.ones((64, 128)), "b": [jnp.ones(3), jnp.ones(2)]}
ADAMW = adam_fn.adamw(1e-3, storage="24bit")

KINDS = {"mu": "int8", "nu": "bfloat16"}
CHANGE = "adam_fn.interop.change_storage converts a state to another storage"


def leaves(slot: str, found: str, expected: str) -> list[str]:
    """The lines about all leaves of a slot, one of whose dtypes may be nothing."""
    shapes = {"w": "64,128", "b/0": "3", "b/1": "2"}
    forms = ([kind if kind == "nothing" else f"{kind}[{x}]" for x in shapes.values()] for kind in (found, expected))
    return [f"state/0/{slot}/{leaf}: {x}, expected {y}" for leaf, x, y in zip(shapes, *forms, strict=True)]


class Other(NamedTuple):
    """What goes on in the place of `ADAMW` and `P`, and what the errors must say.

    Attributes:
      lines: of a description; where there are none, whatever they are.
      state: of a state alone, which names neither its rule nor its parameters; None for the same lines about it.
    """

    tx: optax.GradientTransformation
    params: Any
    lines: list[str]
    state: list[str] | None = None


OTHERS = {
    "another rule with the same slots": Other(
        adam_fn.yogi(1e-3, weight_decay=1e-4, storage="24bit"), P, ["rules: Adam, expected Yogi"]
    ),
    "another rule": Other(
        adam_fn.amsgrad(1e-3, weight_decay=1e-4, storage="24bit"),
        P,
        ["rules: Adam, expected AMSGrad", *leaves("nu_max", "nothing", "bfloat16")],
    ),
    "another storage": Other(
        adam_fn.adamw(1e-3, storage="16bit"),
        P,
        [
            "storage/mu: MuLaw(bound=7.27), expected nothing",
            "storage/nu: Cast('bfloat16'), expected nothing",
            "storage/mu_nu: nothing, expected Word(bound=7.27)",
            CHANGE,
        ],
        [*leaves("mu", "int8", "nothing"), *leaves("nu", "bfloat16", "nothing"), *leaves("mu_nu", "nothing", "uint16")],
    ),
    "another storage of one slot": Other(
        adam_fn.adamw(1e-3, storage="bfloat16"),
        P,
        ["storage/mu: MuLaw(bound=7.27), expected Cast('bfloat16')", CHANGE],
        leaves("mu", "int8", "bfloat16"),
    ),
    "another bound": Other(  # The codes would be read as other moments; a state alone cannot tell.
        adam_fn.adamw(1e-3, b1=0.95, storage="24bit"),
        P,
        ["storage/mu: MuLaw(bound=7.27), expected MuLaw(bound=5.087)", CHANGE],
    ),
    "another storage of another rule": Other(
        adam_fn.lion(1e-3, storage="24bit"),
        P,
        [
            "rules: Adam, expected Lion",
            "storage/mu: MuLaw(bound=7.27), expected Cast('bfloat16')",
            *leaves("nu", "bfloat16", "nothing"),
        ],
        [*leaves("mu", "int8", "bfloat16"), *leaves("nu", "bfloat16", "nothing")],
    ),
    "a leaf of another shape": Other(
        ADAMW,
        {**P, "b": [jnp.ones(3), jnp.ones(1)]},
        ["params/b/1: float32[2], expected float32[1]"]
        + [f"state/0/{slot}/b/1: {kind}[2], expected {kind}[1]" for slot, kind in KINDS.items()],
    ),
    "a leaf of another dtype": Other(
        ADAMW,
        {**P, "w": P["w"].astype(jnp.bfloat16)},
        ["params/w: float32[64,128], expected bfloat16[64,128]"],
    ),
    "a leaf more and one less": Other(
        adam_fn.adamw(1e-3, storage="24bit", frozen=adam_fn.masks.path("b/0")),
        {"w": P["w"], "b": [*P["b"], jnp.ones(())]},
        ["params/b/2: nothing, expected float32[]"]
        + [f"state/0/{slot}/b/2: nothing, expected {kind}[]" for slot, kind in KINDS.items()]
        + [f"state/0/{slot}/b/0: {kind}[3], expected nothing" for slot, kind in KINDS.items()],
    ),
    "another wrapper": Other(adam_fn.stochastic_rounding(ADAMW), P, []),
}


@pytest.mark.quick
@pytest.mark.parametrize("other", OTHERS)
def test_another_checkpoint_is_an_error_that_names_what_differs(other: str) -> None:
    saved = json.loads(json.dumps(checkpoint.describe(ADAMW, P)))
    checkpoint.check(saved, ADAMW, P)
    tx, params, expected, of_state = OTHERS[other]
    with pytest.raises(ValueError, match="does not belong to this transformation and these parameters") as error:
        checkpoint.check(saved, tx, params)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    if not expected:
        expected = lines
        assert "state/inner/0/count: nothing, expected int32[]" in lines
        assert "state/0/mu/w: int8[64,128], expected nothing" in lines
    assert sorted(lines) == sorted(expected)

    arrays = [line for line in expected if line.startswith("state") and "EmptyState" not in line]
    seen = sorted(arrays if of_state is None else of_state)
    for state in (ADAMW.init(P), flax.serialization.to_state_dict(ADAMW.init(P))):
        checkpoint.check(state, ADAMW, P)
        if not seen:
            checkpoint.check(state, tx, params)
            continue
        with pytest.raises(ValueError, match="does not belong to this") as error:
            checkpoint.check(state, tx, params)
        assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == seen


def test_boxes_have_no_value_in_their_path() -> None:
    """Paths are those of masks and groups, also where a box was restored as a dictionary."""
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    wider = nnx.state(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.Param)
    tx = adam_fn.lion(1e-3)
    boxed = {"kernel": {"value": jnp.ones((2, 3))}, "bias": {"value": jnp.ones(3)}}
    for state in (tx.init(params), {"0": {"count": jnp.int32(0), "mu": boxed}}):
        checkpoint.check(state, tx, params)
        with pytest.raises(ValueError, match=r"  state/0/mu/kernel: float32\[2,3\], expected float32\[2,4\]"):
            checkpoint.check(state, tx, wider)
    assert list(checkpoint.describe(tx, params)["params"]) == ["params/bias", "params/kernel"]
    # A parameter that is called so is no box.
    assert list(checkpoint.describe(tx, {"value": jnp.ones(2)})["params"]) == ["params/value"]


def test_a_cast_to_the_dtype_of_the_arithmetic_is_no_other_storage() -> None:
    plain, named = adam_fn.adamw(1e-3), adam_fn.adamw(1e-3, mu_dtype="float32", nu_dtype="float32")
    for params in (P, jax.tree.map(lambda p: p.astype(jnp.bfloat16), P)):
        checkpoint.check(checkpoint.describe(plain, params), named, params)
        checkpoint.check(checkpoint.describe(named, params), plain, params)
        with pytest.raises(ValueError, match=r"storage/mu: Cast\('float32'\), expected Cast\('bfloat16'\)"):
            checkpoint.check(checkpoint.describe(plain, params), adam_fn.adamw(1e-3, mu_dtype="bfloat16"), params)


def test_of_several_transformations_each_leaf_is_named() -> None:
    """The slots of another transformation do not hide behind the storage of one."""

    def parts(first: Any, **labels: int) -> Any:
        return optax.partition({0: first, 1: adam_fn.adam(1e-3)}, {"w": 0, "b": [0, 1], **labels})

    saved = checkpoint.describe(parts(adam_fn.adamw(1e-3)), P)
    with pytest.raises(ValueError, match=r"storage/0/mu: Cast\('float32'\), expected Cast\('bfloat16'\)") as error:
        checkpoint.check(saved, parts(adam_fn.adamw(1e-3, storage="bfloat16"), w=1), P)
    assert "state/inner_states/1/inner_state/0/mu/w: nothing, expected float32[64,128]" in str(error.value)


def test_what_may_change_between_two_runs() -> None:
    saved = checkpoint.describe(ADAMW, P)
    for tx in (
        adam_fn.adamw(1e-2, eps=1e-6, weight_decay=0.1, storage="24bit"),
        adam_fn.nadamw(1e-3, storage="24bit"),  # Its moments are Adam's.
        optax.GradientTransformation(ADAMW.init, ADAMW.update),
    ):
        checkpoint.check(saved, tx, jax.eval_shape(lambda: P))


def test_schedules_count_in_the_state() -> None:
    """As in optax: a schedule may be replaced by a schedule, and not by a number."""

    def make(rate: Any, decay: Any = 1e-4) -> adam_fn.Transformation:
        return adam_fn.adamw(rate, weight_decay=decay, storage="24bit")

    cosine, linear = optax.cosine_decay_schedule(1e-2, 9), optax.linear_schedule(1e-2, 0.0, 9)
    checkpoint.check(checkpoint.describe(make(cosine), P), make(linear, 0.1), P)
    checkpoint.check(checkpoint.describe(make(cosine, cosine), P), make(linear, linear), P)
    for tx, lines in {
        make(cosine): [r"state/2/count: nothing, expected int32\[\]"],
        make(1e-3, cosine): [r"state/1/count: nothing, expected int32\[\]"],
        adam_fn.adamw(1e-3, b2=linear, storage="24bit"): [
            rf"state/3/weights/0/{word}: nothing, expected float32\[\]" for word in ("main", "rest")
        ],
    }.items():
        with pytest.raises(ValueError, match="parameters:\n  " + "\n  ".join(lines) + "$"):
            checkpoint.check(checkpoint.describe(ADAMW, P), tx, P)
        back = "\n  ".join(lines).replace("nothing, expected ", "").replace(r"\[\]", r"\[\], expected nothing")
        with pytest.raises(ValueError, match=f"parameters:\n  {back}$"):
            checkpoint.check(checkpoint.describe(tx, P), ADAMW, P)


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


def test_orbax_keeps_the_description(tmp_path: Path) -> None:
    """As the documentation has it: what is wrong is said before anything is restored, and by Orbax's own shapes."""
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        saved = {"params": P, "state": ADAMW.init(P)}
        manager.save(7, args=ocp.args.StandardSave(saved), custom_metadata=checkpoint.describe(ADAMW, P))
        manager.wait_until_finished()
        about, shapes = manager.metadata(7).custom_metadata, manager.item_metadata(7)
    assert about is not None
    checkpoint.check(about, ADAMW, P)
    checkpoint.check(shapes["state"], ADAMW, P)
    with pytest.raises(ValueError, match=r"rules: Adam, expected Yogi$"):
        checkpoint.check(about, adam_fn.yogi(1e-3, weight_decay=1e-4, storage="24bit"), P)
    with pytest.raises(ValueError, match=r"state/0/mu/w: int8\[64,128\], expected bfloat16\[64,128\]"):
        checkpoint.check(shapes["state"], adam_fn.adam(1e-3, storage="bfloat16"), P)
