"""The common part of all frameworks' states: a count of steps, and moments by slot and by the parameter's path.

The moments are the raw averages, here as there. Bias weights that a state keeps are computed again: `advance_weights`
is run `count` times.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from adam_fn.algebra.bias import Weight, is_kept
from adam_fn.algebra.dtypes import as_dtype, as_real
from adam_fn.algebra.rule import Rule
from adam_fn.algebra.values import method_of
from adam_fn.execute.compiler import zeros_like
from adam_fn.trees.definition import Definition, advanced
from adam_fn.trees.functions import owner_of
from adam_fn.trees.leaves import Leaves, PyTree, check_distinct, display_path, leaf_in_errors
from adam_fn.trees.states import Memory, State
from adam_fn.trees.update import Update, coded
from adam_fn.wrappers.masters import MasterState, MasterWeights

#: An array of any framework.
Array: TypeAlias = Any
#: Arrays by the path of their parameter.
ByPath: TypeAlias = Mapping[str, Array]
#: The paths here of another framework's parameters, as a sequence in its order, or as a mapping or a function from its
#: names to paths. None leaves a parameter out.
Paths: TypeAlias = Sequence[str | None] | Mapping[str, str | None] | Callable[[str], str | None]
#: The axes of the other framework's arrays, in the order in which they are here, by patterns of paths.
Transpose: TypeAlias = Mapping[str, Sequence[int]]


class MomentsByPath(NamedTuple):
    """A state in a form that belongs to no framework.

    Attributes:
      count: the number of steps made.
      slots: the raw moments, by slot and by path, each of its parameter's shape.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    slots: Mapping[str, ByPath]

    def array(self, slot: str, path: str) -> Array:
        """The moment of a parameter. With β₁ = 0 no first moment is stored: zeros, which other frameworks ignore."""
        return self.slots[slot][path] if slot in self.slots else jnp.zeros_like(next(iter(self.slots.values()))[path])


def fail(problems: Iterable[str], what: str) -> None:
    """Raises one error that lists all problems, if there are any."""
    if listed := list(problems):
        raise ValueError("\n  ".join([f"{what}:", *listed]))


class Target:
    """A transformation of this package whose state is made or read, and the parameters that it is for."""

    def __init__(self, tx: optax.GradientTransformation, params: PyTree) -> None:
        self.tx, self.params = tx, params
        owner = owner_of(tx)
        self.masters = isinstance(owner, MasterWeights)
        update = method_of((owner.tx if isinstance(owner, MasterWeights) else tx).update)
        if not isinstance(update, Update):
            raise TypeError(
                "expected an optimizer of adam_fn, such as adam_fn.adam(1e-3), or adam_fn.master_weights around one, "
                f"got {owner or tx!r:.80}…. For an optax.chain, convert the state of the one link that has the "
                "moments, and put the result in its place in the chain's state. For a wrapper, such as skip_nonfinite, "
                "convert for the optimizer inside, and put the result in: tx.init(params)._replace(inner=state)"
            )
        self.update = update
        if self.masters:  # The wrapped optimizer sees them in float32.
            self.params = jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype == jnp.bfloat16 else p, params)
        self._outer = params
        leaves = Leaves(self.params)
        self._treedef = leaves.treedef
        self._paths = leaves.names
        check_distinct(self._paths)
        self._leaves = dict(zip(self._paths, leaves.leaves, strict=True))
        trained = zip(self._paths, update.definition.trained(leaves, self.params), strict=True)
        self.trained = [path for path, train in trained if train]

    @property
    def rule(self) -> Rule:
        """The part of the rule that has the moments."""
        members = [part for part in self.update.definition.rule.parts() if part.slots]
        if len(members) != 1:
            raise TypeError(f"expected a rule that contains exactly one optimizer, got {self.update.definition.rule}")
        return members[0]

    def form(self, forms: Mapping[type[Rule], Any], framework: str) -> Any:  # noqa: ANN401
        """The row of the rule in a framework's table."""
        if type(self.rule) not in forms:
            known = ", ".join(sorted(kind.__name__ for kind in forms))
            raise TypeError(
                f"{framework} has no counterpart of {type(self.rule).__name__}; it has counterparts of {known}"
            )
        return forms[type(self.rule)]

    @property
    def complex(self) -> list[str]:
        """The paths of the complex parameters."""
        return [path for path in self.trained if jnp.iscomplexobj(self._leaves[path])]

    def shape(self, path: str) -> tuple[int, ...]:
        return jnp.shape(self._leaves[path])

    def weights(self, count: int) -> NDArray[np.float64]:
        """The bias weights after `count` steps, ``1 - βᵗ`` where β is constant; shape ``[n]``."""
        memory = _memory(self.update.definition, count)
        found = 1 / np.asarray(self.update.definition.corrections(memory, jnp.result_type(float)), np.float64)
        kept = [i for i, beta in enumerate(self.update.definition.rule.betas) if is_kept(beta)]
        for i, weight in zip(kept, memory.weights, strict=True):  # The rest has more digits.
            found[i] = np.float64(weight.main) + np.float64(weight.rest)
        return found

    def state(self, moments: MomentsByPath, source: str) -> State:
        """Returns the state of the transformation, or raises an error that lists all that does not fit in `source`."""
        fail(self._problems(moments), f"{source} does not fit the parameters")
        outer = self.tx.init(self._outer)
        form = self.update.definition.form
        blank = form.read(outer.inner if isinstance(outer, MasterState) else outer)
        values = [
            {name: moments.slots[name][path] for name in self.update.definition.rule.slots}
            if path in self.trained
            else None
            for path in self._paths
        ]
        slots = _stored(self.update.definition, values, self.params, np.int32(moments.count))
        # Added to the zeros of the first state, so that they live where these live.
        memory = _memory(self.update.definition, moments.count)
        counts, weights = jax.tree.map(
            lambda zero, x: zero + np.asarray(x, zero.dtype),
            (blank.counts, blank.weights),
            (memory.counts, memory.weights),
        )
        state = form.made(Memory(counts, weights, slots))
        return outer._replace(inner=state) if isinstance(outer, MasterState) else state

    def moments(self, state: State) -> MomentsByPath:
        """The moments and the count of a state of the transformation."""
        inner = state.inner if isinstance(state, MasterState) else state
        self.update.definition.form.check(inner)
        slots = {}
        for name, tree in self.update.decoded(inner, self.params).items():
            found = dict(zip(self._paths, self._treedef.flatten_up_to(tree), strict=True))
            slots[name] = {path: self._joined(path, found[path]) for path in self.trained}
        return MomentsByPath(int(self.update.definition.form.read(inner).steps), slots)

    def uncovered(self, paths: Iterable[str | None]) -> Iterable[str]:
        """Lists the differences between some paths and those of the trained parameters."""
        known = {path: None for path in paths if path is not None}
        yield from (f"{display_path(path)}: is not a trained parameter" for path in known if path not in self.trained)
        yield from (f"{display_path(path)}: is not among paths" for path in self.trained if path not in known)

    def _joined(self, path: str, x: jax.Array) -> jax.Array:
        dtype = jnp.result_type(self._leaves[path])
        return as_dtype(x, dtype) if jnp.issubdtype(dtype, jnp.complexfloating) else x

    def _problems(self, moments: MomentsByPath) -> Iterable[str]:
        if moments.count < 0:
            yield f"the number of steps is {moments.count}"
        stored = list(self.update.definition.rule.slots)
        for path in self.trained:
            if missing := [name for name in stored if path not in moments.slots.get(name, {})]:
                yield f"{display_path(path)}: no {', '.join(missing)}"
            for name in stored:
                if path in moments.slots.get(name, {}):
                    yield from self._misfit(path, name, moments.slots[name][path])
        given = {path: None for name in stored for path in moments.slots.get(name, {})}
        yield from (f"{display_path(path)}: is not a parameter" for path in given if path not in self._leaves)

    def _misfit(self, path: str, name: str, x: Array) -> Iterable[str]:
        if jnp.shape(x) != self.shape(path):
            yield f"{display_path(path)}: {name} has shape {jnp.shape(x)}, the parameter {self.shape(path)}"
        kinds = [jnp.issubdtype(jnp.result_type(y), jnp.complexfloating) for y in (x, self._leaves[path])]
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact) or kinds[0] != kinds[1]:
            found, wanted = jnp.result_type(x), jnp.result_type(self._leaves[path])
            yield f"{display_path(path)}: {name} is {found}, the parameter {wanted}"


@jax.jit
def _stored(
    definition: Definition, values: Sequence[Mapping[str, Array] | None], params: PyTree, count: jax.Array
) -> dict[str, PyTree]:
    """The slots of a state, made from arrays for each trained leaf; they get the parameters' shardings."""
    leaves = Leaves(params)
    found: list[dict[str, jax.Array] | None] = []
    for path, p, own in zip(leaves.paths, leaves.leaves, values, strict=True):
        if own is None:
            found.append(None)
            continue
        with leaf_in_errors(path):
            zeros = zeros_like(jnp.asarray(p))
            found.append({name: zeros + as_real(jnp.asarray(x)).astype(zeros.dtype) for name, x in own.items()})
    return coded(definition, leaves, params, found, count)


@jax.jit
def _run(definition: Definition, count: jax.Array, memory: Memory) -> Memory:
    return jax.lax.fori_loop(0, count, lambda _, memory: advanced(definition, memory)[1], memory)


def _memory(definition: Definition, count: int) -> Memory:
    """The memory after `count` steps, except for the slots, in JAX's default dtype."""
    zero = jnp.zeros((), float)
    weights = (Weight(zero, zero),) * sum(map(is_kept, definition.rule.betas))
    counts: tuple[Any, ...] = tuple(np.int32(count) if link.counts else None for link in definition.form.links)
    if not weights:
        return Memory(counts, (), {})
    blank = Memory(tuple(None if x is None else jnp.zeros((), jnp.int32) for x in counts), weights, {})
    return Memory(counts, _run(definition, np.int32(count), blank).weights, {})


def in_order(paths: Paths, names: Sequence[str] | None, number: int, framework: str) -> list[str | None]:
    """The paths of another framework's parameters, in its order.

    Args:
      paths: the paths in that order, None for a parameter that has no counterpart here; or a mapping or a function from
        the others' names to paths.
      names: those names in that order.
      number: the number of parameters.
      framework: its name, for errors.
    """
    if isinstance(paths, str):
        raise TypeError(f"paths must be a sequence of paths, a mapping or a function, got {paths!r}")
    if isinstance(paths, Sequence):
        found = list(paths)
    else:
        if names is None:
            _no_names(framework)
        unknown = [name for name in names if name not in paths] if isinstance(paths, Mapping) else []
        fail(
            (f"{name}: paths has no entry for it (None would leave it out)" for name in unknown), "paths is incomplete"
        )
        found = [paths[name] if isinstance(paths, Mapping) else paths(name) for name in names]
    if len(found) != number:
        raise ValueError(f"{framework}'s optimizer has {number} parameters, but paths has {len(found)}")
    listed = [path for path in found if path is not None]
    fail((f"{path}: more than once" for path in dict.fromkeys(listed) if listed.count(path) > 1), "paths is ambiguous")
    return found


def _no_names(framework: str) -> NoReturn:
    raise ValueError(
        f"a mapping or function as paths needs the names of {framework}'s parameters, in the order of its optimizer: "
        "pass them as names=, or pass a list of paths in that order"
    )


class Axes:
    """The transpositions that the user asked for; every pattern must match a path."""

    def __init__(self, transpose: Transpose | None, paths: Iterable[str | None]) -> None:
        self._rules = {pattern: tuple(axes) for pattern, axes in (transpose or {}).items()}
        known = [path for path in paths if path is not None]
        unused = [pattern for pattern in self._rules if not any(fnmatch.fnmatchcase(path, pattern) for path in known)]
        fail((f"{pattern}: matches no path" for pattern in unused), "transpose does not fit the parameters")

    def _of(self, path: str, rank: int) -> tuple[int, ...] | None:
        for pattern, axes in self._rules.items():
            if fnmatch.fnmatchcase(path, pattern):
                if sorted(axes) != list(range(rank)):
                    raise ValueError(f"transpose[{pattern!r}] = {axes} are not the axes of {path}, which has {rank}")
                return axes
        return None

    def ours(self, path: str, x: Array) -> Array:
        """Converts another framework's array to its form here."""
        axes = self._of(path, np.ndim(x))
        return x if axes is None else np.transpose(x, axes)

    def theirs(self, path: str, x: Array) -> Array:
        """The inverse of `ours`."""
        axes = self._of(path, np.ndim(x))
        return x if axes is None else np.transpose(x, np.argsort(axes))


def as_array(x: Array) -> NDArray[Any]:
    """Converts an array of torch, Keras or JAX to one of NumPy, without importing any of them."""
    for method in ("detach", "cpu"):
        x = getattr(x, method)() if hasattr(x, method) else x
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":  # torch converts NumPy's own dtypes alone.
        x = x.float()
    return np.asarray(x.numpy() if hasattr(x, "numpy") else x)
