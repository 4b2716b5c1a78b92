"""The trainings that compare storages: the character transformer and the MLP, with their data, rates and losses.

A workload says everything about a training but how the parameters and moments are stored.
"""

import dataclasses
import functools
import pathlib
import sys
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from measure import workloads

import adam_fn

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
from loaders import mnist, shakespeare

BATCH = 8
RATE = 4e-3  # The best of 1e-3, 2e-3, 4e-3 and 8e-3 for float32 and the seed 0.
POINTS = 12  # of a curve
GROUP = 256  # neighbours in memory whose gradients are recorded

Params: typing.TypeAlias = dict[str, jax.Array]
Carry: typing.TypeAlias = tuple[Params, optax.OptState]
Data: typing.TypeAlias = dict[str, jax.Array]
Batch: typing.TypeAlias = typing.Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A character transformer of a million parameters, as plain functions on a dict of arrays.

    Decoder-only (arXiv 1706.03762) with pre-norm blocks (arXiv 2002.04745), learned positions, a GELU MLP of four times
    the width and an untied head, without biases. The parameters may be bfloat16: the arithmetic is float32, so what
    differs is their storage and, because a gradient has its parameter's dtype, the rounding of the gradients.
    """

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
        """Float32: ones for the norms, else normal with the variance 1/inputs (1/width for embeddings and head), and
        1/(2 blocks) of that for the two matrices of a block that write to the residual stream.
        """

        def scale(name: str, shape: tuple[int, ...]) -> float:
            inputs = shape[0] if "." in name else shape[1]
            return (inputs * (2 * self.blocks if name.endswith((".out", ".down")) else 1)) ** -0.5

        return workloads.weights(self.shapes(), seed, scale, 1.0)

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        """The logits ``[batch time, vocabulary]``, float32, of int32 ``[batch, time]``.

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
    """Windows ``[batch, time + 1]`` of characters from random places, which depend on `seed` and `step` alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (batch, 1), 0, text.size - time)
    return text[starts + jnp.arange(time + 1)[None]]


def spread(text: jax.Array, windows: int, time: int) -> jax.Array:
    """Evenly spaced windows ``[windows, time + 1]``, none predicting a character of another if there is room."""
    starts = jnp.linspace(0, text.size - time - 1, windows).astype(jnp.int32)
    return text[starts[:, None] + jnp.arange(time + 1)[None]]


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth of `rate`."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.1 * rate)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a workload's runs share; runs of other settings are not compared with them."""

    parameters: int
    steps: int
    batch: int
    rate: float
    b2: float
    weight_decay: float
    validation: int  # characters or images

    def adam(self, *, storage: adam_fn.StorageLike | None = None) -> optax.GradientTransformation:
        rate = schedule(self.rate, self.steps)
        return adam_fn.adamw(rate, b2=self.b2, weight_decay=self.weight_decay, storage=storage)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
      init: the float32 parameters of a seed.
      batch: the batch of the data, a seed and a step.
      loss: the mean cross-entropy of a batch, in nats.
      evaluate: on the data: the mean cross-entropy, and the accuracy or nan.
    """

    name: str
    settings: Settings
    data: Data
    init: Callable[[int], Params]
    batch: Callable[[Data, jax.Array, jax.Array], Batch]
    loss: Callable[[Params, Batch], jax.Array]
    evaluate: Callable[[Params, Data], tuple[jax.Array, jax.Array]]

    def step(
        self, tx: optax.GradientTransformation, data: Data, seed: jax.Array, carry: Carry, number: jax.Array
    ) -> tuple[Carry, tuple[jax.Array, Params]]:
        """A step of training: the parameters and the state after it, its loss and its gradients."""
        params, state = carry
        loss, grads = jax.value_and_grad(self.loss)(params, self.batch(data, seed, number))
        # Without the barrier the compiler is free to leave out the rounding of the gradients to bfloat16.
        grads = jax.lax.optimization_barrier(grads)
        updates, state = tx.update(grads, state, params)
        return (typing.cast(Params, optax.apply_updates(params, updates)), state), (loss, grads)


def characters(quick: bool = False, text: shakespeare.Text | None = None) -> Workload:
    """The transformer on a text, else tinyshakespeare, 1,115,394 characters of 65 kinds, without a substitute.

    The first nine tenths train. Evaluated on windows spread over the rest, at their full length.
    """
    if text is None and len((text := shakespeare.load()).codes) != 1_115_394:
        raise ConnectionError(f"{shakespeare.URL} cannot be reached: put it in $ADAM_FN_DATA/tinyshakespeare")
    end = len(text.codes) * 9 // 10
    train, validation = jnp.array(text.codes[:end]), jnp.array(text.codes[end:])
    model = dataclasses.replace(TINY if quick else Model(), vocabulary=text.vocabulary)
    steps, windows = (96, 32) if quick else (1200, 256)
    length, batch, part = model.context, BATCH, 16
    evaluated = spread(validation, windows, length).reshape(-1, part, length + 1)

    def evaluate(params: Params, data: Data) -> tuple[jax.Array, jax.Array]:
        losses = jax.lax.map(functools.partial(model.loss, params), data["validation"])
        return losses.mean(), jnp.float32(jnp.nan)

    return Workload(
        "char",
        Settings(model.parameters, steps, batch, RATE, 0.999, 0.1, windows * length),
        {"train": train, "validation": evaluated},
        model.init,
        lambda data, seed, step: sample(data["train"], seed, step, batch, length),
        model.loss,
        evaluate,
    )


def images(quick: bool = False, dataset: mnist.Dataset | None = None) -> Workload:
    """The MLP; as many training images as two epochs have, drawn with replacement; evaluated on the test images.

    Its rate is the best of 5e-4, 1e-3, 2e-3 and 4e-3 by the test loss of float32 and the seed 0.
    """
    dataset = dataset or mnist.load()
    hidden, steps, batch = (64, 96, 128) if quick else (1000, POINTS * (2 * 60_000 // (128 * POINTS)), 128)
    shapes = workloads.mlp(dataset.pixels, hidden, 10)

    def scaled(pixels: jax.Array) -> jax.Array:
        return pixels.astype(jnp.float32) / 255

    def sample(data: Data, seed: jax.Array, step: jax.Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(seed), step)
        chosen = jax.random.randint(key, (batch,), 0, data["train_labels"].size)
        return scaled(data["train_images"][chosen]), data["train_labels"][chosen]

    def evaluate(params: Params, data: Data) -> tuple[jax.Array, jax.Array]:
        found, labels = workloads.logits(params, scaled(data["test_images"])), data["test_labels"]
        losses = optax.softmax_cross_entropy_with_integer_labels(found, labels)
        return losses.mean(), (found.argmax(-1) == labels).mean()

    return Workload(
        "mnist" if dataset.name == "MNIST" else "digits",
        Settings(workloads.size(shapes), steps, batch, 2e-3, 0.999, 0.01, len(dataset.test_labels)),
        {name: jnp.array(part) for name, part in dataset._asdict().items() if name != "name"},
        functools.partial(workloads.weights, shapes),
        sample,
        workloads.loss,
        evaluate,
    )


def groups(params: Params, rows: int) -> dict[str, npt.NDArray[np.intp]]:
    """The elements of the transformer to record: by leaf, [its rows, 256] indices that spread evenly over it.

    `rows`, an even share of them a leaf, come from the embedding, the attention and the MLP of the first and the last
    block, and the head. A group is 256 neighbours in memory: whole rows, or a whole part of one.
    """
    first, *_, last = dict.fromkeys(name.partition(".")[0] for name in params if "." in name)
    names = [f"{first}.{x}" for x in ("qkv", "out", "down")] + [f"{last}.{x}" for x in ("qkv", "up", "down")]
    names, found = ["embedding", *names, "head"], {}
    for name, own in zip(names, np.array_split(np.arange(rows), len(names)), strict=True):
        starts = np.linspace(0, params[name].size // GROUP - 1, len(own)).astype(int)
        found[name] = starts[:, None] * GROUP + np.arange(GROUP)
    return found


def recorded(workload: Workload, steps: int, rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Gradients float32[steps, rows, 256] of the elements of `groups`, in a training in float32."""
    tx, params = dataclasses.replace(workload.settings, steps=steps).adam(), workload.init(seed)
    chosen = groups(params, rows)

    @jax.jit
    def run(carry: Carry, data: Data) -> jax.Array:
        def step(carry: Carry, number: jax.Array) -> tuple[Carry, jax.Array]:
            carry, (_, grads) = workload.step(tx, data, jnp.int32(seed), carry, number)
            return carry, jnp.concatenate([grads[name].reshape(-1)[own] for name, own in chosen.items()])

        return jax.lax.scan(step, carry, jnp.arange(steps))[1]

    return np.asarray(run((params, tx.init(params)), workload.data))
