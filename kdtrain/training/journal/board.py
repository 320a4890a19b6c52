"""The journal as TensorBoard shows it: a view of metrics.jsonl and timing.jsonl, made anew whenever
a run is taken up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdtrain.config import Config, ConfigError
from kdtrain.training.checkpoint import run_file, writing

TENSORBOARD = run_file("tensorboard")
PLACE = ("kind", "step", "phase", "epoch", "phase_ends", "split")


def check_board(config: Config) -> None:
    """Raises ConfigError when train.tensorboard is asked for and its package is missing."""
    if not config.train.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.tensorboard: {error}; install kdkernels[tensorboard], or set train.tensorboard "
            "to false (metrics.jsonl holds the same numbers)"
        ) from None


class Board:
    """Event files of one run below `folder`: every number of a journal's record under KIND/NAME at
    its step.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """records: what the journal holds already. Events of before are removed and written again
        from it: an event file cannot be cut back to the checkpoint that a run continues from.
        """
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer, self._folder = SummaryWriter(str(folder)), folder
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it has `step`, and `kind` unless it is one of timing."""
        kind = record.get("kind", "timing")
        for name, value in record.items():
            if name not in PLACE and isinstance(value, (int, float)):
                with writing(self._folder, 100):
                    self._writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what waits and close the files."""
        self._writer.close()
