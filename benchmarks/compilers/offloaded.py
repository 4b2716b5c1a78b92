"""Steps whose state is in the host's memory: `offload`."""

import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from compilers.figures import TREE
from compilers.hlo import Program
from compilers.steps import GPT2, ONE, STEPS, Shapes, first, placed
from measure.scripts import Row
from measure.workloads import held, size

import adam_fn

#: Layers whose activations, of a batch of 16,384, need more memory than a step.
DEEP: Shapes = {f"layer{i}": (2048, 2048) for i in range(4)}
#: What else than a leaf has its state on the host, all in float32.
TREES = {TREE: GPT2, "training": DEEP}


def deep(params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """The loss of `DEEP`."""
    for layer in params.values():
        batch = jnp.tanh(batch @ layer)
    return jnp.mean(batch**2)


def peak(memory: typing.Any) -> int:  # noqa: ANN401 (JAX has no public type for it)
    """The device's memory of a program: its arguments, its results and what it needs beside."""
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return given + memory.temp_size_in_bytes


def offload(name: str, way: str, target: str) -> Row:
    """A step with the state on the host beside one with it on the device, alone or after the gradients of `deep`."""
    tree, place = TREES.get(name, ONE), first(target)
    step = STEPS["float32" if name in TREES else name]
    params = placed(step.params(tree), place)
    batch = jax.ShapeDtypeStruct((16384, 2048), step.dtype, sharding=place)

    def compiled(tx: optax.GradientTransformation) -> tuple[typing.Any, float]:
        """The program with the step, and the largest peak of all there are."""
        state = placed(jax.eval_shape(tx.init, params), adam_fn.state_shardings(tx, params))
        run = adam_fn.make_step(tx)
        if way == "one program":
            whole = jax.jit(lambda p, s, b: run(p, s, jax.grad(deep)(p, b)), donate_argnums=(0, 1))
            found = whole.lower(params, state, batch).compile()
            return found, peak(found.memory_analysis())
        found = run.lower(params, state, params).compile()
        memory: typing.Any = found.memory_analysis()
        if way == "make_step":
            return found, peak(memory)
        gradients = jax.jit(jax.grad(deep)).lower(params, batch).compile().memory_analysis()
        resident = memory.argument_size_in_bytes - 2 * held(params)
        return found, max(peak(gradients) + resident, peak(memory) + held(batch))

    _, most = compiled(step.tx)
    moved, now = compiled(adam_fn.offload(step.tx))
    memory = moved.memory_analysis()
    read, stored = Program(moved.as_text() or "").bus()
    found = {"on the host": memory.host_argument_size_in_bytes, "kept there": memory.host_output_size_in_bytes}
    found |= {"read": read, "stored": stored, "peak": now, "saved": most - now}
    return {name: figure / size(tree) for name, figure in found.items()}
