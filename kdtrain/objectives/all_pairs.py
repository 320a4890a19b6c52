"""True accept rates at low false accept rates, over every pair of a split.

Ten folds of pairs have a few thousand impostor pairs, two or three of them above a false accept
rate of 0.001; all N (N - 1) / 2 pairs of a thousand images are half a million. Scores are formed in
parts, and only the highest impostor scores, which can set a threshold, are stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FARS = (1e-2, 1e-3, 1e-4)
"""False accept rates that are reported, with at least LEAST impostors accepted."""
LEAST = 10
CURVE_FAR = 0.1  # end of the curve
CURVE_POINTS = 120
MOST = 1 << 18  # impostor scores stored; if CURVE_FAR accepts more, the curve ends earlier
_PART = 1 << 20  # scores formed at a time


class Scores(NamedTuple):
    """Cosines of all pairs, as far as thresholds need them; float32, on the CPU."""

    genuine: Tensor  # (G,) of genuine pairs, not within a video, falling
    impostors: Tensor  # (K,) the highest of impostor pairs, falling
    num_impostors: int  # All impostor pairs, M >= K


def pair_scores(
    queries: Tensor,
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    gallery: Tensor | None = None,
    part: int = _PART,
) -> Scores:
    """Returns the cosines of all pairs of N images.

    queries (N, D) features, labels (N,): every unordered pair counts once. gallery (N, D): features
    of the same images by another network; every ordered pair (i, j), i != j, of queries[i] and
    gallery[j] counts. groups (N,): videos; genuine pairs within a video are omitted, as frames are
    near-copies. Memory: `part` scores and the result. Raises ValueError for features not finite.
    """
    ours = F.normalize(queries.float(), dim=1)
    theirs = ours if gallery is None else F.normalize(gallery.float(), dim=1)
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        raise ValueError("pair_scores: features must be finite, got nan or inf in them")
    identities, sizes = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
    order = identities.argsort(stable=True)  # genuine pairs then lie near the diagonal
    ends = sizes.cumsum(0).tolist()
    begins = [0, *ends]
    identities, place = identities[order].to(ours.device), order.to(ours.device)
    ours = ours[place]
    theirs = ours if gallery is None else theirs[place]
    videos = None if groups is None else groups.to(ours.device)[place]
    total = len(order)
    count = (total**2 - int(sizes.square().sum())) // (2 if gallery is None else 1)
    # those accepted at the largest of FARS, more for the curve, and the next one
    wanted = 1 + max(accepted(max(FARS), count), min(accepted(CURVE_FAR, count), MOST))
    genuine: list[Tensor] = []
    highest: list[Tensor] = []
    bound = float("-inf")
    step = max(1, part // max(1, total))
    for start in range(0, total, step):
        stop = min(total, start + step)
        first = 0 if gallery is not None else start
        scores = ours[start:stop] @ theirs[first:].T  # (R, C)
        end = ends[int(identities[stop - 1])]
        low = start if gallery is None else begins[int(identities[start])]
        band = scores[:, low - first : end - first]  # outside of it all pairs are impostors
        column = torch.arange(low, end, device=ours.device)
        row = torch.arange(start, stop, device=ours.device)[:, None]
        same = identities[row] == identities[column]
        counted = same & (row < column if gallery is None else row != column)
        if videos is not None:
            counted &= videos[row] != videos[column]
        genuine.append(band[counted])
        band.masked_fill_(same if gallery is not None else same | (row >= column), float("-inf"))
        highest.append(scores[scores > bound])
        if sum(map(len, highest)) > 2 * wanted:
            highest = [torch.cat(highest).topk(wanted).values]
            bound = highest[0][-1].item()
    largest = torch.cat(highest) if highest else ours.new_zeros(0)
    largest = largest.topk(min(wanted, len(largest))).values
    every = torch.cat(genuine) if genuine else ours.new_zeros(0)
    return Scores(every.sort(descending=True).values.cpu(), largest.cpu(), count)


def accepted(far: float, count: int) -> int:
    """Returns the largest k with k / count <= far: impostors accepted at `far`."""
    k = min(count, int(far * count) + 1)
    while k > 0 and k / count > far:
        k -= 1
    return k


def tar(scores: Scores, impostors: int) -> float:
    """Returns the share of genuine pairs at the lowest threshold that accepts at most `impostors`
    impostors: those above the next impostor's score. Ties with it are rejected; no interpolation.
    """
    if impostors >= scores.num_impostors:
        return 1.0
    next_one = scores.impostors[impostors]
    return (scores.genuine > next_one).double().mean().item()


def metrics(scores: Scores) -> dict[str, float]:
    """Returns tar_at_far_F_all for F of FARS that accept at least LEAST impostors, and counts."""
    allowed = {far: accepted(far, scores.num_impostors) for far in FARS}
    measured = {far: k for far, k in allowed.items() if k >= LEAST}
    if not measured or not len(scores.genuine):
        return {}
    rates = {f"tar_at_far_{far:g}_all": tar(scores, k) for far, k in measured.items()}
    pairs = {"genuine": len(scores.genuine), "impostor": scores.num_impostors}
    return rates | {f"pairs_{kind}_all": count for kind, count in pairs.items()}


def curve(scores: Scores) -> tuple[Tensor, Tensor]:
    """Returns false accept rates, log-spaced from LEAST impostors to CURVE_FAR and a function of
    the labels alone, and the true accept rates; float64 (n,), n = 0 with too few pairs.
    """
    most = min(accepted(CURVE_FAR, scores.num_impostors), len(scores.impostors) - 1)
    if most < LEAST or not len(scores.genuine):
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    ends = torch.tensor([LEAST, most], dtype=torch.float64).log()
    steps = torch.linspace(ends[0].item(), ends[1].item(), CURVE_POINTS, dtype=torch.float64)
    counts = torch.unique(steps.exp().round().long().clamp(LEAST, most))
    falling = -scores.genuine  # rising: the index is the number above a threshold
    above = torch.searchsorted(falling, -scores.impostors[counts])
    return counts.double() / scores.num_impostors, above.double() / len(scores.genuine)
