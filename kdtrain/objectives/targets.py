"""The parts of "L = Phi(task) + alpha soft + beta hidden" (eq. 5 of arXiv 1709.02929) that tasks
share: labels and the teacher's soft prediction, and squared distances.

Terms are returned without weights, as detached float32 scalars on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import hidden_l2
from kdtrain.config import ConfigError, TargetConfig


class Objective(NamedTuple):
    """A part of the loss, and its terms."""

    loss: Tensor  # Weighted scalar with gradient
    terms: dict[str, Tensor]  # Unweighted detached scalars by name


class Guide(NamedTuple):
    """Teacher outputs of N images, without gradient; those that no target reads may be None."""

    logits: Tensor | None = None  # (N, C)
    hidden: Tensor | None = None  # (N, K) pooled features
    attention: tuple[Tensor, ...] = ()
    """(N, h, w) of each residual stage; see backbones.base.attention_map."""


class Pair(NamedTuple):
    """Two tensors of one shape, whose squared distance is a term; gradient to `student` only."""

    name: str
    student: Tensor
    teacher: Tensor
    weight: float
    reduction: str
    """"batchmean" (divide by rows, the papers' norm), "mean" (by elements) or "sum"."""


def softmax_objective(
    op: Callable[..., Any], labels: Tensor, teacher: Any, target: TargetConfig, **options: Any
) -> Objective | None:
    """Returns gamma H(softmax(s), y) + alpha [tau^2] H(softmax(s / tau), softmax(t / tau)) by one
    cross-entropy op of kdkernels (eq. 2), or None if both weights are 0.

    op: kd_cross_entropy on logits (N, C), or linear_kd_cross_entropy on feature and classifier.
    teacher: the op's argument; labels (N,). A part of weight 0 is not computed. Terms: "hard" and
    "top1" with labels; "soft" and "teacher_entropy" with a teacher (their difference is the KL).
    """
    hard, soft = target.gamma > 0, target.alpha > 0 and teacher is not None
    if not (hard or soft):
        return None
    # the op's hard term has weight 1, so gamma multiplies both
    loss, record = op(
        target=labels if hard else None,
        teacher=teacher if soft else None,
        alpha=target.alpha / target.gamma if hard else target.alpha,
        temperature=target.temperature,
        tau_squared=target.tau_squared,
        label_smoothing=target.label_smoothing if hard else 0.0,
        return_terms=True,
        **options,
    )
    terms: dict[str, Tensor] = {}
    if hard:
        terms["hard"] = record.hard
        terms["top1"] = record.hits / record.count.clamp(min=1)
    if soft:
        terms["soft"] = record.soft
        terms["teacher_entropy"] = record.entropy
    return Objective(target.gamma * loss if hard and target.gamma != 1 else loss, terms)


def squared_objective(pairs: Sequence[Pair], backend: str | None = None) -> Objective | None:
    """Returns sum_i weight_i r_i |S_i - T_i|^2 in one hidden_l2 launch, r_i by each pair's
    reduction; None without a pair of positive weight. Terms: r_i |S_i - T_i|^2, summed by the
    pairs' names.
    """
    pairs = [pair for pair in pairs if pair.weight]
    if not pairs:
        return None
    # the op has one reduction for all, which divides by the rows; the others differ by a constant
    factors = [_per_batchmean(pair) for pair in pairs]
    loss, terms = hidden_l2(
        [pair.student for pair in pairs],
        [pair.teacher for pair in pairs],
        weights=[pair.weight * factor for pair, factor in zip(pairs, factors, strict=True)],
        reduction="batchmean",
        return_terms=True,
        backend=backend,
    )
    named: dict[str, Tensor] = {}
    for pair, term, factor in zip(pairs, terms, factors, strict=True):
        term = term * factor
        named[pair.name] = named[pair.name] + term if pair.name in named else term
    return Objective(loss, named)


def _per_batchmean(pair: Pair) -> float:
    """Factor from "batchmean" to the pair's own reduction."""
    rows, elements = max(1, len(pair.student)), max(1, pair.student.numel())
    return {"batchmean": 1.0, "mean": rows / elements, "sum": float(rows)}[pair.reduction]


class WidthMap(nn.Module):
    """P: a linear map without bias if the widths of student and teacher differ, else an identity;
    it is trained with the student and dropped afterwards.

    name: target.{name}_proj allows a learnt P. keys: the weights under target that need P. Raises
    ConfigError for "none" and different widths. The papers leave open how 256 features meet 2048
    (the hidden target), or need equal widths (TH-KD, arXiv 2201.06945).
    """

    def __init__(
        self, name: str, keys: Sequence[str], student: int, teacher: int, target: TargetConfig
    ) -> None:
        super().__init__()
        setting = f"target.{name}_proj"
        if student != teacher and getattr(target, f"{name}_proj") == "none":
            raise ConfigError(
                f"{setting} none: the student has {student} features, the teacher {teacher}; set "
                f"{setting} to linear, or target.{' and target.'.join(keys)} to 0"
            )
        same = student == teacher
        self.projection = nn.Identity() if same else nn.Linear(student, teacher, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, K_S) -> (N, K_T)."""
        return self.projection(hidden)


class HintTarget(nn.Module):
    """The regressor r of a FitNet hint (Romero et al. 2015, eq. 3): |r(v(x)) - u(x)|^2 at a middle
    stage, v and u its maps in student and teacher.

    r is a 1x1 convolution, batch normalisation and ReLU, trained with the student and dropped
    afterwards. ReLU, as the paper has the same non-linearity on both sides; normalised, as many
    channels of a random rectified r are 0 everywhere and never learn. The larger maps are averaged
    two by two. The 1/2 of eq. 3 is left to the weight.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(student_width, teacher_width, 1, bias=False),
            nn.BatchNorm2d(teacher_width),
            nn.ReLU(),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The two (N, teacher_width, h, w) tensors to compare, from the maps of the stage."""
        student, teacher = halved(student, teacher), halved(teacher, student)
        return self.regressor(student), teacher


def halved(maps: Tensor, other: Tensor) -> Tensor:
    """Returns maps (N, C, H, W) averaged two by two until they are no larger than `other`."""
    while maps.shape[-1] > other.shape[-1]:
        maps = F.avg_pool2d(maps, 2, ceil_mode=True)
    return maps


def total(parts: Sequence[Objective | None]) -> Objective:
    """Returns the sum of the parts that are not None. Raises ValueError if all are."""
    present = [part for part in parts if part is not None]
    if not present:
        raise ValueError("total: every term of the loss has weight 0, so there is nothing to train")
    loss = sum((part.loss for part in present[1:]), present[0].loss)
    terms = {name: t.detach().float() for part in present for name, t in part.terms.items()}
    return Objective(loss, terms)
