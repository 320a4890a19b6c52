"""The rows of a chunk whose teacher is sparse: the top k classes, and one bin for all others.

The k classes and the label are taken out of the chunk's logits (they become -inf). A sweep sums up
the others, row by row; the parts are merged here in float64, k + 1 numbers per row; a second
sweep writes the gradient of what is left, and the k + 1 classes get theirs. Nothing is taken out of
a sum, which would cancel where the top k have nearly all probability. Derivation: docs/ops.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.linear_kd_cross_entropy.driver import Chunk

SMALLEST_TAIL = 2.0**-20  # as in eager.py

# (logits, temperature) -> float64 maximum, finite, and sums of exp(s - max), exp((s - max) / tau)
Statistics = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]
# (logits, (N, 4) float32 factors m, a, b, e, temperature, out):
# out = a exp(s - m) + b exp((s - m) / tau) - e, and -e where a and b are 0
Gradient = Callable[[Tensor, Tensor, float, Tensor], None]


@dataclass(frozen=True)
class _Parts:
    """A chunk's logits in float64: of the top k, of the label, and what is known of the others."""

    top: Tensor  # (N, k)
    label: Tensor  # (N,), -inf without labels
    is_label: Tensor  # (N, k): the label, where it is among the top k
    label_in_tail: Tensor  # (N,)
    most: Tensor  # (N,) maximum and sums of the other classes
    plain: Tensor
    softened: Tensor


@dataclass(frozen=True)
class _Slopes:
    """Derivatives of a term by the logits: of the top k (N, k), of the label (N,), and of the other
    classes (N,), which are to be multiplied by exp(s - most), softened in the soft term."""

    top: Tensor
    label: Tensor
    others: Tensor


def _times(probability: Tensor, log: Tensor) -> Tensor:
    """probability log, with 0 log 0 = 0."""
    return torch.where(probability == 0, 0.0, probability * log)


def _soft(parts: _Parts, log_probs: Tensor, tau: float, classes: int) -> tuple[Tensor, ...]:
    """Soft term and entropy of the k + 1 bins, (N,); and the slopes' parts."""
    p = log_probs.exp()
    left = (1.0 - p.sum(dim=1)).clamp(min=0.0)
    left = torch.where(left < SMALLEST_TAIL, 0.0, left)
    if p.shape[1] == classes:
        left = torch.zeros_like(left)
    # the tail relative to its own maximum: so it is there however far below the top k it lies
    in_tail = parts.label_in_tail
    most = torch.where(in_tail, torch.maximum(parts.most, parts.label), parts.most)
    label = torch.where(in_tail, ((parts.label - most) / tau).exp(), 0.0)
    fade = ((parts.most - most) / tau).exp()
    tail = parts.softened * fade + label
    highest = torch.maximum(most, parts.top.amax(dim=1))
    top = ((parts.top - highest[:, None]) / tau).exp()
    down = ((most - highest) / tau).exp()
    total = top.sum(dim=1) + tail * down
    total = torch.where(total > 0, total, torch.nan)
    log_total = total.log() + highest / tau
    soft = -_times(p, parts.top / tau - log_total[:, None]).sum(dim=1)
    soft -= _times(left, tail.log() + most / tau - log_total)
    entropy = -_times(p, log_probs).sum(dim=1) - _times(left, left.log())

    left = torch.where(tail > 0, left, 0.0)
    every = p.sum(dim=1) + left  # 1 but for the rounding of log_probs
    by_top = (every[:, None] * top / total[:, None] - p) / tau
    by_tail = (every * down / total - left / torch.where(left > 0, tail, 1.0)) / tau
    by_label = by_tail * label + torch.where(parts.is_label, by_top, 0.0).sum(dim=1)
    return soft, entropy, by_top, by_label, by_tail * fade


def _hard(
    parts: _Parts, margin: Tensor | None, smoothing: float, mean: Tensor | None, classes: int
) -> tuple[Tensor, ...]:
    """Hard term, (N,), and the slopes' parts. mean: of each row's logits, with the label's as the
    margin makes it; None without smoothing."""
    added, slope = (0.0, 1.0) if margin is None else margin.double().unbind(dim=1)
    label = parts.label + added
    top = torch.where(parts.is_label, -torch.inf, parts.top)
    most = torch.maximum(torch.maximum(parts.most, top.amax(dim=1)), label)
    fade = (parts.most - most).exp()
    top = (top - most[:, None]).exp()
    rest = parts.plain * fade + top.sum(dim=1)
    total = rest + (label - most).exp()
    total = torch.where(total > 0, total, torch.nan)
    log_total = total.log() + most
    hard = log_total - label
    if mean is not None:
        hard = (1.0 - smoothing) * hard + smoothing * (log_total - mean)
    share = smoothing / classes  # which the sweep subtracts from the other classes
    by_label = slope * (smoothing - share - rest / total)
    return hard, top / total[:, None] - share, by_label, fade / total


def take_rows(chunk: Chunk, statistics: Statistics, gradient: Gradient) -> None:
    """Loss, terms and gradient of a chunk with a sparse teacher. Its logits are used up."""
    call, s, target = chunk.call, chunk.student, chunk.target
    indices, log_probs, tau = chunk.indices, chunk.log_probs, call.temperature
    assert indices is not None
    assert log_probs is not None
    classes = s.shape[1]
    in_range = (indices >= 0) & (indices < classes)
    ordered = indices.sort(dim=1).values
    good = in_range.all(dim=1) & (ordered[:, 1:] != ordered[:, :-1]).all(dim=1)
    index = torch.where(in_range, indices, 0).long()
    top = s.gather(1, index).double()
    label, mean, is_hit, counts = None, None, torch.zeros_like(good), torch.ones_like(good)
    if target is None:
        s.scatter_(1, index, -torch.inf)
        label_logit = torch.full_like(top[:, 0], -torch.inf)
        is_label, label_in_tail = torch.zeros_like(in_range), torch.zeros_like(good)
    else:
        counts = target != call.ignore_index
        is_class = (target >= 0) & (target < classes)
        good &= is_class
        label = torch.where(is_class, target, 0).long()[:, None]
        label_logit = s.gather(1, label)[:, 0].double()
        is_label = index == label
        label_in_tail = ~is_label.any(dim=1)
        if chunk.terms is not None:
            is_hit = s.argmax(dim=1) == label[:, 0]
        if call.label_smoothing != 0.0:
            mean = s.sum(dim=1).double() / classes
            if chunk.margin is not None:
                mean = mean + chunk.margin[:, 0].double() / classes
        s.scatter_(1, index, -torch.inf)
        s.scatter_(1, label, -torch.inf)
    parts = _Parts(top, label_logit, is_label, label_in_tail, *statistics(s, tau))

    spoiled = torch.where(good, 1.0, torch.nan).double()  # a bad index or label
    count = 1.0 if chunk.count is None else chunk.count.double()
    weight = spoiled / count
    soft, entropy, *slopes = _soft(parts, log_probs.double(), tau, classes)
    loss = call.alpha * soft
    softly = _Slopes(*(call.alpha * x for x in slopes))
    hard, hardly, share = torch.zeros_like(soft), None, 0.0
    if target is not None:
        hard, *slopes = _hard(parts, chunk.margin, call.label_smoothing, mean, classes)
        loss = hard + loss
        hardly = _Slopes(*slopes)
        share = call.label_smoothing / classes

    def kept(x: Tensor) -> Tensor:
        return torch.where(counts, x, 0.0)

    chunk.loss.copy_(kept(spoiled * loss))
    if chunk.terms is not None:
        is_hit = is_hit & ~hard.isnan()
        found = (spoiled * hard, spoiled * soft, spoiled * entropy, is_hit.double())
        chunk.terms.copy_(torch.stack([kept(x) for x in found], dim=1))
    if chunk.gradient is None:
        return
    by_others, by_top = torch.zeros_like(weight), softly.top
    if hardly is not None:
        by_others, by_top = hardly.others, hardly.top + by_top
    factors = [kept(weight * x) for x in (by_others, softly.others, torch.full_like(weight, share))]
    gradient(s, torch.stack([parts.most, *factors], dim=1).float(), tau, chunk.gradient)
    dtype = chunk.gradient.dtype
    by_top = torch.where(counts[:, None], weight[:, None] * by_top, 0.0)
    chunk.gradient.scatter_(1, index, by_top.to(dtype))
    if hardly is not None and label is not None:
        by_label = kept(weight * (hardly.label + softly.label))
        chunk.gradient.scatter_(1, label, by_label[:, None].to(dtype))
