"""Checks of linear_kd_cross_entropy's arguments: each returns what it checked, or raises."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.checks import check_choice, check_number, check_tensor, reject
from kdkernels.linear_kd_cross_entropy.margins import Amount, Margin

NAME = "linear_kd_cross_entropy"
LARGEST = 1e6  # of scales and margins: beyond, float32 statistics overflow
MARGIN_GRADIENTS = ("exact", "straight_through")
LARGEST_SUM = 1.01  # of a row's top probabilities: bfloat16 log-probabilities may add up to 1.004


class SparseTeacher(NamedTuple):
    """The teacher's k likeliest classes of every row; all other classes are one bin.

    indices: (N, k) int32 or int64, each class once per row, in any order. log_probs: (N, k), their
    natural logarithms of softmax(t / tau), already at the temperature of the call:

        log_probs, indices = torch.log_softmax(t / tau, dim=1).topk(k)
    """

    indices: Tensor
    log_probs: Tensor


Teacher = Tensor | SparseTeacher | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def check_head(of: str, features: object, weight: object, bias: object) -> list[Tensor]:
    """The tensors of a classifier, `of` "" or "teacher's "; or a ValueError."""
    x = check_tensor(NAME, f"{of}features", features, dims=2)
    w = check_tensor(NAME, f"{of}weight", weight, dims=2)
    if x.shape[1] != w.shape[1] or 0 in w.shape:
        raise reject(
            NAME,
            f"{of}features (N, D) and weight (C, D) must agree in D, with C and D above 0, "
            f"got {tuple(x.shape)} and {tuple(w.shape)}",
        )
    found = [x, w]
    if bias is not None:
        b = check_tensor(NAME, f"{of}bias", bias, dims=1)
        if b.shape != w.shape[:1]:
            raise reject(NAME, f"{of}bias must have shape ({w.shape[0]},), got {tuple(b.shape)}")
        found.append(b)
    for t in found[1:]:
        if t.device != x.device:
            raise reject(
                NAME, f"{of}weight and bias must be on {x.device} like features, got {t.device}"
            )
    return found


def check_teacher(
    teacher: object, features: Tensor, weight: Tensor, tensors: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The teacher's features, weight and bias or None, appended to `tensors`."""
    if not isinstance(teacher, (tuple, list)) or len(teacher) not in (2, 3):
        raise reject(
            NAME,
            "teacher must be logits (N, C), (features, weight), (features, weight, bias) or "
            f"(indices, log_probs), got {type(teacher).__name__}",
        )
    parts = check_head("teacher's ", *teacher, *(None,) * (3 - len(teacher)))
    if (
        parts[0].shape[0] != features.shape[0]
        or parts[1].shape[0] != weight.shape[0]
        or parts[0].device != features.device
    ):
        raise reject(
            NAME,
            f"teacher must have the student's {features.shape[0]} rows and {weight.shape[0]} "
            f"classes on {features.device}, got features {tuple(parts[0].shape)} and weight "
            f"{tuple(parts[1].shape)} on {parts[0].device}",
        )
    parts = [part.detach() for part in parts]
    tensors += parts
    return (*parts, *(None,) * (3 - len(parts)))


def is_sparse(teacher: object) -> bool:
    """Whether a teacher is (indices, log_probs): its first tensor holds integers."""
    if isinstance(teacher, SparseTeacher):
        return True
    first = teacher[0] if isinstance(teacher, (tuple, list)) and len(teacher) == 2 else None
    return isinstance(first, Tensor) and not first.is_floating_point()


def check_sparse(
    teacher: object, features: Tensor, classes: int, tensors: list[Tensor]
) -> SparseTeacher:
    """The pair, its log_probs appended to `tensors`; or a ValueError. Values: check_bins."""
    assert isinstance(teacher, (tuple, list))
    indices, log_probs = teacher
    log_probs = check_tensor(NAME, "teacher's log_probs", log_probs, dims=2).detach()
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise reject(NAME, f"teacher's indices must be an int32 or int64 tensor, got {got}")
    rows, k = features.shape[0], log_probs.shape[1]
    if indices.shape != log_probs.shape or len(indices) != rows or not 1 <= k <= classes:
        raise reject(
            NAME,
            f"teacher's indices and log_probs must both have shape ({rows}, k), k from 1 to "
            f"{classes}, got {tuple(indices.shape)} and {tuple(log_probs.shape)}",
        )
    if indices.device != features.device or log_probs.device != features.device:
        raise reject(
            NAME,
            f"teacher's indices and log_probs must be on {features.device} like features, "
            f"got {indices.device} and {log_probs.device}",
        )
    tensors.append(log_probs)
    return SparseTeacher(indices, log_probs)


def check_bins(
    teacher: SparseTeacher, target: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Raises ValueError where a row that counts names no class or one twice, or where its
    probabilities add up to more than 1. On the CPU; elsewhere under kdkernels.validate(True)."""
    indices, log_probs = teacher
    if not checks.looks_at_values(indices):
        return
    ordered = indices.sort(dim=1).values
    total = log_probs.float().exp().sum(dim=1)
    faults = {
        f"lie in [0, {classes})": ((indices < 0) | (indices >= classes)).any(dim=1),
        "name each class once": (ordered[:, 1:] == ordered[:, :-1]).any(dim=1),
    }
    counts = torch.ones_like(total, dtype=torch.bool) if target is None else target != ignore_index
    for what, bad in faults.items():
        if bool((bad & counts).any()):
            row = int((bad & counts).nonzero()[0])
            raise reject(
                NAME,
                f"teacher's indices must {what} in each row, got {indices[row].tolist()} "
                f"in row {row}",
            )
    above = (total > LARGEST_SUM) & counts
    if bool(above.any()):
        row = int(above.nonzero()[0])
        raise reject(
            NAME,
            f"teacher's log_probs must be natural logarithms of softmax(t / tau), got "
            f"probabilities that add up to {float(total[row]):.4g} in row {row}",
        )


def check_scale(name: str, value: object, normalize: bool) -> float:
    """The scale of cosines as a float, 1 without normalize; or a ValueError."""
    scale = check_number(NAME, name, value, at_least=1 / LARGEST, at_most=LARGEST)
    if scale != 1.0 and not normalize:
        raise reject(NAME, f"{name} is for normalize=True: without it logits are as they come")
    return scale


def is_straight_through(margin_grad: object) -> bool:
    """Whether the margin's derivative is taken as 1; a ValueError for an unknown name."""
    return check_choice(NAME, "margin_grad", margin_grad, MARGIN_GRADIENTS) != "exact"


def check_margin(
    margin: object, features: Tensor, applies: bool
) -> tuple[Tensor | None, Tensor | None]:
    """m2 and m3 as (N,) tensors, or None and None; or a ValueError."""
    if margin is None:
        return None, None
    if not isinstance(margin, Margin):
        raise reject(
            NAME,
            f"margin must be ArcFace, CosFace or CombinedMargin, got {type(margin).__name__}",
        )
    if not applies:
        raise reject(NAME, "margin needs normalize=True and a target: it changes an angle")
    m2, m3 = margin.amounts()
    return (
        _check_amount("m2", m2, features, math.pi),
        _check_amount("m3", m3, features, LARGEST),
    )


def _check_amount(name: str, value: Amount, features: Tensor, largest: float) -> Tensor:
    rows, device = features.shape[0], features.device
    if isinstance(value, Tensor):
        check_tensor(NAME, f"margin's {name}", value)
        if value.shape != (rows,) or value.device != device:
            raise reject(
                NAME,
                f"margin's {name} must have shape ({rows},) on {device}, "
                f"got {tuple(value.shape)} on {value.device}",
            )
        return value.detach()
    number = check_number(NAME, f"margin's {name}", value, at_least=-largest, at_most=largest)
    return torch.full((rows,), number, dtype=torch.float64, device=device)
