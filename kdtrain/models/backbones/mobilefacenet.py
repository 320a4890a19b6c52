"""MobileFaceNets (Chen et al. 2018, arXiv 1804.07573): the original, and arcface_torch's two wider
ones. A global depthwise convolution on the last maps fixes the input size.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdtrain.models.backbones.base import SizedBackbone, chain, embedding_layer

SCALES = {"mobilefacenet": 1, "mbf": 2, "mbf_large": 4}  # channels of the first layers over 64
BLOCKS = {"mobilefacenet": (1, 4, 6, 2), "mbf": (1, 4, 6, 2), "mbf_large": (2, 8, 12, 4)}
"""Residual blocks of each stage; 1 in the first is a grouped convolution alone."""
LAST = 512  # channels of the last maps, in every one of them


class Inverted(nn.Module):
    """1x1 to `inner`, 3x3 depthwise with stride, 1x1 to `outer`; an identity if `residual`."""

    def __init__(
        self, channels: int, inner: int, outer: int, stride: int, *, residual: bool
    ) -> None:
        super().__init__()
        self.expand = _unit(channels, inner, 1)
        self.depthwise = _unit(inner, inner, 3, stride, groups=inner)
        self.project = _unit(inner, outer, 1, slope=False)
        self.residual = residual

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, outer, ceil(H / stride), ceil(W / stride))."""
        out = self.project(self.depthwise(self.expand(maps)))
        return maps + out if self.residual else out


class MobileFaceNet(SizedBackbone):
    """Stages end at 1/2, 1/4, 1/8 and 1/16 of the image; feature: the embedding.

    divide: every layer but the embedding has 1 / divide of the channels.
    """

    def __init__(
        self, name: str, divide: int, *, embedding: int, input_size: int, color: str
    ) -> None:
        super().__init__(color, input_size)
        scale, blocks = SCALES[name], BLOCKS[name]
        narrow, wide, last = 64 * scale // divide, 128 * scale // divide, LAST // divide
        inner = [width // divide for width in (128, 256, 512)]  # for any scale
        self.stem = _unit(3, narrow, 3, 2)
        if blocks[0] == 1:
            first: nn.Module = _unit(narrow, narrow, 3, groups=64 // divide)
        else:
            first = _residuals(narrow, inner[0], blocks[0])
        self.stages = nn.Sequential(
            nn.Sequential(first),
            _stage(narrow, inner[0], narrow, inner[0], blocks[1]),
            _stage(narrow, inner[1], wide, inner[1], blocks[2]),
            _stage(wide, inner[2], wide, inner[1], blocks[3]),
        )
        self.widths = [narrow, narrow, wide, wide]
        self.separable = _unit(wide, last, 1)
        self.depthwise = _unit(
            last, last, self.side, padding=0, groups=last, slope=False
        )  # (N, last, 1, 1)
        self.embedding = embedding_layer(last, embedding)
        self.width = embedding
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _feature(self, maps: Tensor) -> Tensor:
        return self.embedding(self.depthwise(self.separable(self._checked(maps))).flatten(1))


def _unit(
    channels: int,
    outer: int,
    kernel: int,
    stride: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    slope: bool = True,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, PReLU."""
    around = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(channels, outer, kernel, stride, around, groups=groups, bias=False)
    return chain(conv=conv, norm=nn.BatchNorm2d(outer), slope=nn.PReLU(outer) if slope else None)


def _residuals(channels: int, inner: int, count: int) -> nn.Sequential:
    return nn.Sequential(
        *(Inverted(channels, inner, channels, 1, residual=True) for _ in range(count))
    )


def _stage(channels: int, down: int, outer: int, inner: int, count: int) -> nn.Sequential:
    """A block of stride 2 with `down` channels, then residual blocks of `inner`."""
    return nn.Sequential(
        Inverted(channels, down, outer, 2, residual=False), *_residuals(outer, inner, count)
    )
