"""bfloat16 parameters that learn: a float32 update is written to a parameter with fewer bits.

A bfloat16 parameter has 8 significant bits: an update below 2⁻⁹ of it is rounded away. `master_weights` keeps the
missing bits; `stochastic_rounding` makes the rounding right on average. Both emit the float32 difference q - p, so that
an ordinary `optax.apply_updates`, which adds in float32 and rounds, lands on the intended bfloat16 q.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_fn.algebra.values import method_of
from adam_fn.execute.compiler import zeros_like
from adam_fn.execute.destination import PARAMETERS, UPDATES, Destination, Inputs
from adam_fn.storage.parameter_bits import join, landing, remainder_of, visible
from adam_fn.trees.checks import check_present, check_untrained
from adam_fn.trees.leaves import Leaves, PyTree
from adam_fn.trees.update import Update
from adam_fn.wrappers.base import TreeTransformation, check_state, check_transformation


class MasterState(NamedTuple):
    """The state of `master_weights`.

    Attributes:
      remainder: the low bits of the masters, int16 or int8, a tree with the structure and the shapes of the
        parameters. float32 and wider leaves have no remainder: they get an unused boolean array, because sharding rules
        expect an array for each parameter. Leaves that are not floating have `optax.MaskedNode`, and so have those
        that an optimizer of this package, wrapped directly, freezes.
      inner: the state of the wrapped transformation, whose parameters are the float32 masters.
    """

    remainder: PyTree
    inner: optax.OptState


class Params:
    """The leaves of the parameters, and which of them are bfloat16."""

    def __init__(self, name: str, params: PyTree, trained: Sequence[bool] | None = None) -> None:
        """Takes bfloat16 leaves that are not trained, if that is known, as they are."""
        if params is None:
            raise ValueError(f"{name} needs the parameters: call update(grads, state, params)")
        self.name = name
        self._tree = Leaves(params)
        self.treedef, self.leaves, self.paths = self._tree.treedef, self._tree.leaves, self._tree.paths
        self.short = [
            x is not None and self._is_short(path, x) for path, x in zip(self.paths, self.leaves, strict=True)
        ]
        self.trained = [True] * len(self.leaves) if trained is None else trained
        self.short = [short and train for short, train in zip(self.short, self.trained, strict=True)]

    def _is_short(self, path: str, p: jax.Array) -> bool:
        dtype = jnp.result_type(p)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32 and dtype != jnp.bfloat16:
            raise TypeError(f"{self.name} expected parameters in bfloat16, or in float32 or wider; {path} is {dtype}")
        return dtype == jnp.bfloat16

    def align(self, tree: PyTree, what: str) -> list[Any]:
        """Aligns `tree` with the parameters; raises if a bfloat16 parameter has a leaf of another shape, not None."""
        leaves = self._tree.align(tree, f"{self.name}: the {what}s", "the parameters")
        for path, short, p, x in zip(self.paths, self.short, self.leaves, leaves, strict=True):
            if short and not (x is None or isinstance(x, optax.MaskedNode)) and jnp.shape(x) != p.shape:
                raise ValueError(f"{self.name}: the {what} of {path} has shape {jnp.shape(x)}, its parameter {p.shape}")
        return leaves

    def widened(self, leaves: Sequence[Any]) -> PyTree:
        """The tree of `leaves`, with those of bfloat16 parameters in float32."""
        return self.treedef.unflatten(
            x.astype(jnp.float32) if short and x is not None else x for short, x in zip(self.short, leaves, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class MasterDestination(Destination):
    """The destination that steps the master of a bfloat16 parameter, whose remainder is `Inputs.remainder`."""

    bits: int
    parameters: bool = False
    has_remainder: ClassVar[bool] = True

    def for_dtype(self, dtype: np.dtype) -> Destination:
        return self if dtype == jnp.bfloat16 else PARAMETERS if self.parameters else UPDATES

    def read(self, inputs: Inputs) -> Inputs:
        return Inputs(inputs.g.astype(jnp.float32), self._master(inputs))

    def write(self, inputs: Inputs, u: jax.Array, dither: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        assert inputs.p is not None
        new = self._master(inputs) + u
        q = visible(new, self.bits)
        result, landed = (q.astype(jnp.bfloat16), q) if self.parameters else landing(inputs.p, q)
        return result, remainder_of(new, landed, self.bits)

    def _master(self, inputs: Inputs) -> jax.Array:
        assert inputs.p is not None
        assert inputs.remainder is not None
        return join(inputs.p, inputs.remainder, self.bits)


@dataclasses.dataclass(frozen=True)
class MasterWeights(TreeTransformation):
    """The implementation of `master_weights`. Around a transformation of this package, masters are never stored."""

    tx: optax.GradientTransformation
    bits: int

    def init(self, params: PyTree) -> MasterState:
        blank, masters = _first(params, self.bits, self._trained(params))
        return MasterState(blank, self.tx.init(masters))

    def _trained(self, params: PyTree) -> tuple[bool, ...] | None:
        """Whether the wrapped transformation trains each leaf, if it is one of this package, which knows it."""
        update = method_of(self.tx.update)
        return tuple(update.definition.trained(Leaves(params), params)) if isinstance(update, Update) else None

    def update(
        self, updates: PyTree, state: MasterState, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, MasterState]:
        check_state(state, MasterState, "master_weights")
        if isinstance(method_of(self.tx.update), Update):
            return self._inside(updates, state, params, MasterDestination(self.bits), **extra_args)
        wide, masters = _joined(updates, state.remainder, params, self.bits)
        wide, inner = optax.with_extra_args_support(self.tx).update(wide, state.inner, masters, **extra_args)
        new, remainder = _written(wide, masters, state.remainder, params, self.bits)
        return new, MasterState(remainder, inner)

    def write(
        self, grads: PyTree, state: MasterState, params: PyTree, **extra_args: PyTree
    ) -> tuple[PyTree, MasterState]:
        if not isinstance(method_of(self.tx.update), Update):
            return super().write(grads, state, params, **extra_args)
        check_state(state, MasterState, "master_weights")
        return self._inside(grads, state, params, MasterDestination(self.bits, parameters=True), **extra_args)

    def _inside(
        self,
        grads: PyTree,
        state: MasterState,
        params: PyTree,
        destination: MasterDestination,
        **extra_args: PyTree,
    ) -> tuple[PyTree, MasterState]:
        """Steps each master where its parameter is stepped, inside the wrapped transformation."""
        update = cast(Update, method_of(self.tx.update))
        tree = Params("master_weights", params, self._trained(params))
        tree.align(grads, "gradient")
        _check_remainders(tree, tree.align(state.remainder, "state's remainder"), self.bits)
        new, remainder, inner = update.written(
            grads, state.inner, params, destination, remainder=state.remainder, **extra_args
        )
        return new, MasterState(remainder, inner)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first(params: PyTree, bits: int, trained: tuple[bool, ...] | None) -> tuple[PyTree, PyTree]:
    """The first remainders, which are 0, and the first masters."""
    tree = Params("master_weights", params, trained)

    def zeros(short: bool, train: bool, p: jax.Array | None) -> Any:  # noqa: ANN401
        if p is None or not train or not jnp.issubdtype(jnp.result_type(p), jnp.inexact):
            return None if p is None else optax.MaskedNode()
        zero = zeros_like(p)
        return (zero[0] if jnp.iscomplexobj(p) else zero).astype(f"int{bits}" if short else bool)

    blank = [zeros(*leaf) for leaf in zip(tree.short, tree.trained, tree.leaves, strict=True)]
    return tree.treedef.unflatten(blank), tree.widened(tree.leaves)


@functools.partial(jax.jit, static_argnums=3)
def _joined(grads: PyTree, remainder: PyTree, params: PyTree, bits: int) -> tuple[PyTree, PyTree]:
    """The gradients and the masters, in float32."""
    tree = Params("master_weights", params)
    gradients, remainders = tree.align(grads, "gradient"), tree.align(remainder, "state's remainder")
    _check_remainders(tree, remainders, bits)
    masters = [
        join(p, r, bits) if short else p for p, r, short in zip(tree.leaves, remainders, tree.short, strict=True)
    ]
    return tree.widened(gradients), tree.treedef.unflatten(masters)


def _check_remainders(tree: Params, remainders: Sequence[Any], bits: int) -> None:
    """Raises if a remainder does not have the dtype that its parameter needs."""
    for path, short, train, p, r in zip(tree.paths, tree.short, tree.trained, tree.leaves, remainders, strict=True):
        found = str(getattr(r, "dtype", "none"))
        floating = train and p is not None and jnp.issubdtype(jnp.result_type(p), jnp.inexact)
        if not train:
            check_untrained(path, p, {"remainder": r})
        elif floating:
            check_present("remainder", r, path)
        if found == f"int{bits}" and not short:
            raise ValueError(
                f"{path} was bfloat16 when master_weights made the state and is {jnp.result_type(p)} now: add the "
                "updates with optax.apply_updates, which keeps the dtype of the parameters; equinox.apply_updates does "
                "not"
            )
        if found != (f"int{bits}" if short else "bool" if floating else "none"):
            raise ValueError(
                f"the remainder of {path} ({jnp.result_type(p)}) in the state of master_weights(bits={bits}) is "
                f"{found}: was the state made by this transformation from these parameters?"
            )


@functools.partial(jax.jit, static_argnums=4)
def _written(updates: PyTree, masters: PyTree, remainder: PyTree, params: PyTree, bits: int) -> tuple[PyTree, PyTree]:
    """The updates of the parameters, and the new remainders."""
    tree = Params("master_weights", params)
    wide, remainders = tree.align(updates, "update"), tree.align(remainder, "state's remainder")
    for i, (u, x) in enumerate(zip(wide, tree.align(masters, "master"), strict=True)):
        if tree.short[i] and u is not None:
            new = x + u.astype(jnp.float32)
            wide[i], landed = landing(tree.leaves[i], visible(new, bits))
            remainders[i] = remainder_of(new, landed, bits)
    return tree.treedef.unflatten(wide), tree.treedef.unflatten(remainders)


def master_weights(tx: optax.GradientTransformation, bits: int = 16) -> optax.GradientTransformationExtraArgs:
    """Keeps float32 masters of bfloat16 parameters, in 2 more bytes per parameter (or 1), around any transformation.

    ::

        x = (bits(p) << 16) + r;   x ← x + tx(g, x);   q = x rounded to bfloat16;   r = x - q in units of x's last bit

    The master x is a float32. The parameter is its upper half, rounded to nearest (halves away from 0), and the state
    keeps the rest, an int16 r. Nothing is lost: training proceeds as with float32 parameters, and the bfloat16
    parameters are the masters, rounded. (XLA may contract the addition and a multiplication in `tx` in one program and
    not in another; x then differs in the last bit.) `tx` sees the masters as parameters, weight decay included, and
    gradients in float32; so its state is in float32 too. The updates are float32, and `optax.apply_updates` lands on q
    exactly.

    The remainder is added to whatever parameter is given. A parameter that was changed between two steps (tied,
    clipped, averaged, restored) is taken as it is, up to half a unit of its last place. No other narrow dtype is
    accepted: float16 and float8 are errors, since every float32 below 2⁻²⁵ becomes the same float16, 0, and 2 bytes
    cannot tell them apart. Leaves of float32 and wider, integers and None go to `tx` as they are, and so do the leaves
    that `tx` freezes, if it is an optimizer of this package: these keep no remainder. (A chain does not tell.)

    Gradients are best accumulated inside, in float32: ``master_weights(optax.MultiSteps(tx, n))``.

    If ``|q|`` is below about ``2⁻¹⁶|p|``, float32 may be unable to represent the update q - p. The update is then off
    by at most ``2⁻²⁵|p|``, which is float32's rounding of the step, and the remainder fits the parameter that results.
    Masters stop at 3.396e38: bfloat16 would round larger ones to inf.

    Args:
      tx: any optax transformation.
      bits: 16 for float32 masters; 8 for masters of 24 bits, of which 16 are significant. They are rounded to the
        nearest, so a step has a rounding error of up to 2⁻¹⁶ of the parameter. It is not dithered: equal steps have
        equal errors, and steps below 2⁻¹⁷ of the parameter are lost.
    """
    check_transformation(tx, "master_weights")
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits}")
    return MasterWeights(tx, bits).transformation()
