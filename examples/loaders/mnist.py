"""MNIST as arrays: from a folder, from the user's cache, from a mirror, or else scikit-learn's handwritten digits.

The search order of `load`:

1. the folder that was asked for (`digits` asks for scikit-learn's digits): it must be complete;
2. `$ADAM_FN_DATA/mnist`, where that folder exists: it must be complete;
3. the user's cache, filled from the first mirror that serves what is missing;
4. scikit-learn's digits, when no mirror can be reached. One printed line says so.

Every file is compared with its checksum before it is read; one that differs is never used.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import requests
from numpy.typing import NDArray

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class Checksums(NamedTuple):
    """SHA-256 of one IDX file: as it is distributed (`.gz`) and unpacked."""

    packed: str
    plain: str


TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

# The four official files, the smallest first: a mirror that fails does so early.
CHECKSUMS: Mapping[str, Checksums] = {
    TEST_LABELS: Checksums(
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    TRAIN_LABELS: Checksums(
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    TEST_IMAGES: Checksums(
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    TRAIN_IMAGES: Checksums(
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
}

DIGITS_TEST_SIZE = 360


class DataError(ValueError):
    """The data asked for is missing or is not what it should be."""


class UnreachableError(Exception):
    """No mirror could be used; the text is the reason."""


class Dataset(NamedTuple):
    """Images as (n, pixels) uint8 in 0..255, labels as (n,) int32 in 0..9."""

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]

    @property
    def pixels(self) -> int:
        return self.train_images.shape[1]


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirrors: Sequence[str] = MIRRORS,
    checksums: Mapping[str, Checksums] = CHECKSUMS,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 5.0,
) -> Dataset:
    """The data set, found in the order that the module describes.

    `timeout` (seconds) bounds the search for a mirror that answers and each wait for its next bytes.
    Raises `DataError` for a folder that lacks files and for a file that differs from its checksum.
    """
    if folder is not None and os.fspath(folder) == "digits":
        return digits()
    if folder is not None:
        return read_folder(Path(folder), checksums)
    data = os.environ.get("ADAM_FN_DATA")
    if data and (Path(data) / "mnist").is_dir():
        return read_folder(Path(data) / "mnist", checksums)
    place = user_cache() if cache is None else Path(cache)
    try:
        download(place, mirrors, checksums, timeout)
    except UnreachableError as reason:
        fallback = digits()
        print(
            f"MNIST could not be downloaded ({reason}): training on {fallback.name} instead "
            f"({len(fallback.train_labels):,} training and {len(fallback.test_labels):,} test images of 8x8 pixels).",
            flush=True,
        )
        return fallback
    return read_folder(place, checksums)


def user_cache() -> Path:
    return Path(pooch.os_cache("adam_fn")) / "mnist"


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth, the same share of each class, is for testing."""
    # Imported here because it takes a second, and only those without MNIST need it.
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(images) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(labels, np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST_SIZE, stratify=labels, random_state=0)
    return Dataset("scikit-learn's digits", images[train], labels[train], images[test], labels[test])


def read_folder(folder: Path, checksums: Mapping[str, Checksums]) -> Dataset:
    """The four IDX files of `folder`, each packed (`.gz`) or plain."""
    paths = {name: _path_in(folder, name) for name in checksums}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        what = f"lacks {', '.join(missing)} (.gz or plain)" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder}: {what}")
    arrays = {name: _read(path, checksums[name]) for name, path in paths.items() if path is not None}
    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        if arrays[images].ndim != 3 or arrays[labels].shape != arrays[images].shape[:1]:
            shapes = f"{arrays[images].shape} and {arrays[labels].shape}"
            raise DataError(f"{folder}: the shapes of {images} and {labels} do not match: {shapes}")
    return Dataset(
        "MNIST",
        arrays[TRAIN_IMAGES].reshape(len(arrays[TRAIN_IMAGES]), -1),
        arrays[TRAIN_LABELS].astype(np.int32),
        arrays[TEST_IMAGES].reshape(len(arrays[TEST_IMAGES]), -1),
        arrays[TEST_LABELS].astype(np.int32),
    )


def _path_in(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read(path: Path, checksums: Checksums) -> NDArray[np.uint8]:
    content = path.read_bytes()
    packed = path.suffix == ".gz"
    expected = checksums.packed if packed else checksums.plain
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(_altered(path, expected, found))
    return parse_idx(gzip.decompress(content) if packed else content, path.name)


def _altered(path: Path, expected: str, found: str) -> str:
    return f"{path}: truncated or altered: expected sha256 {expected}, found {found}"


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zeros, the type 8, the rank, big-endian uint32 dimensions, the values."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{name}: not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{name}: the header ends early")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise DataError(f"{name}: {len(content) - start} bytes of values for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def download(folder: Path, mirrors: Sequence[str], checksums: Mapping[str, Checksums], timeout: float) -> None:
    """Fill `folder` with the packed files; those that are there and whole are not fetched again.

    Each file comes from the first mirror that serves it. Raises `DataError` where all that the mirrors served differs
    from its checksum, `UnreachableError` where they served nothing.
    """
    wanted = [name for name in checksums if not _whole(folder / f"{name}.gz", checksums[name].packed)]
    if not wanted:
        return
    answering = _answering(mirrors, f"{wanted[0]}.gz", timeout)
    if not answering:
        raise UnreachableError("no mirror answers")
    for name in wanted:
        _fetch(f"{name}.gz", checksums[name].packed, folder, answering, timeout)


def _whole(path: Path, expected: str) -> bool:
    if not path.is_file():
        return False
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        print(f"{_altered(path, expected, found)}; downloading it again", flush=True)
    return found == expected


def _answering(mirrors: Sequence[str], file: str, timeout: float) -> list[str]:
    """The mirrors that give any answer within `timeout` seconds, in their order.

    A name server or a firewall that drops packets costs a client its timeout once per address and try. Asking all
    mirrors at once from threads that nobody waits for bounds the whole search.
    """
    answered: set[str] = set()

    def ask(mirror: str) -> None:
        try:
            requests.head(mirror + file, timeout=timeout)
        except requests.RequestException:
            return
        answered.add(mirror)

    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    end = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [mirror for mirror in mirrors if mirror in answered]


def _fetch(file: str, expected: str, folder: Path, mirrors: Sequence[str], timeout: float) -> None:
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=timeout, chunk_size=1 << 16)
    altered: list[str] = []
    failed: list[str] = []
    for mirror in mirrors:
        print(f"downloading {mirror}{file}", flush=True)
        try:
            # pooch's protocol for downloaders names its parameters in another way than its own downloaders do
            pooch.retrieve(
                mirror + file,
                f"sha256:{expected}",
                file,
                folder,
                downloader=downloader,  # pyright: ignore[reportArgumentType]
            )
        except OSError as error:  # all that requests raises, and a cache that cannot be written
            failed.append(_reason(error))
        except ValueError as error:  # pooch's word for a checksum that differs; the message holds both
            altered.append(f"{mirror}{file}: {error}")
        else:
            return
    if altered:
        raise DataError("; ".join(altered))
    raise UnreachableError(failed[-1])


def _reason(error: OSError) -> str:
    """A few words for a failed request; the text of a connection error is a paragraph."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"{response.status_code} from {response.url}"
    return str(error) if error.errno is not None else type(error).__name__
