"""Promises about numbers that are not finite, beyond NaN in, NaN out: what counts, what is a hit.

Functions of (Op, backend) like those of contract.py; the numbers are worked out by hand.
"""

from collections.abc import Callable
from functools import partial

import torch
from contract import Op
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def _loss(op: Op, backend: str, places: list[float], labels: list[int], **options) -> list[float]:
    """The loss of points on a line."""
    x = torch.tensor(places, device=op.device)[:, None]
    loss = op.function(x, torch.tensor(labels, device=op.device), backend=backend, **options)
    return loss.reshape(-1).tolist()


def infinite_negatives_make_triplets(op: Op, backend: str) -> None:
    """7: a negative at infinity is the nearest where there is no other: a triplet with hinge 0."""
    # the nearest farther negative of identity 0 is at infinity, of identity 2 at 400; 1 has none
    places, labels = [0.0, 1000.0, 400.0, INF, 500.0, 501.0], [0, 0, 1, 1, 2, 2]
    options = {"mining": "semihard", "margin": 20_000.0}
    each = [0.0, 0.0, 0.0, 0.0, 10_001.0, 9_800.0]
    assert _loss(op, backend, places, labels, reduction="none", **options) == each
    assert _loss(op, backend, places, labels, **options) == [sum(each) / 4]
    assert _loss(op, backend, places, labels, reduction="nonzero", **options) == [sum(each) / 2]
    for mining in ("hard", "semihard", "all"):
        options = {"mining": mining, "margin": 5.0, "reduction": "none"}
        got = _loss(op, backend, [0.0, 1.0, INF], [0, 0, 1], **options)
        assert got == [0.0, 0.0, 0.0], f"{op.name} {mining}: {got}"


def nan_hinges_count_as_nonzero(op: Op, backend: str) -> None:
    """7: "nonzero" divides by hinges that are not zero, and a NaN is not."""
    x = torch.tensor([[NAN, 1.0], [0.0, 2.0], [1.0, 0.0], [3.0, 5.0]], device=op.device)
    labels = torch.tensor([1, 1, 0, 0], device=op.device)

    def second_column(reduction: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        options = {"mining": "hard", "reduction": reduction, "backend": backend}
        loss = op.function(leaf, labels, **options)
        assert bool(loss.isnan())
        return torch.autograd.grad(loss, leaf)[0][:, 1]

    total = second_column("sum")  # of four anchors, all with a NaN
    assert bool(total.isfinite().all())
    assert bool(total.any())
    assert torch.equal(second_column("nonzero"), total / 4)


def rows_without_a_distribution_hit_nothing(op: Op, backend: str) -> None:
    """7: a row of -inf alone, or with +inf or NaN, has loss NaN and no top-1 hit."""
    for classes in (3, 20_001):  # one tile, and beyond
        student = torch.full((5, classes), -1.0, device=op.device)
        student[0] = -INF
        student[1, 0] = INF
        student[2, 0] = NAN
        student[3:, 0] = 2.0
        student[4, 1:] = -INF
        target = torch.zeros(5, dtype=torch.int64, device=op.device)
        for rows, hits in ((slice(0, 3), 0.0), (slice(0, 5), 2.0)):
            loss, terms = op.function(
                student[rows], None, target[rows], return_terms=True, reduction="none",
                backend=backend,
            )  # fmt: skip
            assert float(terms.hits) == hits
            assert loss.isnan().tolist() == [True] * 3 + [False] * (len(loss) - 3)


def _judge_without_soft_term(op: Op, inputs: list[Tensor], logits: Tensor, call) -> None:
    """Judges call(target), whose alpha is 0 and whose teacher is not finite: with a target the
    plain cross-entropy of `logits` (float64), without one 0; terms that are not computed 0."""
    target = torch.tensor([2, 0], device=op.device)
    with torch.enable_grad():
        truth = torch.nn.functional.cross_entropy(logits, target)
        wanted = torch.autograd.grad(truth, inputs, retain_graph=True)
    for labels in (target, None):
        loss, terms = call(labels)
        assert loss.requires_grad, f"{op.name}: the loss has no gradient, target {labels}"
        got = torch.autograd.grad(loss, inputs)
        assert (float(terms.soft), float(terms.entropy)) == (0.0, 0.0), f"{op.name}: {terms}"
        assert float(terms.count) == 2.0
        if labels is None:
            assert float(loss.detach()) == float(terms.hard) == 0.0
            assert all(not bool(g.isnan().any() | g.any()) for g in got), f"{op.name}: {got}"
            continue
        for value in (loss.detach(), terms.hard):
            torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-5, atol=1e-6)
        for gradient, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


def a_soft_term_of_factor_0_is_not_computed(op: Op, backend: str) -> None:
    """7: with alpha = 0 no NaN and no infinity of the teacher reaches loss, gradient or
    terms; without a target the loss is 0, its gradient 0 and not missing."""
    for classes in (3, 20_001):  # one tile, and beyond
        for bad in (NAN, INF):
            student = torch.linspace(-2.0, 2.0, 2 * classes, device=op.device).view(2, classes)
            student.requires_grad_()
            teacher = torch.zeros_like(student, requires_grad=False)
            teacher[0, 1] = bad
            call = partial(
                op.function, student, teacher, alpha=0.0, return_terms=True, backend=backend
            )
            _judge_without_soft_term(op, [student], student.double(), call)
    # nothing is computed: not even a student that is not finite is seen
    student = torch.full((2, 3), NAN, device=op.device, requires_grad=True)
    loss = op.function(student, torch.zeros(2, 3, device=op.device), None, alpha=0.0,
                       backend=backend)  # fmt: skip
    assert float(loss.detach()) == 0.0
    assert torch.autograd.grad(loss, student)[0].tolist() == [[0.0] * 3] * 2


def a_soft_term_of_factor_0_is_not_computed_by_a_head(op: Op, backend: str) -> None:
    """7: the same of each kind of teacher that a head may have."""
    features = torch.linspace(-1.0, 1.0, 8, device=op.device).view(2, 4).requires_grad_()
    weight = torch.linspace(1.0, -2.0, 20, device=op.device).view(5, 4).sin().requires_grad_()
    bias = torch.linspace(0.0, 0.4, 5, device=op.device).requires_grad_()
    inputs = [features, weight, bias]
    logits = features.double() @ weight.double().t() + bias.double()
    ones = torch.ones(2, 5, device=op.device)
    indices = torch.tensor([[0, 1], [3, 2]], device=op.device)
    for bad in (NAN, INF):
        for teacher in (
            ones * bad,
            (ones * bad, torch.ones(5, 5, device=op.device)),
            (indices, ones[:, :2] * bad),
        ):
            call = partial(
                *(op.function, features, weight),
                **{"bias": bias, "teacher": teacher, "alpha": 0.0},
                **{"return_terms": True, "backend": backend},
            )
            _judge_without_soft_term(op, inputs, logits, call)


PROMISES: list[tuple[str, Callable[[Op, str], None]]] = [
    ("batch_triplet_loss", infinite_negatives_make_triplets),
    ("batch_triplet_loss", nan_hinges_count_as_nonzero),
    ("kd_cross_entropy", rows_without_a_distribution_hit_nothing),
    ("kd_cross_entropy", a_soft_term_of_factor_0_is_not_computed),
    ("linear_kd_cross_entropy", a_soft_term_of_factor_0_is_not_computed_by_a_head),
]
