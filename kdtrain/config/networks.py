"""Names of the networks, and the sections model and head of a config."""

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
"""Face networks: they end in an embedding and are built for one input size."""
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
"""Published m of each margin, for head.m null."""


def network_title(model: Mapping[str, Any]) -> str:
    """'ResNet-50/8', 'IResNet-50', 'timm:convnext_tiny' of the settings under `model`.

    Missing settings have their defaults: a run of an older version may lack some.
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
    """The network. Every layer has 1 / model.divide of the channels of the published network."""

    name: str = "resnet"
    """Architecture, such as resnet or timm:NAME. resnet takes depth, width and stem; mobilefacenet,
    mbf, mbf_large, iresnet18 to iresnet100 and ir18 to ir101 are face networks, built for
    data.input_size; timm:NAME is a network of timm, untrained.
    """
    embedding: int | None = setting(None, within="at least 1")
    "Width of the embedding layer. null: 512 in face networks, no layer in resnet and timm."
    color: Literal["rgb", "bgr"] = "rgb"
    "Order of the color channels that the weights expect. The network converts RGB images."
    depth: Literal[50, 14] = 50
    "Layers of the resnet. 50 has (3, 4, 6, 3) bottleneck blocks, 14 has (1, 1, 1, 1)."
    width: int = 64
    "Channels of the first stage before division (resnet). ResNet-50 has 64."
    divide: Literal[1, 2, 4, 8] = setting(1, own=True)
    "Divisor of the channels of every layer. It must be 1 for timm networks."
    stem: Literal["imagenet", "small"] = "imagenet"
    "First layers of the resnet: 7x7 convolution and pooling (imagenet), or 3x3 (small)."

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        names = f"one of {', '.join(NAMES)}, timm:NAME"
        known = self.name in NAMES or (self.name.startswith(TIMM) and self.name != TIMM)
        require(known, "model.name", names, self.name)
        divides = self.width >= self.divide and self.width % self.divide == 0
        require(divides, "model.width", f"a multiple of model.divide ({self.divide})", self.width)

    @property
    def embedding_width(self) -> int | None:
        """Width of the embedding layer; None without one."""
        if self.embedding is None and self.name in FACE_NETWORKS:
            return EMBEDDING
        return self.embedding

    def describe(self) -> str:
        """The settings that determine the shapes of the weights, for messages."""
        text = f"{self.name}, divide {self.divide}"
        if self.name == "resnet":
            text = f"depth {self.depth}, width {self.width}, divide {self.divide}"
            text += f", stem {self.stem!r}"
        width = self.embedding_width
        return text + (f", embedding {width}" if width is not None else "")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier on the feature: its form, margin, initialisation and update."""

    kind: Literal["linear", "cosine"] = "linear"
    "Form of the classifier. linear: weight and bias; cosine: scaled cosine, logits not stored."
    scale: float = setting(64.0, cost="none", within="more than 0")
    "Scale of the cosines (cosine)."
    margin: Literal["none", "arcface", "cosface", "combined", "adaface", "distillation"] = "none"
    """Margin on the label's logit (cosine). arcface is cos(theta + m), cosface is cos(theta) - m,
    combined is both; adaface adapts m to the feature's norm, distillation (MarginDistillation) to
    the teacher's cosine.
    """
    m: float | None = setting(None, cost="none", within="0 or more")
    """Size of the margin: an angle in radians for arcface, combined and distillation, else a
    cosine. null takes the published value: 0.5 arcface, 0.35 cosface, 0.3 combined, 0.4 adaface,
    0.5 distillation.
    """
    m_cosine: float = setting(0.2, cost="none", within="0 or more")
    "Cosine part of the margin (combined)."
    m_min: float = setting(0.2, cost="none", within="0 or more")
    "Smallest margin, for an image that the teacher puts far from its label (distillation)."
    h: float = setting(0.333, cost="none", within="0 or more")
    "Sensitivity of the margin to the feature's norm (adaface)."
    margin_grad: Literal["exact", "straight_through"] = "exact"
    "Gradient through the margin. straight_through replaces its factor by 1, as InsightFace does."
    run: str | None = setting(None, run="head", cost="none")
    "Run directory that initialises the classifier. Widths and identities must agree."
    update: Literal["gradient", "none", "adaptive"] = "gradient"
    """Update of the classifier. gradient trains it, none freezes it (ProxylessKD, SH-KD), adaptive
    moves each class center towards the teacher's features of its images (AdaDistill).
    """
    streamed: bool = False
    "Compute the loss of a linear classifier without storing logits, to save memory."
    sample: float = setting(1.0, within="0 < x <= 1")
    "Share of the identities with logits in a step (PartialFC); below 1, cosine or streamed only."

    def __post_init__(self) -> None:
        check_settings(self, "head.")
        if self.margin in ("arcface", "combined", "distillation"):
            require(self.size <= math.pi, "head.m", "an angle of at most pi", self.size)
        if self.margin == "distillation":
            require(self.m_min <= self.size, "head.m_min", f"at most {self.size}", self.m_min)
        if self.sample < 1 and not self.streams:
            raise ConfigError(
                f"head.sample {self.sample:g} needs a head that stores no logits: set "
                "head.streamed to true, or head.sample to 1"
            )
        for name in ("margin", "update"):
            value = getattr(self, name)
            if self.kind == "linear" and value in (*MARGINS, "adaptive"):
                raise ConfigError(
                    f"head.{name} {value} needs cosines: set head.kind to cosine, or head.{name} "
                    f"to {'none' if name == 'margin' else 'gradient'}"
                )

    @property
    def size(self) -> float:
        """m, or the published value for null; 0 without a margin."""
        if self.margin == "none":
            return 0.0
        return MARGINS[self.margin] if self.m is None else self.m

    @property
    def needs_teacher(self) -> bool:
        """True where margin or centers depend on the teacher's features."""
        return self.margin == "distillation" or self.update == "adaptive"

    @property
    def streams(self) -> bool:
        """True where the loss is computed from the feature, without N x C logits."""
        return self.kind == "cosine" or self.streamed
