"""The steps that are compiled: transformations, what they are given, and the trees of parameters."""

import dataclasses
import functools
import itertools
import os
import typing
from collections.abc import Callable, Mapping

import jax
import optax
from compilers.limits import BASE
from measure import workloads
from measure.peers import plain_step

import adam_fn

RATE = 1e-3
BF16 = "bfloat16"
Tx = optax.GradientTransformation
Shapes = Mapping[str, tuple[int, ...]]
Tree = typing.Any  # Any pytree.

# --- trees ---

ONE: Shapes = {"leaf": (65536, 1024)}
SMALL: Shapes = {"leaf": (256, 512)}
GPT2: Shapes = workloads.gpt2(50257, 1024, 768, 12)


def llama(layers: int) -> Shapes:
    """The leaves of Llama-7B with some of its 32 layers."""
    width, hidden = 4096, 11008
    found: dict[str, tuple[int, ...]] = {"embedding": (32000, width), "head": (width, 32000), "norm": (width,)}
    for i in range(layers):
        found |= {f"{i}.{name}": (width, width) for name in ("q", "k", "v", "o")}
        found |= {f"{i}.gate": (width, hidden), f"{i}.up": (width, hidden), f"{i}.down": (hidden, width)}
        found |= {f"{i}.norm1": (width,), f"{i}.norm2": (width,)}
    return found


def placed(tree: Tree, place: Tree) -> Tree:
    """Shapes with a sharding, the same for all or a tree of them."""
    if isinstance(place, jax.sharding.Sharding):
        place = jax.tree.map(lambda _: place, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place)


def spent() -> float:
    """Seconds that this process has computed, with those that it started: other work on the machine does not count."""
    return sum(os.times()[:4])


# --- steps ---


#: (params, state, grads) -> (params, state), in place.
WAYS: dict[str, Callable[[Tx], typing.Any]] = {"make_step": adam_fn.make_step, "update, apply": plain_step}


@dataclasses.dataclass(frozen=True)
class Step:
    """A transformation, the dtype of its parameters and gradients, and the ways in which one leaf is compiled."""

    tx: Tx
    dtype: str = "float32"
    ways: tuple[str, ...] = ("make_step",)

    def params(self, tree: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in tree.items()}

    def arguments(self, tree: Shapes) -> tuple[Tree, Tree, Tree]:
        """Parameters, state and gradients without their values."""
        params = self.params(tree)
        return params, jax.eval_shape(self.tx.init, params), params


STORAGES = typing.get_args(adam_fn.StorageName)
#: What is made of a transformation, and the dtype of its parameters.
WRITES: dict[str, tuple[Callable[[Tx], Tx], str]] = {
    "": (lambda tx: tx, "float32"),
    "bfloat16 parameters, ": (lambda tx: tx, BF16),
    "masters, ": (adam_fn.master_weights, BF16),
    "8-bit masters, ": (functools.partial(adam_fn.master_weights, bits=8), BF16),
    "stochastic rounding, ": (adam_fn.stochastic_rounding, BF16),
}
ALIASES = ("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "amsgrad", "radam", "adabelief", "yogi", "laprop")
ALIASES += ("adopt", "ademamix", "adan", "adam_atan2", "lion", "swats", "lamb")
MEMBERS: dict[str, Callable[..., Tx]] = {name: getattr(adam_fn, name) for name in ALIASES}
MEMBERS["cautious"] = lambda rate, **options: adam_fn.cautious(adam_fn.adam(rate, **options))


def family(member: str) -> dict[str, Step]:
    """A member with every storage and every write."""
    made = {storage: MEMBERS[member](RATE, storage=storage) for storage in STORAGES}
    every = itertools.product(WRITES.items(), made.items())
    return {f"{write}{storage}": Step(wrap(tx), dtype) for (write, (wrap, dtype)), (storage, tx) in every}


STEPS = {
    BASE: Step(optax.adamw(RATE), ways=("update, apply",)),
    "optax, all bfloat16": Step(optax.adamw(RATE), BF16, ("update, apply",)),
    **{name: step for name, step in family("adamw").items() if not ("masters" in name and name.endswith(BF16))},
    **{
        f"{name}, {storage}": family(name.lower())[storage]
        for name in ("AMSGrad", "Adan", "AdEMAMix", "Lion")
        for storage in ("float32", "24bit", "16bit")
    },
}
STEPS |= {storage: dataclasses.replace(STEPS[storage], ways=tuple(WAYS)) for storage in STORAGES}
del STEPS["Lion, 16bit"]  # The same as with 24 bits.
#: Those that are compiled for whole trees.
WHOLE = (BASE, *STORAGES, "masters, 16bit")
