"""Keeps the state in the host's memory between the steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from adam_fn.devices.sharding import state_shardings
from adam_fn.execute.compiler import fetched_after
from adam_fn.trees.functions import write_of
from adam_fn.trees.layout import finding_layout
from adam_fn.trees.leaves import PyTree
from adam_fn.wrappers.base import TreeTransformation, check_transformation

#: Arrays of fewer elements stay where they are: moving them costs more than they hold.
SMALL = 4096


def _moved(state: PyTree, space: Any) -> PyTree:  # noqa: ANN401 (`jax.memory.Space` is no type to pyright)
    """Moves the large arrays of a state to another memory, divided over the devices as before."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.size >= SMALL else x, state)


@dataclasses.dataclass(frozen=True)
class Offload(TreeTransformation):
    """The implementation of `offload`."""

    tx: optax.GradientTransformation

    def init(self, params: PyTree) -> PyTree:
        if finding_layout.get():
            raise ValueError("state_shardings: offload must be outermost, offload(optax.chain(…))")
        return _moved(self.tx.init(params), jax.memory.Space.Host)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        update = optax.with_extra_args_support(self.tx).update
        return self._step(update, updates, state, params, **extra_args)

    def write(self, grads: PyTree, state: PyTree, params: PyTree, **extra_args: PyTree) -> tuple[PyTree, PyTree]:
        own = write_of(self.tx)
        return (
            super().write(grads, state, params, **extra_args) if own is None else self._step(own, grads, state, params)
        )

    def state_shardings(self, params: PyTree) -> PyTree:
        """The shardings of the state of these parameters."""

        def moved(x: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.sharding.Sharding:
            return place.with_memory_kind("pinned_host") if x.size >= SMALL else place

        return jax.tree.map(moved, jax.eval_shape(self.tx.init, params), state_shardings(self.tx, params))

    def _step(
        self, run: Callable[..., Any], grads: PyTree, state: PyTree, params: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        new, state = run(grads, _moved(fetched_after(grads, state), jax.memory.Space.Device), params, **extra_args)
        return new, _moved(state, jax.memory.Space.Host)


def offload(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps the state in the host's memory (``"pinned_host"``); the devices hold it only while a step needs it.

    ::

        tx = adam_fn.offload(adam_fn.zero1(adam_fn.adamw(3e-4), params, mesh, "data"))  # Or without `zero1`.
        state = jax.jit(tx.init)(params)

    Arrays of fewer than 4096 elements stay where they are. Results and shardings are those of `tx`, except for the kind
    of memory; `state_shardings` gives both. Once the gradients exist, each step moves the state to the devices and
    back, over a bus that is far slower than their memory. It pays off when steps are few and batches large, for example
    with accumulated gradients. The backend must have this kind of memory; TPUs, GPUs and CPUs do. The wrapper must be
    outermost.

    Args:
      tx: any optax transformation.
    """
    check_transformation(tx, "offload")
    return Offload(tx).transformation()
