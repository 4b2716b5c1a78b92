"""The options that every optimizer takes, declared and documented once, and the transformations that they build."""

# A new option is a field of one of the classes below (they say which optimizers take it), a line of documentation in
# `Options`, and an argument of `built`, which applies it. If it is no matter of the rule, `built` passes it on to
# `transform`, which puts it into the `Definition`.

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypedDict, TypeVar

from jax.typing import DTypeLike

from adam_fn.algebra.hyper import Hyper
from adam_fn.algebra.rate_and_decay import Decay, ProximalDecay, Rate
from adam_fn.algebra.rule import Rule, with_values
from adam_fn.storage.codec import Cast, Codec
from adam_fn.storage.names import StorageLike, by_stored_array
from adam_fn.storage.word_16bit import WORD
from adam_fn.trees.groups import Group, Groups
from adam_fn.trees.leaves import Mask
from adam_fn.trees.transform import Transformation, transform

#: The meaning of `weight_decay`, ``"scaled"``, ``"independent"``, ``"l2"`` or ``"proximal"``; see `Options`.
DecayKind: TypeAlias = Literal["scaled", "independent", "l2", "proximal"]
#: The meaning of the square of a complex gradient, ``"parts"`` or ``"magnitude"``; see `Options`.
Complex: TypeAlias = Literal["parts", "magnitude"]
P = ParamSpec("P")
R = TypeVar("R", bound=Rule)
T = TypeVar("T")


class DirectionOptions(TypedDict, total=False):
    """The options that say what is kept between steps, and for which leaves; see `Options`."""

    complex: Complex
    frozen: Mask | None
    nu_dtype: DTypeLike | None
    storage: StorageLike | None
    storage_mask: Mask | None


class StateOptions(DirectionOptions, total=False):
    """`DirectionOptions` and `groups`; see `Options`."""

    groups: Groups | Mapping[str, Group] | None


class MomentOptions(StateOptions, total=False):
    """`StateOptions` and `mu_dtype`; see `Options`."""

    mu_dtype: DTypeLike | None


class CommonOptions(StateOptions, total=False):
    """`StateOptions` and `decay`; see `Options`."""

    decay: DecayKind


class MuOptions(CommonOptions, total=False):
    """`CommonOptions` and `mu_dtype`; see `Options`."""

    mu_dtype: DTypeLike | None


class DecayOptions(CommonOptions, total=False):
    """`CommonOptions`, and weight decay for optimizers that have none by default; see `Options`."""

    weight_decay: Hyper | None
    mask: Mask | None


class Options(MuOptions, DecayOptions, total=False):
    """The keyword options that the optimizers share; each optimizer's signature lists the ones that it takes.

    A mask is a tree of booleans (or a prefix), or a function of the parameters that returns one; `adam_fn.masks` has
    ready-made ones. `optax.inject_hyperparams` mistakes such a function for a schedule unless its `static_args` name
    it.

    Attributes:
      weight_decay: λ, a number, a 0-d array or a schedule. No decay by default, unless the signature has another
        default.
      mask: the leaves that decay, as a mask. All by default.
      decay: what `weight_decay` means: ``"scaled"``, ``p - α(u + λp)`` (torch, optax; the default);
        ``"independent"``, ``p - αu - λp`` (the AdamW paper, arXiv 1711.05101; give λ as a schedule to let it follow
        one); ``"l2"``, ``g + λp`` before the optimizer (what other frameworks' "Adam with weight decay" often is);
        ``"proximal"``, ``(p - αu)/(1 + αλ)`` (Adan).
      frozen: the leaves that are not trained, as a mask: they have no moments and get a zero update. By default all are
        trained.
      mu_dtype: the floating dtype in which the first moments are stored; float32 by default (float64 for float64
        parameters). A narrower one is rounded with a dither, so that the mean of a slow average stays right.
      nu_dtype: the dtype in which the second moments are stored; otherwise as `mu_dtype`.
      storage: how the moments are stored between steps. One of:

        - a name (in parentheses, the bytes of Adam's state per parameter): ``"float32"`` (8), ``"bfloat16"`` (4),
          ``"24bit"`` (3: first moments in 8 bits, second ones in bfloat16) or ``"16bit"`` (2: both in one word). The
          last two store moments that no code suits in bfloat16;
        - a codec for all moments, such as `Cast("bfloat16")`;
        - a mapping from slot names to codecs, ``Storage(mu=MuLaw(), nu=Cast("float32"))``. A name covers every slot
          that begins with it (nu, nu_max).

      storage_mask: the leaves to which `storage` applies, as a mask, such as
        ``masks.path("*embedding*", invert=True)``; the others are stored in float32 (float64 for float64 parameters).
        All by default. Not with ``"16bit"``.
      complex: the meaning of the square of a complex gradient: ``"parts"``, the squares of its real and imaginary part,
        each for its own second moment, as in torch (the default); or ``"magnitude"``, ``|g|²`` for both, as in optax.
      groups: multipliers of the rate and of the decay, and frozen leaves, by path: a `Groups`, or the mapping that it
        is made from, ``{"embedding/*": Group(frozen=True), "*bias": Group(decay=0.0)}``.
    """


class Built(NamedTuple):
    """The result of options: the two rules that make an optimizer, and the other arguments of `transform`."""

    direction: Rule
    step: Rule
    arguments: dict[str, Any]


def built(
    rule: Rule,
    learning_rate: Hyper = 1.0,
    *,
    weight_decay: Hyper | None = None,
    mask: Mask | None = None,
    decay: DecayKind = "scaled",
    frozen: Mask | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    storage: StorageLike | None = None,
    storage_mask: Mask | None = None,
    complex: Complex = "parts",
    groups: Groups | Mapping[str, Group] | None = None,
) -> Built:
    """Applies the options that all optimizers share (see `Options`) to a rule and a learning rate."""
    check_decay(weight_decay, mask, decay, groups)
    rule = with_complex(rule, complex)
    direction, step = direction_and_step(rule, learning_rate, weight_decay, decay)
    stored = codecs_by_slot(rule, mu_dtype, nu_dtype, storage)
    arguments = {"storage": stored, "mask": mask, "frozen": frozen, "storage_mask": storage_mask, "groups": groups}
    return Built(direction, step, arguments)


def optimizer(rule: Rule, learning_rate: Hyper, **options: Any) -> Transformation:  # noqa: ANN401 (those of `built`)
    """The transformation of `rule` with a learning rate and the options that all optimizers share."""
    found = built(rule, learning_rate, **options)
    return transform(found.direction >> found.step, **found.arguments)


def with_complex(rule: R, complex: Complex) -> R:
    """The rule with the square of complex gradients that the option asks for."""
    if complex not in typing.get_args(Complex):
        raise ValueError(f"complex must be one of {list(typing.get_args(Complex))}, got {complex!r}")
    if complex == "parts":
        return rule
    if not hasattr(rule, "magnitude"):
        kind = type(rule).__name__
        raise ValueError(f'complex="magnitude" is for the second moment of Adam, which {kind} does not have')
    return with_values(rule, {"magnitude": True})


def check_decay(
    weight_decay: Hyper | None, mask: Mask | None, decay: DecayKind, groups: Groups | Mapping[str, Group] | None
) -> None:
    """Raises if an option needs a weight decay and none is given."""
    if weight_decay is not None:
        return
    if mask is not None or decay != "scaled":
        raise ValueError("mask and decay have no effect without weight_decay: pass weight_decay as well")
    if groups is not None:
        Groups.made_of(groups).check_no_decay()


def direction_and_step(
    rule: Rule, learning_rate: Hyper, weight_decay: Hyper | None = None, decay: DecayKind = "scaled"
) -> tuple[Rule, Rule]:
    """The direction and the step that together make an optimizer: the rate is in the second, the decay in either."""
    rate = Rate(learning_rate)
    if decay not in typing.get_args(DecayKind):
        raise ValueError(f"decay must be one of {list(typing.get_args(DecayKind))}, got {decay!r}")
    if weight_decay is None:
        return rule, rate
    if decay == "scaled":
        return rule >> Decay(weight_decay), rate
    if decay == "independent":
        return rule, rate >> Decay(weight_decay, independent=True)
    if decay == "l2":
        return Decay(weight_decay) >> rule, rate
    return rule, rate >> ProximalDecay(weight_decay, learning_rate)


class Storage(dict[str, Codec]):
    """Codecs by slot, ``Storage(mu=MuLaw(), nu=Cast("bfloat16"))``; slots without a codec are stored in float32."""


def codecs_by_slot(
    rule: Rule,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    storage: StorageLike | None = None,
) -> dict[str, Codec]:
    """The codecs that the options ask for, by slot."""
    by_name = by_stored_array(storage, rule.slots)
    asked = {name: (codec, f"storage of {name}") for name, codec in by_name.items()}
    for name, dtype in (("mu", mu_dtype), ("nu", nu_dtype)):
        if dtype is not None:
            if name in asked or WORD in asked:
                raise ValueError(f"{name}_dtype and storage both specify how {name} is stored: pass only one of them")
            asked[name] = (Cast(dtype), f"{name}_dtype")
    found: dict[str, Codec] = {}
    for name, (codec, what) in asked.items():
        if name == WORD:
            found[name] = codec
            continue
        slots = [slot for slot in rule.slots if slot == name or slot.startswith(f"{name}_")]
        if not slots:
            raise ValueError(
                f"{what} is given, but {type(rule).__name__} has no slot {name}; its slots are {', '.join(rule.slots)}"
            )
        found |= dict.fromkeys(slots, codec)
    return found


def lists_options(function: Callable[P, T]) -> Callable[P, T]:
    """Lists the unpacked ``**options`` in the runtime signature, which `optax.inject_hyperparams` and `help` read.

    Annotations are left out, so that `help` stays readable.
    """
    signature = inspect.signature(function)
    *named, rest = signature.parameters.values()
    (options,) = typing.get_args(rest.annotation)
    defaults = inspect.signature(built).parameters
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name].default)
        for name in typing.get_type_hints(options)
    ]
    named = [parameter.replace(annotation=parameter.empty) for parameter in named]

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            signature_.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}; its arguments are {list(signature_.parameters)}") from None
        return function(*args, **kwargs)

    signature_ = signature.replace(parameters=[*named, *keywords])
    wrapped.__signature__ = signature_  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped
