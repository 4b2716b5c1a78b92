"""tinyshakespeare as numbers: from `$ADAM_FN_DATA`, the user's cache or a download, or else this project's license."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from numpy.typing import NDArray

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Text(NamedTuple):
    """Characters by their places in the alphabet, int32 ``[n]``, and the number of different ones."""

    codes: NDArray[np.int32]
    vocabulary: int


def load() -> Text:
    """The text, whose checksum is compared; one printed line tells if it is the substitute."""
    data = os.environ.get("ADAM_FN_DATA")
    folder = Path(data or pooch.os_cache("adam_fn")) / "tinyshakespeare"
    try:
        path = pooch.retrieve(URL, f"sha256:{SHA256}", "input.txt", folder)
        text = Path(path).read_text("utf-8")
    except OSError:  # All that requests raises.
        print("tinyshakespeare cannot be reached: the text of the license instead")
        text = (Path(__file__).parents[2] / "LICENSE").read_text("utf-8")
    alphabet, codes = np.unique(np.array(list(text)), return_inverse=True)
    return Text(codes.astype(np.int32), len(alphabet))
