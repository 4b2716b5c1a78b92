"""CIFAR-10 as arrays: folders, the cache, the official archive from a server on the loopback, the stand-in."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers.mirror import Serve, archive
from helpers.runs import Array
from loaders import cifar, mnist
from loaders.mnist import Checksums, DataError

pytestmark = pytest.mark.quick

RECORDS = 3


def binary(seed: int) -> tuple[bytes, Array, Array]:
    """The bytes of a file of the binary version, and its images and labels."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (RECORDS, 32, 32, 3), np.uint8), rng.integers(0, 10, RECORDS, np.uint8)
    planes = images.transpose(0, 3, 1, 2)
    return b"".join(bytes([y]) + x.tobytes() for x, y in zip(planes, labels, strict=True)), images, labels


def check(found: cifar.Images) -> None:
    expected = [binary(i) for i in range(6)]
    np.testing.assert_array_equal(found.train_images, np.concatenate([images for _, images, _ in expected[:5]]))
    np.testing.assert_array_equal(found.train_labels, np.concatenate([labels for _, _, labels in expected[:5]]))
    np.testing.assert_array_equal(found.test_images, expected[5][1])
    np.testing.assert_array_equal(found.test_labels, expected[5][2])
    assert (found.train_images.dtype, found.train_labels.dtype) == (np.uint8, np.int32)


def test_binary_files(tmp_path: Path) -> None:
    for i, name in enumerate(cifar.FILES):
        (tmp_path / name).write_bytes(binary(i)[0])
    check(cifar.load(tmp_path))


def test_download_into_the_cache(serve: Serve, tmp_path: Path) -> None:
    names = (*cifar.FILES, "tables.html", "../outside.bin")
    packed = archive({f"cifar-10-batches-bin/{name}": binary(i)[0] for i, name in enumerate(names)})
    checksums = {cifar.ARCHIVE: Checksums(hashlib.sha256(packed).hexdigest(), "")}
    mirror = serve({f"{cifar.ARCHIVE}.gz": packed})
    cache = tmp_path / "cache"
    for _ in range(2):
        check(cifar.load(mirrors=(mirror.url,), checksums=checksums, cache=cache))
    assert mirror.fetched == [f"{cifar.ARCHIVE}.gz"], "the second time the cache is used"
    assert {path.name for path in cache.iterdir()} == set(cifar.FILES), "nothing else is unpacked"
    assert not (tmp_path / "outside.bin").exists()


def test_sample_of_the_training_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10)
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / "cifar10" / cifar.SAMPLE, x=x, y=y)
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path))
    found = cifar.load()
    np.testing.assert_array_equal(found.train_images, x[:8])
    np.testing.assert_array_equal(found.test_images, x[8:])
    np.testing.assert_array_equal(found.test_labels, [8, 9])


def test_without_a_network_digits_stand_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cifar.load(mirrors=(), cache=tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("CIFAR-10 could not be downloaded (no mirror answers): training on scikit-learn's digits")
    assert found.train_images.shape == (1437, 32, 32, 3)
    small = mnist.digits().train_images.reshape(-1, 8, 8)
    for channel in range(3):
        np.testing.assert_array_equal(found.train_images[:, 1::4, 3::4, channel], small)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: is not a folder"):
        cifar.load(tmp_path / "absent")
    with pytest.raises(DataError, match="holds neither data_batch_1"):
        cifar.load(tmp_path)
    content = binary(0)[0]
    for name in cifar.FILES:
        (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match="not a whole number of records"):
        cifar.load(tmp_path)
    (tmp_path / cifar.FILES[0]).write_bytes(bytes([10]) + content[1:])
    with pytest.raises(DataError, match=r"labels outside of 0\.\.9"):
        cifar.load(tmp_path)
    (tmp_path / cifar.FILES[0]).unlink()
    np.savez(tmp_path / cifar.SAMPLE, x=np.zeros((2, 3072), np.uint8), y=np.zeros(2))
    with pytest.raises(DataError, match="images of shape"):
        cifar.load(tmp_path)
