"""A character transformer of a million parameters on tinyshakespeare, as plain functions on a dict of arrays.

Decoder-only (arXiv 1706.03762) with pre-norm blocks (arXiv 2002.04745), learned positions, a GELU MLP of four times the
width and an untied head, without biases. The parameters may be bfloat16: the arithmetic is float32, so what differs is
their storage and, because a gradient has its parameter's dtype, the rounding of the gradients.
"""

import dataclasses
import functools
import pathlib
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from measure import workloads

import adam_fn

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
from loaders import shakespeare

BATCH = 8
RATE = 4e-3  # The best of 1e-3, 2e-3, 4e-3 and 8e-3 for float32 and the seed 0.
GROUP = 256

Params: typing.TypeAlias = dict[str, jax.Array]


class Text(typing.NamedTuple):
    """Characters by their place in the sorted alphabet, int32[n]: the first nine tenths train, the last validates."""

    train: npt.NDArray[np.int32]
    validation: npt.NDArray[np.int32]
    vocabulary: int


def split(text: shakespeare.Text) -> Text:
    """The two parts of a text."""
    end = len(text.codes) * 9 // 10
    return Text(text.codes[:end], text.codes[end:], text.vocabulary)


def load() -> Text:
    """tinyshakespeare, 1,115,394 characters of 65 kinds; nothing else will do."""
    text = shakespeare.load()
    if len(text.codes) != 1_115_394:
        raise ConnectionError(f"{shakespeare.URL} cannot be reached: put it in $ADAM_FN_DATA/tinyshakespeare")
    return split(text)


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
        random = np.random.default_rng(seed)
        found: Params = {}
        for name, shape in self.shapes().items():
            leaf = name.rpartition(".")[2]
            if len(shape) == 1:
                found[name] = jnp.ones(shape)
                continue
            inputs = shape[0] if "." in name else shape[1]
            scale = (inputs * (2 * self.blocks if leaf in ("out", "down") else 1)) ** -0.5
            found[name] = jnp.array(random.standard_normal(shape, np.float32) * np.float32(scale))
        return found

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


def groups(model: Model, rows: int) -> dict[str, npt.NDArray[np.intp]]:
    """Which elements are recorded: by leaf, indices [its rows, 256] into the flat leaf, spread evenly over it.

    `rows`, an even share of them a leaf, come from the embedding, the attention and the MLP of the first and the last
    block, and the head. A group is 256 neighbours in memory: whole rows, or a whole part of one.
    """
    first, last = "block0.", f"block{model.blocks - 1}."
    names = ["embedding", *(first + x for x in ("qkv", "out", "down")), *(last + x for x in ("qkv", "up", "down"))]
    names.append("head")
    shapes = model.shapes()
    found = {}
    for name, own in zip(names, np.array_split(np.arange(rows), len(names)), strict=True):
        starts = np.linspace(0, np.prod(shapes[name]) // GROUP - 1, len(own)).astype(int)
        found[name] = starts[:, None] * GROUP + np.arange(GROUP)
    return found


def recorded(
    steps: int, seed: int = 0, rows: int = 128, *, model: Model | None = None, text: Text | None = None
) -> npt.NDArray[np.float32]:
    """float32[steps, rows, 256]: gradients of the elements of `groups` while `adam_fn.adamw` trains in float32.

    The transformer on tinyshakespeare, unless another `model` and `text` are given.
    """
    model, text = model or Model(), text or load()
    chosen, train = groups(model, rows), jnp.array(text.train)
    tx = adam_fn.adamw(schedule(RATE, steps), b2=0.999, weight_decay=0.1)

    def step(
        carry: tuple[Params, optax.OptState], number: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], jax.Array]:
        params, state = carry
        grads = jax.grad(model.loss)(params, sample(train, seed, number, BATCH, model.context))
        updates, state = tx.update(grads, state, params)
        params = typing.cast(Params, optax.apply_updates(params, updates))
        return (params, state), jnp.concatenate([grads[name].reshape(-1)[own] for name, own in chosen.items()])

    @functools.partial(jax.jit, donate_argnums=0)
    def chunk(carry: tuple[Params, optax.OptState], numbers: jax.Array) -> tuple[typing.Any, jax.Array]:
        return jax.lax.scan(step, carry, numbers)

    carry = (params := model.init(seed), tx.init(params))
    found = np.empty((steps, *np.concatenate([*chosen.values()]).shape), np.float32)
    for numbers in np.array_split(np.arange(steps), -(-steps // 50)):
        carry, found[numbers] = chunk(carry, numbers)
    return found
