"""Every target's mathematics, by the key that weighs it.

A target is a field of TargetConfig with its row (config/target.py: name, words, published weight,
what it reads of the teacher) and an entry here. Pairs share one hidden_l2 launch, losses are added
to it; the soft target is part of the softmax op (task.py), teacher_head a second one (heads.py),
and a hint a stage of its own (tasks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdtrain.config import TARGETS, TargetConfig
from kdtrain.models.network import Outputs
from kdtrain.objectives.baselines import (
    EmbeddingTarget,
    attention_pairs,
    cosine_loss,
    rkd_angle,
    rkd_distance,
)
from kdtrain.objectives.heads import TeacherHead
from kdtrain.objectives.targets import Guide, HiddenTarget, Objective, Pair


class Step(NamedTuple):
    """What the targets of a step compare."""

    student: Outputs
    teacher: Guide
    mapped: Mapping[str, tuple[Tensor, Tensor]]
    """Features of student and teacher as a module of MODULES made them comparable, by its name."""
    target: TargetConfig


def _hidden(step: Step) -> list[Pair]:
    target = step.target
    return [Pair("hidden", *step.mapped["hidden"], target.beta, target.hidden_reduction)]


def _logits(step: Step) -> list[Pair]:
    ours, theirs, target = step.student.logits, step.teacher.logits, step.target
    assert ours is not None
    assert theirs is not None
    return [Pair("logits", ours, theirs, target.logits, target.logits_reduction)]


def _embedding_l2(step: Step) -> list[Pair]:
    weight = step.target.embedding_l2
    return [Pair("embedding_l2", *step.mapped["embedding"], weight, "batchmean")]


def _attention(step: Step) -> list[Pair]:
    weight = step.target.attention
    return attention_pairs(step.student.attention, step.teacher.attention, weight)


def _features(step: Step) -> tuple[Tensor, Tensor]:
    assert step.teacher.hidden is not None
    return step.student.hidden, step.teacher.hidden


PAIRS: Mapping[str, Callable[[Step], list[Pair]]] = {
    "beta": _hidden,
    "logits": _logits,
    "embedding_l2": _embedding_l2,
    "attention": _attention,
}
LOSSES: Mapping[str, Callable[[Step], Tensor]] = {
    "embedding_cosine": lambda step: cosine_loss(*step.mapped["embedding"]),
    "rkd_distance": lambda step: rkd_distance(*_features(step)),
    "rkd_angle": lambda step: rkd_angle(*_features(step)),
}
ELSEWHERE = ("alpha", "teacher_head", "hint")
"""Targets whose term is formed by the task itself."""
MODULES: Mapping[str, tuple[tuple[str, ...], Callable[[int, int, TargetConfig], nn.Module]]] = {
    "hidden": (
        ("beta",),
        lambda student, teacher, target: HiddenTarget(
            student, teacher, projection=target.hidden_proj, normalize=target.hidden_normalize
        ),
    ),
    "embedding": (
        ("embedding_l2", "embedding_cosine"),
        lambda student, teacher, target: EmbeddingTarget(
            student, teacher, projection=target.embedding_proj
        ),
    ),
    "teacher_head": (
        ("teacher_head",),
        lambda student, teacher, target: TeacherHead(
            student, teacher, projection=target.teacher_head_proj
        ),
    ),
}
"""Modules that are trained with the student and dropped afterwards: the targets that need each, and
how it is built from the widths of student and teacher.
"""


def compared(student: Outputs, teacher: Guide, extra: nn.ModuleDict, target: TargetConfig) -> Step:
    """The step whose targets `target` weighs, with the features that its modules map."""
    mapped = {
        name: extra[name](student.hidden, teacher.hidden)
        for name in ("hidden", "embedding")
        if name in extra
    }
    return Step(student, teacher, mapped, target)


def pairs_of(step: Step | None) -> list[Pair]:
    """The squared distances of the targets that have a weight, in the order of TARGETS; none
    without a teacher.
    """
    if step is None:
        return []
    keys = [row.key for row in step.target.weighed if row.key in PAIRS]
    return [pair for key in keys for pair in PAIRS[key](step)]


def losses_of(step: Step | None) -> Objective | None:
    """The weighted sum of the other targets' losses; None where none has a weight."""
    if step is None:
        return None
    keys = [row.key for row in step.target.weighed if row.key in LOSSES]
    if not keys:
        return None
    terms = {TARGETS[key].name: LOSSES[key](step) for key in keys}
    weights = [getattr(step.target, key) for key in keys]
    parts = [weight * loss for weight, loss in zip(weights, terms.values(), strict=True)]
    return Objective(torch.stack(parts).sum(), terms)
