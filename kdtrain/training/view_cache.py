"""A teacher's pooled features, stored once for each image and view where images have few.

Where a crop is the whole stored image, training sees an image in one view, or in two with
augment.flip, whatever the seed, the epoch and the batch. The features of all of them are then
computed once, before the first step, by any run that needs them, and read by image and view from
a memory-mapped file; logits are formed from them by the teacher's classifier (Task.step).

The last bits of a feature may depend on how many images are computed together, so that one kept
by itself cannot be what the teacher would say online in every batch that has it. Features are
therefore of fixed groups: GROUP images of one view, in the order of the training part. So they
are the same bits whoever computed them and however often that was interrupted, and differ from an
online teacher's by rounding: such runs have keys of their own (keys.py).

A file is one of teacher_cache.py's, with a group where that has a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtrain.config import Config
from kdtrain.data.run_data import RunData
from kdtrain.objectives.targets import Guide
from kdtrain.objectives.task import Task
from kdtrain.training.teacher_cache import STORED, KeptFile, OwnedFiles, using

GROUP = 256
"Images that are computed together."
VIEWS, NAME = ("as stored", "mirrored"), "views.hidden"


def view_owner(owner: Mapping[str, Any], config: Config, count: int) -> dict[str, Any]:
    """What a feature depends on: `owner`, as teacher_cache.identity gives it, in `count` views.

    Seed and epochs are in no view; what else the augmentation says is in their number.
    """
    views = {"views": VIEWS[:count], "crop": config.augment.crop, "group": GROUP}
    return {k: v for k, v in owner.items() if k not in ("seed", "augment")} | views


class ViewCache:
    """The features of one teacher for the training images of one data set."""

    def __init__(self, files: OwnedFiles, data: RunData, task: Task, count: int) -> None:
        """files: of `view_owner`. task: has the teacher. count: views of an image."""
        self.files, self.read, self.computed = files, 0, 0
        self.data, self.task, self.width = data, task, task.guide_widths["hidden"]
        self.train = data.train.sort().values
        parts = self.train.split(GROUP)
        self.groups = [(part, bool(view)) for view in range(count) for part in parts]
        self._rows: np.ndarray | None = None
        self._batches: Sequence[Tensor] = ()

    def reserve(self) -> None:
        """Say once how much room the features take. Raises CacheError where the disk has it not."""
        self.files.check_room({NAME: sum(len(part) for part, _ in self.groups) * self.width})

    def open(self, phase: int, epoch: int, batches: Sequence[Tensor]) -> None:
        """Turn to an epoch of index lists (B,) int64; at the first, features are computed."""
        self._batches = batches
        if self._rows is None:
            self._fill()

    def guide(self, batch: int, ask: Callable[[], Guide | None], flipped: Tensor) -> Guide:
        """The features of batch number `batch` of the epoch, whose images are mirrored where
        `flipped` (B,) says so. `ask` is not called.
        """
        assert self._rows is not None, "open comes first"
        indices = self._batches[batch]
        places = torch.searchsorted(self.train, indices) + len(self.train) * flipped.cpu().long()
        # a tensor of torch's own, so that it lies in memory the same way in every run
        kept = torch.empty(len(indices), self.width, dtype=STORED[self.files.dtype])
        kept.copy_(torch.from_numpy(self._rows[places.numpy()]))
        return Guide(logits=None, hidden=kept.to(self.files.device, torch.float32))

    def summary(self) -> str:
        """How often the teacher was asked."""
        return f"teacher's features: {self.read} groups read, {self.computed} computed"

    def close(self) -> None:
        """Let go of the file."""
        self._rows = None

    def _fill(self) -> None:
        sizes = [len(part) for part, _ in self.groups]
        belongs = {"images": len(self.train), "part": "views"}
        with contextlib.closing(KeptFile(self.files, NAME, belongs, sizes, self.width)) as file:
            for number, (part, mirrored) in enumerate(self.groups):
                if file.get(number) is not None:  # its checksum stands
                    self.read += 1
                    continue
                if not self.computed:
                    left = f"{len(self.groups) - number} groups of {GROUP}"
                    self.files.say(f"teacher's features: at most {left} are missing")
                guide = self.task.guide(self.data.teacher_view(part, mirrored))
                assert guide is not None
                assert guide.hidden is not None
                file.put(number, guide.hidden)
                self.computed += 1
        shape = (sum(sizes), self.width)
        with using(file.path):
            self._rows = np.memmap(file.path, self.files.dtype, "r", file.places[0], shape)
