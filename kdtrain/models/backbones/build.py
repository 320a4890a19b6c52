"""From the settings under `model` to a backbone."""

from __future__ import annotations

from typing import Any

from kdtrain.config import ModelConfig
from kdtrain.config.networks import FACE_NETWORKS, MOBILE, NAMES, TIMM, is_known
from kdtrain.models.backbones.base import Backbone
from kdtrain.models.backbones.iresnet import IResNet
from kdtrain.models.backbones.mobilefacenet import MobileFaceNet
from kdtrain.models.backbones.resnet import BLOCKS, ResNet
from kdtrain.models.backbones.timm_network import TimmNetwork


def build_backbone(model: ModelConfig, input_size: int) -> Backbone:
    """The network of `model` with weights drawn from torch's random state.

    input_size: side of its pictures; resnet takes any others too. Raises
    ValueError for a network that cannot be built.
    """
    _check(model)
    width = model.embedding_width
    common: dict[str, Any] = {"embedding": width, "color": model.color}
    if model.name.startswith(TIMM):
        name = model.name.removeprefix(TIMM)
        return TimmNetwork(name, input_size=input_size, **common)
    if model.name in FACE_NETWORKS:
        network = MobileFaceNet if model.name in MOBILE else IResNet
        return network(model.name, model.divide, input_size=input_size, **common)
    return ResNet(model.depth, model.width // model.divide, model.stem, **common)


def _check(model: ModelConfig) -> None:
    if not is_known(model.name):
        raise ValueError(
            f"FaceNetwork: model.name must be one of {', '.join(NAMES)} or timm:NAME, got "
            f"{model.name!r}"
        )
    if model.name in FACE_NETWORKS and model.divide not in (1, 2, 4, 8):
        raise ValueError(
            f"FaceNetwork: model.divide must be 1, 2, 4 or 8 for {model.name}, got {model.divide}"
        )
    if model.name != "resnet":
        return
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
