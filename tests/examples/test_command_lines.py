"""Options that the scripts refuse: one line says why."""

from pathlib import Path
from types import ModuleType

import diagnostics
import distributed_mnist
import figure1
import flax_train_state
import mnist_mlp
import pytest

# In the options "{place}" is a folder that holds nothing but a file of that name.
REFUSED = [
    (mnist_mlp, "--batch 0", "argument --batch: '0' is not a whole number from 1 to 2147483647"),
    (mnist_mlp, "--learning-rate nan", "argument --learning-rate: 'nan' is not a finite number"),
    (mnist_mlp, "--weight-decay=-1", "argument --weight-decay: '-1' is not a finite number"),
    (mnist_mlp, "--seed 99999999999", "argument --seed: '99999999999' is not a whole number"),
    (mnist_mlp, "--optimizer adamm", "argument --optimizer: invalid choice: 'adamm'"),
    (mnist_mlp, "--compare --optimizer adam", "--compare gives each optimizer its own rate"),
    (mnist_mlp, "--dropout 1", "argument --dropout: 1 is not below 1"),
    (mnist_mlp, "--data {place}/absent", "absent: is not a folder"),
    (mnist_mlp, "--data digits --batch 1438", "--batch 1438 is more than the 1437 training images"),
    (mnist_mlp, "--data digits --out {place}/file", "place/file"),
    (mnist_mlp, "--data digits --checkpoint {place}/file", "place/file"),
    (flax_train_state, "--epochs none", "argument --epochs: 'none' is not a whole number from 1 to 2147483647"),
    (flax_train_state, "--data digits --batch 1438", "--batch 1438 is more than the 1437 training images"),
    (diagnostics, "--epochs none", "argument --epochs: 'none' is not a whole number"),
    (diagnostics, "--data digits --batch 1438", "--batch 1438 is more than the 1437 training images"),
    (distributed_mnist, "--data digits --batch 100", "--batch 100 cannot be divided by the 8 devices"),
    (distributed_mnist, "--coordinator host:1", "--coordinator, --processes and --process are given together"),
    (distributed_mnist, "--cluster --local 2", "--local, --cluster and --coordinator exclude one another"),
    (figure1, "--epochs 0", "argument --epochs: '0' is not a whole number"),
    (figure1, "--data {place}/absent", "absent/mnist: is not a folder"),
]


@pytest.mark.parametrize(("script", "options", "complaint"), REFUSED, ids=lambda x: getattr(x, "__name__", x))
def test_bad_options_are_reported_in_one_line(
    script: ModuleType,
    options: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(options.format(place=place).split())
    code = stop.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert code in (2, said)
    (line,) = said.splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    assert complaint in line
