"""Checkpoints of a training run, by Orbax: written whole or not at all, and the last one is where a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as to

from adam_fn import checkpoint


class OtherRunError(ValueError):
    """The checkpoints in a folder are of another run."""


class Checkpoints:
    """The checkpoints of one run in a folder, which is made where it is not there.

    A checkpoint is written under another name and gets its own when it is complete; then the one before is deleted. So
    the process may be killed at any moment.

    Args:
      folder: of this run alone.
      options: what makes a run this one, as JSON knows it; with others the folder is refused.
      tx: the optimizer.
      params: the parameters that it trains, or their shapes.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, object], tx: optax.GradientTransformation, params: optax.Params
    ) -> None:
        self.folder, self.options, self.tx = folder, dict(options), tx
        self.params = jax.eval_shape(lambda: params)  # Shapes alone: training may donate the arrays.
        self.manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
            item_handlers={"arrays": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, arrays: optax.Params, record: Mapping[str, object]) -> None:
        """`arrays` is any tree of arrays, `record` what JSON knows."""
        about = {"options": self.options, "optimizer": checkpoint.describe(self.tx, self.params)}
        items = to.Composite(arrays=to.StandardSave(arrays), record=to.JsonSave(record))  # pyright: ignore[reportCallIssue]
        self.manager.save(step, args=items, custom_metadata=about)

    def last(self, arrays: optax.Params) -> tuple[Any, dict[str, Any]] | None:
        """The arrays, laid out as `arrays` are, and the record of the last complete checkpoint, if there is one.

        Raises:
          OtherRunError: says what differs.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        about: Any = self.manager.metadata(step).custom_metadata
        theirs = about["options"]
        other = [f"{name} is {theirs.get(name)}" for name, value in self.options.items() if theirs.get(name) != value]
        if other:
            raise OtherRunError(f"{self.folder} has checkpoints of another run, whose {', '.join(other)}")
        try:
            checkpoint.check(about["optimizer"], self.tx, self.params)
        except ValueError as error:
            raise OtherRunError(f"{self.folder}: {error}") from error
        items = to.Composite(arrays=to.StandardRestore(arrays), record=to.JsonRestore())  # pyright: ignore[reportCallIssue]
        found = self.manager.restore(step, args=items)
        return found["arrays"], found["record"]
