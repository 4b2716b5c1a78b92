"""The workloads: trees of parameters and a training step, in full size and small."""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

Shape = tuple[int, ...]
Kind = typing.Literal["tree", "eager", "training", "loop", "rates"]


def size(shapes: Mapping[str, Shape]) -> int:
    """The elements of some leaves."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def held(tree: object) -> int:
    """The bytes of a tree's arrays, or of those that its shapes stand for."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Case:
    """One case.

    `tree` times a jitted step, `eager` the update outside jit, `training` a whole step; `loop` only compiles,
    and `rates` counts compilations.
    """

    name: str
    title: str
    kind: Kind
    shapes: dict[str, Shape]
    dtype: str = "float32"
    batch: int = 0

    @property
    def parameters(self) -> int:
        return size(self.shapes)

    def tree(self, seed: int, scale: float) -> dict[str, jax.Array]:
        """Normal random leaves of the case's shapes and dtype."""
        random = np.random.default_rng(seed)
        return {
            name: jnp.array(random.standard_normal(shape, np.float32) * np.float32(scale), self.dtype)
            for name, shape in self.shapes.items()
        }


def gpt2(vocabulary: int, positions: int, width: int, blocks: int) -> dict[str, Shape]:
    """The leaves of GPT-2 with tied embeddings: 4 + 12 a block."""
    weights: dict[str, Shape] = {
        "ln_1": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    every = {f"h{block}.{name}": shape for block in range(blocks) for name, shape in weights.items()}
    shapes: dict[str, Shape] = {"wte": (vocabulary, width), "wpe": (positions, width)}
    for name, shape in (every | {"ln_f": (width,)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return shapes


def mlp(inputs: int, hidden: int, classes: int) -> dict[str, Shape]:
    """Two hidden layers."""
    found: dict[str, Shape] = {}
    for layer, sizes in enumerate(itertools.pairwise((inputs, hidden, hidden, classes)), 1):
        found |= {f"w{layer}": sizes, f"b{layer}": sizes[1:]}
    return found


def many(leaves: int, size: int) -> dict[str, Shape]:
    return {f"leaf{index}": (size,) for index in range(leaves)}


def cases(quick: bool) -> list[Case]:
    """Every case; `quick` keeps the kinds and shrinks the sizes."""
    exponents = (16, 20) if quick else (20, 23, 26)
    if not quick and jax.default_backend() != "cpu":
        exponents += (28,)  # What a step moves is then far more than the caches hold.
    found = []
    for dtype, n in itertools.product(("float32", "bfloat16"), exponents):
        shapes: dict[str, Shape] = {"leaf": (2 ** (n - 10), 1024)}
        found.append(Case(f"leaf-2^{n}-{dtype}", f"one leaf of 2^{n - 10} x 1,024, {dtype}", "tree", shapes, dtype))
    leaves, eager, hidden = (50, 50, 128) if quick else (1000, 200, 1000)
    tree = gpt2(512, 64, 64, 4) if quick else gpt2(50257, 1024, 768, 12)
    size = "four blocks of GPT-2 at a twelfth of the width" if quick else "GPT-2 small"
    net = f"MLP 784-{hidden}-{hidden}-10, whole training step, batch 128"
    found += [
        Case("gpt2", f"{size}, {len(tree)} leaves", "tree", tree),
        Case("leaves", f"{leaves} leaves of 1,024", "tree", many(leaves, 1024)),
        Case("eager", f"eager, {eager} leaves of 1,024", "eager", many(eager, 1024)),
        Case("mlp", net, "training", mlp(784, hidden, 10), batch=128),
    ]
    for n, dtype in itertools.product((4, 20), ("float32", "float64")):
        title = f"100 steps of {n} elements in a `while_loop`, {dtype}"
        found.append(Case(f"loop-{n}-{dtype}", title, "loop", {"x": (n,)}, dtype))
    return [*found, Case("rates", "another learning rate", "rates", many(4, 1024))]


def images(case: Case, seed: int) -> tuple[jax.Array, jax.Array]:
    """A batch of random pixels and labels."""
    random = np.random.default_rng(seed)
    pixels = random.random((case.batch, case.shapes["w1"][0]), np.float32)
    return jnp.array(pixels), jnp.array(random.integers(0, case.shapes["b3"][0], case.batch), jnp.int32)


def he(name: str, shape: Shape) -> float:
    """The standard deviation of He initialisation."""
    return (2 / shape[0]) ** 0.5


def weights(
    shapes: Mapping[str, Shape], seed: int, scale: Callable[[str, Shape], float] = he, vector: float = 0.0
) -> dict[str, jax.Array]:
    """Float32: normal matrices of the standard deviation `scale`, and vectors of one value."""
    random = np.random.default_rng(seed)

    def made(name: str, shape: Shape) -> jax.Array:
        return jnp.array(random.standard_normal(shape, np.float32) * np.float32(scale(name, shape)))

    return {name: made(name, shape) if len(shape) > 1 else jnp.full(shape, vector) for name, shape in shapes.items()}


def logits(params: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
    """The MLP with ReLU, in float32."""
    p = {name: jnp.atleast_2d(leaf.astype(jnp.float32)) for name, leaf in params.items()}
    hidden = jax.nn.relu(pixels @ p["w1"] + p["b1"])
    return jax.nn.relu(hidden @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the MLP."""
    pixels, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, pixels), labels).mean()
