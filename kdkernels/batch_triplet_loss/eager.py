"""The specification of batch_triplet_loss in plain PyTorch, and the oracle of its kernels."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint

from kdkernels.triplet_loss.eager import distance, reduce, root_or_square

MININGS = ("hard", "semihard", "all")  # csrc's enum has the same order
REDUCTIONS = ("mean", "nonzero", "sum", "none")
INF = float("inf")
BLOCK_ELEMENTS = 2**25  # (rows, N, D) differences that are held at a time: 128 MB in float32


def squared_distances(x: Tensor) -> Tensor:
    """(N, N) squared distances as sums of squared differences, so that close rows lose nothing;
    large batches in blocks of rows that backward computes again."""
    rows, features = x.shape

    def block(some: Tensor, every: Tensor) -> Tensor:
        return (some[:, None, :] - every[None, :, :]).square().sum(dim=2)

    if rows * rows * features <= BLOCK_ELEMENTS:
        return block(x, x)
    size = max(1, BLOCK_ELEMENTS // (rows * features))
    blocks = [
        checkpoint(block, some, x, use_reentrant=False, preserve_rng_state=False)
        for some in x.split(size)
    ]
    return torch.cat(blocks)


def padded_positives(positive: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's positives in ascending order, (N, P) for the largest number P, and which of them
    exist."""
    rows = len(positive)
    # neither a traced graph nor a tensor without values has sizes that depend on data
    is_traced = torch.compiler.is_compiling() or positive.is_meta or is_fake(positive)
    most = rows if is_traced else max(1, int(positive.sum(dim=1).max()))
    index = (~positive).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # (N, P)
    return index, positive.gather(1, index)


def batch_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
    mining: str,
    squared: bool,
    reduction: str,
) -> Tensor:
    """The hinge of the mined triplets; arguments as checked by op.batch_triplet_loss.

    Selection is on squared distances, ties go to the lowest index, and a NaN is selected before any
    number. A negative at an infinite distance is one like any other.
    """
    compute = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    # contiguous: the order of a sum follows the strides, and equal rows must have equal distances
    x = embeddings.to(compute).contiguous()
    rows = len(x)
    if rows == 0:
        return reduce(x.sum(dim=1), torch.zeros((), device=x.device), reduction)
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(rows, dtype=torch.bool, device=x.device)
    negative = ~same
    largest = torch.finfo(compute).max  # stands for inf, which marks what must not be selected

    if mining == "hard":
        with torch.no_grad():
            d = squared_distances(x)
            p = d.masked_fill(~positive, -INF).argmax(dim=1)
            n = d.clamp(max=largest).masked_fill(~negative, INF).argmin(dim=1)
        counts = positive.any(dim=1) & negative.any(dim=1)  # (N,)
        hinge = torch.relu(distance(x, x[p], squared) - distance(x, x[n], squared) + margin)
    elif mining == "semihard":
        index, exists = padded_positives(positive)
        with torch.no_grad():
            d = squared_distances(x)
            to_positive = d.gather(1, index)[:, :, None]  # (N, P, 1)
            farther = negative[:, None, :] & ~(d[:, None, :] <= to_positive)  # (N, P, N)
            n = torch.where(farther, d.clamp(max=largest)[:, None, :], INF).argmin(dim=2)  # (N, P)
        counts = exists & farther.any(dim=2)
        a = x[:, None, :]
        hinge = torch.relu(distance(a, x[index], squared) - distance(a, x[n], squared) + margin)
    else:
        index, exists = padded_positives(positive)
        d = root_or_square(squared_distances(x), squared)
        hinge = torch.relu(d.gather(1, index)[:, :, None] - d[:, None, :] + margin)  # (N, P, N)
        counts = exists[:, :, None] & negative[:, None, :]

    hinge = torch.where(counts, hinge, 0.0).reshape(rows, -1)
    # a NaN is not zero: its gradient goes on, so it counts
    number = (~(hinge <= 0)).sum() if reduction == "nonzero" else counts.sum()
    return reduce(hinge.sum(dim=1), number, reduction)
