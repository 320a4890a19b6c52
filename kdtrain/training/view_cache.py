"""Teacher features cached once per image and view, for crops that are the whole stored image.

Training then has one view per image, or two with augment.flip, for every seed, epoch and batch. The
first run that needs the features computes them before its first step; they are read by image and
view from a memory-mapped file, and the teacher's classifier forms logits from them (Task.step).

The last bits of a feature may depend on the number of images computed together. Features are
therefore computed in fixed groups, GROUP images of one view: bitwise identical for every run, and
equal to a forward pass on the batch up to rounding, so that such runs have other keys (keys.py). A
file has the format of teacher_cache.py, with a group in place of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kdtrain.data.run_data import RunData
from kdtrain.objectives.targets import Guide
from kdtrain.objectives.task import Task
from kdtrain.training.teacher_cache import STORED, CacheFile, OwnedFiles, using

GROUP = 256  # Images computed together
VIEWS, NAME = ("as stored", "mirrored"), "views.hidden"


class ViewCache:
    """The features of one teacher for the training images of one data set."""

    def __init__(self, files: OwnedFiles, data: RunData, task: Task, count: int) -> None:
        """Checks the room for the features. task: with the teacher. count: views per image."""
        self.files, self.read, self.computed = files, 0, 0
        self.data, self.task, self.width = data, task, task.guide_widths["hidden"]
        self.train = data.train.sort().values
        parts = self.train.split(GROUP)
        self.groups = [(part, bool(view)) for view in range(count) for part in parts]
        self._rows: np.ndarray | None = None
        self._batches: Sequence[Tensor] = ()
        self.files.check_room({NAME: sum(len(part) for part, _ in self.groups) * self.width})

    def open(self, phase: int, epoch: int, batches: Sequence[Tensor]) -> None:
        """Takes an epoch's index lists (B,) int64; computes all features at the first one."""
        self._batches = batches
        if self._rows is None:
            self._fill()

    def guide(self, batch: int, compute: Callable[[], Guide], flipped: Tensor) -> Guide:
        """Returns the features of batch number `batch`, mirrored where `flipped` (B,) is set."""
        assert self._rows is not None, "open comes first"
        indices = self._batches[batch]
        places = torch.searchsorted(self.train, indices) + len(self.train) * flipped.cpu().long()
        # allocated by torch, so that its alignment is the same in every run
        hidden = torch.empty(len(indices), self.width, dtype=STORED[self.files.dtype])
        hidden.copy_(torch.from_numpy(self._rows[places.numpy()]))
        return Guide(logits=None, hidden=hidden.to(self.files.device, torch.float32))

    def summary(self) -> str:
        """Returns a line with the numbers of cached and computed groups."""
        return f"teacher features: {self.read} groups read, {self.computed} computed"

    def close(self) -> None:
        self._rows = None

    def _fill(self) -> None:
        sizes = [len(part) for part, _ in self.groups]
        belongs = {"images": len(self.train), "part": "views"}
        with contextlib.closing(CacheFile(self.files, NAME, belongs, sizes, self.width)) as file:
            for number, (part, mirrored) in enumerate(self.groups):
                if file.get(number) is not None:  # with a matching checksum
                    self.read += 1
                    continue
                if not self.computed:
                    left = f"{len(self.groups) - number} groups of {GROUP}"
                    self.files.say(f"teacher features: at most {left} are missing")
                guide = self.task.guide(self.data.teacher_view(part, mirrored))
                assert guide.hidden is not None
                file.put(number, guide.hidden)
                self.computed += 1
        shape = (sum(sizes), self.width)
        with using(file.path):
            self._rows = np.memmap(file.path, self.files.dtype, "r", file.places[0], shape)
