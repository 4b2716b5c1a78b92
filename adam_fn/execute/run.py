"""Which way a leaf is run: chosen here, by the device and by what its compiler was seen to do."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from adam_fn.codec import Cast, Codec
from adam_fn.execute.body import Inputs, Write, as_dtype, as_real
from adam_fn.execute.cpu import alone, in_order, suits
from adam_fn.execute.kernel import GPU, TPU, in_kernel, opaque, suited
from adam_fn.execute.mesh import on_mesh
from adam_fn.execute.step import Done, Step, in_blocks, in_one, in_rows, whole
from adam_fn.execute.store import Form, Slots, used
from adam_fn.execute.tiles import LARGE, PADDED, in_padded_tiles, in_tiles
from adam_fn.layout import layout
from adam_fn.rule import Clock, Rule


def on_tpu(step: Step, inputs: Inputs) -> Callable[..., Done] | None:
    """What suits a TPU better than the default."""
    codecs, size, blocks = step.codecs.values(), inputs.g.size, layout(inputs.g.shape)
    large = blocks is not None and blocks.even and blocks.blocks > 1 and size >= LARGE and alone()
    if step.form.layout is None:
        if large and inputs.low is not None and step.write.parameters:  # Else a float32 of both halves is stored.
            return in_tiles
        short = any(isinstance(codec, Cast) and codec.dtype is not None for codec in codecs)
        plain = all(isinstance(codec, Cast) for codec in codecs)
        return in_one if step.write.parameters and short and plain else None
    if step.form.layout.even:
        return in_tiles if large else in_blocks
    return in_padded_tiles if size > PADDED else None


@functools.partial(jax.jit, static_argnames=("write", "kernel"))
def run_leaf(
    rule: Rule,
    codecs: Mapping[str, Codec],
    inputs: Inputs,
    stored: Slots,
    clock: Clock,
    *,
    write: Write,
    kernel: bool = False,
) -> Done:
    """A step of one leaf. Jitted, so that it is traced and lowered once per distinct leaf and not once per leaf."""
    dtype = (inputs.p if write.parameters and inputs.p is not None else inputs.g).dtype
    inputs = jax.tree.map(as_real, inputs)
    own = {name: used(codec, inputs.g.shape) for name, codec in codecs.items()}
    form = Form.of(own, inputs.g.shape)
    step = Step(own, write, form)
    ways = {"default": whole if form.layout is None else in_rows}
    if way := on_tpu(step, inputs):
        ways["tpu"] = way
    if suits(step, inputs):
        ways["cpu"] = in_order
    bound: dict[str, Callable[..., Done]] = {name: functools.partial(way, step) for name, way in ways.items()}
    for name, machine in {"tpu": TPU, "cuda": GPU}.items() if kernel else ():
        if blocks := suited(machine, inputs):
            way = on_mesh if machine.divisible else in_kernel
            bound[name] = opaque(functools.partial(way, machine, step, blocks=blocks))
    if len(bound) == 1:
        done = bound["default"](rule, inputs, stored, clock)
    else:
        done = jax.lax.platform_dependent(rule, inputs, stored, clock, **bound)
    return done._replace(result=as_dtype(done.result, dtype)) if jnp.issubdtype(dtype, jnp.complexfloating) else done
