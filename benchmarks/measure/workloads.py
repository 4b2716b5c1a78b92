"""What is measured: trees of parameters and a training step, full size and small."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

Shape = tuple[int, ...]
Kind = typing.Literal["tree", "eager", "training", "rates"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: `tree` times a jitted step, `eager` the update outside jit, `training` a whole step, `rates` counts."""

    name: str
    title: str
    kind: Kind
    shapes: dict[str, Shape]
    dtype: str = "float32"
    batch: int = 0

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def tree(self, seed: int, scale: float) -> dict[str, jax.Array]:
        """Normal random leaves of the case's shapes and dtype."""
        random = np.random.default_rng(seed)
        return {
            name: jnp.array(random.standard_normal(shape, np.float32) * np.float32(scale), self.dtype)
            for name, shape in self.shapes.items()
        }


def gpt2(vocabulary: int, positions: int, width: int, blocks: int) -> dict[str, Shape]:
    """The leaves of GPT-2 with tied embeddings: 4 + 12 a block."""
    shapes: dict[str, Shape] = {"wte": (vocabulary, width), "wpe": (positions, width)}
    for block in range(blocks):
        shapes |= {
            f"h{block}.ln_1.weight": (width,),
            f"h{block}.ln_1.bias": (width,),
            f"h{block}.attn.c_attn.weight": (width, 3 * width),
            f"h{block}.attn.c_attn.bias": (3 * width,),
            f"h{block}.attn.c_proj.weight": (width, width),
            f"h{block}.attn.c_proj.bias": (width,),
            f"h{block}.ln_2.weight": (width,),
            f"h{block}.ln_2.bias": (width,),
            f"h{block}.mlp.c_fc.weight": (width, 4 * width),
            f"h{block}.mlp.c_fc.bias": (4 * width,),
            f"h{block}.mlp.c_proj.weight": (4 * width, width),
            f"h{block}.mlp.c_proj.bias": (width,),
        }
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def mlp(inputs: int, hidden: int, classes: int) -> dict[str, Shape]:
    """Two hidden layers."""
    return {
        "w1": (inputs, hidden),
        "b1": (hidden,),
        "w2": (hidden, hidden),
        "b2": (hidden,),
        "w3": (hidden, classes),
        "b3": (classes,),
    }


def many(leaves: int, size: int) -> dict[str, Shape]:
    return {f"leaf{index}": (size,) for index in range(leaves)}


def cases(quick: bool) -> list[Case]:
    """Every case; `quick` keeps the kinds and shrinks the sizes."""
    exponents = (16, 20) if quick else (20, 23, 26)
    if not quick and jax.default_backend() != "cpu":
        exponents += (28,)  # What a step moves is then far more than the caches hold.
    found = [
        Case(
            f"leaf-2^{exponent}-{dtype}",
            f"one leaf of 2^{exponent - 10} x 1,024, {dtype}",
            "tree",
            {"leaf": (2 ** (exponent - 10), 1024)},
            dtype,
        )
        for dtype in ("float32", "bfloat16")
        for exponent in exponents
    ]
    leaves, eager, hidden = (50, 50, 128) if quick else (1000, 200, 1000)
    tree = gpt2(512, 64, 64, 4) if quick else gpt2(50257, 1024, 768, 12)
    size = "four blocks of GPT-2 at a twelfth of the width" if quick else "GPT-2 small"
    found += [
        Case("gpt2", f"{size}, {len(tree)} leaves", "tree", tree),
        Case("leaves", f"{leaves} leaves of 1,024", "tree", many(leaves, 1024)),
        Case("eager", f"eager, {eager} leaves of 1,024", "eager", many(eager, 1024)),
        Case(
            "mlp",
            f"MLP 784-{hidden}-{hidden}-10, whole training step, batch 128",
            "training",
            mlp(784, hidden, 10),
            batch=128,
        ),
        Case("rates", "another learning rate", "rates", many(4, 1024)),
    ]
    return found


def images(case: Case, seed: int) -> tuple[jax.Array, jax.Array]:
    """A batch of random pixels and labels."""
    random = np.random.default_rng(seed)
    pixels = random.random((case.batch, case.shapes["w1"][0]), np.float32)
    return jnp.array(pixels), jnp.array(random.integers(0, case.shapes["b3"][0], case.batch), jnp.int32)


def weights(case: Case, seed: int) -> dict[str, jax.Array]:
    """He initialisation of the MLP."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.array(random.standard_normal(shape, np.float32) * np.sqrt(2 / shape[0], dtype=np.float32))
        if len(shape) == 2
        else jnp.zeros(shape)
        for name, shape in case.shapes.items()
    }


def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the MLP with ReLU."""
    pixels, labels = batch
    hidden = jax.nn.relu(pixels @ params["w1"] + params["b1"])
    hidden = jax.nn.relu(hidden @ params["w2"] + params["b2"])
    logits = hidden @ params["w3"] + params["b3"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
