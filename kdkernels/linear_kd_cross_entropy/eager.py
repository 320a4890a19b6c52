"""The specification of linear_kd_cross_entropy in plain PyTorch, and the oracle of its kernels."""

import torch
from torch import Tensor

from kdkernels.kd_cross_entropy import eager as rows
from kdkernels.kd_cross_entropy.eager import KDTerms

# A sine below this is taken on the chord, so that the slope of the margin stays finite at angle 0.
# The label's cosine is wrong by at most 2.5e-4 sin(m) there, within 1e-3 of angle 0 (or pi).
SMALLEST_SINE = 2.0**-10


def unit(x: Tensor) -> Tensor:
    """The rows of a matrix over their norms; a row of zeros stays zero and has gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    is_zero = norm == 0
    return torch.where(is_zero, 0.0, x / norm.masked_fill(is_zero, 1.0))


def with_margin(cosine: Tensor, m2: Tensor, m3: Tensor) -> Tensor:
    """cos(theta + m2) - m3 from cos(theta), without acos.

    Beyond theta + m2 = pi it goes on as cos(theta) - m2 sin(m2), so that it keeps falling; for a
    negative m2 it stays at 1 - m3 where theta + m2 is below 0.
    """
    squared = (1.0 - cosine * cosine).clamp(min=0.0)
    chord = squared / SMALLEST_SINE
    sine = torch.where(
        squared > SMALLEST_SINE**2, squared.clamp(min=SMALLEST_SINE**2).sqrt(), chord
    )
    turned = cosine * m2.cos() - sine * m2.sin()
    turned = torch.where((m2 > 0) & (cosine < -m2.cos()), cosine - m2 * m2.sin(), turned)
    turned = torch.where((m2 < 0) & (cosine > m2.cos()), 1.0, turned)
    return turned - m3


def logits_of(
    features: Tensor, weight: Tensor, bias: Tensor | None, scale: float, normalize: bool
) -> Tensor:
    """(N, C) logits of a head: features weight^T + bias, or scale times the cosines."""
    if normalize:
        return scale * (unit(features) @ unit(weight).t())
    logits = features @ weight.t()
    return logits if bias is None else logits + bias


def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | tuple[Tensor, ...] | None,
    *,
    normalize: bool,
    scale: float,
    teacher_scale: float,
    m2: Tensor | None,
    m3: Tensor | None,
    straight_through: bool,
    temperature: float,
    alpha: float,
    tau_squared: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, KDTerms]:
    """Loss and terms; arguments as op.py checks them. m2, m3: (N,), or None without a margin."""
    with torch.autocast(features.device.type, enabled=False):
        wide = torch.float64 in (features.dtype, weight.dtype)
        compute = torch.float64 if wide else torch.float32
        x = features.to(compute)
        if target is not None:
            # a NaN in a row that counts for nothing must not reach the weight's gradient
            x = torch.where((target != ignore_index)[:, None], x, 0.0)
        offset = None if bias is None else bias.to(compute)
        student = logits_of(x, weight.to(compute), offset, scale, normalize)  # (N, C)
        if isinstance(teacher, tuple):
            parts = [part.detach().to(compute) for part in teacher]
            offset = parts[2] if len(parts) == 3 else None
            teacher = logits_of(parts[0], parts[1], offset, teacher_scale, normalize)
        hard = None
        if m2 is not None and m3 is not None and target is not None:
            label = torch.where((target >= 0) & (target < len(weight)), target, 0).long()[:, None]
            cosine = student.gather(1, label) / scale
            changed = with_margin(cosine, m2.to(compute)[:, None], m3.to(compute)[:, None])
            if straight_through:
                changed = cosine + (changed - cosine).detach()
            hard = student.scatter(1, label, scale * changed)
        return rows.kd_cross_entropy(
            student,
            teacher,
            target,
            temperature=temperature,
            alpha=alpha,
            tau_squared=tau_squared,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            hard_logits=hard,
        )
