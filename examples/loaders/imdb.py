"""The IMDB reviews (Maas et al. 2011) as bags of words: from a folder, the user's cache, a download, or else synthetic.

A bag is the number of times that each of the 10,000 most frequent words occurs in a review. The search order of `load`:

1. the folder that was asked for (`standin` asks for synthetic reviews): it must hold imdb_bow10k.npz;
2. `$ADAM_FN_DATA/imdb`, where that folder exists: it must hold that file too;
3. the user's cache, filled from the official archive (84 MB), which is compared with its checksum;
4. synthetic reviews, when the archive cannot be had. One printed line says so.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from loaders import mnist
from loaders.mnist import Checksums, DataError, UnreachableError
from numpy.typing import NDArray

MIRRORS = ("https://ai.stanford.edu/~amaas/data/sentiment/",)
ARCHIVE = "aclImdb_v1.tar"
CHECKSUMS: Mapping[str, Checksums] = {
    ARCHIVE: Checksums("c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe", "")
}
FILE = "imdb_bow10k.npz"
WORDS = 10_000
LIKED = 7  # stars from which a review counts as positive; none has 5 or 6


class Bags(NamedTuple):
    """Reviews as rows of a sparse matrix (CSR), and what they say.

    Review i has ``counts[indptr[i] : indptr[i + 1]]`` of the words that `indices` names there, in order of frequency
    over all reviews. `labels` is 1 for a positive review and 0 for a negative one.
    """

    indptr: NDArray[np.int32]
    indices: NDArray[np.uint16]
    counts: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def dense(self, words: int) -> NDArray[np.uint8]:
        """``[reviews, words]``: a byte a word, 250 MB for the 25,000 training reviews."""
        rows = np.repeat(np.arange(len(self.labels)), np.diff(self.indptr))
        matrix = np.zeros((len(self.labels), words), np.uint8)
        matrix[rows, self.indices] = self.counts
        return matrix


class Reviews(NamedTuple):
    name: str
    words: int
    train: Bags
    test: Bags


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirrors: Sequence[str] = MIRRORS,
    checksums: Mapping[str, Checksums] = CHECKSUMS,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 5.0,
) -> Reviews:
    """The reviews, found in the order that the module describes.

    `timeout` (seconds) bounds the wait for an answer and for the next bytes. Raises `DataError` for a folder without
    the file and for a file that is not what it should be.
    """
    if folder is not None and os.fspath(folder) == "standin":
        return synthetic()
    if folder is not None:
        return read(Path(folder) / FILE)
    data = os.environ.get("ADAM_FN_DATA")
    if data and (Path(data) / "imdb").is_dir():
        return read(Path(data) / "imdb" / FILE)
    place = mnist.user_cache().parent / "imdb" if cache is None else Path(cache)
    if not (place / FILE).is_file():
        try:
            mnist.download(place, mirrors, checksums, timeout)
        except UnreachableError as reason:
            fallback = synthetic()
            print(
                f"The IMDB reviews could not be downloaded ({reason}): training on {fallback.name} instead "
                f"({len(fallback.train.labels):,} of {fallback.words:,} words).",
                flush=True,
            )
            return fallback
        archive = place / f"{ARCHIVE}.gz"
        write(place / FILE, unpack(archive))
        archive.unlink()
    return read(place / FILE)


def read(path: Path) -> Reviews:
    """The file that `write` writes."""
    if not path.is_file():
        raise DataError(
            f"{path.parent}: lacks {path.name}" if path.parent.is_dir() else f"{path.parent}: is not a folder"
        )
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            train, test = (Bags(*(arrays[f"{part}_{name}"] for name in Bags._fields)) for part in ("train", "test"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}") from None
    for bags in (train, test):
        if len(bags.indptr) != len(bags.labels) + 1 or not len(bags.indices) == len(bags.counts) == bags.indptr[-1]:
            raise DataError(f"{path}: its arrays do not fit together")
    return Reviews("IMDB reviews", WORDS, train, test)


def write(path: Path, parts: Mapping[str, Bags]) -> None:
    """The bags of "train" and "test" as one npz file, which is complete or absent."""
    arrays = {f"{part}_{name}": array for part, bags in parts.items() for name, array in bags._asdict().items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content.getvalue())
    unfinished.replace(path)


def unpack(archive: Path) -> dict[str, Bags]:
    """The bags of "train" and "test" from the official archive."""
    parts: dict[str, Bags] = {}
    with tarfile.open(archive) as files:
        for part in ("train", "test"):
            member = files.extractfile(f"aclImdb/{part}/labeledBow.feat")
            if member is None:
                raise DataError(f"{archive}: lacks the bags of {part}")
            parts[part] = parse(line.decode("ascii") for line in member)
    return parts


def parse(lines: Iterable[str]) -> Bags:
    """Lines of ``stars word:count word:count …``, the words numbered by frequency; those past `WORDS` are dropped."""
    indptr, indices, counts, labels = [0], [], [], []
    for line in lines:
        stars, *entries = line.split()
        pairs = np.array([entry.split(":") for entry in entries], np.int64).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] < WORDS]
        indices.append(pairs[:, 0].astype(np.uint16))
        counts.append(np.minimum(pairs[:, 1], 255).astype(np.uint8))
        indptr.append(indptr[-1] + len(pairs))
        labels.append(int(stars) >= LIKED)
    return Bags(np.array(indptr, np.int32), np.concatenate(indices), np.concatenate(counts), np.array(labels, np.uint8))


def synthetic(words: int = 1000, train: int = 2000, test: int = 500, seed: int = 0) -> Reviews:
    """Reviews of words drawn by Zipf's law, half of them positive by a linear teacher that looks at few words."""
    rng = np.random.default_rng(seed)
    frequency = 1 / (np.arange(words) + 3)
    lengths = rng.lognormal(4.5, 0.6, train + test).astype(int) + 5
    matrix = rng.multinomial(lengths, frequency / frequency.sum()).clip(max=255).astype(np.uint8)
    teacher = rng.standard_normal(words) * (rng.random(words) < 0.1) / np.sqrt(frequency)
    score = matrix @ teacher
    labels = (score > np.median(score)).astype(np.uint8)
    parts = (slice(0, train), slice(train, None))
    return Reviews("synthetic reviews", words, *(_bags(matrix[part], labels[part]) for part in parts))


def _bags(matrix: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Bags:
    rows, columns = matrix.nonzero()
    indptr = np.concatenate([[0], np.bincount(rows, minlength=len(matrix)).cumsum()])
    return Bags(indptr.astype(np.int32), columns.astype(np.uint16), matrix[rows, columns], labels)
