"""The examples' data: local folders, the cache, and the downloader against servers on the loopback."""

import gzip
import hashlib
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mirror import Serve
from loaders import mnist
from loaders.mnist import Checksums, DataError
from numpy.typing import NDArray

pytestmark = pytest.mark.quick

TIMEOUT = 5.0


def idx(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tiny_arrays() -> dict[str, NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return {
        mnist.TEST_LABELS: rng.integers(0, 10, 5, np.uint8),
        mnist.TRAIN_LABELS: rng.integers(0, 10, 7, np.uint8),
        mnist.TEST_IMAGES: rng.integers(0, 256, (5, 3, 4), np.uint8),
        mnist.TRAIN_IMAGES: rng.integers(0, 256, (7, 3, 4), np.uint8),
    }


ARRAYS = tiny_arrays()
PLAIN = {name: idx(array) for name, array in ARRAYS.items()}
PACKED = {name: gzip.compress(content, mtime=0) for name, content in PLAIN.items()}
CHECKSUMS = {name: Checksums(sha256(PACKED[name]), sha256(PLAIN[name])) for name in ARRAYS}
FILES = {f"{name}.gz": content for name, content in PACKED.items()}
LAST = f"{mnist.TRAIN_IMAGES}.gz"


def flipped(content: bytes) -> bytes:
    """`content` with one bit changed near its end."""
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.fixture
def unreachable() -> str:
    """An address on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def load(cache: Path, *mirrors: str, timeout: float = TIMEOUT) -> mnist.Dataset:
    return mnist.load(mirrors=mirrors, checksums=CHECKSUMS, cache=cache, timeout=timeout)


def assert_tiny(dataset: mnist.Dataset) -> None:
    assert dataset.name == "MNIST"
    assert dataset.pixels == 12
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_images, ARRAYS[mnist.TRAIN_IMAGES].reshape(7, 12))
    np.testing.assert_array_equal(dataset.train_labels, ARRAYS[mnist.TRAIN_LABELS])
    np.testing.assert_array_equal(dataset.test_images, ARRAYS[mnist.TEST_IMAGES].reshape(5, 12))
    np.testing.assert_array_equal(dataset.test_labels, ARRAYS[mnist.TEST_LABELS])


def assert_digits(dataset: mnist.Dataset) -> None:
    assert dataset.name == "scikit-learn's digits"
    assert dataset.train_images.shape == (1437, 64)
    assert dataset.test_images.shape == (360, 64)


class TestDownload:
    def test_fills_the_cache_once(self, serve: Serve, tmp_path: Path) -> None:
        mirror = serve(FILES)
        assert_tiny(load(tmp_path / "cache", mirror.url))
        assert sorted(mirror.fetched) == sorted(FILES)
        assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == FILES
        assert_tiny(load(tmp_path / "cache", mirror.url))
        assert len(mirror.fetched) == len(FILES), "the second load must not fetch"

    @pytest.mark.parametrize(
        ("files", "cut"),
        [
            ({name: FILES[name] for name in FILES if name != LAST}, frozenset()),
            (FILES, frozenset({LAST})),
            ({**FILES, LAST: flipped(FILES[LAST])}, frozenset()),
        ],
        ids=["lacks a file", "breaks off", "has an altered file"],
    )
    def test_second_mirror_where_the_first(
        self, files: Mapping[str, bytes], cut: frozenset[str], serve: Serve, unreachable: str, tmp_path: Path
    ) -> None:
        first, second = serve(files, cut), serve(FILES)
        assert_tiny(load(tmp_path, unreachable, first.url, second.url))
        assert set(first.fetched) == set(FILES)
        assert second.fetched == [LAST]

    def test_altered_file_is_refused(self, serve: Serve, tmp_path: Path) -> None:
        altered = flipped(FILES[LAST])
        mirror = serve({**FILES, LAST: altered})
        with pytest.raises(DataError) as error:
            load(tmp_path, mirror.url)
        for part in (LAST, sha256(FILES[LAST]), sha256(altered)):
            assert part in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(FILES) - {LAST})

    def test_altered_file_in_the_cache_is_replaced(
        self, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        altered = flipped(FILES[LAST])
        mirror = serve(FILES)
        assert_tiny(load(write(tmp_path, {**FILES, LAST: altered}), mirror.url))
        assert mirror.fetched == [LAST]
        said = capsys.readouterr().out.splitlines()[0]
        for part in (LAST, sha256(FILES[LAST]), sha256(altered), "downloading it again"):
            assert part in said

    def test_without_a_mirror_digits_and_one_line(
        self, serve: Serve, unreachable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for mirror, tried, reason in ((unreachable, 0, "no mirror answers)"), (serve({}).url, 2, "404 from")):
            assert_digits(load(tmp_path, mirror, mirror))
            *downloads, line = capsys.readouterr().out.splitlines()
            assert len(downloads) == tried
            assert f"could not be downloaded ({reason}" in line
            assert "scikit-learn's digits" in line
            assert not list(tmp_path.iterdir())

    def test_a_mirror_that_never_answers_costs_the_timeout(self, tmp_path: Path) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
            start = time.monotonic()
            with pytest.raises(mnist.UnreachableError, match="no mirror answers"):
                mnist.download(tmp_path, (url, url), CHECKSUMS, timeout=0.2)
            assert time.monotonic() - start < 2.0


class TestFolder:
    def test_packed_and_plain(self, tmp_path: Path) -> None:
        names = list(ARRAYS)
        folder = write(tmp_path, {f"{name}.gz": PACKED[name] for name in names[:2]})
        write(folder, {name: PLAIN[name] for name in names[2:]})
        assert_tiny(mnist.load(folder, mirrors=(), checksums=CHECKSUMS))

    @pytest.mark.parametrize("suffix", [".gz", ""])
    @pytest.mark.parametrize("damage", [flipped, lambda content: content[:-1], lambda content: b""])
    def test_truncated_or_altered_file_is_refused(
        self, suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path
    ) -> None:
        whole = {f"{name}{suffix}": (PACKED if suffix else PLAIN)[name] for name in ARRAYS}
        name = f"{mnist.TEST_IMAGES}{suffix}"
        damaged = damage(whole[name])
        with pytest.raises(DataError) as error:
            mnist.load(write(tmp_path, {**whole, name: damaged}), checksums=CHECKSUMS)
        for part in (name, sha256(whole[name]), sha256(damaged)):
            assert part in str(error.value)

    def test_a_folder_that_is_not_complete_is_an_error(
        self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that was asked for, and the one of the environment: nothing is downloaded instead."""
        mirror = serve(FILES)
        options: Any = {"mirrors": (mirror.url,), "checksums": CHECKSUMS, "cache": tmp_path / "cache"}
        with pytest.raises(DataError, match="absent: is not a folder"):
            mnist.load(tmp_path / "absent", **options)
        folder = write(tmp_path / "mnist", {LAST: FILES[LAST]})
        monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path))
        for asked in (folder, None):
            with pytest.raises(DataError, match="lacks") as error:
                mnist.load(asked, **options)
            for name in ARRAYS:
                assert (name in str(error.value)) == (f"{name}.gz" != LAST)
        assert not mirror.fetched

    def test_images_and_labels_must_match(self, tmp_path: Path) -> None:
        short = gzip.compress(idx(ARRAYS[mnist.TEST_LABELS][:-1]), mtime=0)
        checksums = {**CHECKSUMS, mnist.TEST_LABELS: Checksums(sha256(short), "")}
        folder = write(tmp_path, {**FILES, f"{mnist.TEST_LABELS}.gz": short})
        with pytest.raises(DataError, match=r"\(5, 3, 4\) and \(4,\)"):
            mnist.load(folder, checksums=checksums)


def test_the_folder_of_the_environment_comes_before_the_cache(
    monkeypatch: pytest.MonkeyPatch, unreachable: str, tmp_path: Path
) -> None:
    write(tmp_path / "data" / "mnist", FILES)
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path / "data"))
    assert_tiny(load(tmp_path / "cache", unreachable))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path / "elsewhere"))
    assert_tiny(load(write(tmp_path / "cache", FILES), unreachable))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01" + b"\x00" * 8, "not an IDX file"),
        (b"\x00\x00\x08\x03" + b"\x00" * 8, "header ends early"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "5 bytes of values"),
        (idx(np.zeros((2, 3), np.uint8)) + b"\x00", "7 bytes of values"),
    ],
)
def test_malformed_idx_is_refused_with_its_name(content: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=f"the-file: .*{complaint}"):
        mnist.parse_idx(content, "the-file")


def test_digits_are_split_evenly_and_always_alike() -> None:
    digits = mnist.load("digits")
    assert_digits(digits)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255
    share = np.bincount(digits.test_labels) / np.bincount(np.r_[digits.train_labels, digits.test_labels])
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    for a, b in zip(digits[1:], mnist.load("digits")[1:], strict=True):
        np.testing.assert_array_equal(a, b)


DATA = Path(os.environ.get("ADAM_FN_DATA", "absent")) / "mnist"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real MNIST in $ADAM_FN_DATA/mnist")
def test_official_files_have_the_stated_checksums(tmp_path: Path) -> None:
    dataset = mnist.load(DATA)
    assert dataset.train_images.shape == (60000, 784)
    assert dataset.test_images.shape == (10000, 784)
    assert set(dataset.train_labels) == set(range(10))
    for name, checksums in mnist.CHECKSUMS.items():
        content = (DATA / f"{name}.gz").read_bytes()
        assert sha256(content) == checksums.packed
        assert sha256(gzip.decompress(content)) == checksums.plain
