"""All ways to run a step of a leaf, beside each other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rule_of
from helpers.runs import full_jit

import adam_fn
from adam_fn import Block, Storage
from adam_fn.arithmetic import Weight
from adam_fn.execute import cpu, kernel, run, tiles
from adam_fn.execute.body import Inputs, Write
from adam_fn.execute.mesh import on_mesh
from adam_fn.execute.step import Step, in_blocks, in_rows, whole
from adam_fn.execute.store import Form, store
from adam_fn.layout import layout
from adam_fn.rule import Clock
from adam_fn.write import Masters

TX = adam_fn.adamw(1e-2, storage=Storage(mu=Block(8), nu=Block(4)), weight_decay=0.1)


def kernel_of(machine: kernel.Machine) -> Any:
    """A kernel, interpreted, as a way to run a step."""

    def run(step: Step, rule: Any, inputs: Inputs, stored: Any, clock: Clock) -> Any:
        blocks = kernel.suited(machine, inputs)
        assert blocks is not None
        return on_mesh(machine, step, rule, inputs, stored, clock, blocks=blocks, interpret=True)

    return run


MACHINES = {"TPU kernel": kernel.TPU, "GPU kernel": kernel.GPU}


KERNELS = {name: kernel_of(machine) for name, machine in MACHINES.items()}


CODED = {
    "rows": in_rows,
    "blocks": in_blocks,
    "tiles": tiles.in_tiles,
    "padded": tiles.in_padded_tiles,
    "order": cpu.in_order,
    **KERNELS,
}


ALL = {**CODED, "whole": whole}


def one_step(step: Step, rule: Any, ways: tuple[str, ...], count: jax.Array, weights: Any, leaf: Any) -> Any:
    """A step of a leaf by every way, and the bias weights after it."""
    p, low, stored = leaf
    weights = rule.at(count).weigh(weights, count)
    clock = Clock(count, tuple(w.value for w in weights), None, jnp.int32(3))
    g = jax.random.normal(jax.random.key(count), p.shape) * jnp.exp(jax.random.normal(jax.random.key(7), p.shape))
    g = jax.lax.optimization_barrier(g)
    return [ALL[way](step, rule.at(count), Inputs(g, p, low), stored, clock) for way in ways], weights


def stepped(tx: adam_fn.Transformation, shape: tuple[int, ...], write: Write, ways: tuple[str, ...]) -> Any:
    """Two steps of a leaf, each by every way from the state that the first way left."""
    rule, codecs = rule_of(tx), {name: codec for name, codec in tx.update.spec.codecs}  # noqa: C416
    masters = isinstance(write, Masters)
    p = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16 if masters else jnp.float32)
    low = jnp.zeros(shape, f"int{write.bits}") if masters else None
    stored = {name: store(codec, jnp.full(shape, rule.slots[name].initial)) for name, codec in codecs.items()}
    weights = [Weight(jnp.zeros(()), jnp.zeros(()))] * rule.weights
    # Updates that land on a master end where its last bit does, which has to be the same in every way.
    jit = full_jit if masters and not write.parameters else jax.jit
    run = jit(functools.partial(one_step, Step(codecs, write, Form(layout(shape))), rule, ways))
    found = []
    for t in range(2):
        done, weights = run(jnp.int32(t), weights, (p, low, stored))
        found.append(done)
        stored, low = done[0].stored, done[0].low
        p = done[0].result if write.parameters else p
    return found


def check(found: Any, what: str) -> None:
    """All ways gave what the first gave; a product contracted with a sum may move one code in ten thousand."""
    for first, *others in found:
        for other in others:
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                if jnp.issubdtype(a.dtype, jnp.floating):
                    wide, other_wide = (np.asarray(x, np.float32) for x in (a, b))
                    np.testing.assert_allclose(other_wide, wide, rtol=2e-2 if a.dtype == jnp.bfloat16 else 1e-5,
                                               atol=1e-6, err_msg=what)  # fmt: skip
                else:  # The last bit of a master is one of float32.
                    near, most = (2, 1e-2) if a is first.low else (0, 1e-3)
                    assert (np.abs(np.asarray(a, int) - np.asarray(b, int)) > near).mean() < most, what
        assert any(np.ptp(np.asarray(x, np.float32)) > 0 for x in jax.tree.leaves(first.stored))


def ways_of(monkeypatch: pytest.MonkeyPatch, tx: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> set[str]:
    """Which ways are offered to the platforms."""
    found: set[str] = set()

    def record(*args: Any, **ways: Any) -> Any:
        for platform, way in ways.items():
            inner: Any = way
            while not hasattr(inner, "__name__"):  # Partial, or inside of a custom derivative.
                inner = inner.func if isinstance(inner, functools.partial) else inner.fun
            found.add(f"{platform}: {inner.__name__}")
        return ways["default"](*args)

    monkeypatch.setattr(run.jax.lax, "platform_dependent", record)
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(run, "alone", lambda: True)
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    jax.clear_caches()
    jax.eval_shape(tx.update, leaf, jax.eval_shape(tx.init, leaf), leaf)
    return found
