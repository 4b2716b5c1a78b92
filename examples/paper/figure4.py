"""Figure 4 of the Adam paper (arXiv 1412.6980, section 6.4): a variational autoencoder and the bias correction.

    python examples/paper/figure4.py
    python examples/paper/figure4.py --hidden 500 --images 60000 --epochs 100    # the paper's size

A variational autoencoder on MNIST (arXiv 1312.6114: one hidden layer of softplus units in the encoder and in the
decoder, a latent space with a spherical Gaussian prior, a Bernoulli decoder) is trained with and without bias
correction for β₁ in {0, 0.9}, β₂ in {0.99, 0.999, 0.9999} and five rates: 60 runs in one `vmap`, with the same
initialisation, minibatches and noise. The loss is the negative evidence lower bound, in nats an image. The paper shows
it after 10 and after 100 epochs; here it is after a tenth of the epochs and after all of them.

Where it departs from the paper: the default size (100 hidden units, the first 10,000 images, 30 epochs, for a CPU); the
rates are five powers of ten; the paper names neither the minibatch nor the data set, which here are 128 and MNIST; the
loss is the mean over the epoch's minibatches.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence

import harness  # first: it makes the modules below importable
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import Claim
from loaders import mnist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from support.command_line import Parser, whole
from support.report import COLORS, log_axis

import adam_fn

B1 = (0.0, 0.9)
B2 = (0.99, 0.999, 0.9999)
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CORRECTED = (0.0, 1.0)
GRID = harness.product(b1=B1, b2=B2, corrected=CORRECTED, rate=RATES)
EQUAL = 1.01  # losses that differ by at most 1% count as equal

Parameters = dict[str, dict[str, jax.Array]]
Data = jax.Array  # images, [n, pixels], uint8


@dataclasses.dataclass(frozen=True)
class PerhapsCorrected(adam_fn.Adam):
    """Adam, and where `corrected` is 0 Adam without its bias correction: ``u = m/(√v + ε)``, RMSProp with momentum."""

    corrected: adam_fn.NonNegative = 1.0

    def leaf(
        self, g: jax.Array, p: jax.Array | None, slots: Mapping[str, jax.Array], clock: adam_fn.Clock
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        corrections = [jnp.where(self.corrected == 0, 1, x) for x in clock.corrections]
        return super().leaf(g, p, slots, dataclasses.replace(clock, corrections=corrections))


def optimizer(point: harness.Point) -> optax.GradientTransformation:
    """The optimizer of one point of the grid, at rate 1."""
    rule = PerhapsCorrected(point["b1"], point["b2"], corrected=point["corrected"])
    return adam_fn.transform(rule >> adam_fn.Rate(1.0))


class Autoencoder(nnx.Module):
    """pixels -> hidden -> mean and log variance of the latents; a sample of them -> hidden -> logits of the pixels."""

    def __init__(self, pixels: int, hidden: int, latents: int, *, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Linear(pixels, hidden, rngs=rngs)
        self.mean = nnx.Linear(hidden, latents, rngs=rngs)
        self.log_variance = nnx.Linear(hidden, latents, rngs=rngs)
        self.decoder = nnx.Linear(latents, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, pixels, rngs=rngs)

    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(logits, mean, log_variance)`` of images ``[n, pixels]`` in [0, 1], with normal noise ``[n, latents]``."""
        hidden = nnx.softplus(self.encoder(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        latents = mean + jnp.exp(log_variance / 2) * noise
        return self.logits(nnx.softplus(self.decoder(latents))), mean, log_variance


def negative_bound(model: Autoencoder, images: jax.Array, noise: jax.Array) -> jax.Array:
    """The negative evidence lower bound ``-log p(x|z) + KL(q(z|x) ‖ N(0, 1))``, in nats, mean over the images."""
    x = images.astype(jnp.float32) / 255
    logits, mean, log_variance = model(x, noise)
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
    divergence = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1) / 2
    return (reconstruction + divergence).mean()


def train(images: NDArray[np.uint8], options: Namespace) -> harness.Sweep:
    """All runs of the grid."""
    model = Autoencoder(images.shape[1], options.hidden, options.latents, rngs=nnx.Rngs(options.seed))
    graph, variables = nnx.split(model, nnx.Param)

    def cost(params: Parameters, data: Data, rows: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (len(rows), options.latents))
        return negative_bound(nnx.merge(graph, params), data[rows], noise)

    params: Parameters = nnx.to_pure_dict(variables)
    steps = 20 if options.quick else None
    problem = harness.Problem(params, jnp.asarray(images), cost, size=len(images), steps=steps)
    return harness.sweep("Adam", optimizer, GRID, problem, epochs=options.epochs, seed=options.seed)


def losses(runs: harness.Sweep, epoch: int) -> NDArray[np.float64]:
    """The losses of an epoch (the first is 1) as ``[b1, b2, corrected, rate]``; inf for runs that diverged."""
    lost = ~np.isfinite(runs.costs[:, :epoch]).all(1)
    found = np.where(lost, np.inf, runs.costs[:, epoch - 1])
    return found.reshape(len(B1), len(B2), len(CORRECTED), len(RATES))


def claims(runs: harness.Sweep, early: int, options: Namespace) -> list[Claim]:
    """What section 6.4 says about the figure, beside the losses after `early` and all epochs."""
    epochs = runs.costs.shape[1]
    first, last = losses(runs, early), losses(runs, epochs)
    when = f"after {early}", f"after {epochs} epochs"
    count = len(B1) * len(RATES)

    fell = [~np.isfinite(now[:, :, 0]) & np.isfinite(last[:, :, 1]) for now in (first, last)]
    soon, ever = (found.sum((0, 2)) for found in fell)
    diverged = ", ".join(f"{n}/{count} at β₂ = {b2:g}" for n, b2 in zip(ever, B2, strict=True))

    corrected, raw = ([now[:, :, kind].min() for now in (first, last)] for kind in (1, 0))
    by_b2 = [now[:, :, 1].min((0, 2)) for now in (first, last)]  # [β₂]
    lead = [now[0] / now[1:].min() for now in by_b2]
    listed = [", ".join(f"{loss:.1f}" for loss in now) for now in by_b2]

    worse = [(now[:, :, 1] > EQUAL * now[:, :, 0]).sum() for now in (first, last)]
    tuned = [(now.min(-1)[:, :, 1] > EQUAL * now.min(-1)[:, :, 0]).sum() for now in (first, last)]
    found = [
        (
            "Without correction, β₂ near 1 makes training unstable, above all in the first epochs",
            f"runs that diverge without correction and do not with it: {diverged}; {soon.sum()} of these {ever.sum()} "
            f"within {early} epochs",
            ever[-1] > ever[0] and 2 * soon.sum() > ever.sum(),
        ),
        (
            "The best results come with bias correction",
            f"lowest loss with and without: {corrected[0]:.1f} and {raw[0]:.1f} {when[0]}, {corrected[1]:.1f} and "
            f"{raw[1]:.1f} {when[1]}",
            corrected[1] < raw[1],
        ),
        (
            "The best results come with small 1 - β₂, more so towards the end",
            f"lowest loss with correction at β₂ = {', '.join(f'{b2:g}' for b2 in B2)}: {listed[0]} {when[0]}, "
            f"{listed[1]} {when[1]}",
            lead[1] > 1 and lead[1] > lead[0],
        ),
        (
            "Adam is equal to or better than RMSProp (no correction), regardless of the hyperparameters",
            f"settings (β₁, β₂, rate) in which Adam's loss is more than 1% higher: {worse[0]}/{3 * count} {when[0]}, "
            f"{worse[1]}/{3 * count} {when[1]}; at the best rate of each (β₁, β₂): {tuned[0]}/6 and {tuned[1]}/6",
            worse[0] == worse[1] == 0,
        ),
    ]
    return [Claim(text, "6.4, figure 4", measured, harness.decided(options, holds)) for text, measured, holds in found]


def plot(runs: harness.Sweep, early: int, pixels: int, title: str) -> Figure:
    """The loss over the rate, a panel for each β₁ and β₂; on the left early, on the right at the end."""
    top = 1.2 * pixels * np.log(2)  # a decoder that knows nothing, 1/2 for every pixel, loses pixels · ln 2
    lowest = losses(runs, runs.costs.shape[1]).min()
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    halves = figure.add_gridspec(1, 2)
    for i, epoch in enumerate((early, runs.costs.shape[1])):
        half = figure.add_subfigure(halves[i])
        half.suptitle(f"after {epoch} epoch{'s' * (epoch > 1)}", fontsize=10)
        now = losses(runs, epoch)
        panels = half.subplots(len(B1), len(B2), sharex=True, sharey=True)
        for b1, b2 in np.ndindex(panels.shape):
            axes: Axes = panels[b1, b2]
            for corrected, line in ((0, "s--"), (1, "o-")):
                _draw(axes, now[b1, b2, corrected], top, line, COLORS[(3, 6)[corrected]])
            axes.set_title(f"β₁ = {B1[b1]:g}, β₂ = {B2[b2]:g}", fontsize=9)
            axes.set(xticks=np.log10(RATES), ylim=(0.93 * lowest, top))
            log_axis(axes)
        half.supxlabel("log₁₀ of the rate", fontsize=10)
        half.supylabel("loss (nats an image)", fontsize=10)
    handles = [
        Line2D([], [], color=COLORS[6], marker="o", label="with bias correction"),
        Line2D([], [], color=COLORS[3], marker="s", ls="--", label="without"),
        Line2D([], [], color="#555555", marker="^", ls="", label="above the panel, or diverged"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(axes: Axes, losses: NDArray[np.float64], top: float, line: str, color: str) -> None:
    """The losses by rate; those above `top` as triangles at the upper edge."""
    x = np.log10(RATES)
    axes.plot(x, np.where(np.isfinite(losses), losses, np.nan), line, color=color, ms=4.5, lw=1.6)
    outside = losses > top
    # Side by side where both are outside: the uncorrected run's triangle lies to the left.
    shift = 0.12 if line.startswith("o") else -0.12
    axes.plot(
        x[outside] + shift, np.full(outside.sum(), 0.965), "^", color=color, ms=6, transform=axes.get_xaxis_transform()
    )


def extras(parser: Parser) -> None:
    add = parser.add_argument
    add("--hidden", type=whole(1), metavar="N", help="units of both hidden layers (default: 100, the paper's: 500)")
    add("--latents", type=whole(1), default=50, metavar="N", help="dimensions of the latent space (default: 50)")
    add("--images", type=whole(128), default=10_000, metavar="N", help="the first N images (default: 10000)")


def main(argv: Sequence[str] | None = None) -> list[Claim]:
    options = harness.options("figure4.py", __doc__, argv, epochs=30, extras=extras)
    options.hidden = options.hidden or (20 if options.quick else 100)
    with harness.errors_in_one_line("figure4.py"):
        dataset = mnist.load(harness.folder(options.data, "mnist"))
    images = dataset.train_images[: options.images]
    early = max(1, options.epochs // 10)
    sizes = f"{dataset.pixels}-{options.hidden}-{options.latents}-{options.hidden}-{dataset.pixels}"
    title = f"variational autoencoder {sizes} on {len(images):,} images of {dataset.name}, minibatch 128"
    print(f"{title}: {len(GRID['rate'])} runs of {options.epochs} epochs")
    runs = train(images, options)
    found = claims(runs, early, options)
    settings = {
        "dataset": dataset.name,
        "images": len(images),
        "hidden": options.hidden,
        "latents": options.latents,
        "seed": options.seed,
        "early": early,
    }
    harness.write(
        options.out,
        "figure4",
        plot(runs, early, dataset.pixels, title),
        {"options": settings, "runs": [runs.numbers()]},
        found,
    )
    print(harness.claims_table(found))
    return found


if __name__ == "__main__":
    main()
