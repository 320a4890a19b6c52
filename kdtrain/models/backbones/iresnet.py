"""Improved residual networks of face recognition (ArcFace, arXiv 1801.07698, section 3.1): blocks
of normalisation, 3x3, normalisation, PReLU, 3x3 with the stride, normalisation.

Two families with the same blocks and different weights: arcface_torch's IResNets (`iresnet50`),
and the IRs of TFace, AdaFace and CVLface (`ir50`). A linear layer on the flattened last maps fixes
the input size: 7 x 7 places of 112 pixels in published weights.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdtrain.models.backbones.base import SizedBackbone, chain

BLOCKS = {
    **{"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 14, 3)},
    **{"100": (3, 13, 30, 3), "101": (3, 13, 30, 3)},  # IR-101 counts one layer more
}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the second has the stride."""

    def __init__(self, channels: int, outer: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.slope = nn.PReLU(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outer)
        self.shortcut = shortcut

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, outer, ceil(H / stride), ceil(W / stride))."""
        out = self.slope(self.norm2(self.conv1(self.norm1(maps))))
        return self.norm3(self.conv2(out)) + self.shortcut(maps)


class IResNet(SizedBackbone):
    """Stages end at 1/2, 1/4, 1/8 and 1/16 of the image; feature: the embedding.

    iresnet: every stage begins with a convolution as its shortcut, and the weight of the last
    normalisation stays 1 (`requires_grad` False). ir: with equal channels that shortcut takes every
    second place without a weight, and the last normalisation has neither weight nor bias; dropout
    is omitted. divide: every layer but the embedding has 1 / divide of the channels.
    """

    def __init__(
        self, name: str, divide: int, *, embedding: int, input_size: int, color: str
    ) -> None:
        super().__init__(color, input_size)
        family, layers = name.rstrip("0123456789"), name.lstrip("irenst")
        plain = family == "ir"
        channels = 64 // divide
        self.stem = chain(
            conv=nn.Conv2d(3, channels, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(channels),
            slope=nn.PReLU(channels),
        )
        stages, self.widths = [], []
        for stage, count in enumerate(BLOCKS[layers]):
            outer = 64 * 2**stage // divide
            blocks = [Block(channels, outer, 2, _shortcut(channels, outer, plain=plain))]
            blocks += [Block(outer, outer, 1, nn.Identity()) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = outer
            self.widths.append(outer)
        self.stages = nn.Sequential(*stages)
        self.last_norm = nn.BatchNorm2d(channels)
        self.embedding = nn.Linear(channels * self.side**2, embedding)
        self.embedding_norm = nn.BatchNorm1d(embedding, affine=not plain)
        if not plain:
            # as published: one scale for every value of the embedding
            self.embedding_norm.weight.requires_grad_(False)
        self.width = embedding
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if plain:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=0.1)

    def _feature(self, maps: Tensor) -> Tensor:
        # flatten is channel by channel in any memory layout
        flat = self.last_norm(self._checked(maps)).flatten(1)
        return self.embedding_norm(self.embedding(flat))


def _shortcut(channels: int, outer: int, *, plain: bool) -> nn.Module:
    if plain and channels == outer:
        return nn.MaxPool2d(1, 2)  # every second place
    return nn.Sequential(nn.Conv2d(channels, outer, 1, 2, bias=False), nn.BatchNorm2d(outer))
