"""Softmax over a sample of the classes, as in PartialFC: which classes, and labels among them."""

import math

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.checks import check_labels, check_number, reject
from kdkernels.kd_cross_entropy.op import check_label_range
from kdkernels.linear_kd_cross_entropy.arguments import NAME

NO_CLASS = -100  # what rows without a class hold once labels are renumbered: no place of a class


def sample_classes(
    target: Tensor,
    num_classes: int,
    fraction: float,
    generator: torch.Generator | None = None,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """The classes of a batch and others drawn uniformly without replacement, ceil(fraction C) in
    all: sorted int64 (S,), for `linear_kd_cross_entropy(..., classes=)`.

    PartialFC's sampling (An et al., arXiv 2010.05222, 2203.15565): every positive takes part, and
    negatives fill up. A batch with more positives than ceil(fraction C) gets all of them and no
    negative.

    target: (N,) int32 or int64; rows that hold ignore_index have no positive. fraction: above 0, at
    most 1. generator: on target's device, None for torch's own. Where N is above ceil(fraction C)
    the size of the result depends on the labels, so the call waits for the device.

    Raises ValueError for a wrong dtype, shape or fraction, and on the CPU (elsewhere under
    kdkernels.validate(True)) for a label that is no class.
    """
    op = "sample_classes"
    if not isinstance(target, Tensor) or target.dim() != 1:
        raise reject(op, "target must be a tensor of shape (N,)")
    check_labels(op, "target", target, len(target), target.device)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise reject(op, f"num_classes must be an int above 0, got {num_classes!r}")
    fraction = check_number(op, "fraction", fraction, above=0.0, at_most=1.0)
    check_label_range(target, num_classes, ignore_index, op)
    size = math.ceil(round(fraction * num_classes, 6))  # 0.07 * 100 is a little above 7
    score = torch.rand(
        num_classes + 1, generator=generator, device=target.device, dtype=torch.float32
    )
    is_class = (target != ignore_index) & (target >= 0) & (target < num_classes)
    score.index_fill_(0, torch.where(is_class, target, num_classes).long(), 2.0)  # above all others
    score = score[:num_classes]
    if len(target) > size:
        size = max(size, int((score == 2.0).sum()))
    return score.topk(size).indices.sort().values


def check_classes(classes: object, num_classes: int, device: torch.device) -> Tensor:
    """`classes` as int64 (S,); a ValueError where it is no list of classes, on the CPU (elsewhere
    under validate(True)) also where they are out of range or not in rising order."""
    if not isinstance(classes, Tensor) or classes.dtype not in (torch.int32, torch.int64):
        got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise reject(NAME, f"classes must be an int32 or int64 tensor, got {got}")
    if classes.dim() != 1 or len(classes) == 0 or classes.device != device:
        raise reject(
            NAME,
            f"classes must have shape (S,) with S above 0 on {device}, got {tuple(classes.shape)} "
            f"on {classes.device}",
        )
    classes = classes.long().contiguous()
    if checks.looks_at_values(classes):
        inside = (classes >= 0) & (classes < num_classes)
        if not bool(inside.all() & (classes[1:] > classes[:-1]).all()):
            raise reject(
                NAME, f"classes must rise, each once, within [0, {num_classes}): sort them"
            )
    return classes


def renumber(target: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Each label's place among the classes, int64: NO_CLASS where it is ignore_index, and one past
    the last place where it is not among them, which is a ValueError on the CPU."""
    label = target.long().contiguous()
    place = torch.searchsorted(classes, label)
    found = classes[place.clamp(max=len(classes) - 1)] == label
    counts = label != ignore_index
    if checks.looks_at_values(target) and bool((counts & ~found).any()):
        row = int((counts & ~found).nonzero()[0])
        raise reject(
            NAME,
            f"target {int(label[row])} of row {row} is not among classes: "
            f"sample_classes puts every label of a batch there",
        )
    return torch.where(counts, torch.where(found, place, len(classes)), NO_CLASS)
