"""The paper's network: a bottleneck ResNet of any width and input size, with batch normalisation on
the raw image in place of a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtrain.models.backbones.base import StagedBackbone, embedding_layer

BLOCKS = {50: (3, 4, 6, 3), 14: (1, 1, 1, 1)}
EXPANSION = 4  # outer over inner width of a bottleneck block


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the 3x3 has the stride (4.1 GMAC ResNet-50)."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = inner * EXPANSION
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, 4 inner, ceil(H / stride), ceil(W / stride))."""
        out = torch.relu_(self.norm1(self.conv1(maps)))
        out = torch.relu_(self.norm2(self.conv2(out)))
        return torch.relu_(self.norm3(self.conv3(out)) + self.shortcut(maps))


class ResNet(StagedBackbone):
    """Feature: the mean of the last maps, K = 32 * kernels; `embedding` adds a layer of that width.

    stem "imagenet": 7x7 stride 2, then a 3x3 stride 2 maximum (for 224 pixels); "small": 3x3 stride
    2 (for 32).
    """

    def __init__(
        self, depth: int, kernels: int, stem: str, *, embedding: int | None, color: str
    ) -> None:
        super().__init__(color)
        self.input_norm = nn.BatchNorm2d(3)
        if stem == "imagenet":
            self.stem = nn.Conv2d(3, kernels, 7, stride=2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.stem = nn.Conv2d(3, kernels, 3, stride=2, padding=1, bias=False)
            self.pool = nn.Identity()
        self.stem_norm = nn.BatchNorm2d(kernels)
        stages, channels = [], kernels
        self.widths = []
        for stage, count in enumerate(BLOCKS[depth]):
            inner = kernels * 2**stage
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(channels, inner, 2 if stage and not block else 1))
                channels = inner * EXPANSION
            stages.append(nn.Sequential(*blocks))
            self.widths.append(channels)
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.embedding = embedding_layer(channels, embedding)
        self.width = channels if embedding is None else embedding

    def _entry(self, images: Tensor) -> Tensor:
        return self.pool(torch.relu_(self.stem_norm(self.stem(self.input_norm(images)))))

    def _feature(self, maps: Tensor) -> Tensor:
        return self.embedding(maps.mean((2, 3)))
