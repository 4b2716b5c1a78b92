"""The step of a GPT inside its backward pass, beside `value_and_grad` and then the step."""

import contextlib
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilers.figures import ORDINARY
from compilers.hlo import Program
from compilers.placements import several
from compilers.steps import STEPS, Tree, devices, first, placed
from jax.sharding import AxisType, Mesh
from measure.scripts import Row
from measure.workloads import held

import adam_fn
from adam_fn import backward

DEPTH, WIDTH, HEADS, LENGTH, BATCH, WORDS = 12, 2048, 16, 256, 4, 8192
SHAPES = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
#: For each target.
WAYS = {"v5e": ("one device", "FSDP 16", "ZeRO-1 16"), "h200": ("one device",)}


def params() -> Tree:
    layers = {name: (DEPTH, *shape) for name, shape in SHAPES.items()} | {"norm": (DEPTH, 2, WIDTH)}
    shapes = {"embedding": (WORDS, WIDTH), "layers": layers, "norm": (WIDTH,)}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "bfloat16"), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def normed(h: jax.Array, scale: jax.Array) -> jax.Array:
    wide = h.astype("float32")
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(h.dtype) * scale


def layer(p: Tree, h: jax.Array, batch: jax.Array) -> jax.Array:
    batches, length = batch.shape
    q, k, v = jnp.split((normed(h, p["norm"][0]) @ p["qkv"]).reshape(batches, length, 3 * HEADS, -1), 3, 2)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
    h = h + attended @ p["out"]
    return h + jax.nn.gelu(normed(h, p["norm"][1]) @ p["up"]) @ p["down"]


def embed(p: Tree, batch: jax.Array) -> jax.Array:
    return p["embedding"][batch]


def head(p: Tree, h: jax.Array, batch: jax.Array) -> jax.Array:
    logits = normed(h, p["norm"]) @ p["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), batch).mean()


def loss(p: Tree, h: jax.Array, batch: jax.Array) -> jax.Array:
    """The loss of what `embed` returned; only the layers' inputs are kept for the backward pass."""
    again = jax.checkpoint(functools.partial(layer, batch=batch), policy=None)
    return head(p, jax.lax.scan(lambda h, q: (again(q, h), None), h, p["layers"])[0], batch)


def ordinary(tx: optax.GradientTransformation) -> Callable[..., Tree]:
    """Computes all gradients, then steps."""

    def step(p: Tree, state: Tree, batch: jax.Array) -> Tree:
        value, grads = jax.value_and_grad(lambda p: loss(p, embed(p, batch), batch))(p)
        return value, *adam_fn.make_step(tx)(p, state, grads)

    return step


def shardings(mesh: Mesh) -> Tree:
    """FSDP: every parameter is divided along an axis of its own, the layers are not."""
    layers = {name: jax.P(None, "data") for name in SHAPES} | {"norm": jax.P(None, None, "data")}
    specs = {"embedding": jax.P("data"), "layers": layers, "norm": jax.P("data")}
    return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, jax.P))


def inputs_only(p: Tree, batch: jax.Array) -> Tree:
    """The loss and its gradient for what `embed` returned: the activations of a step, and no gradient of parameters."""
    return jax.value_and_grad(lambda h: loss(p, h, batch))(embed(p, batch))


def compiled(name: str, way: str, target: str) -> Row:
    """A step of training; bytes per parameter of a device."""
    tx, p = STEPS[name.removesuffix(ORDINARY)].tx, params()
    batch = jax.ShapeDtypeStruct((BATCH * (1 if way == "one device" else 16), LENGTH), "int32")
    mesh = None
    if way == "one device":
        rows = first(target)
        p = placed(p, rows)
    else:
        mesh = Mesh(np.array(devices(target, "4x4")), ("data",), axis_types=(AxisType.Auto,))
        whole, rows = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
        p = placed(p, shardings(mesh) if way == "FSDP 16" else whole)
        tx = tx if way == "FSDP 16" else adam_fn.zero1(tx, p, mesh, layers="layers")
    state, batch = placed(jax.eval_shape(tx.init, p), adam_fn.state_shardings(tx, p)), placed(batch, rows)
    step = ordinary(tx) if name.endswith(ORDINARY) else backward.value_and_step(tx, embed, layer, head)
    jax.clear_caches()
    with contextlib.ExitStack() as context:
        if mesh is not None:  # Not earlier: `state_shardings` fails in it.
            context.enter_context(several())
            context.enter_context(jax.set_mesh(mesh))
        program: typing.Any = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, batch).compile()
        alone: typing.Any = jax.jit(inputs_only).lower(p, batch).compile()
    devices_ = 16 if way == "FSDP 16" else 1
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(p)) / devices_
    text = Program(program.as_text() or "")
    moved = [size for _, size in text.exchanges()]
    temporaries, activations = (x.memory_analysis().temp_size_in_bytes / count for x in (program, alone))
    gradient = held(p["layers"]) / DEPTH / count  # With FSDP it is whole at first.
    found: Row = {
        "temporaries": temporaries,
        "activations": activations,
        "gradient": gradient,
        "beside": temporaries - activations - gradient,
        "collectives": len(moved),
        "exchanged": sum(moved) / count,
    }
    return found | ({"cycles": cycles} if (cycles := text.cycles(in_full=True)) else {})
