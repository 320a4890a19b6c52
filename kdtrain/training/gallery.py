"""Asymmetric evaluation: the gallery's features come from another run's network, the teacher's.

A store of faces that the large network enrolled is then searched by the small one (arXiv
2011.00265): only a student whose features lie in the teacher's space finds anyone there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kdtrain.config import Config, ConfigError
from kdtrain.data.run_data import RunData
from kdtrain.models.network import FaceNetwork

VIEW = ("store_size", "crop_size", "input_size")
"""Settings of data that say how a network sees a picture; the pictures are the querying run's."""


class Gallery:
    """Pooled features of pictures by a frozen network, at its own input size and crop."""

    def __init__(self, network: FaceNetwork, theirs: Config, data: RunData) -> None:
        """theirs: the config of the network's run; data: the pictures, as the querying run has
        them.
        """
        self.network = network.eval().requires_grad_(False).to(data.device)
        view = {name: getattr(theirs.data, name) for name in VIEW}
        config = Config(  # of neither run: their targets and teachers do not matter here
            task=data.config.task,
            data=replace(data.config.data, **view),
            augment=theirs.augment,
            train=data.config.train,
        )
        # drawn faces are drawn at the stored size; files are only resized to another one
        alike = config.data.store_size == data.config.data.store_size
        shared = alike or config.data.kind != "synthetic"
        self._data = RunData(config, data.source if shared else None)
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, indices: Tensor) -> Tensor:
        """Features (N, D) float32 of the source's pictures `indices` (N,), on the run's device; the
        last answer is kept.
        """
        if self._kept is None or not torch.equal(self._kept[0], indices):
            with torch.no_grad():
                rows = [
                    self.network(batch.pictures).hidden.float()
                    for batch in self._data.evaluation(indices)
                ]
            self._kept = indices.clone(), torch.cat(rows)
        return self._kept[1]


def build_gallery(
    network: FaceNetwork, theirs: Config, data: RunData, width: int, folder: Path
) -> Gallery:
    """The gallery of the run in `folder` for a network of `width` features; see check_width."""
    check_width(network, width, folder)
    return Gallery(network, theirs, data)


def check_width(network: FaceNetwork, width: int, folder: Path) -> None:
    """Raises ConfigError where a gallery's features are not of the querying network's width."""
    if network.width != width:
        raise ConfigError(
            f"eval.gallery {folder}: its features have {network.width} numbers and this network's "
            f"{width}, so they cannot be compared: set model.embedding to {network.width} here, or "
            "eval.gallery to null"
        )
