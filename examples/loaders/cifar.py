"""CIFAR-10 as arrays: from a folder, from the user's cache, from its site, or else scikit-learn's digits, enlarged.

The search order of `load`:

1. the folder that was asked for (`standin` asks for the enlarged digits): it must hold the data;
2. `$ADAM_FN_DATA/cifar10`, where that folder exists: it must hold the data;
3. the user's cache, filled from the official site (170 MB: the binary version, which needs no pickle);
4. the digits, when the site cannot be reached. One printed line says so.

A folder holds the data as the six `.bin` files of the binary version, or as `first_4000_train.npz` with the first 4,000
training images, ``x (4000, 32, 32, 3)`` and ``y (4000,)``; a fifth of those is set aside for testing.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from loaders import mnist
from loaders.mnist import Checksums, DataError, UnreachableError
from numpy.typing import NDArray

MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
ARCHIVE = "cifar-10-binary.tar"
CHECKSUMS: Mapping[str, Checksums] = {
    ARCHIVE: Checksums("c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", "")
}
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
SAMPLE = "first_4000_train.npz"

SIZE = 32  # pixels a side
CHANNELS = 3
CLASSES = 10


class Images(NamedTuple):
    """Images as (n, 32, 32, 3) uint8 in 0..255, red, green and blue; labels as (n,) int32 in 0..9."""

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    mirrors: Sequence[str] = MIRRORS,
    checksums: Mapping[str, Checksums] = CHECKSUMS,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 5.0,
) -> Images:
    """The data set, found in the order that the module describes.

    `timeout` (seconds) bounds the wait for the site's answer and for its next bytes. Raises `DataError` for a folder
    that lacks the data and for files that are not what they should be.
    """
    if folder is not None and os.fspath(folder) == "standin":
        return standin()
    if folder is not None:
        return read_folder(Path(folder))
    data = os.environ.get("ADAM_FN_DATA")
    if data and (Path(data) / "cifar10").is_dir():
        return read_folder(Path(data) / "cifar10")
    place = mnist.user_cache().parent / "cifar10" if cache is None else Path(cache)
    try:
        if not all((place / name).is_file() for name in FILES):
            mnist.download(place, mirrors, checksums, timeout)
            unpack(place / f"{ARCHIVE}.gz")
    except UnreachableError as reason:
        fallback = standin()
        print(
            f"CIFAR-10 could not be downloaded ({reason}): training on {fallback.name} instead "
            f"({len(fallback.train_labels):,} training and {len(fallback.test_labels):,} test images).",
            flush=True,
        )
        return fallback
    return read_folder(place)


def standin() -> Images:
    """scikit-learn's digits, each pixel enlarged to 4x4, in three equal channels."""
    digits = mnist.digits()

    def enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        square = images.reshape(-1, 8, 8).repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)
        return np.repeat(square[..., None], CHANNELS, -1)

    train, test = enlarged(digits.train_images), enlarged(digits.test_images)
    return Images(f"{digits.name}, enlarged to 32x32", train, digits.train_labels, test, digits.test_labels)


def read_folder(folder: Path) -> Images:
    """The binary version where it is whole, else the sample."""
    files = [folder / name for name in FILES]
    if all(file.is_file() for file in files):
        *train, (test_images, test_labels) = [read_binary(file) for file in files]
        images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
        return Images("CIFAR-10", images, labels, test_images, test_labels)
    if (folder / SAMPLE).is_file():
        return read_sample(folder / SAMPLE)
    what = f"holds neither {FILES[0]} … {FILES[-1]} nor {SAMPLE}" if folder.is_dir() else "is not a folder"
    raise DataError(f"{folder}: {what}")


def read_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Images and labels of one file: records of a label and the red, the green and the blue plane, row by row."""
    content = np.fromfile(path, np.uint8)
    record = 1 + CHANNELS * SIZE * SIZE
    if not len(content) or len(content) % record:
        raise DataError(f"{path}: {len(content)} bytes are not a whole number of records of {record}")
    records = content.reshape(-1, record)
    return _checked(
        path, records[:, 1:].reshape(-1, CHANNELS, SIZE, SIZE).transpose(0, 2, 3, 1), records[:, 0].astype(np.int32)
    )


def read_sample(path: Path) -> Images:
    """The first images of the training set; the last fifth of them is for testing."""
    with np.load(path) as arrays:  # pickles are refused
        if not {"x", "y"} <= set(arrays):
            raise DataError(f"{path}: lacks x or y")
        images, labels = _checked(path, arrays["x"], arrays["y"].astype(np.int32))
    train = len(labels) * 4 // 5
    name = f"the first {len(labels):,} images of CIFAR-10"
    return Images(name, images[:train], labels[:train], images[train:], labels[train:])


def _checked(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int32]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    if images.shape != (len(labels), SIZE, SIZE, CHANNELS) or images.dtype != np.uint8:
        raise DataError(f"{path}: images of shape {images.shape} and dtype {images.dtype}, {len(labels)} labels")
    if not ((labels >= 0) & (labels < CLASSES)).all():
        raise DataError(f"{path}: labels outside of 0..{CLASSES - 1}")
    return np.ascontiguousarray(images), labels


def unpack(archive: Path) -> None:
    """The six files of the archive, put beside it; the archive is deleted."""
    with tarfile.open(archive) as members:
        for member in members:
            name = Path(member.name).name
            if name in FILES and (content := members.extractfile(member)):
                unfinished = archive.with_name(f"{name}.part")  # the file itself is complete or absent
                unfinished.write_bytes(content.read())
                unfinished.replace(archive.with_name(name))
    archive.unlink()
