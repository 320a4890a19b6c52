"""The specification of kd_cross_entropy in plain PyTorch, and the oracle of its kernels."""

from typing import NamedTuple

import torch
from torch import Tensor


class KDTerms(NamedTuple):
    """Values of the same sweep beside the loss: detached 0-d tensors on the logits' device.

    hard, soft, entropy are means over the counted rows (0 where none counts): H(softmax(s), y) with
    label smoothing, H(softmax(s/tau), softmax(t/tau)) without alpha and tau^2, and the entropy of
    softmax(t/tau); so soft - entropy is the Kullback-Leibler divergence. A term that is not
    computed is 0: hard without a target, soft and entropy without a teacher or with alpha = 0. hits
    counts rows whose first largest logit is the label's (none of a row that is no distribution:
    with a NaN or +inf, or all -inf), count the counted rows.
    """

    hard: Tensor
    soft: Tensor
    entropy: Tensor
    hits: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.count is not used


def cross_entropy_of(log_probs: Tensor, probs: Tensor) -> Tensor:
    """-sum_c probs_c log_probs_c with 0 log 0 = 0, for (N, C) inputs: (N,)."""
    log_probs = log_probs.masked_fill(probs == 0, 0.0)
    return -(probs * log_probs).sum(dim=1)  # (N,)


def zero_rows(x: Tensor) -> Tensor:
    """(N,) zeros that depend on an (N, C) input with gradient 0, whatever values it has."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0).sum(dim=1)


def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    tau_squared: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    hard_logits: Tensor | None = None,
    soft_terms: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, KDTerms]:
    """Loss and terms by eq. (2) of arXiv 1709.02929; arguments as op.py checks them.

    A term without a target or a teacher is not computed; op.py passes no teacher where alpha is 0.
    Without either the loss is 0 with gradient 0, whatever values the logits have.
    hard_logits: (N, C), what the hard term takes for the student's logits; a margin changes them.
    soft_terms: the soft term and the teacher's entropy of each row, in a teacher's place.
    """
    rows = student.shape[0]
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    s = student.to(compute).contiguous()  # the order of a sum follows the strides
    counts = torch.ones(rows, dtype=torch.bool, device=student.device)
    hard = soft = entropy = s.new_zeros(rows)
    hits = torch.zeros(rows, dtype=torch.bool, device=student.device)

    if target is not None:
        counts = target != ignore_index
        in_range = (target >= 0) & (target < student.shape[1])
        label = torch.where(counts & in_range, target, 0).long()
        # A NaN in a row that counts for nothing must not reach any gradient.
        s = torch.where(counts[:, None], s, 0.0)
        h = s if hard_logits is None else torch.where(counts[:, None], hard_logits, 0.0)
        log_probs = torch.log_softmax(h, dim=1)  # (N, C)
        hard = -log_probs.gather(1, label[:, None])[:, 0]
        if label_smoothing != 0.0:
            smooth = -log_probs.mean(dim=1)
            hard = (1.0 - label_smoothing) * hard + label_smoothing * smooth
        # Where labels are not checked (on CUDA it would wait), a bad one makes its row NaN: a
        # factor, for NaN in the other branch of a torch.where would reach every gradient.
        hard = hard * torch.where(counts & ~in_range, torch.nan, 1.0).to(compute)
        hits = (s.detach().argmax(dim=1) == label) & ~log_probs.detach().isnan().any(dim=1)

    if teacher is not None:
        t = torch.where(counts[:, None], teacher.detach().to(compute).contiguous(), 0.0)
        t = t / temperature
        probs = torch.softmax(t, dim=1)  # (N, C)
        soft = cross_entropy_of(torch.log_softmax(s / temperature, dim=1), probs)
        entropy = cross_entropy_of(torch.log_softmax(t, dim=1), probs)
    elif soft_terms is not None:
        soft, entropy = soft_terms

    if teacher is not None or soft_terms is not None:
        weight = alpha * temperature**2 if tau_squared else alpha
        loss = hard + weight * soft
    elif target is not None:
        loss = hard
    else:
        loss = zero_rows(s)
    loss, hard, soft, entropy = (torch.where(counts, x, 0.0) for x in (loss, hard, soft, entropy))
    count = counts.sum()
    divisor = count.clamp(min=1)
    terms = KDTerms(
        *((x.detach().sum() / divisor).to(compute) for x in (hard, soft, entropy)),
        hits=(hits & counts).sum().to(compute),
        count=count.to(compute),
    )
    if reduction == "none":
        return loss, terms
    return (loss.sum() / divisor if reduction == "mean" else loss.sum()), terms
