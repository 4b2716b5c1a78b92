"""Groups of parameters by path: multipliers of the rate and of the decay, and frozen leaves, within one state."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from adam_fn.algebra.rate_and_decay import WeightDecay
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.trees.leaves import Leaves, PyTree, match_patterns


@dataclasses.dataclass(frozen=True)
class Group:
    """The settings that differ for some leaves.

    Attributes:
      rate: multiplies the learning rate, including one given by `update(..., learning_rate=x)`.
      decay: multiplies the weight decay; with ``decay="scaled"`` and ``"proximal"``, `rate` multiplies it as well.
      frozen: whether the leaves are not trained: they have no moments and get a zero update.
    """

    rate: float = 1.0
    decay: float = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        for name in ("rate", "decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} of a Group must be a number in [0, inf), got {value!r}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.frozen, bool):
            raise TypeError(f"frozen of a Group must be a bool, got {self.frozen!r}")


@dataclasses.dataclass(frozen=True, init=False)
class Groups:
    """Groups by path, for ``groups=`` of every optimizer and of `transform`.

    ::

        depth = 12
        groups = Groups({
            "embedding/*": Group(frozen=True),
            **{f"layers/{i}/*": Group(rate=0.8 ** (depth - 1 - i)) for i in range(depth)},
            "*bias": Group(decay=0.0),
            "*norm*": Group(decay=0.0),
        })
        tx = adam_fn.adamw(1e-3, weight_decay=0.1, groups=groups)

    Paths and patterns are those of `adam_fn.masks.path`: keys joined by ``/``, matched as a whole by `fnmatch`. A leaf
    that several patterns match gets the product of their multipliers, and is frozen if one of them says so; the order
    does not matter. A leaf that no pattern matches keeps its rate and decay. The state has the structure of the
    parameters, with a placeholder for each frozen leaf. Leaves of one shape share a compilation, whatever their
    multipliers are.

    `init` and `update` raise a ValueError for a pattern that matches no parameter and, with `complete`, for parameters
    that no pattern matches; the error lists them.

    Args:
      patterns: a `Group` for each pattern.
      complete: whether every parameter must be matched.
    """

    patterns: tuple[tuple[str, Group], ...]
    complete: bool

    def __init__(self, patterns: Mapping[str, Group], *, complete: bool = False) -> None:
        if not isinstance(patterns, Mapping):
            raise TypeError(f"groups must map patterns to Group, as in {{'*bias': Group(decay=0.0)}}, got {patterns!r}")
        for pattern, group in patterns.items():
            if not isinstance(pattern, str) or not isinstance(group, Group):
                raise TypeError(f"groups must map patterns to Group, got {pattern!r}: {group!r}")
        object.__setattr__(self, "patterns", tuple(sorted(patterns.items(), key=lambda item: item[0])))
        object.__setattr__(self, "complete", complete)

    @classmethod
    def made_of(cls, groups: "Groups | Mapping[str, Group]") -> "Groups":
        return groups if isinstance(groups, Groups) else cls(groups)

    def per_leaf(self, params: PyTree) -> list[Group]:
        """The group of each leaf of a tree, None included."""
        found = match_patterns([pattern for pattern, _ in self.patterns], params)
        there = zip(found, Leaves(params).leaves, strict=True)
        uncovered = [name for (name, hits), leaf in there if leaf is not None and not any(hits)]
        if self.complete and uncovered:
            raise ValueError(f"no pattern of the groups matches the parameters {', '.join(uncovered)}")
        groups = [group for _, group in self.patterns]
        return [_product([group for group, hit in zip(groups, hits, strict=True) if hit]) for _, hits in found]

    def check_no_decay(self) -> None:
        """Raises if a group multiplies the decay, for optimizers without decay."""
        for pattern, group in self.patterns:
            if group.decay != 1:
                raise ValueError(f"the group {pattern!r} multiplies the decay, but weight_decay is not given")


def _product(groups: Sequence[Group]) -> Group:
    return Group(
        math.prod(group.rate for group in groups),
        math.prod(group.decay for group in groups),
        any(group.frozen for group in groups),
    )


def rules_per_leaf(
    rule: Rule, clock: Clock, decays: Sequence[bool], groups: Sequence[Group] | None
) -> list[tuple[Rule, Clock]]:
    """The rule and the clock of each leaf; the same objects for leaves that are alike.

    `decays` is what the option ``mask=`` says of each leaf: the rule of those that do not decay has no `WeightDecay`.
    """
    kinds: dict[tuple[bool, Group | None], tuple[Rule, Clock]] = {}

    def of(decays: bool, group: Group | None) -> tuple[Rule, Clock]:
        own = rule if decays and (group is None or group.decay) else rule.without(WeightDecay)
        if group is None:
            return own, clock
        rate = None if clock.learning_rate is None else clock.learning_rate * group.rate
        own = own.times({"learning_rate": group.rate, "weight_decay": group.decay})
        return own, dataclasses.replace(clock, learning_rate=rate)

    for key in zip(decays, groups or [None] * len(decays), strict=True):
        if key not in kinds:
            kinds[key] = of(*key)
    return [kinds[key] for key in zip(decays, groups or [None] * len(decays), strict=True)]
