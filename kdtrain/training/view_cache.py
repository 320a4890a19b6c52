"""A teacher's pooled features, stored once for each picture and view where pictures have few.

Where a crop is the whole stored picture, training sees a picture in one view, or in two with
augment.flip, whatever the seed, the epoch and the batch. The features of all of them are then
computed once, before the first step, by any run that needs them, and read by picture and view from
a memory-mapped file; logits are formed from them by the teacher's classifier (Task.step).

The last bits of a feature may depend on how many pictures are computed together, so that one kept
by itself cannot be what the teacher would say online in every batch that has it. Features are
therefore of fixed groups: GROUP pictures of one view, in the order of the training part. So they
are the same bits whoever computed them and however often that was interrupted, and differ from an
online teacher's by rounding: such runs have keys of their own (keys.py).

A file is one of teacher_cache.py's, with a group where that has a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtrain.config import Config
from kdtrain.data import fixed_views
from kdtrain.objectives.targets import Guide
from kdtrain.training.teacher_cache import FORMAT, HEADER_BYTES, STORED, KeptFile, room, using

GROUP = 256
"Pictures that are computed together."
VIEWS = ("as stored", "mirrored")

Ask = Callable[[Tensor, bool], Tensor]
"""Features (N, width) float32 of the pictures of these indices (N,), mirrored or not."""


class ViewCache:
    """The features of one teacher for the training pictures of one data set."""

    def __init__(
        self,
        folder: Path,
        owner: Mapping[str, Any],
        width: int,
        dtype: str,
        device: torch.device | str,
        say: Callable[[str], None],
        *,
        train: Tensor,
        config: Config,
        ask: Ask,
    ) -> None:
        """folder, dtype, device, say: as TeacherCache has them. owner: what
        teacher_cache.identity gives. width: values of a feature. train: numbers (N,) of the
        training pictures. config: the run's, for its views. ask: where features come from.
        """
        count = fixed_views(config.augment, config.data.store_size, config.data.crop_side)
        assert count is not None, "crops differ from epoch to epoch"
        # seed and epochs are in no view; what else the augmentation says is in their number
        views = {"views": VIEWS[:count], "crop": config.augment.crop, "group": GROUP}
        self.owner = {k: v for k, v in owner.items() if k not in ("seed", "augment")} | views
        name = hashlib.sha256(json.dumps(self.owner, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.width, self.dtype = folder / name, width, dtype
        self.device, self.say, self._ask = torch.device(device), say, ask
        self.train = train.sort().values
        parts = self.train.split(GROUP)
        self.groups = [(part, bool(view)) for view in range(count) for part in parts]
        self.read = self.computed = 0
        self._rows: np.ndarray | None = None
        self._batches: Sequence[Tensor] = ()

    def reserve(self) -> None:
        """Say once how much room the features take. Raises CacheError where the disk has it not."""
        rows = sum(len(part) for part, _ in self.groups)
        needed = rows * self.width * STORED[self.dtype].itemsize
        missing = 0 if self._path.exists() else needed
        self.say(room(self.folder, self.dtype, needed, missing))

    def open(self, phase: int, epoch: int, batches: Sequence[Tensor]) -> None:
        """Turn to an epoch; the first time every feature that is missing is computed. batches: its
        index lists, (B,) int64 each.
        """
        self._batches = batches
        if self._rows is None:
            self._fill()

    def guide(self, batch: int, ask: Callable[[], Guide | None], flipped: Tensor) -> Guide:
        """The features of batch number `batch` of the epoch, whose pictures are mirrored where
        `flipped` (B,) says so. `ask` is not called.
        """
        assert self._rows is not None, "open comes first"
        indices = self._batches[batch]
        places = torch.searchsorted(self.train, indices) + len(self.train) * flipped.cpu().long()
        # a tensor of torch's own, so that it lies in memory the same way in every run
        kept = torch.empty(len(indices), self.width, dtype=STORED[self.dtype])
        kept.copy_(torch.from_numpy(self._rows[places.numpy()]))
        return Guide(logits=None, hidden=kept.to(self.device, torch.float32))

    def summary(self) -> str:
        """How often the teacher was asked."""
        return f"teacher's features: {self.read} groups read, {self.computed} computed"

    def close(self) -> None:
        """Let go of the file."""
        self._rows = None

    @property
    def _path(self) -> Path:
        return self.folder / f"views.hidden.{self.dtype}"

    def _fill(self) -> None:
        shape = {"part": "views", "width": self.width, "dtype": self.dtype}
        belongs = {"format": FORMAT, "images": len(self.train), **shape, **self.owner}
        header = json.dumps(belongs).encode().ljust(HEADER_BYTES)
        sizes = [len(part) for part, _ in self.groups]
        file = KeptFile(self._path, header, sizes, self.width, self.dtype, self.say)
        try:
            for number, (part, mirrored) in enumerate(self.groups):
                if file.get(number) is not None:  # its checksum stands
                    self.read += 1
                    continue
                if not self.computed:
                    left = len(self.groups) - number
                    self.say(f"teacher's features: at most {left} groups of {GROUP} are missing")
                file.put(number, self._ask(part, mirrored))
                self.computed += 1
        finally:
            file.close()
        shape = (sum(sizes), self.width)
        with using(self._path):
            self._rows = np.memmap(self._path, self.dtype, "r", file.places[0], shape)
