"""The parts of the objective against the formulas written out in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdkernels import kd_cross_entropy
from kdtrain.config import TargetConfig
from kdtrain.models.network import Outputs
from kdtrain.objectives.registry import compared
from kdtrain.objectives.targets import (
    Guide,
    Objective,
    Pair,
    WidthMap,
    softmax_objective,
    squared_objective,
    total,
)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def soft_cross_entropy(student, teacher, temperature):
    target = torch.softmax(teacher / temperature, 1)
    return -(target * torch.log_softmax(student / temperature, 1)).sum(1).mean()


def kd(student, **options):
    return partial(kd_cross_entropy, student, **options)


LABELS = torch.tensor([3, 0, 10, 4])


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("gamma", "alpha", "tau_squared"),
    [(1.0, 1.0, False), (1.0, 0.7, True), (0.5, 2.0, False), (2.0, 0.0, False), (0.0, 0.3, True)],
)
def test_the_softmax_part_is_gamma_hard_plus_alpha_soft(backend, gamma, alpha, tau_squared):
    student, teacher = random(4, 11).requires_grad_(), random(4, 11, seed=1)
    target = TargetConfig(gamma=gamma, alpha=alpha, tau_squared=tau_squared)
    part = softmax_objective(kd(student, backend=backend), LABELS, teacher, target)
    assert part is not None
    hard, soft = F.cross_entropy(student, LABELS), soft_cross_entropy(student, teacher, 3.0)
    expected = gamma * hard + alpha * (9 if tau_squared else 1) * soft
    torch.testing.assert_close(part.loss, expected)
    (ours,) = torch.autograd.grad(part.loss, student, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs)
    # terms come without their weights, and only those that were computed
    assert set(part.terms) == ({"hard", "top1"} if gamma else set()) | (
        {"soft", "teacher_entropy"} if alpha else set()
    )
    if gamma:
        torch.testing.assert_close(part.terms["hard"], hard.detach())
        torch.testing.assert_close(part.terms["top1"], (student.argmax(1) == LABELS).float().mean())
    if alpha:
        torch.testing.assert_close(part.terms["soft"], soft.detach())
        entropy = soft_cross_entropy(teacher, teacher, 3.0)
        torch.testing.assert_close(part.terms["teacher_entropy"], entropy)


def test_label_smoothing_reaches_the_hard_term_alone():
    student, teacher = random(4, 11), random(4, 11, seed=1)
    target = TargetConfig(alpha=1.0, label_smoothing=0.2)
    part = softmax_objective(kd(student), LABELS, teacher, target)
    assert part is not None
    torch.testing.assert_close(
        part.terms["hard"], F.cross_entropy(student, LABELS, label_smoothing=0.2)
    )
    torch.testing.assert_close(part.terms["soft"], soft_cross_entropy(student, teacher, 3.0))


def test_no_weight_means_no_softmax_part():
    logits = random(4, 11)
    none, soft = TargetConfig(gamma=0.0), TargetConfig(gamma=0.0, alpha=1.0)
    assert softmax_objective(kd(logits), LABELS, logits, none) is None
    assert softmax_objective(kd(logits), LABELS, None, soft) is None


def test_a_softmax_part_is_one_call_of_the_fused_op():
    calls = []

    def counted(**options):
        calls.append(options)
        return kd_cross_entropy(random(4, 11), **options)

    softmax_objective(counted, LABELS, random(4, 11), TargetConfig(alpha=1.0))
    assert len(calls) == 1
    assert calls[0]["return_terms"] is True


@pytest.mark.parametrize("backend", [None, "eager"])
def test_squared_distances_keep_each_pairs_own_reduction_and_weight(backend):
    students = [random(4, n, seed=n).requires_grad_() for n in (10, 6, 8)]
    teachers = [random(4, n, seed=n + 50) for n in (10, 6, 8)]
    reductions = ("batchmean", "mean", "sum")
    weights = (1.0, 0.5, 0.25)
    pairs = [
        Pair(reduction, s, t, weight, reduction)
        for s, t, weight, reduction in zip(students, teachers, weights, reductions, strict=True)
    ]
    part = squared_objective(pairs, backend)
    assert part is not None
    errors = [(s - t).square() for s, t in zip(students, teachers, strict=True)]
    terms = [errors[0].sum(1).mean(), errors[1].mean(), errors[2].sum()]
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    torch.testing.assert_close(part.loss, expected)
    for name, term in zip(reductions, terms, strict=True):
        torch.testing.assert_close(part.terms[name], term.detach())
    ours = torch.autograd.grad(part.loss, students)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, students), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pairs_without_weight_cost_nothing():
    assert squared_objective([]) is None
    assert squared_objective([Pair("x", random(2, 3), random(2, 3), 0.0, "mean")]) is None


def width_map(student, teacher, **target):
    return WidthMap("hidden", ("beta",), student, teacher, TargetConfig(**target))


def test_a_projection_is_learnt_only_where_widths_differ():
    assert not list(width_map(8, 8).parameters())
    target = width_map(8, 12)
    assert [tuple(p.shape) for p in target.parameters()] == [(12, 8)]
    assert target(random(3, 8)).shape == (3, 12)


def test_without_a_projection_widths_must_agree():
    with pytest.raises(ValueError, match=r"the student has 8 features, the teacher 12"):
        width_map(8, 12, hidden_proj="none")


def test_normalized_hidden_targets_have_unit_length():
    extra = nn.ModuleDict({"hidden": width_map(8, 12)})
    target = TargetConfig(beta=1.0, hidden_normalize=True)
    student, teacher = Outputs(random(3, 8), None, None), Guide(None, random(3, 12))
    for side in compared(student, teacher, extra, target).mapped["hidden"]:
        torch.testing.assert_close(side.norm(dim=1), torch.ones(3))


def test_the_total_adds_the_parts_and_detaches_float32_terms():
    one = Objective(random(1)[0].requires_grad_(), {"a": random(1)[0].requires_grad_()})
    two = Objective(random(1, seed=1)[0].double(), {"b": torch.tensor(2.0, dtype=torch.float64)})
    result = total([one, None, two])
    assert result.loss.item() == pytest.approx(one.loss.item() + two.loss.item())
    assert result.loss.requires_grad
    assert {name: term.dtype for name, term in result.terms.items()} == {
        "a": torch.float32,
        "b": torch.float32,
    }
    assert not any(term.requires_grad for term in result.terms.values())


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="every term of the loss has weight 0"):
        total([None, None])
