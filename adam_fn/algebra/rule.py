"""The algebra: a rule is one optimizer's arithmetic on one array, and ``a >> b`` composes rules.

A rule is a frozen dataclass of its hyperparameters. It is pure and elementwise and knows nothing of trees, storage,
devices or optax; `adam_fn.transform` lifts it. A hyperparameter is a Python number or a schedule (static: compared by
value, compiled in) or a 0-d array (dynamic: a new value needs no new compilation).
"""

import abc
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_fn.algebra.arithmetic import OneMinus, Scalar, clip_finite
from adam_fn.algebra.hyper import UNIT, checked, ranges
from adam_fn.algebra.slots import Slot, Slots
from adam_fn.algebra.values import register

#: Where in a chain a rule must stand; see `Rule`.
Side: TypeAlias = Literal["before rate", "rate", "after rate"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """The current step, as a rule sees it.

    Attributes:
      count: the zero-based step, an int32 scalar; the first update sees 0. (A `Chain` may have one for each part.)
      corrections: the bias corrections of the rule's `betas`, this step included: ``1/(1 - βᵗ)`` for a constant β.
      learning_rate: the rate that `update(..., learning_rate=x)` sets for this step, or None.
    """

    count: Any
    corrections: Sequence[jax.Array]
    learning_rate: jax.Array | None = None

    def rate(self, learning_rate: Scalar) -> Scalar:
        """The learning rate of this step."""
        return learning_rate if self.learning_rate is None else self.learning_rate


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """One optimizer's arithmetic on one array.

    A subclass is a frozen dataclass of its hyperparameters (annotated `Beta` or `NonNegative`, which checks their
    range) that defines `leaf` and, if it keeps state, `slots` and `betas`. Rules are pytrees whose leaves are the
    hyperparameters given as arrays.

    Attributes:
      state_type: the named tuple in which optax keeps the state of the same optimizer, if there is one.
      state_fields: its fields by the names of the slots, where they differ.
      counts: for rules without slots, whether `leaf` uses ``clock.count``. Rules with slots always have a count.
      side: where in a chain the rule must stand: before or after the `Rate`, or anywhere.
      has_moments: whether its slots are the moments of an optimizer, for `adam_fn.diagnostics`.
      squared_factor: the largest number that `leaf` squares, in units of the largest gradient: 1 for the gradient
        itself, 2 for the difference of two gradients, 0 if nothing is squared.
    """

    has_moments: ClassVar[bool] = False
    squared_factor: ClassVar[float] = 0.0
    state_type: ClassVar[Any] = None
    state_fields: ClassVar[Mapping[str, str]] = {}
    counts: ClassVar[bool] = True

    @property
    def side(self) -> Side:
        return None

    def __init_subclass__(cls) -> None:
        register(cls)

    def __post_init__(self) -> None:
        for name, bounds in ranges(type(self)).items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name, ...) is not None:  # None is valid only as a default.
                object.__setattr__(self, name, checked(name, value, bounds))

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The numbers that the rule keeps for each element, by name."""
        return {}

    @property
    def betas(self) -> Sequence[Any]:
        """The decay rates, each a `Beta`, of the averages whose bias corrections the rule needs."""
        return ()

    @property
    def is_scheduled(self) -> bool:
        """Whether a hyperparameter is a schedule."""
        return any(callable(getattr(self, name)) for name in ranges(type(self)))

    def clipped_gradient(self, g: jax.Array) -> jax.Array:
        """The gradient as `leaf` receives it: large finite elements are clipped, so that the slots stay finite.

        A rule that squares receives at most ``2⁶³/squared_factor`` (float64: ``2⁵¹¹/squared_factor``), whose square a
        float can hold: beyond that v would no longer grow with m, and the update would not be bounded. Other rules with
        slots receive at most a quarter of the largest number. inf and nan become nan, which no slot loses again. Rules
        without slots receive everything as it is.
        """
        return clip_finite(g, self.squared_factor) if self.slots else g

    @abc.abstractmethod
    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        """Computes the update of one array and its new slots; everything has one dtype, float32 or float64.

        It must be elementwise, since the array may be a part of a leaf. Whatever needs whole leaves is a
        `TreeTransformation`, such as `lamb`.
        """

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        """``m̂/√v̂`` of one array, from its slots after a step and that step's bias corrections, or None."""
        return None

    def at(self, count: jax.Array) -> Self:
        """The rule with every schedule replaced by its value at step `count`."""
        now = {}
        for name, bounds in ranges(type(self)).items():
            value = getattr(self, name)
            if bounds is UNIT and hasattr(value, "one_minus"):
                now[name] = OneMinus(jnp.asarray(value.one_minus(count)))
            elif callable(value):
                value = checked(f"{name}(count)", value(count), bounds)
                # `slots` may drop a moment for the number 0; a schedule's 0 becomes an array, which keeps it.
                now[name] = jnp.zeros(()) if isinstance(value, float) and value == 0 else value
        return with_values(self, now)

    def of_real(self) -> "Rule":
        """The rule for real leaves."""
        return self

    def check_arrays(self) -> None:
        """Raises for an array whose value is known and out of range, as under `optax.inject_hyperparams`."""
        for part in self.parts():
            for name, bounds in ranges(type(part)).items():
                value = getattr(part, name)
                if isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, jax.core.Tracer):
                    checked(name, float(value), bounds)

    def cast(self, dtype: DTypeLike) -> Self:
        """The rule with its array hyperparameters in `dtype`."""
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self)

    def without(self, kind: type["Rule"]) -> "Rule":
        """The rule without its parts of type `kind`."""
        return Chain(tuple(Identity() if isinstance(part, kind) else part for part in self.parts()))

    def times(self, factors: Mapping[str, float]) -> "Rule":
        """Multiplies hyperparameters; call it after `at`.

        They become arrays, so that different factors share one compiled program.
        """
        parts: list[Rule] = []
        for part in self.parts():
            own = factors.keys() & ranges(type(part))
            parts.append(with_values(part, {name: jnp.asarray(getattr(part, name) * factors[name]) for name in own}))
        return Chain(tuple(parts))

    def parts(self) -> tuple["Rule", ...]:
        """The rules that this one is composed of."""
        return (self,)

    def named_parts(self) -> Iterator[tuple["Rule", Mapping[str, str]]]:
        """Each part, with the names of its slots in this rule, by their names in the part."""
        yield self, {name: name for name in self.slots}

    def __rshift__(self, other: "Rule") -> "Chain":
        """``a >> b``: the update of `a` is the gradient of `b`.

        A `WeightDecay` on the wrong side of a `Rate`, where its sign would make the weights grow, is a ValueError.
        """
        if not isinstance(other, Rule):
            return NotImplemented
        parts = self.parts() + other.parts()
        return Chain(parts)


R = TypeVar("R", bound=Rule)


def with_values(rule: R, values: Mapping[str, object]) -> R:
    """Returns a copy with some fields replaced, unchecked: inside JAX's transformations they may be any object."""
    copy = object.__new__(type(rule))
    for field in dataclasses.fields(rule):
        object.__setattr__(copy, field.name, values.get(field.name, getattr(rule, field.name)))
    return copy


def _of_part(count: jax.Array | Sequence[jax.Array], i: int) -> jax.Array:
    """The count of a part of a chain: its own, or the one of all parts."""
    return count[i] if isinstance(count, (tuple, list)) else typing.cast(jax.Array, count)


@dataclasses.dataclass(frozen=True)
class Chain(Rule):
    """Rules applied one after the other; ``a >> b >> c`` is ``Chain((a, b, c))``, and ``Chain(())`` does nothing.

    A slot of part i whose name an earlier part has taken is kept as ``name_i``.
    """

    chained: tuple[Rule, ...]

    def __post_init__(self) -> None:
        sides = [part.side for part in self.chained]
        if "rate" not in sides:
            return
        rate = sides.index("rate")
        for i, (part, side) in enumerate(zip(self.chained, sides, strict=True)):
            if side == ("before rate" if i > rate else "after rate"):
                raise ValueError(
                    f"{type(part).__name__} on the wrong side of Rate would make the weights grow: "
                    "before it stands Decay(…), after it Decay(…, independent=True) or ProximalDecay"
                )

    def parts(self) -> tuple[Rule, ...]:
        return self.chained

    def named_parts(self) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        taken: set[str] = set()
        for i, part in enumerate(self.chained):
            names = {name: f"{name}_{i}" if name in taken else name for name in part.slots}
            taken.update(names.values())
            yield part, names

    @property
    def slots(self) -> Mapping[str, Slot]:
        found: dict[str, Slot] = {}
        for part, names in self.named_parts():
            for name, slot in part.slots.items():
                unit = slot.unit and slot.unit._replace(slot=names[slot.unit.slot])
                found[names[name]] = slot._replace(unit=unit)
        return found

    @property
    def betas(self) -> Sequence[Any]:
        return [beta for part in self.chained for beta in part.betas]

    @property
    def is_scheduled(self) -> bool:
        return any(part.is_scheduled for part in self.chained)

    def _own(self, slots: Slots, clock: Clock) -> Iterator[tuple[Rule, Mapping[str, str], Slots, Clock]]:
        start = 0
        for i, (part, names) in enumerate(self.named_parts()):
            corrections = clock.corrections[start : start + len(part.betas)]
            start += len(corrections)
            own = {name: slots[full] for name, full in names.items()}
            yield part, names, own, dataclasses.replace(clock, count=_of_part(clock.count, i), corrections=corrections)

    def clipped_gradient(self, g: jax.Array) -> jax.Array:
        return g  # Each part has a bound of its own.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        new: dict[str, jax.Array] = {}
        for part, names, own, now in self._own(slots, clock):
            g, after = part.leaf(part.clipped_gradient(g), p, own, now)
            new |= {names[name]: value for name, value in after.items()}
        return g, new

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        found = (part.signal_to_noise(own, now) for part, _, own, now in self._own(slots, clock))
        return next((ratio for ratio in found if ratio is not None), None)

    def of_real(self) -> "Chain":
        return Chain(tuple(part.of_real() for part in self.chained))

    def at(self, count: jax.Array | Sequence[jax.Array]) -> "Chain":
        return Chain(tuple(part.at(_of_part(count, i)) for i, part in enumerate(self.chained)))


@dataclasses.dataclass(frozen=True)
class Identity(Rule):
    """A rule whose update is the gradient."""

    counts: ClassVar[bool] = False

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        return g, slots
