"""The published networks as their projects define them, layer by layer under their names, to
compare with after an import: slow and literal, at any width and input.

arcface_torch (insightface, recognition/arcface_torch/backbones), AdaFace (net.py) and CVLface
(models/iresnet). `places` is the side of the last maps: 7 in everything published.
"""

from __future__ import annotations

import torch
from torch import nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ArcfaceBlock(nn.Module):
    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes, eps=1e-5)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=1e-5)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes, eps=1e-5)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False),
                nn.BatchNorm2d(planes, eps=1e-5),
            )

    def forward(self, x):
        out = self.conv1(self.bn1(x))
        out = self.prelu(self.bn2(out))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class ArcfaceIResNet(nn.Module):
    def __init__(self, depth, num_features, places):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-5)
        self.prelu = nn.PReLU(64)
        inplanes = 64
        for number, count in enumerate(LAYERS[depth]):
            planes = 64 * 2**number
            blocks = [ArcfaceBlock(inplanes, planes, 2)]
            blocks += [ArcfaceBlock(planes, planes, 1) for _ in range(1, count)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            inplanes = planes
        self.bn2 = nn.BatchNorm2d(512, eps=1e-5)
        self.fc = nn.Linear(512 * places**2, num_features)
        self.features = nn.BatchNorm1d(num_features, eps=1e-5)
        self.features.weight.requires_grad = False

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(torch.flatten(self.bn2(x), 1)))


class ConvBlock(nn.Module):
    def __init__(self, in_c, out_c, kernel, stride, padding, groups=1, linear=False):
        super().__init__()
        layers = [
            nn.Conv2d(in_c, out_c, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_c),
        ]
        self.layers = nn.Sequential(*layers, *([] if linear else [nn.PReLU(out_c)]))

    def forward(self, x):
        return self.layers(x)


class DepthWise(nn.Module):
    def __init__(self, in_c, out_c, groups, stride=2, residual=False):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBlock(in_c, groups, 1, 1, 0),
            ConvBlock(groups, groups, 3, stride, 1, groups=groups),
            ConvBlock(groups, out_c, 1, 1, 0, linear=True),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class Residual(nn.Module):
    def __init__(self, c, count, groups):
        super().__init__()
        self.layers = nn.Sequential(*(DepthWise(c, c, groups, 1, True) for _ in range(count)))

    def forward(self, x):
        return self.layers(x)


class GDC(nn.Module):
    def __init__(self, num_features, places):
        super().__init__()
        self.layers = nn.Sequential(
            ConvBlock(512, 512, places, 1, 0, groups=512, linear=True),
            nn.Flatten(),
            nn.Linear(512, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )

    def forward(self, x):
        return self.layers(x)


class ArcfaceMobileFaceNet(nn.Module):
    def __init__(self, blocks, scale, num_features, places):
        super().__init__()
        narrow, wide = 64 * scale, 128 * scale
        second = (
            ConvBlock(narrow, narrow, 3, 1, 1, groups=64)
            if blocks[0] == 1
            else Residual(narrow, blocks[0], 128)
        )
        self.layers = nn.ModuleList(
            [
                ConvBlock(3, narrow, 3, 2, 1),
                second,
                DepthWise(narrow, narrow, 128),
                Residual(narrow, blocks[1], 128),
                DepthWise(narrow, wide, 256),
                Residual(wide, blocks[2], 256),
                DepthWise(wide, wide, 512),
                Residual(wide, blocks[3], 256),
            ]
        )
        self.conv_sep = ConvBlock(wide, 512, 1, 1, 0)
        self.features = GDC(num_features, places)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))


class BasicBlockIR(nn.Module):
    def __init__(self, in_channel, depth, stride):
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if in_channel == depth
            else nn.Sequential(
                nn.Conv2d(in_channel, depth, 1, stride, bias=False), nn.BatchNorm2d(depth)
            )
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channel),
            nn.Conv2d(in_channel, depth, 3, 1, 1, bias=False),
            nn.BatchNorm2d(depth),
            nn.PReLU(depth),
            nn.Conv2d(depth, depth, 3, stride, 1, bias=False),
            nn.BatchNorm2d(depth),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    """AdaFace's and CVLface's; AdaFace's own gives (x / |x|, |x|) of what this returns."""

    def __init__(self, depth, num_features, places):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        body, channels = [], 64
        for number, count in enumerate(LAYERS[depth]):
            for block in range(count):
                body.append(BasicBlockIR(channels, 64 * 2**number, 1 if block else 2))
                channels = 64 * 2**number
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(512 * places**2, num_features),
            nn.BatchNorm1d(num_features, affine=False),
        )

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


def disturbed(network: nn.Module) -> nn.Module:
    """The network in eval mode, with no two layers alike: statistics, scales and slopes drawn."""
    draws = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.1, generator=draws)
            module.running_var.uniform_(0.5, 1.5, generator=draws)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3, generator=draws)
                nn.init.normal_(module.bias, 0, 0.1, generator=draws)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4, generator=draws)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=draws)
    return network.eval()
