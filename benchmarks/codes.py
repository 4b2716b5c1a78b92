"""Codes for Adam's two moments, compared: how far the updates are from exact Adam's.

    python benchmarks/codes.py [--quick] [--data NAME] [--only TEXT] [--gradients DIR] [--out DIR]

Every candidate is emulated in float64: decode the moments, update them, take the update m̂/√v̂ of the new moments, encode
them. Of the last 200 updates: the relative L2 error against exact Adam's, and their RMS and largest magnitude in units
of exact Adam's. β₁ = 0.9, β₂ = 0.999, ε = 0. The data:

- synthetic: normal gradients, each element with a scale of lognormal(0.7) times σ; σ from 1 to 1e-15;
- recorded: the gradients of some blocks of a character transformer's weights while it trains (`char_model.py`);
- directions: those of squares of 32 rows and columns, in blocks along the rows and in blocks along the columns: of the
  transformer's matrices, and of the embedding and the head of a small model of words, whose rows are tokens of very
  different frequency.

0/0 counts as 0 in both; √v̂ = 0 where m̂ is not 0 counts as 1e-30, so that an element that runs away shows. Recording
takes minutes; with `--gradients DIR` it is done once.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from emulation.block_codes import Bend, Code, Kind, Log, MuLaw, Places, Root, Rounding, Scale, Table, dynamic
from measure import machine
from training import char_model

B1, B2 = 0.9, 0.999
SIGMAS = (1.0, 1e-3, 1e-6, 1e-9, 1e-15)
LAST = 200
GOLDEN = (5**0.5 - 1) / 2  # Its multiples, modulo 1, fill an interval most evenly.

Moment = Literal["m", "v"]
Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Gradients [steps, elements]; each row of the results belongs to one sigma, which multiplies them.

    `blocks`: how the elements of a weight are blocks, and `rare`, bool[elements]: which are of the rarer tokens.
    """

    name: str
    gradients: Array
    sigmas: tuple[float, ...] | tuple[None] = (None,)
    blocks: str | None = None
    rare: npt.NDArray[np.bool_] | None = None


def synthetic(steps: int, elements: int) -> Data:
    """Normal gradients, each element with a scale of lognormal(0.7)."""
    random = np.random.default_rng(0)
    scales = np.exp(0.7 * random.standard_normal(elements))
    return Data("synthetic", (random.standard_normal((steps, elements)) * scales).astype(np.float32), SIGMAS)


def kept(folder: pathlib.Path | None, name: str, shape: tuple[int, ...], record: Callable[[], Array]) -> Array:
    """What was recorded, from its file in the folder if it is there."""
    file = folder and folder / f"{name}.npy"
    if file and file.exists():
        gradients = np.load(file)
    else:
        gradients = record()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, gradients)
    if gradients.shape != shape:
        raise ValueError(f"{file} holds gradients of other sizes, {gradients.shape}")
    return gradients


def recorded(steps: int, elements: int, folder: pathlib.Path | None = None) -> Data:
    """Gradients of groups of 256 neighbours from eight weight matrices of the character transformer, as it trains."""
    rows = elements // 256
    shape = (steps, rows, 256)
    gradients = kept(folder, "recorded", shape, lambda: char_model.recorded(steps, rows=rows))
    return Data("recorded", gradients.reshape(steps, -1))


def directions(steps: int, squares: int, folder: pathlib.Path | None = None) -> Iterator[Data]:
    """Gradients of so many squares of each weight, its elements in the order that makes each row or column a block."""
    found = kept(folder, "matrices", (steps, squares, 32, 32), lambda: char_model.matrices(steps, squares))
    # Of a Flax kernel [inputs, outputs] a column is 32 inputs; of torch's weights it is 32 outputs.
    yield Data("matrices", found.reshape(steps, -1), blocks="32 outputs of an input")
    yield Data("matrices", found.swapaxes(2, 3).reshape(steps, -1), blocks="32 inputs of an output")
    found = kept(folder, "words", (steps, 2, squares, 32, 32), lambda: char_model.tables(steps, squares))
    tokens = np.arange(squares * 32)
    shuffled = np.random.default_rng(0).permutation(tokens)
    for name, own in (("embedding", found[:, 0]), ("head", found[:, 1])):
        for blocks, order in (("32 columns of a token", tokens), ("32 tokens of like frequency", tokens),
                              ("32 tokens in random order", shuffled)):  # fmt: skip
            ordered = own.reshape(steps, -1, 32)[:, order].reshape(own.shape)
            rare = np.broadcast_to((order >= len(order) // 2).reshape(squares, 32, 1), own.shape[1:])
            if "tokens" in blocks:
                ordered, rare = ordered.swapaxes(2, 3), rare.swapaxes(1, 2)
            yield Data(name, ordered.reshape(steps, -1), blocks=blocks, rare=rare.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A way of storing the moments; None stands for the exact moment.

    `relative`: not m is stored but m/√v, with the new v before it is coded; decoded, it is multiplied by √v as decoded.
    """

    label: str
    m: Code | None
    v: Code | None
    peer: str | None = None
    relative: bool = False

    @property
    def bytes(self) -> float:
        return sum(4.0 if code is None else code.bytes for code in (self.m, self.v))

    @property
    def ours(self) -> bool:
        """Whether it is what the library does, to both moments or to one."""
        codes = (self.m, self.v)
        return not self.relative and any(
            all(a in (None, b) for a, b in zip(codes, pair, strict=True)) for pair in LIBRARY.values()
        )

    @property
    def part(self) -> str:
        return "m" if self.v is None else "v" if self.m is None else "both"


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def trajectory(
    gradients: jax.Array, sigmas: jax.Array, m_code: Code | None, v_code: Code | None, relative: bool
) -> tuple[jax.Array, jax.Array]:
    """m̂ and √v̂ of the last updates, float32[updates, sigmas, elements], before the moments are coded again."""
    steps, elements = gradients.shape
    key = jax.random.key(0)
    count = jnp.arange(steps)
    phase = jax.random.uniform(jax.random.fold_in(key, steps), (2, elements))

    def step(state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array]):  # noqa: ANN202
        t, row = given
        g = row.astype(jnp.float64)[None] * sigmas[:, None]
        m, v = state
        if relative:
            m = m * jnp.sqrt(v)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        white = jax.random.uniform(jax.random.fold_in(key, t), (2, elements))
        even = (phase + t * GOLDEN) % 1.0
        noise = [even[i] if code and code.even else white[i] for i, code in enumerate((m_code, v_code))]
        kept = m * jax.lax.rsqrt(jnp.maximum(v, 1e-120)) if relative else m
        kept = m_code.stored(kept, noise[0]) if m_code else kept
        return (kept, v_code.stored(v, noise[1]) if v_code else v), (m, v)

    def last(state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array]):  # noqa: ANN202
        state, (m, v) = step(state, given)
        m_hat, v_hat = m / (1 - B1 ** (given[0] + 1.0)), v / (1 - B2 ** (given[0] + 1.0))
        return state, (m_hat.astype(jnp.float32), jnp.sqrt(v_hat).astype(jnp.float32))

    zeros = jnp.zeros((len(sigmas), elements))
    state, _ = jax.lax.scan(lambda s, x: (step(s, x)[0], None), (zeros, zeros), (count[:-LAST], gradients[:-LAST]))
    return jax.lax.scan(last, state, (count[-LAST:], gradients[-LAST:]))[1]


class Comparison:
    """The candidates on one set of gradients. Moments that are stored apart from each other are computed once."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.gradients = jnp.asarray(data.gradients)
        self.sigmas = jnp.asarray([1.0 if sigma is None else sigma for sigma in data.sigmas])
        self._moment = functools.lru_cache(maxsize=48)(self._compute)
        self.exact = self._updates(Entry("exact", None, None))

    def _compute(self, m: Code | None, v: Code | None, moment: Moment) -> jax.Array:
        return trajectory(self.gradients, self.sigmas, m, v, False)[moment == "v"]

    def _updates(self, entry: Entry) -> jax.Array:
        if entry.relative:
            m, v = trajectory(self.gradients, self.sigmas, entry.m, entry.v, True)
        else:
            m, v = self._moment(entry.m, None, "m"), self._moment(None, entry.v, "v")
        return jnp.where(m == 0, 0.0, m.astype(jnp.float64) / jnp.maximum(v.astype(jnp.float64), 1e-30))

    def rows(self, entry: Entry) -> Iterator[dict[str, object]]:
        """One row of results for each sigma, or for all elements and for those of the rarer tokens."""
        updates, rare = self._updates(entry), self.data.rare
        yield from self._rows(entry, updates, self.exact, "all")
        if rare is not None:
            yield from self._rows(entry, updates[..., rare], self.exact[..., rare], "rarer half")

    def _rows(self, entry: Entry, updates: jax.Array, exact: jax.Array, elements: str) -> Iterator[dict[str, object]]:
        def norm(x: jax.Array) -> npt.NDArray[np.float64]:
            return np.asarray(jnp.sqrt((x * x).sum((0, 2))))

        errors, sizes = norm(updates - exact) / norm(exact), norm(updates) / norm(exact)
        largest = np.asarray(jnp.abs(updates).max((0, 2)) / jnp.abs(exact).max((0, 2)))
        blocks = {} if self.data.blocks is None else {"blocks": self.data.blocks, "elements": elements}
        for i, sigma in enumerate(self.data.sigmas):
            yield {
                "data": self.data.name,
                **blocks,
                "sigma": sigma,
                "label": entry.label,
                "m": "exact" if entry.m is None else ("m/√v: " if entry.relative else "") + str(entry.m),
                "v": "exact" if entry.v is None else str(entry.v),
                "bytes": entry.bytes,
                "error": float(errors[i]),
                "rms": float(sizes[i]),
                "largest": float(largest[i]),
                "ours": entry.ours,
                "peer": entry.peer,
                "part": "direction" if blocks else entry.part,
            }


def mu_law(bits: int, *, sign: bool = True, scale: Kind = "14 bits") -> Code:
    """Ours for the first moment."""
    return Code((MuLaw.full if sign else MuLaw.symmetric)(bits), "nearest", Scale(scale, sign=sign))


def places(
    bits: int, octave: float, group: int = 32, *, skew: float = 0.0, even: bool = True, shared: bool = True
) -> Code:
    """Ours for the second moment."""
    grid = Places(2**bits - 1, octave)
    return Code(grid, "dithered", Scale("place", group), even=even, shared=shared, skew=skew)


def m_code(bits: int, k: float, rounding: Rounding = "closest", *, sign: bool = True) -> Code:
    """Companded."""
    return Code((Bend.full if sign else Bend.symmetric)(bits, k), rounding, Scale(sign=sign))


def v_octave(bits: int, octave: float, rounding: Rounding = "dithered", group: int = 32, *, even: bool = True) -> Code:
    """Logarithms below a power of two: with n codes an octave the values are the same whatever the scale is, and a
    scale that changes moves no other element of its block.
    """
    return Code(Log(2**bits - 1, octave), rounding, Scale("power of 2", group), even=even)


#: What `adam_fn.Block` does; a test compares them.
LIBRARY: dict[int, tuple[Code, Code]] = {
    8: (mu_law(8), places(8, 20, skew=2**-6)),
    4: (mu_law(4), places(4, 2, skew=2**-3)),
}

# Of each width: codes an octave that are tried, those of the library, and its skew.
OCTAVES = {8: ((16, 20, 22, 24), 20, 2**-6), 4: ((2, 2.25, 2.5, 3), 2, 2**-3)}


def first_moments() -> Iterator[Entry]:
    """Codes of m, v exact: what else can be chosen, then companded ones."""
    for bits in LIBRARY:
        ours, label = mu_law(bits), f"m{bits}"
        yield Entry(label, ours, None)
        yield Entry(label, mu_law(bits, sign=False), None)
        yield Entry(label, mu_law(bits, scale="bfloat16"), None)
        yield Entry(label, mu_law(bits, scale="nearest bfloat16"), None)
        yield Entry(label, dataclasses.replace(ours, rounding="unbiased"), None)
        for k in (0, 1, 2, 3):
            yield Entry(label, m_code(bits, k), None)


def second_moments() -> Iterator[Entry]:
    """Codes of v, m exact: what else can be chosen, then logarithms and roots."""
    for bits, (octaves, octave, skew) in OCTAVES.items():
        ours, label = places(bits, octave, skew=skew), f"v{bits}"
        yield Entry(label, None, ours)
        for n in octaves:
            yield Entry(label, None, places(bits, n))
        yield Entry(label, None, dataclasses.replace(ours, shared=False))
        yield Entry(label, None, dataclasses.replace(ours, even=False))
        for group in (16, 64):
            yield Entry(label, None, dataclasses.replace(ours, scale=Scale("place", group)))
        for rounding in ("dithered", "unbiased"):
            yield Entry(label, None, v_octave(bits, octave, rounding))
        yield Entry(label, None, v_octave(bits, octave, "nearest", even=False))
        for p in (2, 4):
            yield Entry(label, None, Code(Root(2**bits - 1, p), "unbiased"))


def peers() -> Iterator[Entry]:
    """What other libraries store, from their published formulas, all rounded to the nearest."""
    # bitsandbytes, optim.Adam8bit: blocks of 256. (It also keeps the sign of m where the nearest value is 0.)
    scale = Scale("float32", 256)
    signed, unsigned = dynamic(8, 7, signed=True), dynamic(8, 7, signed=False)
    yield Entry("bitsandbytes 8", Code(signed, scale=scale), Code(unsigned, scale=scale), peer="bitsandbytes")
    # torchao, optim.Adam8bit: the same with scales of at least 1e-12.
    scale = dataclasses.replace(scale, floor=1e-12)
    yield Entry("torchao 8", Code(signed, scale=scale), Code(unsigned, scale=scale), peer="torchao")
    # torchao, optim.Adam4bit (arXiv 2309.01507): v in sixteenths without 0.
    scale = dataclasses.replace(scale, group=128)
    linear = Table("linear, no 0", tuple(i / 16 for i in range(1, 17)))
    yield Entry("torchao 4", Code(dynamic(4, 3, signed=True), scale=scale), Code(linear, scale=scale), peer="torchao")
    # FlashOptim (arXiv 2602.23349): the scale of v is that of √v; both are at least 1e-12 before float16 rounds them.
    m_scale, v_scale = (Scale("float16", root=root, floor=1e-12) for root in (1, 2))
    yield Entry(
        "FlashOptim 8", Code(Bend.symmetric(8, 1), scale=m_scale), Code(Root(255, 2), scale=v_scale), peer="FlashOptim"
    )


def pairs() -> Iterator[Entry]:
    """Both moments: the library's and others, companded m and logarithms, m in units of √v, and roots."""
    for bits, (m, v) in LIBRARY.items():
        label, (octaves, octave, _) = f"{bits}|{bits}", OCTAVES[bits]
        yield Entry(label, m, v)
        yield Entry(label, mu_law(bits, sign=False), v)
        for n in octaves:
            yield Entry(label, m, places(bits, n))
        yield Entry(label, m, dataclasses.replace(v, shared=False))
        yield Entry(label, m_code(bits, 2), v_octave(bits, octave))
        yield Entry(f"{label} relative", m, v, relative=True)
    nearest = m_code(8, 1, "nearest", sign=False)
    roots: tuple[tuple[int, Rounding], ...] = ((2, "nearest"), (2, "unbiased"), (4, "unbiased"))
    for p, rounding in roots:
        yield Entry("8|8", nearest, Code(Root(255, p), rounding))


def ranges() -> Iterator[Entry]:
    """Both moments, in two ways that divide the same codes of v: more octaves, or finer ones."""
    for bits, finer in ((8, 24), (4, 2.25)):
        yield Entry(f"{bits}|{bits}", *LIBRARY[bits])
        yield Entry(f"{bits}|{bits}", mu_law(bits), places(bits, finer))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: steps, elements, squares of a direction's weight."""

    steps: int = 3000
    synthetic: int = 4096
    recorded: int = 8192
    direction_steps: int = 2000
    squares: int = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and elements, to try the script")
    parser.add_argument("--only", default="", help="candidates whose label contains this text")
    parser.add_argument("--data", choices=("synthetic", "recorded", "directions"), help="only these gradients")
    parser.add_argument("--gradients", type=pathlib.Path, help="folder that keeps recorded gradients")
    parser.add_argument("--out", type=pathlib.Path, help="folder for codes.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    sizes = Sizes(250, 512, 2048, 250, 8) if options.quick else Sizes()
    rows: list[dict[str, object]] = []
    for entries, data in plan(options.data, sizes, options.gradients):
        rows += table(data, [entry for entry in entries if options.only in entry.label])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = {"device": machine.device(), "versions": machine.versions(), "date": machine.now()}
        settings = {**dataclasses.asdict(sizes), "last": LAST, "b1": B1, "b2": B2}
        (options.out / "codes.json").write_text(json.dumps({**about, **settings, "rows": rows}, indent=1) + "\n")


def plan(only: str | None, sizes: Sizes, folder: pathlib.Path | None) -> Iterator[tuple[Iterator[Entry], Data]]:
    """Whole states on all sigmas; one moment alone on one sigma, as only the rounding of the scales differs there."""
    makers: dict[str, Callable[[], Data]] = {
        "synthetic": lambda: synthetic(sizes.steps, sizes.synthetic),
        "recorded": lambda: recorded(sizes.steps, sizes.recorded, folder),
    }
    for data in (make() for name, make in makers.items() if only in (None, name)):
        yield itertools.chain(pairs(), peers()), data
        alone = dataclasses.replace(data, sigmas=data.sigmas[1:2] or (None,))
        yield itertools.chain(first_moments(), second_moments()), alone
    if only in (None, "directions"):
        for data in directions(sizes.direction_steps, sizes.squares, folder):
            yield ranges(), data


def table(data: Data, entries: list[Entry]) -> list[dict[str, object]]:
    """The rows of the candidates on one set of gradients, printed."""
    blocks = f", blocks of {data.blocks}" if data.blocks else ""
    title = f"{data.name} gradients{blocks}, the last {LAST} updates of {len(data.gradients):,}"
    print(f"\n{title}\n{'':<14}{'bytes':>7}{'sigma':>11}{'error':>9}{'rms':>9}{'largest':>9}  codes")
    comparison, rows = Comparison(data), []
    for entry in entries:
        for row in comparison.rows(entry):
            sigma = str(row.get("elements", "")) if row["sigma"] is None else f"{row['sigma']:g}"
            numbers = "".join(f"{row[key]:>9.3g}" for key in ("error", "rms", "largest"))
            codes = f"m: {row['m']}; v: {row['v']}" if entry.part == "both" else row[entry.part]
            print(f"{entry.label:<14}{entry.bytes:>7.4g}{sigma:>11}{numbers}  {codes}", flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
