"""linear_kd_cross_entropy chunk by chunk of rows: what the native and the Triton backend share.

A chunk's logits are float32 in a buffer that the next chunk takes over; the fused row kernel turns
the student's into their gradient in place, and products turn that into the gradients of features
and weight. So no N x C tensor is stored for either network.

How many rows a chunk has is decided by its bytes, `Arithmetic.chunk_bytes`, but it has no fewer
than `Arithmetic.least_rows` (before chunks are made equal): every chunk reads both weights again,
and reads and writes the float32 gradient of one, so chunks of few rows are bound by that traffic
and not by the products. (Rules made for language models, rows = N D / C, come to 8 rows where N =
1,024 and C = 93,431.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.linear_kd_cross_entropy.products import (
    Arithmetic,
    Gradients,
    Head,
    LabelDirections,
    round_up,
    unit,
)

SMALLEST_SINE = 2.0**-20  # as in eager.py
SMALL_SINE = 2.0**-6  # above it the products lose at most 2^-18 of a margin's gradient


@dataclass(frozen=True)
class Call:
    """The arguments of the raw op, checked."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Tensor | None
    teacher_features: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    indices: Tensor | None
    log_probs: Tensor | None
    target: Tensor | None
    m2: Tensor | None
    m3: Tensor | None
    normalize: bool
    scale: float
    teacher_scale: float
    straight_through: bool
    temperature: float
    alpha: float
    ignore_index: int
    label_smoothing: float
    reduction: str


@dataclass(frozen=True)
class Chunk:
    """Arguments of the row kernel: logits of some rows, and where their results go."""

    student: Tensor  # (rows, C) float32
    teacher: Tensor | None  # (rows, C)
    target: Tensor | None
    margin: Tensor | None  # (rows, 2) float32: added to the label's logit, slope of that
    gradient: Tensor | None  # (rows, C): the student's logits themselves, or other memory
    loss: Tensor  # (rows,)
    terms: Tensor | None  # (rows, 4)
    count: Tensor | None  # 0-d: what the gradient is divided by; None for 1
    call: Call
    indices: Tensor | None = None  # (rows, k), in a teacher's place, and their log-probabilities
    log_probs: Tensor | None = None


def chunks(rows: int, classes: int, networks: int, how: Arithmetic) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk: as many as the rule gives, of equal size up to the block."""
    if rows == 0:
        return
    most = max(how.chunk_bytes // (4 * classes * networks), how.least_rows, 1)
    number = -(-rows // most)
    size = round_up(-(-rows // number), 16)  # so that what belongs to a row begins on 16 bytes
    for begin in range(0, rows, size):
        yield begin, min(begin + size, rows)


def margins(
    call: Call, head: Head, counts: Tensor | None
) -> tuple[Tensor | None, LabelDirections | None]:
    """(N, 2): what the margin adds to the label's logit, and the slope of the changed logit; and
    for an exact slope, which is large at a small angle, the directions that it is multiplied by
    (None where a look costs nothing and finds no small angle).

    cos and sin come from |x - w| and |x + w| of the unit vectors: 1 - cos^2 would leave nothing of
    the sine of a small angle in float32.
    """
    if call.m2 is None or call.m3 is None or call.target is None:
        return None, None
    is_class = (call.target >= 0) & (call.target < head.classes)
    label = torch.where(is_class, call.target, 0).long()
    x = call.features if counts is None else torch.where(counts[:, None], call.features, 0.0)
    x, x_is_zero = unit(x, head.how.may_wait)
    w, w_is_zero = unit(call.weight.index_select(0, label), head.how.may_wait)
    near, far = ((x + sign * w).square().sum(dim=1) for sign in (-1.0, 1.0))
    cosine = (far - near) / 4.0
    squared = (near * far / 4.0).masked_fill(x_is_zero | w_is_zero, 1.0)
    sine = squared.sqrt()

    m2, m3 = call.m2.double(), call.m3.double()
    is_small = squared <= SMALLEST_SINE**2
    sine = torch.where(is_small, squared / SMALLEST_SINE, sine)
    fall = torch.where(is_small, 2.0 * cosine / SMALLEST_SINE, cosine / sine)  # -d sine / d cosine
    turned = cosine * m2.cos() - sine * m2.sin()
    slope = m2.cos() + fall * m2.sin()
    beyond = (m2 > 0) & (cosine < -m2.cos())
    turned = torch.where(beyond, cosine - m2 * m2.sin(), turned)
    above = (m2 < 0) & (cosine > m2.cos())
    turned = torch.where(above, 1.0, turned)
    slope = torch.where(beyond, 1.0, torch.where(above, 0.0, slope))
    directions = None
    if call.straight_through:
        slope = torch.ones_like(slope)
    elif not head.how.may_wait or bool((squared < SMALL_SINE**2).any()):
        of_rows, of_classes = w - cosine[:, None] * x, x - cosine[:, None] * w
        directions = LabelDirections(label, of_rows.float(), of_classes.float())
    margin = torch.stack((call.scale * (turned - m3 - cosine), slope), dim=1).float()
    return margin, directions


def run(
    call: Call,
    want: tuple[bool, bool, bool],
    weights: Tensor | None,
    want_terms: bool,
    how: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, terms, and the gradients of features, weight and bias: float32, (0,) where not wanted.

    weights: (N,), what each row's loss is multiplied by, or None for 1.
    """
    device = call.features.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        counts = None if call.target is None else call.target != call.ignore_index
        scale = call.scale if call.normalize else None
        head = Head(call.features, call.weight, call.bias, scale, counts, how)
        rows, classes = head.rows, head.classes
        teacher = None
        if call.teacher_features is not None and call.teacher_weight is not None:
            scale = call.teacher_scale if call.normalize else None
            parts = (call.teacher_features, call.teacher_weight, call.teacher_bias)
            teacher = Head(*parts, scale, None, how)
        wanted = any(want)
        margin, directions = margins(call, head, counts)
        gradients = Gradients(head, want, weights, directions) if wanted else None

        form = {"dtype": torch.float32, "device": device}
        number = torch.full((), rows, **form) if counts is None else counts.sum(dtype=torch.float32)
        divisor = number.clamp(min=1.0)
        per_row = torch.empty(rows, **form)
        row_terms = torch.empty((rows, 4), **form) if want_terms else None
        plan = list(chunks(rows, classes, 1 if teacher is None else 2, how))
        longest = round_up(max((end - begin for begin, end in plan), default=0), how.block)
        shape = (longest, round_up(classes, 16))  # rows begin on 16 bytes
        student_logits = how.empty(shape, torch.float32)
        teacher_logits = None if teacher is None else how.empty(shape, torch.float32)
        is_bf16 = head.is_bf16 and head.row_scale is None and weights is None
        bf16_gradient = how.empty(shape, torch.bfloat16) if wanted and is_bf16 else None
        for begin, end in plan:
            here = slice(begin, end)
            s = student_logits[: round_up(end - begin, how.block)]
            head.logits(begin, end, s)
            t = None if call.teacher is None else call.teacher[here]
            if teacher is not None and teacher_logits is not None:
                t = teacher_logits[: len(s)]
                teacher.logits(begin, end, t)
                t = t[: end - begin, :classes]
            g = s if bf16_gradient is None else bf16_gradient[: len(s)]
            student = s[: end - begin, :classes]
            gradient = student if bf16_gradient is None else g[: end - begin, :classes]
            chunk = Chunk(
                student,
                t,
                None if call.target is None else call.target[here],
                None if margin is None else margin[here],
                gradient if wanted else None,
                per_row[here],
                None if row_terms is None else row_terms[here],
                divisor if call.reduction == "mean" else None,
                call,
                None if call.indices is None else call.indices[here],
                None if call.log_probs is None else call.log_probs[here],
            )
            how.rows(chunk)
            if gradients is not None:
                gradients.add(g, begin, end)
        nothing = torch.empty(0, **form)
        by_features, by_weight, by_bias = (
            (nothing, nothing.clone(), nothing.clone()) if gradients is None else gradients.finish()
        )

        loss = per_row
        if call.reduction != "none":
            loss = per_row.sum(dtype=torch.float64)
            loss = (loss / divisor if call.reduction == "mean" else loss).to(torch.float32)
        terms = torch.empty(0, **form)
        if row_terms is not None:
            sums = row_terms.sum(dim=0, dtype=torch.float64)
            means = (sums[:3] / divisor).to(torch.float32)
            terms = torch.cat((means, sums[3:].to(torch.float32), number[None]))
        return loss, terms, by_features, by_weight, by_bias
