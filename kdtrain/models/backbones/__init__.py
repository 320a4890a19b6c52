"""Backbones by name, with the features and stage maps that targets compare."""

from __future__ import annotations

from typing import Any

from kdtrain.config import ConfigError, ModelConfig
from kdtrain.config.networks import FACE_NETWORKS, MOBILE, TIMM
from kdtrain.models.backbones.base import Backbone
from kdtrain.models.backbones.iresnet import IResNet
from kdtrain.models.backbones.mobilefacenet import MobileFaceNet
from kdtrain.models.backbones.resnet import ResNet
from kdtrain.models.backbones.timm_network import TimmNetwork


def build_backbone(model: ModelConfig, input_size: int) -> Backbone:
    """Returns the network of `model` with random weights. input_size: side of its images (resnet
    takes any). Raises ValueError for a network that cannot be built.
    """
    width = model.embedding_width
    common: dict[str, Any] = {"embedding": width, "color": model.color}
    if model.name.startswith(TIMM):
        network = TimmNetwork(model.name.removeprefix(TIMM), input_size=input_size, **common)
        if model.divide != 1:  # after the name, which is checked first
            raise ConfigError(f"model.divide: expected 1 for {model.name}; got {model.divide}")
        return network
    if model.name in FACE_NETWORKS:
        network = MobileFaceNet if model.name in MOBILE else IResNet
        return network(model.name, model.divide, input_size=input_size, **common)
    return ResNet(model.depth, model.width // model.divide, model.stem, **common)
