"""The mathematics of every target, by the key of its weight.

A target is a field of TargetConfig with its row (config/target.py: name, words, published weight,
input from the teacher) and an entry here. Pairs share one hidden_l2 launch, losses are added. The
soft target is part of the softmax op (task.py), teacher_head a second op (heads.py), and a hint a
stage of its own (tasks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdtrain.config import TargetConfig
from kdtrain.models.network import Outputs
from kdtrain.objectives.relations import (
    attention_pairs,
    cosine_loss,
    embedding_sides,
    rkd_angle,
    rkd_distance,
)
from kdtrain.objectives.targets import Guide, Objective, Pair


class Step(NamedTuple):
    """The inputs of a step's targets."""

    student: Outputs
    teacher: Guide
    mapped: dict[str, tuple[Tensor, Tensor]]
    """Student and teacher features after a module of MAPS, by its name."""
    target: TargetConfig


def compared(student: Outputs, teacher: Guide, extra: nn.ModuleDict, target: TargetConfig) -> Step:
    """Returns the inputs of a step's targets, features mapped by the modules in `extra`."""
    step = Step(student, teacher, {}, target)
    if "hidden" in extra:
        ours, theirs = _features(step)
        ours = extra["hidden"](ours)
        if target.hidden_normalize:
            ours, theirs = F.normalize(ours, dim=1), F.normalize(theirs, dim=1)
        step.mapped["hidden"] = ours, theirs
    if "embedding" in extra:
        step.mapped["embedding"] = embedding_sides(extra["embedding"], *_features(step))
    return step


def _logits(step: Step) -> list[Pair]:
    ours, theirs, target = step.student.logits, step.teacher.logits, step.target
    assert ours is not None
    assert theirs is not None
    return [Pair("logits", ours, theirs, target.logits, target.logits_reduction)]


def _features(step: Step) -> tuple[Tensor, Tensor]:
    assert step.teacher.hidden is not None
    return step.student.hidden, step.teacher.hidden


PAIRS: Mapping[str, Callable[[Step], list[Pair]]] = {
    "beta": lambda step: [
        Pair("hidden", *step.mapped["hidden"], step.target.beta, step.target.hidden_reduction)
    ],
    "logits": _logits,
    "embedding_l2": lambda step: [
        Pair("embedding_l2", *step.mapped["embedding"], step.target.embedding_l2, "batchmean")
    ],
    "attention": lambda step: attention_pairs(
        step.student.attention, step.teacher.attention, step.target.attention
    ),
}
LOSSES: Mapping[str, Callable[[Step], Tensor]] = {
    "embedding_cosine": lambda step: cosine_loss(*step.mapped["embedding"]),
    "rkd_distance": lambda step: rkd_distance(*_features(step)),
    "rkd_angle": lambda step: rkd_angle(*_features(step)),
}
MAPS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("beta",),
    "embedding": ("embedding_l2", "embedding_cosine"),
    "teacher_head": ("teacher_head",),
}
"""The targets of each targets.WidthMap."""


def pairs_of(step: Step) -> list[Pair]:
    """Returns the squared distances of the weighted targets, in the order of TARGETS."""
    keys = [row.key for row in step.target.weighed if row.key in PAIRS]
    return [pair for key in keys for pair in PAIRS[key](step)]


def losses_of(step: Step) -> Objective | None:
    """Returns the weighted sum of the other targets' losses, or None."""
    rows = [row for row in step.target.weighed if row.key in LOSSES]
    if not rows:
        return None
    terms = {row.name: LOSSES[row.key](step) for row in rows}
    parts = [getattr(step.target, row.key) * terms[row.name] for row in rows]
    return Objective(torch.stack(parts).sum(), terms)
