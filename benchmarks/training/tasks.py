"""What is trained to compare storages: the character transformer and the MLP, with their data, rates and losses.

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
import optax
from measure import workloads
from training import char_model

import adam_fn
from adam_fn import StorageLike

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
from loaders import mnist

POINTS = 12  # of a curve

Params: typing.TypeAlias = dict[str, jax.Array]
Data: typing.TypeAlias = dict[str, jax.Array]
Batch: typing.TypeAlias = typing.Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a workload's runs have in common; runs of other settings are not compared with them."""

    parameters: int
    steps: int
    batch: int
    rate: float
    b2: float
    weight_decay: float
    validation: int  # characters or images

    def adam(self, *, storage: StorageLike | None = None) -> optax.GradientTransformation:
        rate = char_model.schedule(self.rate, self.steps)
        return adam_fn.adamw(rate, b2=self.b2, weight_decay=self.weight_decay, storage=storage)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and its data.

    Attributes:
      init: the float32 parameters of a seed.
      batch: of the data, a seed and a step.
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


def characters(quick: bool = False, text: char_model.Text | None = None) -> Workload:
    """The transformer; evaluated on windows spread over the validation text, at their full length."""
    text = text or char_model.load()
    model = dataclasses.replace(char_model.TINY if quick else char_model.Model(), vocabulary=text.vocabulary)
    steps, windows = (96, 32) if quick else (1200, 256)
    length, batch, part = model.context, char_model.BATCH, 16
    validation = char_model.spread(jnp.array(text.validation), windows, length).reshape(-1, part, length + 1)

    def evaluate(params: Params, data: Data) -> tuple[jax.Array, jax.Array]:
        losses = jax.lax.map(functools.partial(model.loss, params), data["validation"])
        return losses.mean(), jnp.float32(jnp.nan)

    return Workload(
        "char",
        Settings(model.parameters, steps, batch, char_model.RATE, 0.999, 0.1, windows * length),
        {"train": jnp.array(text.train), "validation": validation},
        model.init,
        lambda data, seed, step: char_model.sample(data["train"], seed, step, batch, length),
        model.loss,
        evaluate,
    )


def images(quick: bool = False, dataset: mnist.Dataset | None = None) -> Workload:
    """The MLP; as many training images as two epochs have, drawn with replacement; evaluated on the test images.

    Its rate is the best of 5e-4, 1e-3, 2e-3 and 4e-3 by the test loss of float32 and the seed 0.
    """
    dataset = dataset or mnist.load()
    hidden, steps, batch = (64, 96, 128) if quick else (1000, POINTS * (2 * 60_000 // (128 * POINTS)), 128)
    case = workloads.Case("mlp", "", "training", workloads.mlp(dataset.pixels, hidden, 10), batch=batch)

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
        Settings(case.parameters, steps, batch, 2e-3, 0.999, 0.01, len(dataset.test_labels)),
        {name: jnp.array(part) for name, part in dataset._asdict().items() if name != "name"},
        functools.partial(workloads.weights, case),
        sample,
        workloads.loss,
        evaluate,
    )
