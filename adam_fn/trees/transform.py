"""Makes an optax transformation of a rule and its storage (the step is in update.py).

One policy for the leaves, everywhere: ``None`` passes through. Integer, boolean and frozen leaves have no moments
(`optax.MaskedNode` stands in their place) and get a zero update. Complex leaves are two reals. A gradient that does
not fit its parameter is an error, raised while tracing, that names the leaf.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adam_fn.algebra.rule import Rule
from adam_fn.storage.names import StorageLike, codecs_of
from adam_fn.storage.word_16bit import WORD
from adam_fn.trees.definition import Definition
from adam_fn.trees.functions import Functions
from adam_fn.trees.groups import Group, Groups
from adam_fn.trees.leaves import Mask, fixed_mask
from adam_fn.trees.update import Init, Update


class Transformation(Functions):
    """An optax transformation with precise types: any pytree is accepted.

    Transformations with equal rules, codecs and masks compare equal, hash alike and share compilations; they pickle if
    their hyperparameters do.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        init: Init  # pyright: ignore[reportIncompatibleVariableOverride]
        update: Update  # pyright: ignore[reportIncompatibleVariableOverride]


def transform(
    rule: Rule,
    *,
    storage: StorageLike | None = None,
    mask: Mask | None = None,
    frozen: Mask | None = None,
    storage_mask: Mask | None = None,
    groups: Groups | Mapping[str, Group] | None = None,
) -> Transformation:
    """Lifts a rule to an optax transformation.

    Args:
      rule: what to compute; ``transform(a >> b)`` equals ``optax.chain(transform(a), transform(b))``.
      storage: one of the names in `adam_fn.options.Options`, a `Codec` for every slot, or a mapping from the names of
        slots to codecs; slots that it does not name are stored in float32 (float64 for float64 parameters).
      mask: the leaves to which a `WeightDecay` applies: a tree of booleans with the structure of the parameters or a
        prefix of it, or a function of the parameters that returns one (see `adam_fn.masks`); all by default.
      frozen: the leaves that are not trained: they have no moments and get a zero update; by default all are trained.
      storage_mask: the leaves to which `storage` applies, all by default; the others are stored in float32 (float64 for
        float64 parameters).
      groups: multipliers of `learning_rate` and `weight_decay`, and frozen leaves, by path (see `Groups`).
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"transform takes a rule, such as Adam() >> Rate(1e-3), got {rule!r}")
    codecs = codecs_of(storage, rule.slots)
    if storage_mask is not None and not storage:
        raise ValueError("storage_mask has no effect without storage: pass storage as well")
    if storage_mask is not None and WORD in dict(codecs):
        raise ValueError(
            "storage_mask cannot leave out parameters of a 16-bit storage, whose one word has no place for two float32 "
            'moments: use storage="24bit", or another transformation for these parameters (optax.partition)'
        )
    masks = {"mask": mask, "frozen": frozen, "storage_mask": storage_mask}
    fixed = {name: fixed_mask(name, value) for name, value in masks.items()}
    definition = Definition(rule, codecs, **fixed, groups=None if groups is None else Groups.made_of(groups))
    return Transformation(Init(definition), Update(definition))
