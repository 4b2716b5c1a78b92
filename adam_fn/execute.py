"""`body`, the only place where a rule's arithmetic meets its storage, and the ways to run it."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from adam_fn.codec import Codec, Noise, Stored, stored_spec
from adam_fn.noise import Part, even_bits
from adam_fn.rule import Clock, Rule

Slots: TypeAlias = Mapping[str, Stored]

#: Leaves of at least so many elements are updated tile by tile.
LARGE = 2**20
#: A tile has at least so many elements,
TILE = 2**17
#: and with several devices a multiple of so many rows, so that they may share them.
ROWS = 32
#: A vector is cut as a matrix of rows of this length.
WIDTH = 1024


class Inputs(NamedTuple):
    """What a step of a leaf starts from beside its state: the gradient and the parameter, of one shape."""

    g: jax.Array
    p: jax.Array | None


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the arithmetic for a parameter's dtype: float64 for float64 and complex128, else float32."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32)


def as_real(x: jax.Array) -> jax.Array:
    """A complex array as two reals, stacked in front; a real array as it is."""
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def as_dtype(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The inverse of `as_real`, in `dtype`."""
    return (jax.lax.complex(x[0], x[1]) if jnp.issubdtype(dtype, jnp.complexfloating) else x).astype(dtype)


def _widened(g: jax.Array, dtype: np.dtype) -> jax.Array:
    """The gradient in the dtype of the arithmetic.

    A low-precision gradient whose square would overflow there (bfloat16 above 9e18) counts as the largest that does
    not, so that any finite one gives a finite update; inf and nan stay what they are.
    """
    exponent = jnp.finfo(dtype).maxexp // 2 - 1
    wide = g.astype(dtype)
    if jnp.finfo(g.dtype).bits >= 32 or jnp.finfo(g.dtype).maxexp <= exponent:
        return wide
    return jnp.where(jnp.isfinite(wide), jnp.clip(wide, -(2.0**exponent), 2.0**exponent), wide)


def _noise(slot: int, clock: Clock, part: Part | None) -> Noise:
    """Random numbers of their own for each slot and leaf, which move on with the step."""
    assert clock.index is not None
    return functools.partial(even_bits, slot, clock.count, clock.index, part=part)


def body(
    rule: Rule, codecs: Mapping[str, Codec], inputs: Inputs, stored: Slots, clock: Clock, part: Part | None = None
) -> tuple[jax.Array, Slots]:
    """One step of one leaf, or of a part of it: decode, the rule, encode. The update has the gradient's dtype."""
    g, p = inputs
    dtype = compute_dtype((g if p is None else p).dtype)
    rule = rule.cast(dtype)
    clock = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, clock)
    shape = jax.eval_shape(as_real, g).shape
    slots = {name: codecs[name].decode(x, dtype, shape) for name, x in stored.items()}
    param = None if p is None else as_real(p).astype(dtype)
    gradient = _widened(as_real(g), dtype)
    u, new = rule.leaf(gradient, param, slots, clock)
    found = {"update": u.shape} | {name: x.shape for name, x in new.items()}
    expected = {"update": gradient.shape} | {name: x.shape for name, x in slots.items()}
    if found != expected:
        raise ValueError(f"{type(rule).__name__}.leaf returned shapes {found}, expected {expected}")
    return as_dtype(u, g.dtype), {
        name: codecs[name].encode(new[name], None if clock.index is None else _noise(i, clock, part))
        for i, name in enumerate(sorted(codecs))  # As `jit` sorts them, so that a slot's number is the same outside.
    }


@functools.partial(jax.jit, static_argnames="write")
def run_leaf(
    rule: Rule, codecs: Mapping[str, Codec], inputs: Inputs, stored: Slots, clock: Clock, *, write: bool = False
) -> tuple[jax.Array, Slots]:
    """`body` over a leaf: the update, or with `write` the new parameter, as `optax.apply_updates` has it.

    Jitted, so that it is traced and lowered once per distinct leaf and not once per leaf.
    """

    def run(
        rule: Rule, inputs: Inputs, stored: Slots, clock: Clock, part: Part | None = None
    ) -> tuple[jax.Array, Slots]:
        u, new = body(rule, codecs, inputs, stored, clock, part)
        return u if inputs.p is None or not write else (inputs.p + u).astype(inputs.p.dtype), new

    tiles = _tiles(codecs, inputs.g, stored)
    if tiles is None:
        return run(rule, inputs, stored, clock)
    cut = jax.custom_jvp(functools.partial(_run_tiles, run, tiles, codecs, "p" if write else "g"))
    cut.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))  # The derivative is that of the whole.
    return jax.lax.platform_dependent(rule, inputs, stored, clock, cpu=cut, default=run)


class _Tiles(NamedTuple):
    """A leaf of the shape `view` cut along `axis` into `stride` tiles, each of which is every `stride`-th row.

    Interleaved, so that a leaf that is sharded along the axis is cut where it lies.
    """

    view: tuple[int, ...]
    axis: int
    stride: int


def _tiles(codecs: Mapping[str, Codec], g: jax.Array, stored: Slots) -> _Tiles | None:
    """How to cut a leaf, or None where it had better be updated as a whole.

    XLA on a CPU does not fuse the reductions and the integer arithmetic of codes with the rest, and a temporary of the
    leaf's size costs more than the arithmetic; without codes there is none, and in a small leaf it stays in the cache.
    """
    if g.size < LARGE or not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(stored)):
        return None
    if jnp.iscomplexobj(g) or any(axis != AxisType.Auto for axis in jax.typeof(g).sharding.mesh.axis_types):
        return None  # Two reals in front; or what is sharded explicitly, or a shard.
    view = g.shape if g.ndim > 1 else (g.size // WIDTH, WIDTH)
    groups = [codec.group for codec in codecs.values()]
    if math.prod(view) != g.size or any(group is None or (g.ndim == 1 and WIDTH % group) for group in groups):
        return None
    forms = [jax.tree.leaves(stored_spec(codecs[name], view, compute_dtype(g.dtype))) for name in stored]
    if any(x.shape[: len(view) - 1] != view[:-1] for x in itertools.chain.from_iterable(forms)):
        return None
    unit = math.lcm(ROWS, jax.device_count()) if jax.device_count() > 1 else 1
    cuts = [
        _Tiles(view, axis, stride)
        for axis, rows in enumerate(view[:-1])
        for stride in range(2, g.size // TILE + 1)
        if rows % (stride * unit) == 0
    ]
    return max(cuts, key=lambda cut: cut.stride, default=None)


def _run_tiles(
    run: Callable[..., tuple[jax.Array, Slots]],
    tiles: _Tiles,
    codecs: Mapping[str, Codec],
    target: str,
    rule: Rule,
    inputs: Inputs,
    stored: Slots,
    clock: Clock,
) -> tuple[jax.Array, Slots]:
    """`run` tile by tile, in the place of the input `target` and of the slots."""
    view, axis, stride = tiles
    dtype = compute_dtype(inputs.g.dtype)

    def split(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _as_bits(x.reshape(*shape[:axis], -1, stride, *shape[axis + 1 :]))

    def take(x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)

    def put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, part, i, axis + 1)

    forms = {name: stored_spec(codecs[name], view, dtype) for name in stored}
    whole = jax.tree.map(lambda x: split(x, view), inputs)
    slots = jax.tree.map(lambda x, form: split(x, form.shape), stored, forms)

    def tile(i: jax.Array, parts: tuple[Inputs, Slots]) -> tuple[jax.Array, Slots]:
        parts = jax.tree.map(lambda x, like: jax.lax.bitcast_convert_type(x, like.dtype), parts, (inputs, stored))
        return jax.tree.map(_as_bits, run(rule, *parts, clock, Part(axis, stride, i)))

    def step(i: jax.Array, carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        result, slots = carry
        parts = jax.tree.map(lambda x: take(x, i), (whole._replace(**{target: result}), slots))
        # Always true. XLA does not know, and so does not fuse the arithmetic into both the reductions and the writes.
        new = jax.lax.cond(clock.count | 1 != 0, tile, lambda _, parts: (getattr(parts[0], target), parts[1]), i, parts)
        return jax.tree.map(lambda x, part: put(x, part, i), carry, new)

    found, slots = jax.lax.fori_loop(0, stride, step, (getattr(whole, target), slots))
    return jax.tree.map(
        lambda x, like: jax.lax.bitcast_convert_type(x, like.dtype).reshape(like.shape),
        (found, slots), (getattr(inputs, target), stored),
    )  # fmt: skip


def _as_bits(x: jax.Array) -> jax.Array:
    """Short floats as integers: XLA's CPU compiler would widen a whole array of them to write a part of it."""
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else 0
    return jax.lax.bitcast_convert_type(x, f"uint{bits}") if bits in (8, 16) else x
