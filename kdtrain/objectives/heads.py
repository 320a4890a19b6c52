"""The classifier's part of the loss beyond a linear layer: margins, centres that follow a teacher,
and the teacher's classifier as a second head.

Cosine and streamed heads use kdkernels.linear_kd_cross_entropy, which stores no N x C logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    adaface_margin,
    linear_kd_cross_entropy,
)
from kdtrain.config import HeadConfig, TargetConfig
from kdtrain.models.network import CosineClassifier, FaceNetwork
from kdtrain.objectives.targets import Guide, Objective

Margin = ArcFace | CosFace | CombinedMargin


class AdaFaceNorms(nn.Module):
    """Moving mean and standard deviation of the feature's norm (AdaFace, arXiv 2204.00964, section
    3.3): average <- 0.99 average + 0.01 batch, from 20 and 100. Dropped after training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Adds a batch of features (N, K), unless of a single row, which has no deviation."""
        if len(features) < 2:
            return
        norms = features.float().norm(dim=1).clamp(0.001, 100.0)
        self.mean.lerp_(norms.mean(), 0.01)
        self.std.lerp_(norms.std(), 0.01)


def scores_op(network: FaceNetwork, hidden: Tensor) -> Callable[..., Any]:
    """Returns linear_kd_cross_entropy of a network's classifier on a feature (N, K)."""
    head = network.classifier
    return partial(
        linear_kd_cross_entropy,
        hidden,
        head.weight,
        bias=head.bias,
        normalize=isinstance(head, CosineClassifier),
        scale=getattr(head, "scale", 1.0),
    )


def soft_source(guide: Guide, teacher: FaceNetwork) -> dict[str, Any]:
    """Returns the teacher arguments of linear_kd_cross_entropy: logits, or feature and head."""
    if guide.logits is not None:
        return {"teacher": guide.logits}
    assert guide.hidden is not None
    head = teacher.classifier
    bias = () if head.bias is None else (head.bias,)
    scale = getattr(head, "scale", None)
    return {"teacher": (guide.hidden, head.weight, *bias), "teacher_scale": scale}


def teacher_head_objective(
    mapped: Tensor,
    teacher: FaceNetwork,
    guide: Guide,
    target: TargetConfig,
    backend: str | None = None,
) -> Objective:
    """Returns target.teacher_head [tau^2] H(softmax(h / tau), softmax(t / tau)), h the logits of
    the teacher's frozen classifier on the student's feature: TH-KD (arXiv 2201.06945).

    The paper's KL divergence has the same gradient. mapped (N, K_T): the feature by
    targets.WidthMap. tau: target.teacher_head_temperature, else target.temperature. Term
    "teacher_head" is the cross-entropy.
    """
    loss, record = scores_op(teacher, mapped)(
        target=None,
        **soft_source(guide, teacher),
        temperature=target.teacher_head_temperature or target.temperature,
        alpha=target.teacher_head,
        tau_squared=target.tau_squared,
        return_terms=True,
        backend=backend,
    )
    return Objective(loss, {"teacher_head": record.soft})


def margin_of(
    head: HeadConfig,
    hidden: Tensor,
    labels: Tensor,
    teacher: FaceNetwork | None,
    guide: Guide,
    norms: AdaFaceNorms | None,
) -> Margin | None:
    """Returns the margin of a batch by head.margin, or None."""
    if head.margin == "arcface":
        return ArcFace(head.size)
    if head.margin == "cosface":
        return CosFace(head.size)
    if head.margin == "combined":
        return CombinedMargin(head.size, head.m_cosine)
    if head.margin == "adaface":
        assert norms is not None
        norms.update(hidden)
        return adaface_margin(hidden, m=head.size, h=head.h, mean=norms.mean, std=norms.std)
    if head.margin == "distillation":
        assert teacher is not None
        assert guide.hidden is not None
        weight = teacher.classifier.weight
        return distillation_margin(guide.hidden, weight, labels, head.size, head.m_min)
    return None


@torch.no_grad()
def distillation_margin(
    teacher: Tensor, weight: Tensor, labels: Tensor, largest: float, smallest: float
) -> ArcFace:
    """Returns MarginDistillation's angle of each image (Svitov and Alyamkin 2020, arXiv
    2003.02586):

        m_n = (largest - smallest) c_n / max_n c_n + smallest,   c_n = cos(teacher_n, weight_{y_n})

    teacher (N, K) features, weight (C, K) of the teacher's classifier, labels (N,). Cosines below 0
    count as 0, which the paper leaves open; without a positive one every m is the smallest.
    """
    cosines = F.cosine_similarity(teacher.float(), weight[labels].float(), dim=1).clamp(min=0)
    most = cosines.max() if len(cosines) else cosines.sum()
    share = cosines / most.masked_fill(most <= 0, math.inf)
    return ArcFace((largest - smallest) * share + smallest)


@torch.no_grad()
def move_centres(weight: Tensor, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Takes AdaDistill's step of the class centres, in place (arXiv 2407.01332, eq. 6 and 7):

        a_n  = clip(cos(student_n, teacher_n), 0, 1) clip(cos(w_y, teacher_n), 0, 1),   y = labels_n
        w_y <- mean over the batch's images n of y of  a_n u(w_y) + (1 - a_n) u(teacher_n)

    u scales to unit length. While student and teacher features differ, a centre becomes the
    teacher's feature of the current image; once they agree, it stays unchanged, as do centres of
    classes without an image. weight (C, K); student, teacher (N, K); labels (N,). The mean over a
    class's images is ours: the released code overwrites the row per image, in undefined order.
    """
    theirs = F.normalize(teacher.float(), dim=1)
    identities, place, count = torch.unique(labels, return_inverse=True, return_counts=True)
    centres = F.normalize(weight[identities].float(), dim=1)
    agrees = (F.normalize(student.float(), dim=1) * theirs).sum(1).clamp(0, 1)
    keeps = (agrees * (centres[place] * theirs).sum(1).clamp(0, 1))[:, None]
    moved = keeps * centres[place] + (1 - keeps) * theirs
    sums = torch.zeros_like(centres).index_add_(0, place, moved)
    weight[identities] = (sums / count[:, None]).to(weight.dtype)
