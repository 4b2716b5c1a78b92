"""The definition of a transformation, and the trees of its state made from stored leaves."""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import incremented
from adam_fn.algebra.bias import Weight, advance_weights, corrections_of, is_kept
from adam_fn.algebra.dtypes import compute_dtype
from adam_fn.algebra.rule import Chain, Rule
from adam_fn.algebra.values import ByValue
from adam_fn.storage.codec import Cast, Codec
from adam_fn.trees.groups import Groups
from adam_fn.trees.leaves import Leaves, PyTree
from adam_fn.trees.states import Form, Memory, form_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Definition(ByValue):
    """The definition of a transformation: a pytree, whose leaves are the hyperparameters given as arrays."""

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

    def corrections(self, memory: Memory, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        """The bias corrections of all decay rates after the steps that a memory counts."""
        found: list[jax.Array] = []
        left = list(memory.weights)
        for part, count in zip(self.rule.parts(), memory.counts, strict=True):
            number = sum(map(is_kept, part.betas))
            found += corrections_of(part.betas, left[:number], memory.steps if count is None else count, dtype)
            left = left[number:]
        return tuple(found)

    def trained(self, leaves: Leaves, tree: PyTree) -> list[bool]:
        """Whether each leaf is trained: floating or complex, and not frozen."""
        frozen = (
            leaves.broadcast_mask("frozen", self.frozen, tree)
            if self.frozen is not None
            else [False] * len(leaves.leaves)
        )
        if self.groups is not None:
            frozen = [fixed or group.frozen for fixed, group in zip(frozen, self.groups.per_leaf(tree), strict=True)]
        return [
            x is not None and not fixed and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            for x, fixed in zip(leaves.leaves, frozen, strict=True)
        ]

    def codecs_of(self, leaves: Leaves, tree: PyTree) -> list[dict[str, Codec]]:
        """The codecs of each leaf."""
        coded = dict(self.codecs)
        if self.storage_mask is None:
            return [coded] * len(leaves.leaves)
        kinds = {True: coded, False: {name: Cast().for_slot(name, self.rule.slots) for name in coded}}
        return [kinds[kept] for kept in leaves.broadcast_mask("storage_mask", self.storage_mask, tree)]


def tree_from_leaves(leaves: Leaves, stored: Sequence[jax.Array | None]) -> PyTree:
    """Converts one stored value per leaf to a tree of the parameters' structure, with `optax.MaskedNode` for None."""
    blank = [None if x is None else optax.MaskedNode() for x in leaves.leaves]
    return leaves.treedef.unflatten(b if x is None else x for b, x in zip(blank, stored, strict=True))


def weight_dtype(leaves: Leaves, trained: Sequence[bool]) -> np.dtype:
    """The dtype of the bias weights: the widest one of the arithmetic."""
    kinds = [compute_dtype(jnp.result_type(p)) for p in itertools.compress(leaves.leaves, trained)]
    return jnp.dtype(jnp.float64 if jnp.float64 in kinds else jnp.float32)


def advanced(definition: Definition, memory: Memory) -> tuple[Rule, Memory]:
    """Evaluates schedules at this step, and returns the rule and the next `Memory`, its slots still empty."""
    counts = tuple(jnp.zeros((), jnp.int32) if count is None else count for count in memory.counts)
    rule = Chain(definition.rule.parts()).at(counts)
    new = tuple(None if count is None else incremented(count) for count in memory.counts)
    kept: list[Weight] = []
    for part, now, count in zip(definition.rule.parts(), rule.parts(), counts, strict=True):
        betas = [beta(count) if callable(beta) else beta for beta in now.betas]
        kept += advance_weights(part.betas, betas, memory.weights[len(kept) :])
    others = {field: incremented(count) for field, count in memory.others.items()}
    return rule, Memory(new, tuple(kept), {}, others)
