"""A step of a model of stacked layers, taken while the gradients are computed; see `adam_fn.backward`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_fn.algebra.norms import norm, reals
from adam_fn.execute.compiler import opaque, run_at_most_once
from adam_fn.execute.sources import dependencies
from adam_fn.trees.leaves import PyTree
from adam_fn.trees.stack import Stack
from adam_fn.wrappers.base import step_parameters
from adam_fn.wrappers.layered_model import Model

# Unsigned indices cannot be negative: then XLA knows that the slice read and the slice written are the same memory.


def _take(x: jax.Array, i: ArrayLike, axis: int = 0) -> jax.Array:
    starts = [jnp.uint32(0)] * x.ndim
    starts[axis] = jnp.asarray(i).astype(jnp.uint32)
    return jax.lax.dynamic_slice(x, starts, (*x.shape[:axis], 1, *x.shape[axis + 1 :]))


def _put(x: jax.Array, part: jax.Array, i: ArrayLike, axis: int = 0) -> jax.Array:
    starts = [jnp.uint32(0)] * x.ndim
    starts[axis] = jnp.asarray(i).astype(jnp.uint32)
    return jax.lax.dynamic_update_slice(x, part, starts)


def _sum(x: Any, y: Any) -> Any:  # noqa: ANN401
    return x if x.dtype == jax.dtypes.float0 else x + y


def _scaled(g: Any, scale: jax.Array | None) -> Any:  # noqa: ANN401
    return g if scale is None or g.dtype == jax.dtypes.float0 else (g * scale).astype(g.dtype)


def clipping(total: jax.Array, max_norm: ArrayLike) -> jax.Array:
    """The factor that makes a norm at most `max_norm`."""
    limit = jnp.asarray(max_norm, total.dtype)
    return jnp.where(total <= limit, 1, limit / jnp.where(total == 0, 1, total))


def _measured(grads: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """The norm of some gradients, and whether all are finite; those of integers do not count."""
    arrays = jax.tree.leaves(reals([g for g in grads if g.dtype != jax.dtypes.float0]))
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in arrays], jnp.asarray(True))
    return norm(arrays), finite


class Ends(NamedTuple):
    """The results of the forward pass and of the head's backward pass.

    Attributes:
      value: the loss, or loss and aux.
      inside: the parameters of the layers.
      outside: the other parameters.
      kept: the inputs of the layers, or of each k-th.
      dh: the gradient of the head's input.
      finish: from the gradient of `embed`'s output, computes the gradients of the other parameters.
    """

    value: Any
    inside: list[jax.Array]
    outside: list[jax.Array]
    kept: PyTree
    dh: PyTree
    finish: Callable[[PyTree], list[Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A step of a model.

    Attributes:
      placement: an `Undivided`, or a `Zero1`.
    """

    placement: Any
    model: Model
    stack: Stack
    batch: PyTree
    extra_args: dict[str, Any]

    def _layer(self, slices: Sequence[jax.Array], h: PyTree) -> PyTree:
        return self.model.layer(self.stack.layer(slices), h, self.batch)

    @functools.cached_property
    def _of_layer(self) -> Any:  # noqa: ANN401
        """The placement of one layer."""
        return self.placement.part(self.stack.one)

    def _read(self, slices: Sequence[jax.Array], *, vary: bool = False) -> list[Any]:
        """The parameters of a layer as the model reads them."""
        return self.stack.split(self._of_layer.read(self.stack.tree(slices, None), vary=vary))[0]

    def _entered(self, g: Sequence[Any], slices: Sequence[jax.Array]) -> tuple[list[Any], list[Any]]:
        """The gradients and parameters of a layer as its step gets them."""
        stack = self.stack
        g, slices = self._of_layer.enter(stack.tree(g, None), stack.tree(slices, None))
        return stack.split(g)[0], stack.split(slices)[0]

    def _left(self, new: Sequence[Any]) -> list[Any]:
        """The results of a layer's step as they are put into the stack."""
        return self.stack.split(self._of_layer.leave(self.stack.tree(new, None)))[0]

    def _forward(self, params: Sequence[jax.Array], h: PyTree, start: ArrayLike, number: int) -> tuple[PyTree, PyTree]:
        """The outputs of `number` layers from `start` on, and their inputs."""

        def one(h: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
            return self._layer(self._read([_take(p, i) for p in params]), h), h

        return jax.lax.scan(one, h, jnp.add(start, jnp.arange(number)))

    def ends(self) -> "Ends":
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

        return Ends(value, inside, outside, kept, dh, finish)

    def norm(self, ends: "Ends") -> tuple[jax.Array, jax.Array]:
        """The global norm of all gradients, and whether all of them are finite."""

        def use(carry: Any, i: jax.Array, slices: list[Any], grads: list[Any]) -> Any:  # noqa: ANN401
            own, finite = _measured(grads)
            return carry[0].at[i].set(own), carry[1] & finite

        carry = jnp.zeros(self.stack.length), jnp.asarray(True)
        (norms, inside), dh = self._backward(carry, ends, lambda _: ends.inside, use)
        outside, finite = _measured(ends.finish(dh))
        return norm([norms, jnp.reshape(outside, 1)]), inside & finite

    def step(
        self,
        ends: "Ends",
        scale: jax.Array | None = None,
        made: jax.Array | None = None,
        layer_norm: ArrayLike | None = None,
    ) -> tuple[PyTree, PyTree]:
        """The new parameters and the new state; the old ones where `made` is false.

        Gradients are multiplied by `scale`, or clipped layer by layer to `layer_norm`.
        """
        stack, tx = self.stack, self.placement.tx
        shared, of_layers = [*stack.shared, *stack.fixed], stack.of_layers
        of_rest = self.placement.part(stack.rest)

        def scaled(grads: list[Any]) -> list[Any]:
            by = scale if layer_norm is None else clipping(_measured(grads)[0], layer_norm)
            return [_scaled(g, by) for g in grads]

        def stepped(
            placement: Any,  # noqa: ANN401
            grads: PyTree,
            params: PyTree,
            given: dict[int, jax.Array],
            **more: Any,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            """Steps some parameters. `given` maps indices of state leaves to arrays, and so does the second result."""
            numbers = sorted(given)
            state = jax.tree.structure(jax.eval_shape(tx.init, params)).unflatten([given[k] for k in numbers])
            step = functools.partial(step_parameters, tx)
            new, after = placement.run(step, grads, params, state, **self.extra_args, **more)
            if made is not None:
                new, after = jax.tree.map(functools.partial(jnp.where, made), (new, after), (params, state))
            return new, dict(zip(numbers, jax.tree.leaves(after), strict=True))

        def again(i: jax.Array, g: list[Any], slices: list[Any], parts: dict[int, jax.Array]) -> Any:  # noqa: ANN401
            given = parts | {k: stack.state[k] for k in shared}
            layer = {"layer": i} if stack.length > 1 else {}
            new, after = stepped(self._of_layer, stack.tree(g, None), stack.tree(slices, None), given, **layer)
            return stack.split(new)[0], {k: after[k] for k in of_layers}

        def taken(arrays: dict[int, jax.Array], i: jax.Array) -> dict[int, jax.Array]:
            return {k: _take(arrays[k], i, stack.axis(k)) for k in of_layers}

        def in_turn(
            params: list[Any], arrays: dict[int, jax.Array], i: jax.Array, g: list[Any], slices: list[Any]
        ) -> Any:  # noqa: ANN401
            """One array after the other, each computed anew.

            XLA for GPUs writes each into its stack by a kernel of its own, and otherwise would store what they share.
            """
            new = self._left(again(i, g, slices, taken(arrays, i))[0])
            params = [_put(x, part, i) for x, part in zip(params, new, strict=True)]
            after, last = dict[int, jax.Array](), params
            for k in of_layers:
                i, g, last = opaque((i, g, last))
                slices, last = opaque((slices, last)) if reads_parameters else (slices, last)
                after[k] = last = _put(arrays[k], again(i, g, slices, taken(arrays, i))[1][k], i, stack.axis(k))
            return params, after

        def at_once(
            params: list[Any], arrays: dict[int, jax.Array], i: jax.Array, g: list[Any], slices: list[Any]
        ) -> Any:  # noqa: ANN401
            """All arrays, in a loop that runs once.

            XLA for CPUs copies a stack unless it sees that a part is written after all that reads it.
            """

            def step(both: tuple[list[Any], dict[int, jax.Array]]) -> tuple[list[Any], dict[int, jax.Array]]:
                return again(i, g, both[0], both[1])

            new, after = run_at_most_once(i | 1 != 0, step, (slices, taken(arrays, i)))
            params = [_put(x, part, i) for x, part in zip(params, self._left(new), strict=True)]
            return params, {k: _put(arrays[k], after[k], i, stack.axis(k)) for k in of_layers}

        def new_state(slices: list[Any], parts: dict[int, jax.Array], g: list[Any]) -> list[jax.Array]:
            return list(again(jnp.int32(0), g, slices, parts)[1].values())

        # Parameters are written first: their old slices are kept where the step of the state reads them.
        parts = {k: stack.state[k] for k in of_layers}
        slices = [_take(p, 0) for p in ends.inside]
        one = jax.eval_shape(lambda: (self._entered(slices, slices)[1], taken(parts, jnp.int32(0))))
        needed = dependencies(jax.make_jaxpr(new_state)(*one, one[0]).jaxpr)
        reads_parameters = any(n < len(ends.inside) for own in needed for n in own)

        def use(carry: Any, i: jax.Array, slices: list[Any], grads: list[Any]) -> Any:  # noqa: ANN401
            own = self._entered(scaled(grads), slices)
            params, arrays = jax.lax.platform_dependent(*carry, i, *own, cpu=at_once, default=in_turn)
            params, arrays = self.placement.settle(stack.tree(params, None), arrays)
            return stack.split(params)[0], arrays

        carry = ends.inside, {k: stack.state[k] for k in of_layers}
        (inside, arrays), dh = self._backward(carry, ends, lambda carry: carry[0], use, vary=layer_norm is None)
        g, rest = of_rest.enter(stack.tree(None, scaled(ends.finish(dh))), stack.tree(None, ends.outside))
        new, after = stepped(of_rest, g, rest, {k: stack.state[k] for k in (*stack.shared, *stack.others)})
        new = of_rest.leave(new)
        state = {**arrays, **after, **{k: stack.state[k] for k in stack.fixed}}
        params, state = self.placement.settle(stack.tree(inside, stack.split(new)[1]), state)
        return params, stack.treedef.unflatten([state[k] for k in sorted(state)])

    def _backward(
        self,
        carry: Any,  # noqa: ANN401
        ends: "Ends",
        params_of: Callable[[Any], Sequence[jax.Array]],
        use: Callable[[Any, jax.Array, list[Any], list[Any]], Any],
        *,
        vary: bool = False,
    ) -> tuple[Any, PyTree]:
        """Runs the backward pass. For each layer, from the last on, ``carry = use(carry, index, params, grads)``.

        With `vary`, `use` may get gradients that are not summed over the devices of a `shard_map`.
        """
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
                slices = self._read([_take(p, i) for p in params_of(carry)])
                _, pull = jax.vjp(self._layer, self._read(slices, vary=vary), own)
                grads, dh = pull(dh)
                return use(carry, i, slices, grads), dh

            return one(jnp.int32(0), both) if every == 1 else jax.lax.fori_loop(0, every, one, both)

        return jax.lax.fori_loop(0, length // every, group, (carry, ends.dh))
