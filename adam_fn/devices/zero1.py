"""ZeRO, stage 1: the state divided over the data axis, while the parameters stay as they are.

zero1_plan.py chooses the axis along which each parameter is divided.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from adam_fn.devices.zero1_plan import Place, Plan, plan
from adam_fn.trees.functions import owner_of, write_of
from adam_fn.trees.layout import device_count, divided, division, finding_layout
from adam_fn.trees.leaves import Leaves, PyTree, difference, leaf_in_errors
from adam_fn.trees.recording import is_marking
from adam_fn.wrappers.base import TreeTransformation, varying_axes


def _placed(x: jax.Array, *shardings: NamedSharding) -> jax.Array:
    """Constrains an array to shardings, one after the other, except for the axes of an enclosing `shard_map`."""
    now = jax.sharding.get_abstract_mesh()
    mesh: Any = now if now.manual_axes else shardings[-1].mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def along(sharding: NamedSharding, kind: AxisType) -> NamedSharding:
        own = (tuple(name for name in names if kinds[name] == kind) for names in division(sharding, x.ndim))
        return divided(mesh, tuple(own))

    if AxisType.Explicit in kinds.values():
        x = jax.sharding.reshard(x, along(shardings[-1], AxisType.Explicit))
    if AxisType.Auto in kinds.values():
        for sharding in shardings:
            x = jax.lax.with_sharding_constraint(x, along(sharding, AxisType.Auto))
    return x


def _is_array(x: object) -> bool:
    return hasattr(x, "dtype") and jnp.result_type(x) != jax.dtypes.float0


@dataclasses.dataclass(frozen=True)
class Zero1(TreeTransformation):
    """The implementation of `zero1`.

    Attributes:
      names: the axes of the mesh that the state is divided over.
      plan: where parameters and state live.
    """

    tx: optax.GradientTransformation
    mesh: Mesh
    names: tuple[str, ...]
    plan: Plan

    def init(self, params: PyTree) -> PyTree:
        if finding_layout.get():
            raise ValueError("state_shardings: zero1 must be outermost, zero1(optax.chain(…), …)")
        if is_marking() or not Leaves(params).leaves:  # Without leaves: as in `optax.tree_map_params`.
            return self.tx.init(params)
        state = self._within(self.tx.init, self.plan.state.tree(), self._each(params, "parameters", self._part))
        return self._kept(state)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        update = optax.with_extra_args_support(self.tx).update
        return self._step(update, updates, state, params, extra_args)

    def write(self, grads: PyTree, state: PyTree, params: PyTree, **extra_args: PyTree) -> tuple[PyTree, PyTree]:
        own = write_of(self.tx)
        return (
            super().write(grads, state, params, **extra_args)
            if own is None
            else self._step(own, grads, state, params, {})
        )

    def state_shardings(self, params: PyTree) -> PyTree:
        """The shardings of the state of these parameters, which must be like those that `zero1` was given."""
        self._each(params, "parameters", lambda _, x: x)
        return self.plan.state.tree()

    def _step(
        self, run: Callable[..., Any], grads: PyTree, state: PyTree, params: PyTree, extra_args: dict[str, PyTree]
    ) -> tuple[PyTree, PyTree]:
        new, state = self.run(run, *self.enter(grads, params), state, **extra_args)
        return self.leave(new), state

    def enter(self, grads: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """Divides gradients, after summing what devices hold, and parameters."""
        grads = self._each(grads, "gradients", self._reduced)
        return grads, None if params is None else self._each(params, "parameters", self._part)

    def run(
        self, step: Callable[..., Any], grads: PyTree, params: PyTree, state: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Runs `step` on divided gradients, parameters and state."""
        spread = self.plan.places.treedef.unflatten(
            None if x is None else x.step_sharding for x in self.plan.places.leaves
        )
        results = spread, self.plan.state.tree()
        new, state = self._within(step, results, grads, self._kept(state), params, **extra_args)
        return new, self._kept(state)

    def leave(self, results: PyTree) -> PyTree:
        """Gathers the results of a step where the parameters live."""
        return self._each(results, "results", self._gathered)

    def settle(self, params: PyTree, state: dict[int, jax.Array]) -> tuple[PyTree, dict[int, jax.Array]]:
        """Constrains gathered parameters and the given state arrays (by leaf index) to their shardings."""
        if self._inside():
            return params, state
        params = self._each(params, "parameters", lambda leaf, x: _placed(x, leaf.sharding))
        return params, {k: _placed(x, self.plan.state.leaves[k]) for k, x in state.items()}

    def part(self, params: PyTree) -> "Zero1":
        """Returns this object for a subset of the parameters, or for slices of them.

        `params` has the whole tree's structure: shapes, and None for what is left out.
        """
        return dataclasses.replace(self, plan=self.plan.part(self.tx, params, self.mesh))

    def read(self, params: PyTree, *, vary: bool = False) -> PyTree:
        """Parameters as the model reads them: gathered.

        Otherwise XLA would divide the model's computation the way the step is divided. Inside a `shard_map`, with
        `vary`, their gradients are not summed over its axes.
        """

        def each(leaf: Place, x: jax.Array) -> jax.Array:
            if not self._inside():
                return _placed(x, leaf.sharding)
            axes = tuple(name for name in self.names if vary and name not in varying_axes(x))
            return jax.lax.pcast(x, axes, to="varying") if axes else x

        return self._each(params, "parameters", each)

    def _within(self, run: Callable[..., Any], results: PyTree, *args: PyTree, **extra_args: PyTree) -> Any:  # noqa: ANN401
        """Calls `run` and places its results as `results` says. Inside, XLA divides the work over explicit axes too."""
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        explicit = [x for x, kind in kinds.items() if kind == AxisType.Explicit and x not in _manual()]
        if not explicit:
            return run(*args, **extra_args)
        arrays, treedef = jax.tree.flatten((args, extra_args))
        given = [i for i, x in enumerate(arrays) if _is_array(x)]

        def flat(*own: jax.Array) -> Any:  # noqa: ANN401
            values = dict(zip(given, own, strict=True))
            args, extra_args = treedef.unflatten([values.get(i, x) for i, x in enumerate(arrays)])
            return run(*args, **extra_args)

        own = [arrays[i] for i in given]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in own]
        places = jax.tree.map(lambda _, place: place, jax.eval_shape(flat, *shapes), results)
        return jax.sharding.auto_axes(flat, axes=tuple(explicit), out_sharding=places)(*own)

    def _matched(self, tree: PyTree, what: str) -> Iterator[tuple[Place | None, Any]]:
        """Pairs the place of each leaf with what a tree has there."""
        try:
            return zip(self.plan.places.leaves, self.plan.places.treedef.flatten_up_to(tree), strict=True)
        except (ValueError, TypeError) as error:
            where = difference(self.plan.places.tree(), tree) or str(error)
            raise ValueError(
                f"zero1: the {what} must have the structure of the parameters it was made for: {where}"
            ) from error

    def _each(self, tree: PyTree, what: str, function: Callable[[Place, jax.Array], jax.Array]) -> PyTree:
        """Applies `function` to each array in a tree of the parameters' structure."""
        found, inside = [], self._inside()
        for leaf, x in self._matched(tree, what):
            if leaf is None or not _is_array(x):
                found.append(x)
                continue
            if not inside and jnp.shape(x) != leaf.shape:
                raise ValueError(f"zero1: {leaf.path} of the {what} has shape {jnp.shape(x)}, expected {leaf.shape}")
            with leaf_in_errors(leaf.path):
                found.append(function(leaf, x))
        return self.plan.places.treedef.unflatten(found)

    def _part(self, leaf: Place, x: jax.Array) -> jax.Array:
        """Divides a parameter."""
        if not self._inside():
            return _placed(x, leaf.step_sharding)
        if leaf.axis is None:
            return x
        length = x.shape[leaf.axis] // device_count(self.mesh, self.names)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.names) * length, length, leaf.axis)

    def _reduced(self, leaf: Place, x: jax.Array) -> jax.Array:
        """Divides a gradient; inside a `shard_map`, after summing what the devices hold."""
        if not self._inside():
            # Without the first constraint XLA carries the second one into the backward pass.
            return _placed(x, leaf.sharding, leaf.step_sharding)
        own = {
            name for names in division(leaf.sharding, len(leaf.shape)) for name in names
        }  # FSDP: parts are not summed.
        over = tuple(name for name in self.names if name in varying_axes(x) - own)
        if over == self.names and leaf.axis is not None:
            return jax.lax.psum_scatter(x, over, scatter_dimension=leaf.axis, tiled=True)
        return self._part(leaf, jax.lax.psum(x, over) if over else x)

    def _gathered(self, leaf: Place, x: jax.Array) -> jax.Array:
        """Gathers the result of a parameter's step where the parameter lives."""
        if not self._inside():
            # The first constraint keeps the computation divided; only its result is gathered.
            return _placed(x, leaf.step_sharding, leaf.sharding)
        if leaf.axis is None:
            return x
        return jax.lax.all_gather(x, self.names, axis=leaf.axis, tiled=True, to="invarying")

    def _kept(self, state: PyTree) -> PyTree:
        """Places the state where it lives."""
        if jax.tree.structure(state) != self.plan.state.treedef:
            raise ValueError("zero1 expected its own state: was it made by this transformation from these parameters?")
        return state if self._inside() else jax.tree.map(_placed, state, self.plan.state.tree())

    def _inside(self) -> bool:
        """Whether the caller runs inside a `shard_map` over the axes."""
        found = [name for name in self.names if name in _manual()]
        if found and len(found) < len(self.names):
            raise ValueError(f"zero1: a shard_map over {found} must be over all of {list(self.names)}")
        return bool(found)


def _manual() -> tuple[str, ...]:
    """The axes of an enclosing `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def zero1(
    tx: optax.GradientTransformation,
    params: PyTree,
    mesh: Mesh,
    axis: str | Sequence[str] = "data",
    *,
    layers: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides the state, and the work of a step, over an axis along which the parameters are copies (ZeRO, stage 1).

    ::

        tx = adam_fn.zero1(adam_fn.adamw(3e-4), params, mesh, "data")
        state = jax.jit(tx.init)(params)  # The rest as before, with `tx.update` or `make_step`.

    Each of the n devices holds 1/n of the moments and masters, and steps 1/n of the parameters
    (Rajbhandari et al., arXiv 1910.02054, section 5.1). If the same program computes the gradients, from a batch that
    is divided over the axis, their all-reduce becomes a reduce-scatter, and the updates are gathered; in `make_step`
    the new parameters are gathered instead, which take fewer bytes in bfloat16. Results are the same as with `tx`
    alone.

    A leaf is divided along the first of its axes that the n devices divide evenly, in addition to any division that it
    already has (tensor parallelism). A leaf that is divided over the axis already (FSDP) stays as it is. Leaves that
    cannot be divided stay whole: `undivided` lists them, and a warning names those of 4096 elements or more.

    Only `offload` may be outside it: ``zero1(optax.chain(optax.clip_by_global_norm(1.0), adamw(3e-4)), …)``. Axes may
    be automatic or explicit. Inside a `shard_map` over the axis it takes whole parameters; gradients that vary over it
    are summed, by a reduce-scatter: divide the loss by n. (With ``check_vma=False`` JAX does not know which gradients
    vary, and all of them must be the same on every device.)

    Args:
      tx: any optax transformation; in a `shard_map`, one whose work is elementwise.
      params: arrays, or `jax.ShapeDtypeStruct`, with their shardings; a leaf without one counts as whole on every
        device.
      mesh: the mesh that the parameters live on.
      axis: the mesh axis, or axes, of data parallelism.
      layers: the path of parameters that are stacked along a first axis, which is then not divided. Needed by
        `adam_fn.backward.value_and_step`, which steps one layer after the other.

    Raises:
      ValueError: if the mesh has no such axis, or a parameter lives on another mesh.
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"zero1: the mesh has the axes {tuple(mesh.axis_names)}, not {name!r}")
    return Zero1(tx, mesh, names, plan(tx, params, mesh, names, layers)).transformation()


def undivided(tx: optax.GradientTransformation) -> dict[str, int]:
    """The parameters whose state `zero1` leaves whole on every device: their numbers of elements, by path.

    Paths are those of `adam_fn.masks.path`, as in ``{"layers/0/kernel": 15}``; the path of a tree that is a single
    array is empty. `tx` is what `zero1` returned, or a wrapper of this package around it (`offload`).
    """
    owner = owner_of(tx)
    while not isinstance(owner, Zero1):
        if not hasattr(owner, "tx"):
            raise TypeError("undivided expected a transformation that zero1 made")
        owner = owner_of(owner.tx)
    return dict(owner.plan.undivided)
