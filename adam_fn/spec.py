"""What defines a transformation, and how what is stored of each leaf becomes the trees of its state."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_fn.bias import is_kept, weights_of
from adam_fn.codec import Cast, Codec
from adam_fn.execute.body import as_real, compute_dtype
from adam_fn.functions import ByValue
from adam_fn.groups import Groups
from adam_fn.leaves import Leaves, PyTree
from adam_fn.rule import Rule
from adam_fn.states import Form, Memory, form_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spec(ByValue):
    """Everything that defines a transformation. A pytree: its leaves are the hyperparameters given as arrays."""

    rule: Rule
    codecs: tuple[tuple[str, Codec], ...] = dataclasses.field(metadata={"static": True})
    mask: Hashable = dataclasses.field(metadata={"static": True})
    frozen: Hashable = dataclasses.field(metadata={"static": True})
    storage_mask: Hashable = dataclasses.field(metadata={"static": True})
    groups: Groups | None = dataclasses.field(metadata={"static": True})

    @property
    def form(self) -> Form:
        """The form of the state."""
        return form_of(self.rule, self.codecs, masked=self.mask is not None)

    def weights(self, memory: Memory, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        """The bias weights of all decay rates after the steps that a memory counts."""
        found: list[jax.Array] = []
        left = list(memory.weights)
        for part, count in zip(self.rule.parts(), memory.counts, strict=True):
            number = sum(map(is_kept, part.betas))
            found += weights_of(part.betas, left[:number], memory.steps if count is None else count, dtype)
            left = left[number:]
        return tuple(found)

    def trained(self, leaves: Leaves, tree: PyTree) -> list[bool]:
        """Which leaves are trained: floating or complex, and not frozen."""
        frozen = leaves.spread("frozen", self.frozen, tree) if self.frozen is not None else [False] * len(leaves.leaves)
        if self.groups is not None:
            frozen = [fixed or group.frozen for fixed, group in zip(frozen, self.groups.of(tree), strict=True)]
        return [
            x is not None and not fixed and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            for x, fixed in zip(leaves.leaves, frozen, strict=True)
        ]

    def codecs_of(self, leaves: Leaves, tree: PyTree) -> list[dict[str, Codec]]:
        """The codecs of each leaf."""
        coded = dict(self.codecs)
        if self.storage_mask is None:
            return [coded] * len(leaves.leaves)
        kinds = {True: coded, False: {name: Cast().of(name, self.rule.slots) for name in coded}}
        return [kinds[kept] for kept in leaves.spread("storage_mask", self.storage_mask, tree)]


def zeros_like(p: jax.Array) -> jax.Array:
    """Zeros of the parameter's (real) shape and arithmetic dtype that live where the parameter lives.

    They are computed from its bits. A constant would be placed on one device under `jit`, would not vary over the mesh
    inside `shard_map`, and XLA would merge the equal constants of leaves that are laid out differently. The barrier
    keeps ``x ^ x`` from being folded to one.
    """
    p = as_real(p)
    bits = jax.lax.bitcast_convert_type(p, f"uint{jnp.finfo(p.dtype).bits}")
    return (bits ^ jax.lax.optimization_barrier(bits)).astype(compute_dtype(p.dtype))


def gather(leaves: Leaves, stored: Sequence[jax.Array | None]) -> PyTree:
    """A tree of the parameters' structure, of what is stored of each leaf; `optax.MaskedNode` where nothing is."""
    blank = [None if x is None else optax.MaskedNode() for x in leaves.leaves]
    return leaves.treedef.unflatten(b if x is None else x for b, x in zip(blank, stored, strict=True))
