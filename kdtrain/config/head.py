"""The classifier over a network's feature, and its margin: the section head of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kdtrain.config.fields import ConfigError, check_settings, require, setting

MARGINS: Mapping[str, float] = {
    "arcface": 0.5,
    "cosface": 0.35,
    "combined": 0.3,
    "adaface": 0.4,
    "distillation": 0.5,
}
"""Margins and their m where head.m is null: the values of their papers."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What turns the feature into class scores, how it starts, and whether it is trained."""

    kind: Literal["linear", "cosine"] = "linear"
    """linear: weight and bias. cosine: scale times the cosine of feature and weight, as networks
    for open sets of people are trained; its logits are never kept.
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
    "Smallest angle of distillation, for a picture that the teacher puts far from its label."
    h: float = setting(0.333, cost="none", within="0 or more")
    "How fast AdaFace's margin follows the norm (adaface)."
    margin_grad: Literal["exact", "straight_through"] = "exact"
    "Gradient of the margin: its own, or 1, as InsightFace trains."
    run: str | None = setting(None, run="head", cost="none")
    """Run folder whose classifier this one starts as (RUN/best: its best); @NAME is the run beside
    this one. Widths and people must agree.
    """
    update: Literal["gradient", "none", "adaptive"] = "gradient"
    """gradient: trained. none: frozen as it starts, as ProxylessKD and the teacher of SH-KD have
    it. adaptive: each class's centre follows the teacher's features of its pictures (AdaDistill).
    """
    streamed: bool = False
    """Never keep the logits of a linear head either; worth it where people are very many."""
    sample: float = setting(1.0, within="0 < x <= 1")
    """Share of the people whose scores a step forms: those of the batch and others at random
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
