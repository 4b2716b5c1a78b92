"""The step inside the backward pass: a model of stacked layers whose gradients never exist all at once.

::

    step = adam_fn.backward.value_and_step(tx, embed, layer, head, layers="layers")
    step = jax.jit(step, donate_argnums=(0, 1))
    loss, params, state = step(params, state, batch)

The gradient of a layer is used as soon as it is computed: the layer and its part of the state are stepped, and the
gradient is gone before the layer below begins. So a step needs the memory of the parameters, of the state, of the
layers' inputs, and of a single layer's gradient. The parameters, the state and the result are those of
`jax.value_and_grad` followed by `adam_fn.make_step`: a run can change from one to the other at any step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.norms import norm, reals
from adam_fn.execute.sources import dependencies
from adam_fn.trees.functions import owner_of
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.stack import Stack
from adam_fn.wrappers.base import step_parameters
from adam_fn.wrappers.guard import SkipNonfinite, decided

#: ``embed(params, batch) -> h``
Embed: TypeAlias = Callable[[PyTree, PyTree], PyTree]
#: ``layer(layer_params, h, batch) -> h``
Layer: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]
#: ``head(params, h, batch) -> loss``
Head: TypeAlias = Callable[[PyTree, PyTree, PyTree], Any]


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
) -> Callable[..., tuple[Any, PyTree, PyTree]]:
    """``step(params, state, batch) -> (loss, params, state)``, with each layer stepped during the backward pass.

    The loss is ``head(params, layer(pₙ, … layer(p₁, embed(params, batch), batch) …, batch), batch)``. The parameters of
    the layers are stacked along a first axis, as those of `jax.lax.scan`, of `flax.nnx.scan`, of `flax.linen.scan` and
    of layers that were made by a `vmap`. `embed` and `head` see all other parameters, with None in the place of the
    layers' arrays; a parameter that both use (tied embeddings) gets the sum of both gradients.

    `tx` is called for one layer after the other, with the other parameters left out, and then for those. So every
    update must depend on the gradient of its own leaf alone; anything else is a ValueError. Norms of a leaf (`lamb`,
    `cautious`) are then norms of one layer's part of it. A mask that is a function sees leaves whose first axis has
    length 1. What needs all gradients at once is done here, by a backward pass before the one that steps: clipping, by
    `max_norm`, and `adam_fn.skip_nonfinite` as the outermost wrapper.

    Args:
      tx: the optimizer; its state is that of ``tx.init(params)``.
      embed: the model before the layers.
      layer: one layer. For numbers that differ between layers, such as the index, put an integer array among the
        layers' parameters: it is not trained.
      head: the model after the layers, which returns the loss, a scalar.
      layers: the path of the stacked parameters (see `adam_fn.masks.path`).
      has_aux: whether `head` returns ``(loss, aux)``; then `step` returns both in the place of the loss.
      microbatches: the number of equal parts in which the batch, an array or tree of arrays with the examples first,
        is computed one after the other. The loss is their mean, and aux has a first axis for them.
      keep_every: 1 keeps the input of each layer for the backward pass; k keeps that of each k-th one, and computes the
        others again from it, k of them at a time.
      max_norm: clips the gradients of all parameters by their global norm, exactly, as
        ``optax.clip_by_global_norm(max_norm)`` before `tx` would.

    Raises:
      ValueError: if `layers` names no parameters, if they have first axes of different length, if `keep_every` does not
        divide that, or if an update of `tx` depends on the gradients of other leaves; while tracing.
    """
    if keep_every < 1 or microbatches < 1:
        raise ValueError(f"keep_every and microbatches must be at least 1, got {keep_every} and {microbatches}")
    model = _Model(embed, layer, head, has_aux)
    if microbatches > 1:
        model = model.in_parts(microbatches)

    def step(params: PyTree, state: PyTree, batch: PyTree, **extra_args: PyTree) -> tuple[Any, PyTree, PyTree]:
        guard = owner_of(tx)
        guard = guard if isinstance(guard, SkipNonfinite) else None
        inner = guard.tx if guard else tx
        stack = Stack(inner, params, state.inner if guard else state, layers, keep_every)
        _check_separate(inner, stack, params)
        run = _Run(inner, model, stack, batch, extra_args)
        ends = run.ends()
        if guard is None and max_norm is None:
            return ends.value, *run.step(ends, None, None)
        total, scale = run.norm(ends), None
        if max_norm is not None:
            limit = jnp.asarray(max_norm, total.dtype)
            scale = jnp.where(total <= limit, 1, limit / jnp.where(total == 0, 1, total))
        if guard is None:
            return ends.value, *run.step(ends, scale, None)
        made, outer = decided(guard.max_consecutive, jnp.isfinite(total), state)
        new, after = run.step(ends, scale, made)
        return ends.value, new, outer._replace(inner=after)

    return step


def _check_separate(tx: optax.GradientTransformation, stack: Stack, params: PyTree) -> None:
    """Raises if an update depends on gradients of other leaves."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    state = stack.treedef.unflatten(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in stack.state)
    closed = jax.make_jaxpr(lambda g, s, p: step_parameters(tx, g, s, p)[0])(shapes, state, shapes)
    names = [name for name, p in zip(stack.leaves.paths, stack.leaves.leaves, strict=True) if p is not None]
    for name, needed in zip(names, dependencies(closed.jaxpr), strict=True):
        others = [other for i, other in enumerate(names) if i in needed and other != name]
        if others:
            raise ValueError(
                f"the step of {name} depends on the gradients of {', '.join(others[:3])}, which exist only after "
                "the backward pass. For clipping by the global norm, give value_and_step max_norm; for "
                "skip_nonfinite, make it the outermost wrapper; swats and apply_if_finite cannot be used"
            )


@dataclasses.dataclass(frozen=True)
class _Model:
    """The three parts of a model."""

    embed: Embed
    layer: Layer
    head: Head
    has_aux: bool

    def in_parts(self, number: int) -> "_Model":
        """The same for a batch in parts, one after the other; between the layers every array has an axis of parts."""

        def split(batch: PyTree) -> PyTree:
            def parts(x: jax.Array) -> jax.Array:
                if jnp.ndim(x) == 0 or x.shape[0] % number:
                    raise ValueError(f"{number} microbatches do not divide a batch of shape {jnp.shape(x)}")
                return x.reshape(number, x.shape[0] // number, *x.shape[1:])

            return jax.tree.map(parts, batch)

        def each(function: Callable[..., Any], *xs: PyTree) -> PyTree:
            return jax.lax.map(lambda x: jax.checkpoint(function)(*x), xs)

        def head(params: PyTree, h: PyTree, batch: PyTree) -> Any:  # noqa: ANN401
            found = each(functools.partial(self.head, params), h, split(batch))
            return (found[0].mean(), found[1]) if self.has_aux else found.mean()

        return _Model(
            lambda params, batch: each(functools.partial(self.embed, params), split(batch)),
            lambda params, h, batch: each(functools.partial(self.layer, params), h, split(batch)),
            head,
            self.has_aux,
        )


def _take(x: jax.Array, i: ArrayLike, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=True)


def _put(x: jax.Array, part: jax.Array, i: ArrayLike, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i, axis)


def _sum(x: Any, y: Any) -> Any:  # noqa: ANN401
    return x if x.dtype == jax.dtypes.float0 else x + y


def _trained(grads: Sequence[Any]) -> list[Any]:
    return [g for g in grads if g.dtype != jax.dtypes.float0]


def _scaled(g: Any, scale: jax.Array | None) -> Any:  # noqa: ANN401
    return g if scale is None or g.dtype == jax.dtypes.float0 else (g * scale).astype(g.dtype)


class _Ends(NamedTuple):
    """What is known before the way back through the layers begins.

    Attributes:
      value: the loss, or loss and aux.
      inside: the parameters of the layers.
      outside: the other parameters.
      kept: the inputs of the layers, or of each k-th.
      dh: the gradient of what the head was given.
      finish: the gradients of the other parameters, from that of what `embed` returned.
    """

    value: Any
    inside: list[jax.Array]
    outside: list[jax.Array]
    kept: PyTree
    dh: PyTree
    finish: Callable[[PyTree], list[Any]]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A step of a model."""

    tx: optax.GradientTransformation
    model: _Model
    stack: Stack
    batch: PyTree
    extra_args: dict[str, Any]

    def _layer(self, slices: Sequence[jax.Array], h: PyTree) -> PyTree:
        return self.model.layer(self.stack.layer(slices), h, self.batch)

    def _forward(self, params: Sequence[jax.Array], h: PyTree, start: ArrayLike, number: int) -> tuple[PyTree, PyTree]:
        """The outputs of `number` layers from `start` on, and their inputs."""

        def one(h: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
            return self._layer([_take(p, i) for p in params], h), h

        return jax.lax.scan(one, h, jnp.add(start, jnp.arange(number)))

    def ends(self) -> "_Ends":
        """Goes forward, and back through the head."""
        stack, model = self.stack, self.model
        inside, outside = stack.split(stack.leaves.treedef.unflatten(stack.leaves.leaves))

        def embed(outside: list[Any]) -> PyTree:
            return model.embed(stack.tree(None, outside), self.batch)

        def group(h: PyTree, start: jax.Array) -> tuple[PyTree, PyTree]:
            return self._forward(inside, h, start, stack.every)[0], h

        def head(outside: list[Any], h: PyTree) -> Any:  # noqa: ANN401
            return model.head(stack.tree(None, outside), h, self.batch)

        h, pull = jax.vjp(embed, outside)
        h, kept = jax.lax.scan(group, h, jnp.arange(0, stack.length, stack.every))
        grad = jax.value_and_grad(head, (0, 1), has_aux=model.has_aux, allow_int=True)
        value, (grads, dh) = grad(outside, h)

        def finish(dh: PyTree) -> list[Any]:
            return [_sum(x, y) for x, y in zip(grads, pull(dh)[0], strict=True)]

        return _Ends(value, inside, outside, kept, dh, finish)

    def norm(self, ends: "_Ends") -> jax.Array:
        """The global norm of all gradients."""

        def use(norms: jax.Array, i: jax.Array, slices: list[Any], grads: list[Any]) -> jax.Array:
            return norms.at[i].set(norm(jax.tree.leaves(reals(_trained(grads)))))

        norms, dh = self._backward(jnp.zeros(self.stack.length), ends, lambda _: ends.inside, use)
        outside = norm(jax.tree.leaves(reals(_trained(ends.finish(dh)))))
        return norm([norms, jnp.reshape(outside, 1)])

    def step(self, ends: "_Ends", scale: jax.Array | None, made: jax.Array | None) -> tuple[PyTree, PyTree]:
        """The new parameters and the new state; the old ones where `made` is false."""
        stack = self.stack
        shared, of_layers, others = stack.numbers()

        def stepped(grads: PyTree, params: PyTree, given: dict[int, jax.Array], **more: Any) -> Any:  # noqa: ANN401
            """A step of some parameters, with arrays of the state by their numbers; they keep their order in it."""
            numbers = sorted(given)
            state = jax.tree.structure(jax.eval_shape(self.tx.init, params)).unflatten([given[k] for k in numbers])
            new, after = step_parameters(self.tx, grads, state, params, **self.extra_args, **more)
            if made is not None:
                new, after = jax.tree.map(functools.partial(jnp.where, made), (new, after), (params, state))
            return new, dict(zip(numbers, jax.tree.leaves(after), strict=True))

        def use(carry: Any, i: jax.Array, slices: list[Any], grads: list[Any]) -> Any:  # noqa: ANN401
            params, arrays = carry
            given = {k: stack.state[k] for k in shared} | {k: _take(arrays[k], i, stack.axis(k)) for k in of_layers}
            g = stack.tree([_scaled(x, scale) for x in grads], None)
            layer = {"layer": i} if stack.length > 1 else {}
            new, after = stepped(g, stack.tree(slices, None), given, **layer)
            params = [_put(x, part, i) for x, part in zip(params, stack.split(new)[0], strict=True)]
            return params, {k: _put(arrays[k], after[k], i, stack.axis(k)) for k in of_layers}

        carry = ends.inside, {k: stack.state[k] for k in of_layers}
        (inside, arrays), dh = self._backward(carry, ends, lambda carry: carry[0], use)
        outside = stack.tree(None, [_scaled(g, scale) for g in ends.finish(dh)])
        given = {k: stack.state[k] for k in (*shared, *others)}
        new, after = stepped(outside, stack.tree(None, ends.outside), given)
        state = {**arrays, **after}
        return stack.tree(inside, stack.split(new)[1]), stack.treedef.unflatten([state[k] for k in sorted(state)])

    def _backward(
        self,
        carry: Any,  # noqa: ANN401
        ends: "_Ends",
        params_of: Callable[[Any], Sequence[jax.Array]],
        use: Callable[[Any, jax.Array, list[Any], list[Any]], Any],
    ) -> tuple[Any, PyTree]:
        """Goes back through the layers: `use` makes a new carry of a layer's index, parameters and gradients."""
        every, length = self.stack.every, self.stack.length

        def group(k: jax.Array, both: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
            start = length - (k + 1) * every
            h = jax.tree.map(lambda x: jnp.reshape(_take(x, start // every), x.shape[1:]), ends.kept)
            inputs = self._forward(params_of(both[0]), h, start, every)[1] if every > 1 else None

            def one(j: jax.Array, both: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
                carry, dh = both
                i = start + every - 1 - j
                own = (
                    h
                    if inputs is None
                    else jax.tree.map(lambda x: jnp.reshape(_take(x, i - start), x.shape[1:]), inputs)
                )
                slices = [_take(p, i) for p in params_of(carry)]
                _, pull = jax.vjp(self._layer, slices, own)
                grads, dh = pull(dh)
                return use(carry, i, slices, grads), dh

            return one(jnp.int32(0), both) if every == 1 else jax.lax.fori_loop(0, every, one, both)

        return jax.lax.fori_loop(0, length // every, group, (carry, ends.dh))
