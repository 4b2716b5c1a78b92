"""Places the state on a mesh, beside its parameters."""

import jax
import optax
from jax.sharding import Mesh, NamedSharding, Sharding

from adam_fn.trees.functions import owner_of
from adam_fn.trees.layout import StateLayout, check_mesh, division
from adam_fn.trees.leaves import PyTree


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The shardings of ``tx.init(params)``, as a tree with the state's structure: ``jit(tx.init, out_shardings=…)``.

    Whatever belongs to a parameter is sharded like the parameter: moments, remainders of masters, averages, and the
    states of optax's transformations, which `jit` alone would put on one device. Counts and everything else that
    belongs to no parameter are replicated. Together with `jax.eval_shape`, the result tells a checkpointer where to
    restore a state::

        shardings = adam_fn.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(tx.init, params), shardings
        )

    Args:
      tx: any transformation of this package or of optax, or a chain of both. `zero1` must be outermost, and `offload`
        outside it.
      params: arrays, or `jax.ShapeDtypeStruct` with shardings. Leaves without a `NamedSharding` count as whole on the
        mesh of the others; if none has one, everything lives where the first leaf does.

    Raises:
      ValueError: if a leaf has no sharding at all, or lives on another mesh than the leaves before it.
    """
    if (own := getattr(owner_of(tx), "state_shardings", None)) is not None:
        return own(params)
    slots = StateLayout(tx, params)
    places: list[Sharding | None] = []
    mesh: Mesh | None = None
    for path, x in zip(slots.leaves.paths, slots.leaves.leaves, strict=True):
        place = getattr(x, "sharding", None)
        if x is not None and place is None:
            raise ValueError(
                f"state_shardings: {path} has no sharding; expected an array or a ShapeDtypeStruct with one"
            )
        places.append(place)
        if isinstance(place, NamedSharding):
            mesh = mesh or place.mesh  # pyright: ignore[reportAssignmentType]
            assert mesh is not None
            check_mesh("state_shardings", path, place, mesh)
    if mesh is None:
        first = next((place for place in places if place is not None), None)
        return jax.tree.map(lambda _: first, slots.state)
    over = [division(place, 0 if p is None else len(p.shape)) for place, p in zip(places, slots.shapes, strict=True)]
    return slots.shardings(mesh, over)
