"""The specification of nearest_neighbor in plain PyTorch, and the oracle of its kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22  # differences held at a time


class Nearest(NamedTuple):
    """Squared distance (N,) float32 and gallery index (N,) int64 of each query's nearest row."""

    distance: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used


def nearest_neighbor(queries: Tensor, gallery: Tensor | None) -> Nearest:
    """min_j ||q_i - x_j||^2 and the lowest j that has it; arguments as checked by op.

    A distance that is NaN is passed over; a query with no other gets NaN and its lowest admissible
    index.
    """
    leave_one_out = gallery is None
    rows = queries if gallery is None else gallery
    wide = torch.float64 in (queries.dtype, rows.dtype)
    compute = torch.float64 if wide else torch.float32
    # contiguous: the order of a sum follows the strides, and equal rows must have equal distances
    queries, rows = queries.detach(), rows.detach().to(compute).contiguous()
    count = rows.shape[0]
    at_once = max(1, CHUNK // max(1, rows.numel()))
    places = torch.arange(count, device=rows.device)
    found = [(rows.new_empty(0), places[:0])]
    for first in range(0, queries.shape[0], at_once):
        some = queries[first : first + at_once].to(compute).contiguous()
        distances = (some[:, None] - rows[None]).square().sum(dim=2)  # (n, M)
        own = torch.arange(first, first + len(some), device=rows.device)
        admissible = (own[:, None] != places) if leave_one_out else torch.ones_like(distances) > 0
        usable = admissible & ~distances.isnan()
        least = distances.masked_fill(~usable, torch.inf).amin(dim=1, keepdim=True)
        nearest = usable & (distances == least)
        # argmax of a 0-1 matrix is the first 1
        index = torch.where(usable.any(dim=1), nearest.int().argmax(1), admissible.int().argmax(1))
        found.append((distances.gather(1, index[:, None])[:, 0], index))
    distance, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Nearest(distance, index)
