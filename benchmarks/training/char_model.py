"""A character transformer of a million parameters on tinyshakespeare, as plain functions on a dict of arrays.

Decoder-only (arXiv 1706.03762) with pre-norm blocks (arXiv 2002.04745), learned positions, a GELU MLP of four times the
width and an untied head, without biases. The parameters may be bfloat16: the arithmetic is float32, so what differs is
their storage and, because a gradient has its parameter's dtype, the rounding of the gradients.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import optax
from measure import workloads

BATCH = 8
RATE = 4e-3  # The best of 1e-3, 2e-3, 4e-3 and 8e-3 for float32 and the seed 0.

Params: typing.TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the transformer."""

    vocabulary: int = 65
    width: int = 128
    blocks: int = 5
    heads: int = 4
    context: int = 128

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Matrices are [inputs, outputs], but the embeddings and the head [entries, width]."""
        width = self.width
        found: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, width), "positions": (self.context, width)}
        for block in range(self.blocks):
            found |= {
                f"block{block}.norm1": (width,),
                f"block{block}.qkv": (width, 3 * width),
                f"block{block}.out": (width, width),
                f"block{block}.norm2": (width,),
                f"block{block}.up": (width, 4 * width),
                f"block{block}.down": (4 * width, width),
            }
        return found | {"norm": (width,), "head": (self.vocabulary, width)}

    @property
    def parameters(self) -> int:
        return workloads.size(self.shapes())

    def init(self, seed: int) -> Params:
        """float32; ones for the norms, else normal with the variance 1/inputs (1/width for embeddings and head), and
        1/(2 blocks) of that for the two matrices of a block that write to the residual stream.
        """

        def scale(name: str, shape: tuple[int, ...]) -> float:
            inputs = shape[0] if "." in name else shape[1]
            return (inputs * (2 * self.blocks if name.endswith((".out", ".down")) else 1)) ** -0.5

        return workloads.weights(self.shapes(), seed, scale, 1.0)

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        """``[batch time, vocabulary]`` float32 of int32 ``[batch, time]``.

        Batch and time are one axis: a CPU is slow at products that contract two, which the gradients would be.
        """
        p = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
        x = (p["embedding"][tokens] + p["positions"][None, : tokens.shape[1]]).reshape(-1, self.width)
        for block in range(self.blocks):
            own = {name: p[f"block{block}.{name}"] for name in ("norm1", "qkv", "out", "norm2", "up", "down")}
            x = x + self._attention(_norm(x, own["norm1"]) @ own["qkv"], *tokens.shape) @ own["out"]
            x = x + jax.nn.gelu(_norm(x, own["norm2"]) @ own["up"]) @ own["down"]
        return _norm(x, p["norm"]) @ p["head"].T

    def _attention(self, qkv: jax.Array, batch: int, time: int) -> jax.Array:
        """Causal attention of ``[batch time, 3 width]``, the heads side by side."""
        q, k, v = jnp.moveaxis(qkv.reshape(batch, time, 3, self.heads, -1), (2, 3), (0, 2))
        scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tri(time, dtype=bool)[None, None], scores, -jnp.inf)
        return jnp.moveaxis(jax.nn.softmax(scores) @ v, 1, 2).reshape(batch * time, -1)

    def loss(self, params: Params, windows: jax.Array) -> jax.Array:
        """Mean cross-entropy, in nats a character, of the last `time` of ``[batch, time + 1]`` characters."""
        logits = self.logits(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].reshape(-1)).mean()


TINY = Model(width=32, blocks=2, heads=2, context=32)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer normalisation without a bias."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale[None]


def sample(text: jax.Array, seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike, batch: int, time: int) -> jax.Array:
    """``[batch, time + 1]`` neighbouring characters from random places, which depend on `seed` and `step` alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (batch, 1), 0, text.size - time)
    return text[starts + jnp.arange(time + 1)[None]]


def spread(text: jax.Array, windows: int, time: int) -> jax.Array:
    """``[windows, time + 1]``: evenly spaced windows, none predicting a character of another if there is room."""
    starts = jnp.linspace(0, text.size - time - 1, windows).astype(jnp.int32)
    return text[starts[:, None] + jnp.arange(time + 1)[None]]


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth of `rate`."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.1 * rate)
