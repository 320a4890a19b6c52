"""The networks' names and how they are written, and the sections model and head of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdtrain.config.fields import ConfigError, check_settings, require, setting

TIMM = "timm:"
MOBILE = ("mobilefacenet", "mbf", "mbf_large")
IRESNETS = ("iresnet18", "iresnet34", "iresnet50", "iresnet100")
IRS = ("ir18", "ir34", "ir50", "ir101")
FACE_NETWORKS = (*MOBILE, *IRESNETS, *IRS)
"""Networks of face recognition that end in an embedding and are built for one input size."""
NAMES = ("resnet", *FACE_NETWORKS)
EMBEDDING = 512  # width of every published face network's embedding

_TITLES = {"mobilefacenet": "MobileFaceNet", "mbf": "MBF", "mbf_large": "MBF-large"}

MARGINS: Mapping[str, float] = {
    "arcface": 0.5,
    "cosface": 0.35,
    "combined": 0.3,
    "adaface": 0.4,
    "distillation": 0.5,
}
"""Margins and their m where head.m is null: the values of their papers."""


def is_known(name: str) -> bool:
    """Whether model.name can be this: one of NAMES, or timm:NAME."""
    return name in NAMES or (name.startswith(TIMM) and len(name) > len(TIMM))


def network_title(model: Mapping[str, Any]) -> str:
    """'ResNet-50/8', 'IResNet-50', 'timm:convnext_tiny' of the settings under `model`.

    Settings that are missing have their defaults: a folder may hold the run of an older version.
    """
    name: str = model.get("name", "resnet")
    if name == "resnet":
        name = f"ResNet-{model['depth']}"
    elif name in IRESNETS or name in IRS:
        family, layers = name.rstrip("0123456789"), name.lstrip("irenst")
        name = f"{'IResNet' if family == 'iresnet' else 'IR'}-{layers}"
    else:
        name = _TITLES.get(name, name)
    divide = model.get("divide", 1)
    return name + (f"/{divide}" if divide > 1 else "")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; every layer has 1 / divide of the channels that its name stands for."""

    name: str = "resnet"
    """resnet (depth, width and stem are its own) | mobilefacenet (the original, 1.2 M parameters) |
    mbf | mbf_large (arcface_torch's) | iresnet18, 34, 50, 100 | ir18, 34, 50, 101 (AdaFace's and
    CVLface's) | timm:NAME. Face networks (all but resnet and most of timm) are built for
    data.input_size.
    """
    embedding: int | None = setting(None, within="at least 1")
    """Width of an embedding layer between the pooled maps and the classifier; null: 512 for face
    networks, none for resnet and timm.
    """
    color: Literal["rgb", "bgr"] = "rgb"
    "Order of the colours that the weights want; images are RGB, the network turns them round."
    depth: Literal[50, 14] = 50
    "Bottleneck blocks (3, 4, 6, 3), or (1, 1, 1, 1) for small images and demos (resnet)."
    width: int = 64
    "Kernels of the first stage before division; 64 is ResNet-50's own (resnet)."
    divide: Literal[1, 2, 4, 8] = setting(1, own=True)
    "The papers' /2, /4, /8 students; timm's networks cannot be divided."
    stem: Literal["imagenet", "small"] = "imagenet"
    "imagenet: 7x7 stride 2 and 3x3 stride 2 max pooling; small: 3x3 stride 2 alone (resnet)."

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        require(
            is_known(self.name), "model.name", f"one of {', '.join(NAMES)}, timm:NAME", self.name
        )
        require(
            self.divide == 1 or not self.name.startswith(TIMM),
            "model.divide",
            f"1 for {self.name}: timm's networks have sizes under other names",
            self.divide,
        )
        require(
            self.width >= self.divide and self.width % self.divide == 0,
            "model.width",
            f"a multiple of model.divide ({self.divide})",
            self.width,
        )

    @property
    def embedding_width(self) -> int | None:
        """Width of the embedding layer that embedding and name ask for; None for none."""
        if self.embedding is None and self.name in FACE_NETWORKS:
            return EMBEDDING
        return self.embedding

    def describe(self) -> str:
        """The settings that decide which weights a network has, for messages."""
        text = f"{self.name}, divide {self.divide}"
        if self.name == "resnet":
            text = f"depth {self.depth}, width {self.width}, divide {self.divide}"
            text += f", stem {self.stem!r}"
        width = self.embedding_width
        return text + (f", embedding {width}" if width is not None else "")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What turns the feature into class scores, how it starts, and whether it is trained."""

    kind: Literal["linear", "cosine"] = "linear"
    """linear: weight and bias. cosine: scale times the cosine of feature and weight, as networks
    for open sets of identities are trained; its logits are never kept.
    """
    scale: float = setting(64.0, cost="none", within="more than 0")
    "What cosines are multiplied by (cosine)."
    margin: Literal["none", "arcface", "cosface", "combined", "adaface", "distillation"] = "none"
    """What the label's logit loses in training (cosine): cos(theta + m), cos(theta) - m, both,
    AdaFace's by the feature's norm, or MarginDistillation's by the teacher's cosine with the label.
    """
    m: float | None = setting(None, cost="none", within="0 or more")
    """Size of the margin: an angle (arcface, combined, distillation's largest), else a cosine; null
    takes the paper's 0.5, 0.35, 0.3, 0.4, 0.5.
    """
    m_cosine: float = setting(0.2, cost="none", within="0 or more")
    "The part of combined that is taken off the cosine."
    m_min: float = setting(0.2, cost="none", within="0 or more")
    "Smallest angle of distillation, for an image that the teacher puts far from its label."
    h: float = setting(0.333, cost="none", within="0 or more")
    "How fast AdaFace's margin follows the norm (adaface)."
    margin_grad: Literal["exact", "straight_through"] = "exact"
    "Gradient of the margin: its own, or 1, as InsightFace trains."
    run: str | None = setting(None, run="head", cost="none")
    """Run folder whose classifier this one starts as (RUN/best: its best); @NAME is the run beside
    this one. Widths and identities must agree.
    """
    update: Literal["gradient", "none", "adaptive"] = "gradient"
    """gradient: trained. none: frozen as it starts, as ProxylessKD and the teacher of SH-KD have
    it. adaptive: each class's centre follows the teacher's features of its images (AdaDistill).
    """
    streamed: bool = False
    """Never keep the logits of a linear head either; worth it where identities are very many."""
    sample: float = setting(1.0, within="0 < x <= 1")
    """Share of the identities whose scores a step forms: those of the batch and others at random
    (PartialFC). 1 takes all; less needs a cosine or streamed head.
    """

    def __post_init__(self) -> None:
        check_settings(self, "head.")
        if self.margin in ("arcface", "combined", "distillation"):
            require(self.size <= math.pi, "head.m", "an angle of at most pi", self.size)
        if self.margin == "distillation":
            require(self.m_min <= self.size, "head.m_min", f"at most {self.size}", self.m_min)
        if self.sample < 1 and not self.streams:
            raise ConfigError(
                f"head.sample {self.sample:g} forms some of the scores, and a linear head keeps "
                "them all: set head.streamed to true, or head.sample to 1"
            )
        for name in ("margin", "update"):
            value = getattr(self, name)
            if self.kind == "linear" and value in (*MARGINS, "adaptive"):
                raise ConfigError(
                    f"head.{name} {value} is of cosines: set head.kind to cosine, or head.{name} "
                    f"to {'none' if name == 'margin' else 'gradient'}"
                )

    @property
    def size(self) -> float:
        """m, or the paper's where it is null; 0 without a margin."""
        if self.margin == "none":
            return 0.0
        return MARGINS[self.margin] if self.m is None else self.m

    @property
    def needs_teacher(self) -> bool:
        """True where the teacher's features decide the margin or move the centres."""
        return self.margin == "distillation" or self.update == "adaptive"

    @property
    def streams(self) -> bool:
        """True where the loss is formed from the feature, without N x C logits."""
        return self.kind == "cosine" or self.streamed
