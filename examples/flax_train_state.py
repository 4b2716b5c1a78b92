"""adam_fn in a Flax linen `TrainState`: AdamW behind a clip of the global norm, its rate warmed up, then a cosine.

    python examples/flax_train_state.py

The data are those of mnist_mlp.py; the test accuracy is printed after each epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.training.train_state import TrainState
from loaders import mnist
from support.command_line import Parser, whole

import adam_fn


class MLP(linen.Module):
    width: int

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 255
        x = linen.relu(linen.Dense(self.width)(x))
        x = linen.relu(linen.Dense(self.width)(x))
        return linen.Dense(10)(x)


def optimizer(steps: int, rate: float = 1e-3) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps=steps // 10, decay_steps=steps)
    # Biases do not decay: only arrays of two axes or more do.
    adamw = adam_fn.adamw(schedule, weight_decay=1e-2, mask=adam_fn.masks.rank(2))
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@partial(jax.jit, donate_argnames="train_state")
def train_step(
    train_state: TrainState, images: jax.Array, labels: jax.Array, batch: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One update on the images that `batch` numbers, in place."""

    def cost(params: optax.Params) -> jax.Array:
        logits = train_state.apply_fn({"params": params}, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    value, grads = jax.value_and_grad(cost)(train_state.params)
    return train_state.apply_gradients(grads=grads), value


@jax.jit
def accuracy(train_state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    return (train_state.apply_fn({"params": train_state.params}, images).argmax(-1) == labels).mean()


class Result(NamedTuple):
    costs: list[float]  # of every step, in nats
    accuracies: list[float]  # on the test images after each epoch, as fractions


def main(argv: Sequence[str] | None = None) -> Result:
    parser = Parser(prog="flax_train_state.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="as for mnist_mlp.py")
    add("--epochs", type=whole(1), metavar="N", help="default: 5")
    add("--batch", type=whole(1), default=128, metavar="N", help="images a step (default: 128)")
    add("--width", type=whole(1), metavar="N", help="of both hidden layers (default: 1000)")
    add("--seed", type=whole(0), default=0, metavar="N", help="default: 0")
    add("--quick", action="store_true", help="a trial of 2 epochs of at most 20 steps, 64 units wide")
    given = parser.parse_args(argv)
    try:
        data = mnist.load(given.data)
        size = len(data.train_labels)
        if given.batch > size:
            raise ValueError(f"--batch {given.batch} is more than the {size} training images")
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")

    epochs = given.epochs or (2 if given.quick else 5)
    # What remains of the images after the last whole batch sits an epoch out; each epoch shuffles anew.
    steps = min(size // given.batch, 20 if given.quick else size)
    model = MLP(given.width or (64 if given.quick else 1000))
    train_state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(given.seed), data.train_images[:1])["params"],
        tx=optimizer(steps * epochs),
    )
    images, labels, test_images, test_labels = jax.device_put(data[1:])
    rng = np.random.default_rng(given.seed)
    result = Result([], [])
    for epoch in range(1, epochs + 1):
        costs = []
        for batch in jnp.asarray(rng.permutation(size)[: steps * given.batch].reshape(steps, given.batch)):
            train_state, cost = train_step(train_state, images, labels, batch)
            costs.append(cost)
        result.costs.extend(np.asarray(jax.device_get(costs)).tolist())
        result.accuracies.append(float(accuracy(train_state, test_images, test_labels)))
        mean = np.mean(result.costs[-steps:])
        print(f"epoch {epoch}/{epochs}: training cost {mean:.4f}, test accuracy {result.accuracies[-1]:.2%}")
    return result


if __name__ == "__main__":
    main()
