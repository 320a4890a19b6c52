"""The specification of linear_kd_cross_entropy in plain PyTorch, and the oracle of its kernels."""

import torch
from torch import Tensor

from kdkernels.kd_cross_entropy import eager as rows
from kdkernels.kd_cross_entropy.eager import KDTerms

# A sine below this is taken on the chord, so that the slope of the margin stays finite at angle 0.
# The label's cosine is wrong by at most 2.4e-7 sin(m) there, within 1e-6 of angle 0 (or pi).
SMALLEST_SINE = 2.0**-20
# Rows whose largest component is between these have norms that float32 holds with all digits.
SMALLEST_PLAIN, LARGEST_PLAIN = 2.0**-40, 2.0**40
# The tail that a sparse teacher leaves of 1 is 0 below this: float32 logarithms of a whole
# distribution miss it by about 1e-7, and a student without a tail would make that infinite.
SMALLEST_TAIL = 2.0**-20


def power_of(x: Tensor) -> Tensor:
    """(N, 1): a power of two near each row's largest component, 1 within 2^-40 to 2^40.

    Over it, a row has a norm whose square neither overflows nor underflows, and the same direction.
    """
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    is_extreme = (largest < SMALLEST_PLAIN) & (largest > 0) | (largest > LARGEST_PLAIN)
    is_extreme &= largest.isfinite()
    largest = torch.where(is_extreme, largest, 1.0)
    return largest / (2.0 * torch.frexp(largest).mantissa)


def unit(x: Tensor) -> Tensor:
    """The rows of a matrix over their norms; a row of zeros stays zero and has gradient 0."""
    x = x / power_of(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    is_zero = norm == 0
    return torch.where(is_zero, 0.0, x / norm.masked_fill(is_zero, 1.0))


def cosine_and_squared_sine(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angle between unit vectors, row by row: (N, 1) each.

    From |x - w|^2 = q and |x + w|^2 = p: 1 - cos^2 would lose the sine of a small angle.
    """
    near = (x - w).square().sum(dim=1, keepdim=True)
    far = (x + w).square().sum(dim=1, keepdim=True)
    is_zero = (x == 0).all(dim=1, keepdim=True) | (w == 0).all(dim=1, keepdim=True)
    squared = torch.where(is_zero, 1.0, near * far / 4.0)
    return (far - near) / 4.0, squared


def with_margin(cosine: Tensor, squared: Tensor, m2: Tensor, m3: Tensor) -> Tensor:
    """cos(theta + m2) - m3 from cos(theta) and sin(theta)^2, without acos.

    Beyond theta + m2 = pi it goes on as cos(theta) - m2 sin(m2), so that it keeps falling; for a
    negative m2 it stays at 1 - m3 where theta + m2 is below 0.
    """
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


def names_classes_once(indices: Tensor, classes: int) -> Tensor:
    """(N,): whether a row's indices are all classes, none of them twice."""
    ordered = indices.sort(dim=1).values
    is_class = ((indices >= 0) & (indices < classes)).all(dim=1)
    return is_class & (ordered[:, 1:] != ordered[:, :-1]).all(dim=1)


def soft_over_bins(
    student: Tensor, indices: Tensor, log_probs: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with a sparse teacher and its entropy, (N,) each, over k + 1 bins: the classes
    of `indices`, (N, k), and all others together."""
    p = log_probs.exp()
    tail = (1.0 - p.double().sum(dim=1)).clamp(min=0.0)
    tail = torch.where(tail < SMALLEST_TAIL, 0.0, tail).to(p.dtype)
    log_q = torch.log_softmax(student / temperature, dim=1)  # (N, C)
    others = log_q.scatter(1, indices, -torch.inf)
    if p.shape[1] == student.shape[1]:
        tail = torch.zeros_like(tail)
    # where all others are -inf, so is their sum; logsumexp would have NaN for its gradient
    is_empty = (others == -torch.inf).all(dim=1)
    log_q_tail = torch.logsumexp(torch.where(is_empty[:, None], 0.0, others), dim=1)
    log_q_tail = torch.where(is_empty, -torch.inf, log_q_tail)
    bins = torch.cat((p, tail[:, None]), dim=1)  # (N, k + 1)
    log_q = torch.cat((log_q.gather(1, indices), log_q_tail[:, None]), dim=1)
    log_p = torch.cat((log_probs, tail.log()[:, None]), dim=1)
    return rows.cross_entropy_of(log_q, bins), rows.cross_entropy_of(log_p, bins)


def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | tuple[Tensor, ...] | None,
    sparse: tuple[Tensor, Tensor] | None,
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
    """Loss and terms; arguments as op.py checks them. m2, m3: (N,), or None without a margin.

    sparse: (indices, log_probs), (N, k) each, in a teacher's place. Without teacher, sparse and
    target the loss is 0 with gradient 0.
    """
    with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
        wide = torch.float64 in (features.dtype, weight.dtype)
        compute = torch.float64 if wide else torch.float32
        # contiguous: the order of a sum follows the strides. Once: two conversions would add two
        # gradients that are rounded to 16 bits.
        x, w = features.to(compute).contiguous(), weight.to(compute).contiguous()
        if target is not None:
            # a NaN in a row that counts for nothing must not reach the weight's gradient
            x = torch.where((target != ignore_index)[:, None], x, 0.0)
        offset = None if bias is None else bias.to(compute)
        if teacher is None and sparse is None and target is None:
            # the loss is 0 with gradient 0, also where the products would be infinite or NaN
            inputs = [weight] if bias is None else [weight, bias[:, None]]
            student = rows.zero_rows(x) + sum(rows.zero_rows(t).sum() for t in inputs)
            student = student[:, None]
        else:
            student = logits_of(x, w, offset, scale, normalize)
        if isinstance(teacher, tuple):
            parts = [part.detach().to(compute).contiguous() for part in teacher]
            offset = parts[2] if len(parts) == 3 else None
            teacher = logits_of(parts[0], parts[1], offset, teacher_scale, normalize)
        soft_terms = None
        if sparse is not None:
            indices, log_probs = sparse
            counts = torch.ones_like(indices[:, 0], dtype=torch.bool)
            if target is not None:
                counts = target != ignore_index
            good = names_classes_once(indices, len(weight))
            # where indices are not checked (on CUDA it would wait), bad ones make their row NaN
            spoiled = torch.where(counts & ~good, torch.nan, 1.0).to(compute)
            student = student * spoiled[:, None]
            soft_terms = soft_over_bins(
                student,
                torch.where((counts & good)[:, None], indices, 0).long(),
                torch.where(counts[:, None], log_probs.to(compute).contiguous(), 0.0),
                temperature,
            )
        hard = None
        if m2 is not None and m3 is not None and target is not None:
            label = torch.where((target >= 0) & (target < len(weight)), target, 0).long()[:, None]
            cosine, squared = cosine_and_squared_sine(unit(x), unit(w[label[:, 0]]))
            changed = with_margin(cosine, squared, m2.to(compute)[:, None], m3.to(compute)[:, None])
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
            soft_terms=soft_terms,
        )
