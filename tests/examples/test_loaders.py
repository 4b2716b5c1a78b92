"""The examples' data sets: folders, the user's cache, downloads from servers on the loopback, and stand-ins."""

import gzip
import hashlib
import io
import os
import re
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import chex
import numpy as np
import pytest
from helpers.runs import Array
from loaders import cifar, imdb, mnist
from loaders.mnist import Checksums, DataError
from sklearn.linear_model import RidgeClassifier

pytestmark = pytest.mark.quick

Files = dict[str, bytes]
NOBODY = "http://127.0.0.1:1/"  # An address on which nobody listens.


class Mirror(NamedTuple):
    url: str
    fetched: list[str]


Serve = Callable[..., Mirror]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the environment's data sets, and keeps proxies away from the loopback."""
    monkeypatch.delenv("ADAM_FN_DATA", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers of some files; only the first half of the file `cut` arrives."""
    servers: list[ThreadingHTTPServer] = []

    def start(files: Files, cut: str = "") -> Mirror:
        fetched: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                name = self.path.removeprefix("/")
                content = files.get(name, b"")
                self.send_response(200 if name in files else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    fetched.append(name)
                    self.wfile.write(content[: len(content) // 2] if name == cut else content)

            def do_GET(self) -> None:
                self.do_HEAD()

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return Mirror(f"http://127.0.0.1:{servers[-1].server_address[1]}/", fetched)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Data(NamedTuple):
    """A data set of a few records: the files that a mirror serves, those kept in the cache, and the arrays in them."""

    loader: Any
    folder: str
    name: str
    standin: str
    served: Files
    kept: set[str]
    arrays: tuple[Array, ...]

    def load(self, *args: Any, **options: Any) -> Any:
        checksums = {
            name.removesuffix(".gz"): Checksums(sha256(content), sha256(gzip.decompress(content)))
            for name, content in self.served.items()
        }
        return self.loader.load(*args, checksums=checksums, **options)

    def check(self, found: Any) -> None:
        assert found.name == self.name
        dense = [(bags.dense(imdb.WORDS), bags.labels) for bags in found[2:]] if self.loader is imdb else []
        chex.assert_trees_all_equal(sum(dense, ()) or found[1:], self.arrays, strict=True)


def archive(files: Files) -> bytes:
    """A tar.gz of these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as members:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            members.addfile(member, io.BytesIO(data))
    return content.getvalue()


RNG = np.random.default_rng(0)


def images_and_labels(count: int, *shape: int) -> tuple[Array, Array]:
    return RNG.integers(0, 256, (count, *shape), np.uint8), RNG.integers(0, 10, count, np.int32)


def idx(values: Array) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


TRAIN, TEST = images_and_labels(7, 3, 4), images_and_labels(5, 3, 4)
PLAIN = {
    mnist.TEST_LABELS: idx(TEST[1]),
    mnist.TRAIN_LABELS: idx(TRAIN[1]),
    mnist.TEST_IMAGES: idx(TEST[0]),
    mnist.TRAIN_IMAGES: idx(TRAIN[0]),
}
PACKED = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in PLAIN.items()}
LAST = f"{mnist.TRAIN_IMAGES}.gz"
DIGITS = TRAIN[0].reshape(7, 12), TRAIN[1], TEST[0].reshape(5, 12), TEST[1]
MNIST = Data(mnist, "mnist", "MNIST", "digits", PACKED, {*PACKED}, DIGITS)


def binary(images: Array, labels: Array) -> bytes:
    """A file of CIFAR-10's binary version."""
    return np.c_[labels, images.transpose(0, 3, 1, 2).reshape(len(labels), -1)].astype(np.uint8).tobytes()


IMAGES, LABELS = images_and_labels(18, 32, 32, 3)
BINARY = {name: binary(IMAGES[3 * i : 3 * i + 3], LABELS[3 * i : 3 * i + 3]) for i, name in enumerate(cifar.FILES)}
BATCHES = {f"cifar-10-batches-bin/{name}": content for name, content in BINARY.items()}
BATCHES |= {"cifar-10-batches-bin/tables.html": b"no data", "cifar-10-batches-bin/../outside.bin": b"no data"}
OBJECTS = IMAGES[:15], LABELS[:15], IMAGES[15:], LABELS[15:]
SERVED = {f"{cifar.ARCHIVE}.gz": archive(BATCHES)}
CIFAR = Data(cifar, "cifar10", "CIFAR-10", "standin", SERVED, {*cifar.FILES}, OBJECTS)

LINES = "9 0:9 2:1 9999:300 10000:4 89526:1\n", "1 1:2\n", "7 \n", "4 5:1 3:2\n"
BAGS, LIKED = np.zeros((4, imdb.WORDS), np.uint8), np.array([1, 0, 1, 0], np.uint8)
BAGS[0, [0, 2, 9999]] = 9, 1, 255
BAGS[1, 1] = 2
BAGS[3, [3, 5]] = 2, 1
PARTS = {"train": LINES, "test": LINES[:2]}
SERVED = {f"{imdb.ARCHIVE}.gz": archive({f"aclImdb/{x}/labeledBow.feat": "".join(PARTS[x]).encode() for x in PARTS})}
IMDB = Data(imdb, "imdb", "IMDB reviews", "standin", SERVED, {imdb.FILE}, (BAGS, LIKED, BAGS[:2], LIKED[:2]))

ALL = pytest.mark.parametrize("data", (MNIST, CIFAR, IMDB), ids=lambda data: data.folder)


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@ALL
def test_data_are_downloaded_once_and_found_in_the_cache_and_in_folders(
    data: Data, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, place = serve(data.served), tmp_path / data.folder
    for _ in range(2):
        data.check(data.load(mirrors=[site.url], cache=place))
    assert sorted(site.fetched) == sorted(data.served)
    assert {path.name for path in tmp_path.rglob("*.*")} | {path.name for path in place.iterdir()} == data.kept
    data.check(data.load(place, mirrors=()))
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path / "elsewhere"))
    data.check(data.load(mirrors=(), cache=place))
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path))
    data.check(data.load(mirrors=(), cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@ALL
def test_without_a_mirror_one_line_names_the_stand_in(
    data: Data, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mirror, tried, reason in ((NOBODY, 0, "no mirror answers)"), (serve({}).url, 2, "404 from")):
        found = data.load(mirrors=(mirror, mirror), cache=tmp_path)
        *downloads, line = capsys.readouterr().out.splitlines()
        assert len(downloads) == tried
        assert f"{data.name} could not be downloaded ({reason}" in line
        assert f"training on {found.name} instead" in line
        assert not list(tmp_path.iterdir())
        np.testing.assert_equal(found, data.load(data.standin))


def npz(**arrays: Array) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def altered(name: str, whole: bytes, damaged: bytes) -> str:
    return f"{name}: truncated or altered: expected sha256 {sha256(whole)}, found {sha256(damaged)}"


def flipped(content: bytes) -> bytes:
    """`content` with one bit changed near its end."""
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def with_last(content: bytes) -> tuple[Data, Files]:
    """MNIST with other training images, and checksums of them."""
    files = {**PACKED, LAST: gzip.compress(content, mtime=0)}
    return MNIST._replace(served=files), files


PIXELS = idx(np.zeros((2, 3), np.uint8))
UNEVEN = {f"{part}_{name}": np.zeros(2 * (name == "indptr"), int) for part in PARTS for name in imdb.Bags._fields}
REFUSED: list[tuple[Data, Files, str]] = [
    *(
        (MNIST, files | {name: damaged}, altered(name, files[name], damaged))
        for files, name in ((PACKED, LAST), (PLAIN, mnist.TEST_LABELS))
        for damaged in (flipped(files[name]), files[name][:-1], b"")
    ),
    (MNIST, {LAST: PACKED[LAST]}, f"lacks {', '.join([*PLAIN][:3])} (.gz or plain)"),
    (*with_last(b""), f"{LAST}: not an IDX file"),
    (*with_last(b"\x00\x00\x0d\x01" + b"\x00" * 8), f"{LAST}: not an IDX file"),
    (*with_last(b"\x00\x00\x08\x03" + b"\x00" * 8), f"{LAST}: the header ends early"),
    (*with_last(PIXELS[:-1]), f"{LAST}: 5 bytes of values"),
    (*with_last(PIXELS + b"\x00"), f"{LAST}: 7 bytes of values"),
    (*with_last(PLAIN[mnist.TEST_IMAGES]), "(5, 3, 4) and (7,)"),
    (CIFAR, {}, "holds neither data_batch_1"),
    (CIFAR, {name: content[:-1] for name, content in BINARY.items()}, "not a whole number of records"),
    (CIFAR, {name: bytes([10]) + content[1:] for name, content in BINARY.items()}, "labels outside of 0..9"),
    (CIFAR, {cifar.SAMPLE: npz(x=np.zeros((2, 3072), np.uint8), y=np.zeros(2))}, "images of shape"),
    (IMDB, {}, f"lacks {imdb.FILE}"),
    (IMDB, {imdb.FILE: b"PK\x03\x04 cut off"}, imdb.FILE),
    (IMDB, {imdb.FILE: npz(**UNEVEN)}, "do not fit together"),
]


@pytest.mark.parametrize(("data", "files", "complaint"), REFUSED, ids=[complaint for *_, complaint in REFUSED])
def test_a_folder_that_does_not_hold_the_data_is_an_error(
    data: Data, files: Files, complaint: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument or the environment names the folder: nothing is downloaded instead."""
    site = serve(data.served)
    folder = write(tmp_path / data.folder, files)
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path))
    for asked, wrong in ((folder, complaint), (None, complaint), (tmp_path / "absent", "absent: is not a folder")):
        with pytest.raises(DataError, match=re.escape(wrong)):
            data.load(asked, mirrors=(site.url,), cache=tmp_path / "cache")
    assert not site.fetched


ALTERED = PACKED | {LAST: flipped(PACKED[LAST])}


class TestMnist:
    def test_packed_and_plain_files_may_be_mixed(self, tmp_path: Path) -> None:
        MNIST.check(MNIST.load(write(tmp_path, {LAST: PACKED[LAST]} | dict([*PLAIN.items()][:3]))))

    @pytest.mark.parametrize(
        "first",
        [({name: PACKED[name] for name in PACKED if name != LAST},), (PACKED, LAST), (ALTERED,)],
        ids=["lacks a file", "breaks off", "has an altered file"],
    )
    def test_the_second_mirror_serves_if_the_first(self, first: tuple[Any, ...], serve: Serve, tmp_path: Path) -> None:
        site, second = serve(*first), serve(PACKED)
        MNIST.check(MNIST.load(mirrors=(NOBODY, site.url, second.url), cache=tmp_path))
        assert set(site.fetched) == set(PACKED)
        assert second.fetched == [LAST]

    def test_altered_download_is_refused(self, serve: Serve, tmp_path: Path) -> None:
        hashes = f"{LAST}: .*{sha256(PACKED[LAST])}.*{sha256(ALTERED[LAST])}"
        with pytest.raises(DataError, match=hashes):
            MNIST.load(mirrors=(serve(ALTERED).url,), cache=tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*PACKED} - {LAST}

    def test_altered_file_in_the_cache_is_replaced(
        self, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        site = serve(PACKED)
        MNIST.check(MNIST.load(mirrors=(site.url,), cache=write(tmp_path, ALTERED)))
        assert site.fetched == [LAST]
        said = f"{altered(LAST, PACKED[LAST], ALTERED[LAST])}; downloading it again"
        assert said in capsys.readouterr().out.splitlines()[0]

    def test_a_mirror_that_never_answers_costs_only_the_timeout(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
            start = time.monotonic()
            with pytest.raises(mnist.UnreachableError, match="no mirror answers"):
                mnist.download(tmp_path, (url, url), mnist.CHECKSUMS, timeout=0.2)
            assert time.monotonic() - start < 2.0

    def test_digits_are_split_evenly(self) -> None:
        digits = mnist.load("digits")
        assert (digits.train_images.shape, digits.test_images.shape) == ((1437, 64), (360, 64))
        assert (digits.train_images.dtype, digits.train_images.max()) == (np.uint8, 255)
        share = np.bincount(digits.test_labels) / np.bincount(np.r_[digits.train_labels, digits.test_labels])
        np.testing.assert_allclose(share, 0.2, atol=0.01)

    DATA = Path(os.environ.get("ADAM_FN_DATA", "absent")) / "mnist"

    @pytest.mark.skipif(not DATA.is_dir(), reason="needs the real MNIST in $ADAM_FN_DATA/mnist")
    def test_official_files_have_the_stated_checksums(self) -> None:
        dataset = mnist.load(self.DATA)
        assert dataset.train_images.shape == (60000, 784)
        assert dataset.test_images.shape == (10000, 784)
        assert set(dataset.train_labels) == set(range(10))
        for name, checksums in mnist.CHECKSUMS.items():
            content = (self.DATA / f"{name}.gz").read_bytes()
            assert Checksums(sha256(content), sha256(gzip.decompress(content))) == checksums


def test_a_sample_of_cifars_training_set_is_split(tmp_path: Path) -> None:
    x, y = RNG.integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10)
    found = cifar.load(write(tmp_path, {cifar.SAMPLE: npz(x=x, y=y)}))
    chex.assert_trees_all_equal(found[1:], (x[:8], y[:8], x[8:], y[8:]))


def test_digits_stand_in_for_cifar_enlarged() -> None:
    found, small = cifar.load("standin"), mnist.digits()
    np.testing.assert_array_equal(found.test_labels, small.test_labels)
    for channel in range(3):
        np.testing.assert_array_equal(found.train_images[:, 1::4, 3::4, channel].reshape(-1, 64), small.train_images)


def test_synthetic_reviews_are_sparse_balanced_and_linear() -> None:
    reviews = imdb.synthetic()
    train, test = (part.dense(reviews.words).astype(float) for part in (reviews.train, reviews.test))
    assert train.shape == (2000, 1000)
    assert (train > 0).mean() < 0.15
    assert train[:, :10].sum() > train[:, -100:].sum(), "Zipf's law"
    assert np.mean(reviews.train.labels) == pytest.approx(0.5, abs=0.05)
    linear = RidgeClassifier(alpha=30).fit(train, reviews.train.labels)
    assert linear.score(test, reviews.test.labels) > 0.75
