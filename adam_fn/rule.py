"""The algebra: a rule is one optimizer's arithmetic on one array, and ``a >> b`` composes rules.

A rule is a frozen dataclass of its hyperparameters. It is pure and elementwise and knows nothing of trees, storage,
devices or optax; `adam_fn.transform` lifts it. A hyperparameter is a Python number or a schedule (static: compared by
value, compiled in) or a 0-d array (dynamic: a new value needs no new compilation).
"""

import abc
import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from adam_fn.arithmetic import OneMinus, Scalar, Weight, bounded
from adam_fn.codec import Slot, Slots

#: A function of the zero-based step, an int32 scalar, that returns a number or a 0-d array.
Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
#: A hyperparameter as it is given to a rule: a number, a 0-d array or a `Schedule`.
Hyper: TypeAlias = ArrayLike | Schedule


class Range(NamedTuple):
    """The half-open interval ``[low, high)`` that a Python number must lie in."""

    low: float
    high: float


UNIT = Range(0.0, 1.0)
# A rule's field is a `Hyper` where the rule is made and a `Scalar` where its arithmetic runs (after `Rule.at`): no one
# type says that.
#: The annotation of a rule's field that is a decay rate, a `Hyper` in [0, 1).
Beta: TypeAlias = Annotated[Any, UNIT]
#: The annotation of a rule's field that is a `Hyper` of at least 0, and finite.
NonNegative: TypeAlias = Annotated[Any, Range(0.0, math.inf)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """What a rule knows about the current step.

    Attributes:
      count: the zero-based step, an int32 scalar; the first update sees 0.
      weights: the rule's bias weights, this step included.
      learning_rate: the rate that `update(..., learning_rate=x)` sets for this step, or None.
    """

    count: jax.Array
    weights: Sequence[jax.Array]
    learning_rate: jax.Array | None = None

    def rate(self, learning_rate: Scalar) -> Scalar:
        """The learning rate of this step."""
        return learning_rate if self.learning_rate is None else self.learning_rate


def checked(name: str, value: object, bounds: Range) -> Hyper:
    """The hyperparameter as a Python float, a 0-d array or a schedule, or an error that names it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (bounds.low <= value < bounds.high):
            raise ValueError(f"{name} must be in [{bounds.low:g}, {bounds.high:g}), got {value}")
        return float(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}")
        if bounds is UNIT and jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
            raise ValueError(
                f"{name} is a {value.dtype} array, which has too few digits for a decay rate near 1 (in bfloat16, "
                "0.999 becomes 1): pass it in float32, or call optax.inject_hyperparams with "
                'hyperparam_dtype=jnp.float32 or static_args=("b1", "b2")'
            )
        return value
    if callable(value):
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(f"{name} is an unhashable schedule: use a function or a frozen dataclass") from error
        return typing.cast(Schedule, value)
    raise TypeError(f"{name} must be a number, a 0-d array or a schedule, got {value!r}")


@functools.cache
def _ranges(rule: type["Rule"]) -> dict[str, Range]:
    """The hyperparameters of a rule: the fields whose annotation carries a `Range`."""
    found: dict[str, Range] = {}
    for name, hint in typing.get_type_hints(rule, include_extras=True).items():
        notes = (note for part in (hint, *typing.get_args(hint)) for note in getattr(part, "__metadata__", ()))
        if bounds := next((note for note in notes if isinstance(note, Range)), None):
            found[name] = bounds
    return found


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """One optimizer's arithmetic on one array.

    A subclass is a frozen dataclass of its hyperparameters (annotated `Beta` or `NonNegative`, which checks their
    range) that defines `leaf` and, if it keeps state, `slots` and `weigh`. Rules are pytrees whose leaves are the
    hyperparameters given as arrays.

    Attributes:
      squares: the largest number that `leaf` squares, in units of the largest gradient: 1 for the gradient itself, 2
        for the difference of two gradients, 0 if nothing is squared.
    """

    squares: ClassVar[float] = 0.0

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))

    def __post_init__(self) -> None:
        for name, bounds in _ranges(type(self)).items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name, ...) is not None:  # None only where it is the default.
                object.__setattr__(self, name, checked(name, value, bounds))

    @property
    def slots(self) -> Mapping[str, Slot]:
        """What the rule remembers per element, by name."""
        return {}

    @property
    def weights(self) -> int:
        """How many bias weights the rule keeps."""
        return 0

    def weigh(self, weights: Sequence[Weight], count: jax.Array) -> Sequence[Weight]:
        """The bias weights after step `count`; called once a step, on scalars, after `at`."""
        return weights

    def bounded(self, g: jax.Array) -> jax.Array:
        """The gradient as `leaf` gets it: the largest finite ones clipped, so that what is remembered stays finite.

        A rule that squares receives at most ``2⁶³/squares`` (float64: ``2⁵¹¹/squares``), whose square a float can hold:
        beyond that v would no longer grow with m, and the update would not be bounded. Other rules with slots receive
        at most a quarter of the largest number; rules without slots receive everything. inf and nan are never changed.
        """
        return bounded(g, self.squares) if self.slots else g

    @abc.abstractmethod
    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        """The update of one array and its new slots; everything has one dtype, float32 or float64.

        Elementwise: the array may be a part of a leaf. Whatever needs whole leaves is a `Wrapper`, such as `lamb`.
        """

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        """``m̂/√v̂`` of one array, from its slots after a step and that step's bias weights; None if it has none."""
        return None

    def at(self, count: jax.Array) -> Self:
        """The rule with every schedule replaced by its value at step `count`."""
        now = {}
        for name, bounds in _ranges(type(self)).items():
            value = getattr(self, name)
            if bounds is UNIT and hasattr(value, "one_minus"):
                now[name] = OneMinus(jnp.asarray(value.one_minus(count)))
            elif callable(value):
                value = checked(f"{name}(count)", value(count), bounds)
                # What a rule remembers may depend on a number that is 0, but not on what a schedule returns.
                now[name] = jnp.zeros(()) if isinstance(value, float) and value == 0 else value
        return _with(self, now)

    def cast(self, dtype: DTypeLike) -> Self:
        """The rule with its array hyperparameters in `dtype`."""
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self)

    def without(self, kind: type["Rule"]) -> "Rule":
        """The rule without its parts of one kind."""
        return Chain(tuple(part for part in self.parts() if not isinstance(part, kind)))

    def times(self, factors: Mapping[str, float]) -> "Rule":
        """The rule, after `at`, with hyperparameters multiplied by name: arrays, so that factors share a program."""
        parts: list[Rule] = []
        for part in self.parts():
            own = factors.keys() & _ranges(type(part))
            parts.append(_with(part, {name: jnp.asarray(getattr(part, name) * factors[name]) for name in own}))
        return Chain(tuple(parts))

    def parts(self) -> tuple["Rule", ...]:
        """The rules that this one is composed of."""
        return (self,)

    def __rshift__(self, other: "Rule") -> "Chain":
        """``a >> b``: the update of `a` is the gradient of `b`.

        A `Decay` on the wrong side of a `Rate`, where its sign would make the weights grow, is a ValueError.
        """
        if not isinstance(other, Rule):
            return NotImplemented
        parts = self.parts() + other.parts()
        rates = [i for i, part in enumerate(parts) if isinstance(part, Rate)]
        for i, part in enumerate(parts):
            if rates and isinstance(part, Decay) and part.independent != (i > rates[0]):
                order = "Rate >> Decay needs" if i > rates[0] else "Decay >> Rate is for"
                raise ValueError(
                    f"{order} Decay(…, independent={not part.independent}): otherwise the weights would grow"
                )
        return Chain(parts)


R = TypeVar("R", bound=Rule)


def _with(rule: R, values: Mapping[str, object]) -> R:
    """A copy with some fields replaced, unchecked: inside a transformation they may be any object."""
    copy = object.__new__(type(rule))
    for field in dataclasses.fields(rule):
        object.__setattr__(copy, field.name, values.get(field.name, getattr(rule, field.name)))
    return copy


def _flatten(rule: Rule) -> tuple[tuple[object, ...], tuple[tuple[str, ...], tuple[tuple[str, object], ...]]]:
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    dynamic = tuple(name for name, value in fields.items() if isinstance(value, (jax.Array, np.ndarray, tuple)))
    static = tuple((name, value) for name, value in fields.items() if name not in dynamic)
    return tuple(fields[name] for name in dynamic), (dynamic, static)


def _unflatten(
    kind: type[Rule], aux: tuple[tuple[str, ...], tuple[tuple[str, object], ...]], children: Sequence[object]
) -> Rule:
    rule = object.__new__(kind)
    for name, value in (*zip(aux[0], children, strict=True), *aux[1]):
        object.__setattr__(rule, name, value)
    return rule


@dataclasses.dataclass(frozen=True)
class Chain(Rule):
    """Rules applied one after the other; ``a >> b >> c`` is ``Chain((a, b, c))``, and ``Chain(())`` does nothing.

    A slot of part i whose name an earlier part has taken is kept as ``name_i``.
    """

    chained: tuple[Rule, ...]

    def parts(self) -> tuple[Rule, ...]:
        return self.chained

    def _names(self) -> Iterator[tuple[Rule, Mapping[str, str]]]:
        taken: set[str] = set()
        for i, part in enumerate(self.chained):
            names = {name: f"{name}_{i}" if name in taken else name for name in part.slots}
            taken.update(names.values())
            yield part, names

    @property
    def slots(self) -> Mapping[str, Slot]:
        found: dict[str, Slot] = {}
        for part, names in self._names():
            for name, slot in part.slots.items():
                unit = slot.unit and slot.unit._replace(slot=names[slot.unit.slot])
                found[names[name]] = slot._replace(unit=unit)
        return found

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.chained)

    def weigh(self, weights: Sequence[Weight], count: jax.Array) -> Sequence[Weight]:
        new: list[Weight] = []
        for part in self.chained:
            new += part.weigh(weights[len(new) : len(new) + part.weights], count)
        return new

    def _own(self, slots: Slots, clock: Clock) -> Iterator[tuple[Rule, Mapping[str, str], Slots, Clock]]:
        start = 0
        for part, names in self._names():
            weights = clock.weights[start : start + part.weights]
            start += part.weights
            own = {name: slots[full] for name, full in names.items()}
            yield part, names, own, dataclasses.replace(clock, weights=weights)

    def bounded(self, g: jax.Array) -> jax.Array:
        return g  # Each part has a bound of its own.

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        new: dict[str, jax.Array] = {}
        for part, names, own, now in self._own(slots, clock):
            g, after = part.leaf(part.bounded(g), p, own, now)
            new |= {names[name]: value for name, value in after.items()}
        return g, new

    def signal_to_noise(self, slots: Slots, clock: Clock) -> jax.Array | None:
        found = (part.signal_to_noise(own, now) for part, _, own, now in self._own(slots, clock))
        return next((ratio for ratio in found if ratio is not None), None)

    def at(self, count: jax.Array) -> "Chain":
        return Chain(tuple(part.at(count) for part in self.chained))


def _required(p: jax.Array | None) -> jax.Array:
    if p is None:
        raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
    return p


@dataclasses.dataclass(frozen=True)
class WeightDecay(Rule):
    """A rule that decays weights: `mask` selects the leaves to which it applies."""

    weight_decay: NonNegative


@dataclasses.dataclass(frozen=True)
class Decay(WeightDecay):
    """Weight decay: ``u + λ p`` before the rate, or after it with `independent=True`, ``u - λ p``.

    Before the rate it is the decoupled decay of torch and optax (``p - α(u + λ p)``), before the optimizer it is L2
    regularisation, and after the rate it is the decay of the AdamW paper (``p - α u - λ p``; arXiv 1711.05101).
    """

    independent: bool = False

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        decay = self.weight_decay * _required(p)
        return (g - decay if self.independent else g + decay), slots


@dataclasses.dataclass(frozen=True)
class ProximalDecay(WeightDecay):
    """Weight decay by a proximal step, after the rate: ``p + u' = (p + u)/(1 + αλ)`` (Adan's, arXiv 2208.06677)."""

    learning_rate: NonNegative

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        strength = clock.rate(self.learning_rate) * self.weight_decay
        return (g - strength * _required(p)) / (1 + strength), slots


@dataclasses.dataclass(frozen=True)
class Rate(Rule):
    """The learning rate and the sign of descent: ``-α u``; `update(..., learning_rate=x)` replaces α for one step."""

    learning_rate: NonNegative

    def leaf(self, g: jax.Array, p: jax.Array | None, slots: Slots, clock: Clock) -> tuple[jax.Array, Slots]:
        return -clock.rate(self.learning_rate) * g, slots
