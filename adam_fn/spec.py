"""What defines a transformation, and how what is stored of each leaf becomes the trees of its state."""

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import optax

from adam_fn.codec import Codec, Stored, Uncoded
from adam_fn.execute.body import as_real, compute_dtype
from adam_fn.execute.store import PARTS, structure
from adam_fn.groups import Groups
from adam_fn.leaves import Leaves, PyTree
from adam_fn.rule import Rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """Everything that defines a transformation. A pytree: its leaves are the hyperparameters given as arrays.

    Compared by value, but arrays by identity: they may be tracers.
    """

    rule: Rule
    codecs: tuple[tuple[str, Codec], ...] = dataclasses.field(metadata={"static": True})
    mask: Hashable = dataclasses.field(metadata={"static": True})
    frozen: Hashable = dataclasses.field(metadata={"static": True})
    storage_mask: Hashable = dataclasses.field(metadata={"static": True})
    groups: Groups | None = dataclasses.field(metadata={"static": True})
    kernel: bool = dataclasses.field(metadata={"static": True})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        (ours, treedef), (theirs, other_treedef) = jax.tree.flatten(self), jax.tree.flatten(other)
        return treedef == other_treedef and all(a is b for a, b in zip(ours, theirs, strict=True))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

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
        kinds = {True: coded, False: {name: Uncoded(codec=codec) for name, codec in self.codecs}}
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


def gather(leaves: Leaves, codec: Codec, stored: Sequence[Stored | None]) -> PyTree:
    """What the codec made of each leaf, as its structure of trees: slots outside, the parameters' structure inside."""
    outer = structure(codec)
    blank = [None if x is None else optax.MaskedNode() for x in leaves.leaves]
    rows = [b if x is None else outer.flatten_up_to(x) for b, x in zip(blank, stored, strict=True)]
    columns = [[row[i] if isinstance(row, list) else row for row in rows] for i in range(outer.num_leaves)]
    return outer.unflatten([leaves.treedef.unflatten(column) for column in columns])


def scatter(leaves: Leaves, codec: Codec, slot: PyTree, what: str) -> list[Stored]:
    """The inverse of `gather`."""
    outer = structure(codec)
    try:
        parts = outer.flatten_up_to(slot)
        if isinstance(slot, dict) and set(slot) == set(PARTS) and jax.tree_util.treedef_is_leaf(outer):
            leaves.treedef.flatten_up_to(slot)  # Of a Block, unless the parameters have these names.
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{what} is not stored as {codec}: the state was made with a different storage; "
            "adam_fn.interop.change_storage converts it"
        ) from error
    columns = [leaves.match(part, what, "the parameters") for part in parts]
    return [outer.unflatten(row) for row in zip(*columns, strict=True)]
