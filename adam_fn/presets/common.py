"""Code that the presets share."""

from typing import Literal

from adam_fn.algebra.hyper import Hyper
from adam_fn.family.adam import adam
from adam_fn.family.amsgrad import amsgrad
from adam_fn.options import MomentOptions, Options
from adam_fn.trees.leaves import Mask


class Weights(MomentOptions, total=False):
    """`MomentOptions`, `weight_decay` as the framework means it, and `mask`: the leaves that decay."""

    weight_decay: Hyper | None
    mask: Mask | None


def with_decay_kind(decay: Literal["scaled", "independent", "l2"], options: Weights) -> Options:
    """The options, with the meaning of their weight decay if there is one."""
    return {**options} if options.get("weight_decay") is None else {**options, "decay": decay}


#: The optimizer by `amsgrad`, which the frameworks have as a flag of Adam.
ADAM = {False: adam, True: amsgrad}
