"""Checks of linear_kd_cross_entropy's arguments: each returns what it checked, or raises."""

import math

import torch
from torch import Tensor

from kdkernels import library as lib
from kdkernels.linear_kd_cross_entropy.margins import Amount, Margin

NAME = "linear_kd_cross_entropy"
LARGEST = 1e6  # of scales and margins: beyond, float32 statistics overflow
Teacher = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
MARGIN_GRADIENTS = ("exact", "straight_through")


def check_head(of: str, features: object, weight: object, bias: object) -> list[Tensor]:
    """The tensors of a classifier, `of` "" or "teacher's "; or a ValueError."""
    x = lib.check_tensor(NAME, f"{of}features", features, dims=2)
    w = lib.check_tensor(NAME, f"{of}weight", weight, dims=2)
    if x.shape[1] != w.shape[1] or 0 in w.shape:
        raise lib.reject(
            NAME,
            f"{of}features (N, D) and weight (C, D) must agree in D, with C and D above 0, "
            f"got {tuple(x.shape)} and {tuple(w.shape)}",
        )
    found = [x, w]
    if bias is not None:
        b = lib.check_tensor(NAME, f"{of}bias", bias, dims=1)
        if b.shape != w.shape[:1]:
            raise lib.reject(
                NAME, f"{of}bias must have shape ({w.shape[0]},), got {tuple(b.shape)}"
            )
        found.append(b)
    for t in found[1:]:
        if t.device != x.device:
            raise lib.reject(
                NAME, f"{of}weight and bias must be on {x.device} like features, got {t.device}"
            )
    return found


def check_teacher(
    teacher: object, features: Tensor, weight: Tensor, tensors: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The teacher's features, weight and bias or None, appended to `tensors`."""
    if not isinstance(teacher, (tuple, list)) or len(teacher) not in (2, 3):
        raise lib.reject(
            NAME,
            "teacher must be logits (N, C), (features, weight) or (features, weight, bias), "
            f"got {type(teacher).__name__}",
        )
    parts = check_head("teacher's ", *teacher, *(None,) * (3 - len(teacher)))
    if (
        parts[0].shape[0] != features.shape[0]
        or parts[1].shape[0] != weight.shape[0]
        or parts[0].device != features.device
    ):
        raise lib.reject(
            NAME,
            f"teacher must have the student's {features.shape[0]} rows and {weight.shape[0]} "
            f"classes on {features.device}, got features {tuple(parts[0].shape)} and weight "
            f"{tuple(parts[1].shape)} on {parts[0].device}",
        )
    parts = [part.detach() for part in parts]
    tensors += parts
    return (*parts, *(None,) * (3 - len(parts)))


def check_scale(name: str, value: object, normalize: bool) -> float:
    """The scale of cosines as a float, 1 without normalize; or a ValueError."""
    scale = lib.check_number(NAME, name, value, at_least=1 / LARGEST, at_most=LARGEST)
    if scale != 1.0 and not normalize:
        raise lib.reject(NAME, f"{name} is for normalize=True: without it logits are as they come")
    return scale


def is_straight_through(margin_grad: object) -> bool:
    """Whether the margin's derivative is taken as 1; a ValueError for an unknown name."""
    return lib.check_choice(NAME, "margin_grad", margin_grad, MARGIN_GRADIENTS) != "exact"


def check_margin(
    margin: object, features: Tensor, applies: bool
) -> tuple[Tensor | None, Tensor | None]:
    """m2 and m3 as (N,) tensors, or None and None; or a ValueError."""
    if margin is None:
        return None, None
    if not isinstance(margin, Margin):
        raise lib.reject(
            NAME,
            f"margin must be ArcFace, CosFace or CombinedMargin, got {type(margin).__name__}",
        )
    if not applies:
        raise lib.reject(NAME, "margin needs normalize=True and a target: it changes an angle")
    m2, m3 = margin.amounts()
    return (
        _check_amount("m2", m2, features, math.pi),
        _check_amount("m3", m3, features, LARGEST),
    )


def _check_amount(name: str, value: Amount, features: Tensor, largest: float) -> Tensor:
    rows, device = features.shape[0], features.device
    if isinstance(value, Tensor):
        lib.check_tensor(NAME, f"margin's {name}", value)
        if value.shape != (rows,) or value.device != device:
            raise lib.reject(
                NAME,
                f"margin's {name} must have shape ({rows},) on {device}, "
                f"got {tuple(value.shape)} on {value.device}",
            )
        return value.detach()
    number = lib.check_number(NAME, f"margin's {name}", value, at_least=-largest, at_most=largest)
    return torch.full((rows,), number, dtype=torch.float64, device=device)
