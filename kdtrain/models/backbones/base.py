"""What every backbone does: raw RGB images in, one feature an image and its stages' maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

import torch
from torch import Tensor, nn


def wide(values: Tensor) -> Tensor:
    """Values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def attention_map(maps: Tensor) -> Tensor:
    """Where a network looks: the squared activations of maps (N, C, h, w), summed over channels.

    Q of attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1); (N, h, w)
    in float32 at least.
    """
    return wide(maps).square().sum(1)


class Backbone(nn.Module, ABC):
    """(N, 3, H, W) raw RGB images in [0, 255] -> (N, width) features.

    color "bgr": the weights want the channels in this order, so the network turns them round.
    Scaling of the input is the network's own too.
    """

    width: int
    """Values of a feature."""
    widths: list[int]
    """Channels of each stage's maps, the first stage first."""

    def __init__(self, color: str) -> None:
        super().__init__()
        self.color = color

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (N, width)."""

    @abstractmethod
    def maps(self, images: Tensor, stage: int) -> Tensor:
        """Output (N, widths[stage - 1], h, w) of stage 1, 2, ...; the layers above it do not
        run.
        """

    @abstractmethod
    def attend(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features, and the attention_map (N, h, w) of each stage."""

    def extra_repr(self) -> str:
        """What the weights do not tell of this network."""
        return f"color={self.color}"

    def _ordered(self, images: Tensor) -> Tensor:
        return images.flip(1) if self.color == "bgr" else images


class StagedBackbone(Backbone):
    """A backbone of layers of ours: an entry, stages one after another, and a feature of the last
    maps.
    """

    stages: nn.Sequential

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, width)."""
        return self._feature(self.maps(images, len(self.stages)))

    def maps(self, images: Tensor, stage: int) -> Tensor:
        """Output of one stage; see Backbone.maps."""
        maps = self._entry(self._ordered(images))
        for part in list(self.stages)[:stage]:
            maps = part(maps)
        return maps

    def attend(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features, and the attention_map of each stage."""
        maps, attention = self._entry(self._ordered(images)), []
        for part in self.stages:
            maps = part(maps)
            attention.append(attention_map(maps))
        return self._feature(maps), tuple(attention)

    @abstractmethod
    def _entry(self, images: Tensor) -> Tensor:
        """What the first stage reads, of images in the weights' colour order."""

    @abstractmethod
    def _feature(self, maps: Tensor) -> Tensor:
        """(N, width) of the last stage's maps."""


class SizedBackbone(StagedBackbone):
    """A backbone whose last layers have a weight for every place of the last maps, which therefore
    are as large as it was built for: side x side, side = ceil(input size / 16).
    """

    def __init__(self, color: str, input_size: int) -> None:
        super().__init__(color)
        self.side = -(-input_size // 16)  # after four layers of stride 2

    def extra_repr(self) -> str:
        """Colour order and input."""
        return f"{super().extra_repr()}, side={self.side}"

    def _scaled(self, images: Tensor) -> Tensor:
        """[0, 255] -> [-1, 1], as the field's face networks are trained."""
        return (images - 127.5) / 127.5

    def _checked(self, maps: Tensor) -> Tensor:
        """maps, whose size is what the weights are for. Raises ValueError."""
        height, width = maps.shape[-2:]
        if (height, width) != (self.side, self.side):
            raise ValueError(
                f"FaceNetwork: its last layers were built for images of {16 * self.side - 15} to "
                f"{16 * self.side} pixels a side, and these leave maps of {height} x {width} where "
                f"{self.side} x {self.side} are needed; set data.input_size (for a teacher "
                "teacher.input_size, with data.crop_size and data.store_size at least that) to the "
                "size that it was trained on, or train one for this size"
            )
        return maps


def chain(**layers: nn.Module | None) -> nn.Sequential:
    """The layers one after another under their names, without those that are None."""
    return nn.Sequential(OrderedDict((n, m) for n, m in layers.items() if m is not None))


def embedding_layer(channels: int, width: int | None) -> nn.Module:
    """Linear without bias, and a batch normalisation: how MobileFaceNets end. None: no layer."""
    if width is None:
        return nn.Identity()
    return chain(linear=nn.Linear(channels, width, bias=False), norm=nn.BatchNorm1d(width))
