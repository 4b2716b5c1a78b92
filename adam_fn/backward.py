"""The step inside the backward pass: a model of stacked layers whose gradients never exist all at once.

::

    step = adam_fn.backward.value_and_step(tx, embed, layer, head, layers="layers")
    step = jax.jit(step, donate_argnums=(0, 1))
    loss, params, state = step(params, state, batch)

The gradient of a layer is used as soon as it is computed: the layer and its part of the state are stepped, and the
gradient is gone before the layer below begins. So a step needs the memory of the parameters, of the state, of the
layers' inputs, of a single layer's gradient, and of the gradients of the parameters outside the layers. The results are
those of `jax.value_and_grad` followed by `adam_fn.make_step`: a run can change from one to the other at any step.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.execute.sources import dependencies
from adam_fn.trees.functions import owner_of
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.stack import Stack, Undivided
from adam_fn.wrappers.base import COUNT, check_state, step_parameters
from adam_fn.wrappers.clip import check_norm
from adam_fn.wrappers.guard import GuardState, SkipNonfinite, decided
from adam_fn.wrappers.layered_model import Embed, Head, Layer, Model
from adam_fn.wrappers.layers import Run, clipping


def value_and_step(
    tx: optax.GradientTransformation,
    embed: Embed,
    layer: Layer,
    head: Head,
    *,
    layers: str = "layers",
    has_aux: bool = False,
    microbatches: int = 1,
    keep_every: int = 1,
    max_norm: ArrayLike | None = None,
    clip: Literal["model", "layer"] = "model",
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """``step(params, state, batch) -> (loss, params, state)``, with each layer stepped during the backward pass.

    The layers follow each other between `embed` and `head`. Their parameters are stacked along a first axis, as those
    of `jax.lax.scan`, of `flax.nnx.scan`, of `flax.linen.scan` and of layers that were made by a `vmap`. `embed` and
    `head` see all other parameters, with None in the place of the layers' arrays; a parameter that both use (tied
    embeddings) gets the sum of both gradients.

    `tx` is called once per layer, with None for all other parameters, and at the end once for the parameters outside
    the layers. So every update must depend on the gradient of its own leaf alone; where it depends on another leaf's,
    that is a ValueError. Norms and means of a leaf (`lamb`, `cautious`) are those of one layer's part of it. A mask
    that is a function sees leaves whose first axis has length 1. What needs all gradients at once is done here, by a
    backward pass before the one that steps: clipping, by `max_norm`, and `adam_fn.skip_nonfinite` as the outermost
    wrapper.

    Args:
      tx: the optimizer; its state is that of ``tx.init(params)``.
      embed: the model before the layers.
      layer: one layer. For numbers that differ between layers, such as the index, put an integer array among the
        layers' parameters: it is not trained.
      head: the model after the layers, which returns the loss, a scalar.
      layers: the path of the stacked parameters (see `adam_fn.masks.path`).
      has_aux: whether `head` returns ``(loss, aux)``; then `step` returns both in the place of the loss.
      microbatches: the number of equal parts in which the batch, an array or tree of arrays with the examples first,
        is computed one after the other. The loss is their mean, and aux has a first axis for them. Their gradients are
        added in the dtype of the parameters.
      keep_every: 1 keeps the input of each layer for the backward pass; k keeps that of each k-th one, and computes the
        others again from it, k of them at a time.
      max_norm: clips the gradients of all parameters by their global norm, exactly, as
        ``optax.clip_by_global_norm(max_norm)`` before `tx` would.
      clip: ``"layer"`` clips the gradients of each layer by their own norm, and those of all other parameters by
        theirs: there is no second backward pass.

    Raises:
      ValueError: if `layers` names no parameters, if they have first axes of different length, if `keep_every` does not
        divide that, or if an update of `tx` depends on the gradients of other leaves; while tracing.
    """
    if keep_every < 1 or microbatches < 1:
        raise ValueError(f"keep_every and microbatches must be at least 1, got {keep_every} and {microbatches}")
    if max_norm is not None:
        check_norm(max_norm)
    if clip not in ("model", "layer"):
        raise ValueError(f'clip must be "model" or "layer", got {clip!r}')
    model = Model(embed, layer, head, has_aux)
    if microbatches > 1:
        model = model.in_parts(microbatches)

    def step(params: PyTree, state: PyTree, batch: PyTree, **extra_args: PyTree) -> tuple[Any, PyTree, PyTree]:
        guard = owner_of(tx)
        guard = guard if isinstance(guard, SkipNonfinite) else None
        inner = guard.tx if guard else tx
        placement = owner_of(inner) if hasattr(owner_of(inner), "read") else Undivided(inner)
        inner = placement.tx
        if hasattr(owner_of(inner), "state_shardings"):
            raise ValueError("offload fetches the whole state: value_and_step takes what it wraps")
        if guard:
            check_state(state, GuardState, "skip_nonfinite", skipped=COUNT, consecutive=COUNT)
        stack = Stack(
            inner,
            params,
            state.inner if guard else state,
            layers,
            keep_every,
            lambda part: jax.eval_shape(placement.part(part).init, part),
        )
        _check_separate(inner, stack, params, extra_args)
        run = Run(placement, model, stack, batch, extra_args)
        ends = run.ends()
        layer_norm, model_norm = (max_norm, None) if clip == "layer" else (None, max_norm)
        if guard is None and model_norm is None:
            return ends.value, *run.step(ends, layer_norm=layer_norm)
        total, finite = run.norm(ends)
        scale = None if model_norm is None else clipping(total, model_norm)
        if guard is None:
            return ends.value, *run.step(ends, scale)
        made, outer = decided(guard.max_consecutive, finite, state)
        new, after = run.step(ends, scale, made, layer_norm)
        return ends.value, new, outer._replace(inner=after)

    return step


def _check_separate(
    tx: optax.GradientTransformation, stack: Stack, params: PyTree, extra_args: Mapping[str, PyTree]
) -> None:
    """Raises if an update, or a part of the state, depends on gradients of other leaves."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    state = jax.eval_shape(tx.init, shapes)
    closed = jax.make_jaxpr(lambda g, s, p: step_parameters(tx, g, s, p, **extra_args))(shapes, state, shapes)
    there = [i for i, p in enumerate(stack.leaves.leaves) if p is not None]
    results = [(i, f"the step of {stack.leaves.paths[i]}") for i in there]
    results += [
        (-1 if k in stack.fixed else owner, f"the state's {name}")
        for k, (owner, name) in enumerate(zip(stack.owners, stack.names, strict=True))
    ]
    for (owner, name), needed in zip(results, dependencies(closed.jaxpr), strict=True):
        others = [stack.leaves.paths[there[n]] for n in sorted(needed) if n < len(there) and there[n] != owner]
        if others:
            raise ValueError(
                f"{name} depends on the gradients of {', '.join(others[:3])}, which exist only after the "
                "backward pass. For clipping by the global norm, give value_and_step max_norm; for skip_nonfinite, "
                "make it the outermost wrapper; swats and apply_if_finite cannot be used"
            )
