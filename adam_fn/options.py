"""The options that every optimizer of the family takes, declared and documented once, and what they build."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Literal, ParamSpec, TypedDict, TypeVar

from jax.typing import DTypeLike

from adam_fn.codec import Cast, Codec
from adam_fn.rule import Decay, Hyper, Rate, Rule
from adam_fn.transform import Mask, Transformation, transform

P = ParamSpec("P")
T = TypeVar("T")


class CommonOptions(TypedDict, total=False):
    """Keyword options of every optimizer.

    Attributes:
      decay: what `weight_decay` means: ``"scaled"``, ``p - α(u + λp)`` (torch, optax); ``"independent"``,
        ``p - αu - λp`` (the AdamW paper, arXiv 1711.05101; give λ as a schedule to let it follow one);
        ``"l2"``, ``g + λp`` before the optimizer (what other frameworks' "Adam with weight decay" often is).
      frozen: leaves that are not trained, as a mask: no moments, a zero update.
      nu_dtype: the floating dtype in which the second moments are stored; float32 by default, whatever the parameters.
        bfloat16 loses the changes of v below 0.4%: with β₂ above 0.996 that is all of them while gradients are steady.
    """

    decay: Literal["scaled", "independent", "l2"]
    frozen: Mask | None
    nu_dtype: DTypeLike | None


class MuOptions(CommonOptions, total=False):
    """`CommonOptions`, and `mu_dtype`: the dtype in which the first moments are stored; float32 by default."""

    mu_dtype: DTypeLike | None


class DecayOptions(CommonOptions, total=False):
    """`CommonOptions`, and the decay of an optimizer that has none by default.

    Attributes:
      weight_decay: λ, a number, a 0-d array or a schedule.
      mask: the leaves that decay: a tree of booleans (or a prefix), or a function of the parameters that returns one;
        `adam_fn.masks` has ready ones. All leaves by default.
    """

    weight_decay: Hyper | None
    mask: Mask | None


class Options(MuOptions, DecayOptions, total=False):
    """All of them."""


def optimizer(
    rule: Rule,
    learning_rate: Hyper,
    *,
    weight_decay: Hyper | None = None,
    mask: Mask | None = None,
    decay: Literal["scaled", "independent", "l2"] = "scaled",
    frozen: Mask | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> Transformation:
    """The transformation of `rule` with a learning rate and the options that all optimizers share (see `Options`)."""
    rate = Rate(learning_rate)
    if decay not in ("scaled", "independent", "l2"):
        raise ValueError(f"decay must be 'scaled', 'independent' or 'l2', got {decay!r}")
    if weight_decay is None:
        if mask is not None or decay != "scaled":
            raise ValueError("mask and decay say how the weights decay, but weight_decay is not given")
        whole = rule >> rate
    elif decay == "scaled":
        whole = rule >> Decay(weight_decay) >> rate
    elif decay == "independent":
        whole = rule >> rate >> Decay(weight_decay, independent=True)
    else:
        whole = Decay(weight_decay) >> rule >> rate
    storage: dict[str, Codec] = {}
    for name, dtype in (("mu", mu_dtype), ("nu", nu_dtype)):
        if dtype is not None:
            slots = [slot for slot in rule.slots if slot.split("_")[0] == name]
            if not slots:
                raise ValueError(f"{name}_dtype is given, but {type(rule).__name__} has no slot {name}")
            storage |= dict.fromkeys(slots, Cast(dtype))
    return transform(whole, storage=storage, mask=mask, frozen=frozen)


def alias(function: Callable[P, T]) -> Callable[P, T]:
    """Lists the unpacked ``**options`` in the runtime signature, which `optax.inject_hyperparams` reads."""
    signature = inspect.signature(function)
    *named, rest = signature.parameters.values()
    (options,) = typing.get_args(rest.annotation)
    defaults = inspect.signature(optimizer).parameters
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name].default, annotation=hint)
        for name, hint in typing.get_type_hints(options).items()
    ]

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
