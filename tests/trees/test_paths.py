"""A leaf has one name: whatever speaks of it spells its path as the patterns of `adam_fn.masks.path` do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import adam_fn
from adam_fn import checkpoint, diagnostics, interop, masks

pytestmark = pytest.mark.quick


class Flat(adam_fn.Rule):
    """A rule whose result has another shape if there are two axes."""

    def leaf(self, g: jax.Array, p: Any, slots: Any, clock: Any) -> Any:
        return g[0] if g.ndim == 2 else g, slots


class Layer(NamedTuple):
    kernel: Any


def tree(kernel: Any) -> Any:
    """A tree of dictionaries, a list and a named tuple, so that it has every kind of key."""
    return {"layers": [Layer(kernel)], "z": jnp.ones(2)}


NAME = "layers/0/kernel"
PARAMS = tree(jnp.ones((5, 3)))
SHORT = tree(jnp.ones((5, 3), jnp.bfloat16))
MASK = jax.tree.map(lambda _: True, PARAMS)
ADAM = adam_fn.adam(1e-3)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def whole(params: Any = PARAMS, *axes: int) -> Any:
    other = jax.make_mesh(axes, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2) if axes else mesh()
    return jax.device_put(params, NamedSharding(other, PartitionSpec()))


def step(tx: Any, grads: Any, params: Any = PARAMS, of: Any = None) -> None:
    tx.update(grads, (tx if of is None else of).init(params), params)


def zero1(params: Any = PARAMS) -> Any:
    return adam_fn.zero1(ADAM, whole(params), mesh())


TORCH: Any = {"state": {}, "param_groups": [{"params": [0, 1]}]}
MASTERS: Any = adam_fn.master_weights(ADAM)
#: Calls that go wrong with the leaf, by the module that says so.
WRONG: dict[str, Callable[[], Any]] = {
    "transform-shape": lambda: step(ADAM, tree(jnp.ones(3))),
    "transform-none": lambda: step(ADAM, tree(None)),
    "transform-state": lambda: step(ADAM, PARAMS, of=adam_fn.adam(1e-3, mu_dtype="bfloat16")),
    "leaves-missing": lambda: step(ADAM, {"layers": [], "z": jnp.ones(2)}),
    "leaves-extra": lambda: step(ADAM, PARAMS, {"layers": [], "z": jnp.ones(2)}),
    "leaves-mask": lambda: adam_fn.adamw(1e-3, mask=MASK).init({"layers": 1.0, "z": 1.0}),
    "leaves-bool": lambda: adam_fn.adamw(1e-3, mask=tree(1.0)),
    "execute": lambda: step(adam_fn.transform(Flat()), PARAMS),
    "masks": lambda: masks.path("other")(PARAMS),
    "groups": lambda: adam_fn.adam(1e-3, groups=adam_fn.Groups({"z": adam_fn.Group()}, complete=True)).init(PARAMS),
    "write-dtype": lambda: MASTERS.init(tree(jnp.ones(3, jnp.float16))),
    "write-shape": lambda: step(MASTERS, tree(jnp.ones(3)), SHORT),
    "write-missing": lambda: step(MASTERS, {"layers": [], "z": jnp.ones(2)}, SHORT),
    "write-state": lambda: step(MASTERS, SHORT, SHORT, of=adam_fn.master_weights(ADAM, bits=8)),
    "write-rounding": lambda: adam_fn.stochastic_rounding(ADAM).init(tree(jnp.ones(3, jnp.float16))),
    "sharding-none": lambda: adam_fn.state_shardings(ADAM, tree(np.ones(3))),
    "zero1-mesh": lambda: adam_fn.zero1(ADAM, whole(PARAMS, 4, 2), mesh()),
    "zero1-shape": lambda: step(zero1(), tree(jnp.ones(3)), whole()),
    "zero1-missing": lambda: step(zero1(), {"layers": [], "z": jnp.ones(2)}, whole()),
    "checkpoint": lambda: checkpoint.check(checkpoint.describe(ADAM, PARAMS), ADAM, tree(jnp.ones(3))),
    "from_optax": lambda: interop.from_optax(ADAM, PARAMS, optax.adam(1e-3).init(tree(jnp.ones(3)))),
    "to_optax": lambda: interop.to_optax(ADAM, PARAMS, ADAM.init(PARAMS), optax.adam(1e-3).init({})),
    "torch": lambda: interop.from_torch(ADAM, PARAMS, TORCH, paths=[NAME, "z"]),
    "keras": lambda: interop.from_keras(ADAM, PARAMS, [np.int64(1), np.float32(1)], paths=[]),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_leaf_as_patterns_do(name: str) -> None:
    with pytest.raises(Exception, match=rf"\b{NAME}\b") as caught:
        WRONG[name]()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert not re.search(r"\['(layers|z)'\]|\.kernel\b|\[0\]", text), text


def test_results_by_path_spell_it_as_patterns_do() -> None:
    assert adam_fn.undivided(zero1())[NAME] == 15
    state = ADAM.init(PARAMS)
    for found in (
        {key.partition("/")[2] for key in diagnostics.summary(ADAM, state, PARAMS, per_leaf=True) if "/" in key},
        {key.partition("/")[2] for key in checkpoint.describe(ADAM, PARAMS)["params"]},
    ):
        assert found == {NAME, "z"}


def test_the_only_leaf_has_an_empty_path() -> None:
    with pytest.raises(ValueError, match="the gradient of the only leaf has shape"):
        step(ADAM, jnp.ones(2), jnp.ones(3))
    assert adam_fn.undivided(zero1(jnp.ones((5, 3)))) == {"": 15}
    assert masks.path("")(jnp.ones(3)) is True


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"layers": [{"kernel": jnp.ones((5, 3))}], "z": jnp.ones(2)}, "layers/0 is a dict, not a Layer"),
        ({"layers": (Layer(jnp.ones((5, 3))),), "z": jnp.ones(2)}, "layers is a tuple, not a list"),
    ],
)
def test_containers_of_other_types_are_named(grads: Any, message: str) -> None:
    """All leaves have the same paths."""
    with pytest.raises(ValueError, match=f"the structure of the parameters: {message}"):
        step(ADAM, grads)
    with pytest.raises(ValueError, match=f"a prefix of it: {message}"):
        adam_fn.adamw(1e-3, mask=jax.tree.map(lambda _: True, grads)).init(PARAMS)


def test_a_mask_name_that_only_begins_like_a_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="w is not a parameter"):
        adam_fn.adamw(1e-3, mask={"w": True, "w2": True}).init({"w2": jnp.ones(2), "w3": jnp.ones(2)})


def test_paths_are_spelt_in_one_place() -> None:
    root = Path(adam_fn.__file__).parent
    calls = [file.name for file in root.rglob("*.py") for _ in re.findall(r"\bkeystr\(", file.read_text())]
    assert calls == ["leaves.py"]
