"""The specification of triplet_loss in plain PyTorch, and the oracle of its kernels.

d is the squared Euclidean distance, eq. (8) of arXiv 1709.02929, or its root.
"""

import torch
from torch import Tensor


def root_or_square(squared_distance: Tensor, squared: bool) -> Tensor:
    """The distance from its square; the gradient of a root at 0 is 0."""
    if squared:
        return squared_distance
    is_zero = squared_distance == 0
    return squared_distance.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def distance(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """d(x, y) over the last dimension."""
    return root_or_square((x - y).square().sum(dim=-1), squared)


def reduce(per_row: Tensor, count: Tensor, reduction: str) -> Tensor:
    """The per-row losses, their sum, or the sum over `count` triplets (0 of none)."""
    if reduction == "none":
        return per_row
    total = per_row.sum()
    return total if reduction == "sum" else total / count.clamp(min=1)


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float,
    squared: bool,
    reduction: str,
) -> Tensor:
    """relu(d(a, p) - d(a, n) + margin) of every row; arguments as checked by op.triplet_loss."""
    is_double = torch.float64 in (anchor.dtype, positive.dtype, negative.dtype)
    compute = torch.float64 if is_double else torch.float32
    # contiguous: the order of a sum follows the strides
    a, p, n = (t.to(compute).contiguous() for t in (anchor, positive, negative))
    hinge = torch.relu(distance(a, p, squared) - distance(a, n, squared) + margin)
    return reduce(hinge, torch.tensor(len(hinge), device=hinge.device), reduction)
