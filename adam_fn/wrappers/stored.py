"""Keeps the moments of any transformation in bfloat16."""

import collections
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_fn.algebra.arithmetic import incremented
from adam_fn.storage import noise
from adam_fn.storage.codec import narrowed
from adam_fn.trees.layout import StateLayout
from adam_fn.trees.leaves import Leaves, PyTree
from adam_fn.wrappers.base import COUNT, TreeTransformation, check_state, check_transformation


class StoredState(NamedTuple):
    """The state of `stored`.

    Attributes:
      count: the number of updates made so far, an int32 scalar; the dither depends on it.
      inner: the state of the wrapped transformation, with bfloat16 in the place of float32 arrays of a parameter's
        shape.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: optax.OptState


@dataclasses.dataclass(frozen=True)
class StoredMoments(TreeTransformation):
    """The implementation of `stored`."""

    tx: optax.GradientTransformation

    def init(self, params: PyTree) -> StoredState:
        count = jnp.zeros((), jnp.int32)
        if not Leaves(params).leaves:  # A placeholder for the parameters, as of `optax.tree_map_params`.
            return StoredState(count, self.tx.init(params))
        return StoredState(count, _narrow(self.tx.init(params), self._marks(params), count))

    def update(
        self, updates: PyTree, state: StoredState, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, StoredState]:
        check_state(state, StoredState, "stored", count=COUNT)
        like = updates if params is None else params
        marks = self._marks(like)
        wide = jax.tree.map(_widened, marks, state.inner)
        new, inner = optax.with_extra_args_support(self.tx).update(updates, wide, params, **extra_args)
        count = incremented(state.count)
        return new, StoredState(count, _narrow(inner, marks, count, extra_args.get("layer")))

    def _marks(self, params: PyTree) -> PyTree:
        """Numbers the arrays of each parameter that are stored in bfloat16; -1 for other arrays of the inner state."""
        slots = StateLayout(self.tx, params)
        numbers = collections.Counter[int]()

        def own(i: int, x: jax.ShapeDtypeStruct) -> int:
            p = slots.shapes[i]
            if p is None or x.dtype != jnp.float32 or x.shape != p.shape:
                return -1
            numbers[i] += 1
            return numbers[i] - 1

        return slots.map(own, lambda _: -1)


def _widened(mark: int, x: jax.Array) -> jax.Array:
    if mark < 0:
        return x
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"stored: a moment of the state is {x.dtype}, expected bfloat16: was the state cast?")
    return x.astype(jnp.float32)


def _narrow(inner: PyTree, marks: PyTree, count: jax.Array, layer: jax.Array | None = None) -> PyTree:
    number = max(jax.tree.leaves(marks), default=-1) + 1
    times = noise.time_offsets(count, [f"stored {i}" for i in range(number)])

    def stored(mark: int, x: jax.Array) -> jax.Array:
        if mark < 0:
            return x
        return narrowed(x, jnp.dtype(jnp.bfloat16), noise.dither(noise.lattice(x, layer), times[f"stored {mark}"]))

    return jax.tree.map(stored, marks, inner)


def stored(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any transformation in bfloat16, rounded with a dither, so that slow averages stay right.

    ::

        muon = adam_fn.stored(optax.contrib.scale_by_muon())
        tx = optax.partition({"matrices": muon, "rest": adam_fn.adam(1e-3, storage="16bit")}, labels)

    Every float32 array in the state of `tx` that has its parameter's shape takes 2 bytes per element between the steps
    and is float32 during a step; everything else stays as it is: counts, and arrays of other shapes such as
    Adafactor's. The optimizers of this package do this by themselves with ``storage="bfloat16"``, and better with
    ``"24bit"`` and ``"16bit"``.

    Args:
      tx: any optax transformation.
    """
    check_transformation(tx, "stored")
    return StoredMoments(tx).transformation()
