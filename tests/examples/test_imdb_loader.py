"""The IMDB reviews as bags of words: folders, the cache, the official archive from a server on the loopback."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers.mirror import Serve, archive
from loaders import imdb
from loaders.mnist import Checksums, DataError

pytestmark = pytest.mark.quick

LINES = ("9 0:9 2:1 9999:300 10000:4 89526:1\n", "1 1:2\n", "7 \n", "4 5:1 3:2\n")


#: Such files as the official archive's, with the reviews of `LINES` for training and the first two for testing.
FILES = {
    f"aclImdb/{part}/labeledBow.feat": "".join(lines).encode()
    for part, lines in (("train", LINES), ("test", LINES[:2]))
}


def assert_lines(bags: imdb.Bags) -> None:
    dense = np.zeros((4, 10_000), int)
    dense[0, [0, 2, 9999]] = 9, 1, 255
    dense[1, 1] = 2
    dense[3, [3, 5]] = 2, 1
    np.testing.assert_array_equal(bags.dense(10_000), dense)
    assert bags.labels.tolist() == [1, 0, 1, 0]


def test_review_lines_are_parsed() -> None:
    assert_lines(imdb.parse(LINES))


def test_downloads_once(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive(FILES)
    checksums = {imdb.ARCHIVE: Checksums(hashlib.sha256(content).hexdigest(), "")}
    mirror = serve({"aclImdb_v1.tar.gz": content})
    for _ in range(2):
        reviews = imdb.load(mirrors=[mirror.url], checksums=checksums, cache=tmp_path / "imdb")
        assert (reviews.name, reviews.words, len(reviews.test.labels)) == ("IMDB reviews", 10_000, 2)
        assert_lines(reviews.train)
    assert mirror.fetched == ["aclImdb_v1.tar.gz"]
    assert [path.name for path in (tmp_path / "imdb").iterdir()] == [imdb.FILE]
    assert_lines(imdb.load(tmp_path / "imdb").train)
    monkeypatch.setenv("ADAM_FN_DATA", str(tmp_path))
    assert_lines(imdb.load(mirrors=()).train)


def test_without_a_network_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reviews = imdb.load(mirrors=(), cache=tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert "could not be downloaded (no mirror answers): training on synthetic reviews instead (2,000 of" in line
    assert reviews.name == "synthetic reviews"


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: is not a folder"):
        imdb.load(tmp_path / "absent")
    with pytest.raises(DataError, match=r"lacks imdb_bow10k[.]npz"):
        imdb.load(tmp_path)
    (tmp_path / imdb.FILE).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match=imdb.FILE):
        imdb.load(tmp_path)
    bags = imdb.parse(LINES)
    imdb.write(tmp_path / imdb.FILE, {"train": bags, "test": bags._replace(labels=bags.labels[1:])})
    with pytest.raises(DataError, match="do not fit together"):
        imdb.load(tmp_path)


def test_synthetic_reviews_are_sparse_balanced_and_linear() -> None:
    reviews = imdb.synthetic()
    train, test = (part.dense(reviews.words).astype(float) for part in (reviews.train, reviews.test))
    assert train.shape == (2000, 1000)
    assert (train > 0).mean() < 0.15
    frequency = train.sum(0)
    assert frequency[:10].sum() > 10 * frequency[-100:].sum() / 10, "Zipf's law"
    assert np.mean(reviews.train.labels) == pytest.approx(0.5, abs=0.05)
    signs = 2.0 * reviews.train.labels - 1
    solution = np.linalg.solve(train.T @ train + 30 * np.eye(1000), train.T @ (signs - signs.mean()))
    score = test @ solution
    assert np.mean((score > np.median(score)) == reviews.test.labels) > 0.75
