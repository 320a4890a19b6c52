"""The face network: a bottleneck ResNet of any width with a classifier and a landmark head side by
side.

The teacher is ResNet-50; a student keeps the depth and divides the number of kernels of every layer
by 2, 4 or 8 ("Model Distillation with Knowledge Transfer", arXiv 1709.02929, section 5.1). Batch
normalisation sits directly on the raw picture, so no mean is subtracted anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NUM_POINTS = 5
BLOCKS = {50: (3, 4, 6, 3), 14: (1, 1, 1, 1)}
EXPANSION = 4  # a bottleneck block puts out four times its inner width


class Outputs(NamedTuple):
    """What one pass of the network gives. N pictures, C classes, K features."""

    hidden: Tensor
    """(N, K) pooled feature before any normalisation: the paper's hidden layer K."""
    logits: Tensor
    """(N, C) class scores a = classifier(hidden)."""
    points: Tensor | None
    """(N, 10) landmarks as (x / W - 0.5, y / H - 0.5), x before y, point after point; None without
    a landmark head.
    """
    attention: tuple[Tensor, ...] = ()
    """(N, h, w) of each residual stage, where they were asked for; see attention_map."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the stride sits on the 3x3 (as in the 4.1 GMAC
    ResNet-50).
    """

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


def attention_map(maps: Tensor) -> Tensor:
    """Where a network looks: the squared activations of maps (N, C, h, w), summed over channels.

    Q of attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1); (N, h, w)
    in float32 at least.
    """
    return maps.to(torch.promote_types(maps.dtype, torch.float32)).square().sum(1)


class Backbone(nn.Module):
    """(N, 3, H, W) raw pictures in [0, 255] -> (N, K) pooled features, K = 32 * kernels, for any H
    and W.

    stem "imagenet": 7x7 stride 2, then a 3x3 stride 2 maximum (for 224 pixels). "small": 3x3 stride
    2 alone (for 32).
    """

    def __init__(self, depth: int, kernels: int, stem: str) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm2d(3)
        if stem == "imagenet":
            self.stem = nn.Conv2d(3, kernels, 7, stride=2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.stem = nn.Conv2d(3, kernels, 3, stride=2, padding=1, bias=False)
            self.pool = nn.Identity()
        self.stem_norm = nn.BatchNorm2d(kernels)
        stages, channels = [], kernels
        self.widths: list[int] = []
        for stage, count in enumerate(BLOCKS[depth]):
            inner = kernels * 2**stage
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(channels, inner, 2 if stage and not block else 1))
                channels = inner * EXPANSION
            stages.append(nn.Sequential(*blocks))
            self.widths.append(channels)
        self.stages = nn.Sequential(*stages)
        self.width = channels

    def forward(self, pictures: Tensor) -> Tensor:
        """Pooled features (N, K)."""
        return self.maps(pictures, len(self.stages)).mean((2, 3))

    def maps(self, pictures: Tensor, stage: int) -> Tensor:
        """Output (N, widths[stage - 1], h, w) of residual stage 1 to 4; the layers above it do not
        run.
        """
        maps = self._entry(pictures)
        for part in list(self.stages)[:stage]:
            maps = part(maps)
        return maps

    def attend(self, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pooled features, and the attention_map (N, h, w) of each residual stage."""
        maps, attention = self._entry(pictures), []
        for part in self.stages:
            maps = part(maps)
            attention.append(attention_map(maps))
        return maps.mean((2, 3)), tuple(attention)

    def _entry(self, pictures: Tensor) -> Tensor:
        """What the first residual stage reads."""
        return self.pool(torch.relu_(self.stem_norm(self.stem(self.input_norm(pictures)))))


class FaceNetwork(nn.Module):
    """ResNet of `model.depth` with `model.width / model.divide` base kernels, a classifier and, if
    asked, a landmark head.

    model: an object with depth (50 | 14), width, divide (1 | 2 | 4 | 8) and stem ("imagenet" |
    "small"). num_classes: C. landmarks: whether to add the head for 5 points. Both heads read the
    same feature, so an alignment network still predicts classes (its soft target). Weights depend
    on torch's seed alone, and those of backbone and classifier do not change with `landmarks` (see
    `seeded`). Raises ValueError for a size that cannot be built.
    """

    def __init__(self, model: Any, num_classes: int, landmarks: bool = False) -> None:
        super().__init__()
        if model.depth not in BLOCKS:
            raise ValueError(
                f"FaceNetwork: model.depth must be one of {sorted(BLOCKS)}, got {model.depth}"
            )
        if model.stem not in ("imagenet", "small"):
            raise ValueError(
                f"FaceNetwork: model.stem must be 'imagenet' or 'small', got {model.stem!r}"
            )
        if model.divide < 1 or model.width < 1 or model.width % model.divide:
            raise ValueError(
                "FaceNetwork: model.divide must divide model.width into whole kernels, "
                f"got width {model.width} and divide {model.divide}"
            )
        if num_classes < 1:
            raise ValueError(f"FaceNetwork: num_classes must be at least 1, got {num_classes}")
        self.backbone = Backbone(model.depth, model.width // model.divide, model.stem)
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.width = self.backbone.width
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.width, num_classes)
        self.regressor = nn.Linear(self.width, 2 * NUM_POINTS) if landmarks else None
        self.arrange(channels_last=True)

    def arrange(self, *, channels_last: bool) -> None:
        """Keep weights and maps with the channels of a pixel side by side, or in planes, as torch
        does by itself.

        A training step on a CPU takes 1.1 (224 pixels) to 1.4 times as long in planes.
        """
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self._format)  # pyright: ignore[reportCallIssue]

    def forward(self, pictures: Tensor) -> Outputs:
        """Feature, class scores and landmarks of raw pictures (N, 3, H, W) in [0, 255]."""
        return self._heads(self.backbone(pictures.contiguous(memory_format=self._format)))

    def tap(self, pictures: Tensor, stage: int) -> Tensor:
        """Output (N, C, h, w) of residual stage 1 to 4 for raw pictures; see Backbone.maps."""
        return self.backbone.maps(pictures.contiguous(memory_format=self._format), stage)

    def attend(self, pictures: Tensor) -> Outputs:
        """What `forward` gives, and the attention_map of every residual stage."""
        pictures = pictures.contiguous(memory_format=self._format)
        hidden, attention = self.backbone.attend(pictures)
        return self._heads(hidden)._replace(attention=attention)

    def _heads(self, hidden: Tensor) -> Outputs:
        points = None if self.regressor is None else self.regressor(hidden)
        return Outputs(hidden, self.classifier(hidden), points)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`, and torch's own CPU random state is as before afterwards.

    A student is therefore initialised alike whether or not a teacher was built before it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def network_from_state(model: Any, state: Mapping[str, Tensor]) -> FaceNetwork:
    """A network with exactly the weights in `state`; classes and landmark head are read off the
    weights' shapes.

    Raises ValueError when `model` describes another network than the one that was saved.
    """
    if "classifier.weight" not in state:
        raise ValueError(
            "network_from_state: the weights hold no 'classifier.weight', so they are not a "
            f"FaceNetwork's; their first names are {list(state)[:3]}"
        )
    with seeded(0):
        network = FaceNetwork(model, len(state["classifier.weight"]), "regressor.weight" in state)
    refused = _differences(network.state_dict(), state)
    if refused:
        raise ValueError(
            f"network_from_state: {len(refused)} weights do not fit depth {model.depth}, width "
            f"{model.width}, divide {model.divide}, stem {model.stem!r}; the first: {refused[0]}"
        )
    network.load_state_dict(dict(state))
    return network


def inherit(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copies every weight of `state` that has a namesake of the same shape; returns what was not
    taken, with the reason.

    Listed are entries of `state` that found no place and weights of `network` that keep their
    initial values (a head for other classes, a new landmark head). Raises ValueError when no
    convolution or linear weight of the backbone was taken: then nothing was learnt from `state`,
    whatever small vectors happen to agree.
    """
    own = network.state_dict()
    taken = {name for name in own if name in state and own[name].shape == state[name].shape}
    if not any(name.startswith("backbone.") and own[name].dim() > 1 for name in taken):
        raise ValueError(
            f"inherit: none of the {len(state)} weights offered fits a backbone weight here; "
            "model.depth, width, divide and stem must be those of the run that is inherited from; "
            f"differences begin with: {'; '.join(_differences(own, state)[:3])}"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(state[name])
    return _differences(own, state)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters of `module`; running statistics do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(network: FaceNetwork, input_size: int) -> int:
    """Multiply-adds of convolutions and linear layers, heads included, for one (3, input_size,
    input_size) picture.

    The usual "MACs" or, loosely, "FLOPs" of the field; normalisation, activation and pooling do not
    count. Shapes alone are computed (meta tensors): no memory, no arithmetic, no change to
    `network`.
    """
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output[0].numel() * weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    shapes = {
        name: tensor.to("meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    was_training = network.training
    try:
        network.eval()
        picture = torch.empty(1, 3, input_size, input_size, device="meta")
        torch.func.functional_call(network, shapes, (picture,))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return total


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line per name that only one side has or whose shapes differ."""
    lines = []
    for name, tensor in state.items():
        if name not in own:
            lines.append(f"{name}: has no place in this network")
        elif own[name].shape != tensor.shape:
            lines.append(f"{name}: {tuple(tensor.shape)} offered, {tuple(own[name].shape)} needed")
    lines += [f"{name}: not offered, keeps its initial values" for name in own if name not in state]
    return lines
