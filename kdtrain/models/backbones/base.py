"""The interface of backbones: raw RGB images to one feature per image, and to stage maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

import torch
from torch import Tensor, nn


def wide(values: Tensor) -> Tensor:
    """Returns values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def attention_map(maps: Tensor) -> Tensor:
    """Returns Q of attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928, section
    3.1): the squares of maps (N, C, h, w) summed over channels, (N, h, w), in float32 at least.
    """
    return wide(maps).square().sum(1)


class Backbone(nn.Module, ABC):
    """(N, 3, H, W) raw RGB images in [0, 255] -> (N, width) features; scaling is the network's own.

    color: channel order of the weights; "bgr" reverses the input's channels.
    """

    width: int  # Width of a feature
    widths: list[int]  # Channels of each stage's maps

    def __init__(self, color: str) -> None:
        super().__init__()
        self.color = color

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, width)."""

    @abstractmethod
    def maps(self, images: Tensor, stage: int) -> Tensor:
        """Maps (N, widths[stage - 1], h, w) of stage 1, 2, ...; later layers do not run."""

    @abstractmethod
    def attend(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features, and the attention_map (N, h, w) of each stage."""

    def extra_repr(self) -> str:
        """Settings that are in no weight."""
        return f"color={self.color}"

    def _ordered(self, images: Tensor) -> Tensor:
        return images.flip(1) if self.color == "bgr" else images


class StagedBackbone(Backbone):
    """An entry, a sequence of stages, and a feature of the last maps."""

    stages: nn.Sequential

    def forward(self, images: Tensor) -> Tensor:
        return self._feature(self.maps(images, len(self.stages)))

    def maps(self, images: Tensor, stage: int) -> Tensor:
        maps = self._entry(self._ordered(images))
        for part in list(self.stages)[:stage]:
            maps = part(maps)
        return maps

    def attend(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps, attention = self._entry(self._ordered(images)), []
        for part in self.stages:
            maps = part(maps)
            attention.append(attention_map(maps))
        return self._feature(maps), tuple(attention)

    @abstractmethod
    def _entry(self, images: Tensor) -> Tensor:
        """Input of the first stage, from images in the weights' channel order."""

    @abstractmethod
    def _feature(self, maps: Tensor) -> Tensor:
        """(N, width) of the last stage's maps."""


class SizedBackbone(StagedBackbone):
    """A backbone of one input size: a weight per place of the last maps, side x side."""

    stem: nn.Sequential

    def __init__(self, color: str, input_size: int) -> None:
        super().__init__(color)
        self.side = -(-input_size // 16)  # after four layers of stride 2

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}"

    def _entry(self, images: Tensor) -> Tensor:
        return self.stem((images - 127.5) / 127.5)  # [-1, 1], as published face networks

    def _checked(self, maps: Tensor) -> Tensor:
        """maps, if of the right size, else raises ValueError."""
        height, width = maps.shape[-2:]
        if (height, width) != (self.side, self.side):
            raise ValueError(
                f"FaceNetwork: its last layers were built for images of {16 * self.side - 15} to "
                f"{16 * self.side} pixels a side, and these leave maps of {height} x {width} where "
                f"{self.side} x {self.side} are needed; set data.input_size (for a teacher "
                "teacher.input_size, with data.crop_size and data.store_size at least that) to its "
                "training size, or train a network for this size"
            )
        return maps


def chain(**layers: nn.Module | None) -> nn.Sequential:
    """Returns the layers in sequence under their names, without those that are None."""
    return nn.Sequential(OrderedDict((n, m) for n, m in layers.items() if m is not None))


def embedding_layer(channels: int, width: int | None) -> nn.Module:
    """Returns a linear layer without bias and a batch normalisation; an identity for width None."""
    if width is None:
        return nn.Identity()
    return chain(linear=nn.Linear(channels, width, bias=False), norm=nn.BatchNorm1d(width))
