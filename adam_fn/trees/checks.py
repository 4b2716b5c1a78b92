"""Checks that a leaf's gradient, parameter and state belong together."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_fn.algebra.dtypes import as_real, compute_dtype
from adam_fn.algebra.slots import Slots
from adam_fn.execute.body import encode, lattice_of
from adam_fn.storage.codec import Codec, Stored


def form_of_array(x: jax.Array | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    return x.shape, x.dtype


@functools.cache
def expected_forms(
    codecs: tuple[tuple[str, Codec], ...], shape: tuple[int, ...], dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shapes and dtypes of the stored arrays of a parameter."""
    if not codecs:
        return {}
    real = jax.eval_shape(as_real, jax.ShapeDtypeStruct(shape, dtype))
    slot = jax.ShapeDtypeStruct(real.shape, compute_dtype(dtype))
    slots = [name for _, codec in codecs for name in codec.slots]
    time = jax.ShapeDtypeStruct((), jnp.int32)

    def stored(slots: Slots, times: Slots) -> dict[str, jax.Array]:
        return encode(dict(codecs), slots, lattice_of(next(iter(slots.values()))), times)

    kept = jax.eval_shape(stored, dict.fromkeys(slots, slot), dict.fromkeys(slots, time))
    return {name: form_of_array(x) for name, x in kept.items()}


def check_leaf(path: str, g: object, p: object, stored: Stored, codecs: Mapping[str, Codec]) -> None:
    """Raises if a trained leaf's gradient, parameter and state do not belong together."""
    if g is None:
        raise ValueError(f"the gradient of {path} is None, but the parameter is trained; to freeze it, use frozen=")
    gradient, parameter = jax.typeof(g), jax.typeof(p)
    if gradient.shape != parameter.shape:
        raise ValueError(f"the gradient of {path} has shape {gradient.shape}, its parameter {parameter.shape}")
    if gradient.dtype != parameter.dtype:
        for kind in (jnp.floating, jnp.complexfloating):
            if jnp.issubdtype(gradient.dtype, kind) != jnp.issubdtype(parameter.dtype, kind):
                raise ValueError(f"the gradient of {path} is {gradient.dtype}, its parameter {parameter.dtype}")
    expected = expected_forms(tuple(codecs.items()), parameter.shape, parameter.dtype)
    for name, x in stored.items():
        if not isinstance(x, optax.MaskedNode) and form_of_array(x) != expected[name]:
            found, wanted = (f"{dtype}{list(shape)}" for shape, dtype in (form_of_array(x), expected[name]))
            raise ValueError(
                f"the state's {name} of {path} is {found}, expected {wanted} ({codecs[name]}): was the state made by "
                "this transformation from these parameters? adam_fn.interop.from_optax converts a state of optax, and "
                "adam_fn.interop.change_storage converts one that was made with another storage"
            )
        check_present(name, x, path)


def check_present(what: str, x: object, path: str) -> None:
    """Raises if a state has nothing in the place of an array of a trained leaf."""
    if isinstance(x, optax.MaskedNode):
        raise ValueError(
            f"the state has no {what} of {path}, which is trained: was it frozen when the state was made? "
            "adam_fn.surgery.adapt(tx, state, params, params) adds it"
        )


def check_untrained(path: str, p: object, stored: Stored) -> None:
    """Raises if the state has moments of a leaf that is not trained: a step would drop them."""
    if p is not None and not all(isinstance(x, optax.MaskedNode) for x in stored.values()):
        raise ValueError(
            f"the state has moments of {path}, which is not trained (it is frozen, or not a floating array): "
            "adam_fn.interop.change_storage drops them, or from_optax those of a state of optax"
        )


def no_update(g: ArrayLike | None, p: ArrayLike) -> jax.Array | None:
    """The update of a leaf that is not trained: zeros that can be added to it."""
    if g is None:
        return None
    # float0 is what JAX gives as the gradient of an integer; nothing can be added to it, so it becomes False.
    dtype = next((x.dtype for x in map(jax.typeof, (g, p)) if x.dtype != jax.dtypes.float0), jnp.dtype(bool))
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # The keys of random streams.
        return None
    return jnp.zeros(jnp.shape(p), dtype)
