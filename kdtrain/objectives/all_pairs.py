"""True accept rates at low false accept rates, over every pair of a split.

Ten folds of pairs hold a few thousand impostors: at a false accept rate of 0.001 two or three of
them set the threshold. All N (N - 1) / 2 pairs of a thousand images are half a million. Scores
are formed a part at a time, and only the impostors that can set a threshold are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FARS = (1e-2, 1e-3, 1e-4)
"""False accept rates that are reported, where LEAST impostors stand behind them."""
LEAST = 10
CURVE_FAR = 0.1
"""Where the curve ends."""
CURVE_POINTS = 120
KEPT = 1 << 18  # impostors for the curve; where more stand behind CURVE_FAR it ends before
_PART = 1 << 20  # scores formed at a time


class Scores(NamedTuple):
    """Cosines of every pair, as far as thresholds need them; float32, on the CPU."""

    genuine: Tensor
    """(G,) of two images of one identity, not of one video, falling."""
    impostors: Tensor
    """(K,) the largest of two identities, falling."""
    num_impostors: int
    """Pairs of two identities in all, M >= K."""


def pair_scores(
    queries: Tensor,
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    gallery: Tensor | None = None,
    part: int = _PART,
) -> Scores:
    """Cosines of all pairs of N images.

    queries (N, D) features, labels (N,). Without gallery every unordered pair counts once. gallery
    (N, D): features of the same images by another network; every ordered pair (i, j), i != j,
    of queries[i] and gallery[j] counts. groups (N,): the video that an image comes from; genuine
    pairs of one video are left out, as frames are near-copies. Memory: `part` scores and what is
    kept. ValueError for features that are not finite.
    """
    ours = F.normalize(queries.float(), dim=1)
    theirs = ours if gallery is None else F.normalize(gallery.float(), dim=1)
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        raise ValueError("pair_scores: features must be finite, got nan or inf in them")
    identities, sizes = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
    order = identities.argsort(stable=True)  # pairs of one identity then lie beside the diagonal
    ends = sizes.cumsum(0).tolist()
    begins = [0, *ends]
    identities, place = identities[order].to(ours.device), order.to(ours.device)
    ours = ours[place]
    theirs = ours if gallery is None else theirs[place]
    videos = None if groups is None else groups.to(ours.device)[place]
    total = len(order)
    count = (total**2 - int(sizes.square().sum())) // (2 if gallery is None else 1)
    # those behind the largest of FARS, more for the curve, and the next one
    wanted = 1 + max(accepted(max(FARS), count), min(accepted(CURVE_FAR, count), KEPT))
    genuine: list[Tensor] = []
    kept: list[Tensor] = []
    bound = float("-inf")
    step = max(1, part // max(1, total))
    for start in range(0, total, step):
        stop = min(total, start + step)
        first = 0 if gallery is not None else start
        scores = ours[start:stop] @ theirs[first:].T  # (R, C)
        end = ends[int(identities[stop - 1])]
        low = start if gallery is None else begins[int(identities[start])]
        band = scores[:, low - first : end - first]  # whoever is not in it is somebody else
        column = torch.arange(low, end, device=ours.device)
        row = torch.arange(start, stop, device=ours.device)[:, None]
        same = identities[row] == identities[column]
        counted = same & (row < column if gallery is None else row != column)
        if videos is not None:
            counted &= videos[row] != videos[column]
        genuine.append(band[counted])
        band.masked_fill_(same if gallery is not None else same | (row >= column), float("-inf"))
        kept.append(scores[scores > bound])
        if sum(map(len, kept)) > 2 * wanted:
            kept = [torch.cat(kept).topk(wanted).values]
            bound = kept[0][-1].item()
    largest = torch.cat(kept) if kept else ours.new_zeros(0)
    largest = largest.topk(min(wanted, len(largest))).values
    every = torch.cat(genuine) if genuine else ours.new_zeros(0)
    return Scores(every.sort(descending=True).values.cpu(), largest.cpu(), count)


def accepted(far: float, count: int) -> int:
    """Impostors of `count` that may be accepted at `far`: the largest k with k / count <= far."""
    k = min(count, int(far * count) + 1)
    while k > 0 and k / count > far:
        k -= 1
    return k


def tar(scores: Scores, impostors: int) -> float:
    """Share of genuine pairs above the threshold that accepts at most `impostors` others.

    The lowest threshold t with #{impostor >= t} <= `impostors`, "score >= t" accepts: every genuine
    score above the next impostor's. No interpolation; pairs that tie with that impostor are
    refused, as are the impostors.
    """
    if impostors >= scores.num_impostors:
        return 1.0
    next_one = scores.impostors[impostors]
    return (scores.genuine > next_one).double().mean().item()


def metrics(scores: Scores) -> dict[str, float]:
    """tar_at_far_F_all for each F of FARS with at least LEAST impostors behind it, and both counts;
    {} where none has.
    """
    behind = {far: accepted(far, scores.num_impostors) for far in FARS}
    known = {far: k for far, k in behind.items() if k >= LEAST}
    if not known or not len(scores.genuine):
        return {}
    rates = {f"tar_at_far_{far:g}_all": tar(scores, k) for far, k in known.items()}
    return {
        **rates,
        "pairs_genuine_all": len(scores.genuine),
        "pairs_impostor_all": scores.num_impostors,
    }


def curve(scores: Scores) -> tuple[Tensor, Tensor]:
    """False accept rates, evenly spaced on a logarithmic axis from LEAST impostors up to CURVE_FAR,
    and the true accept rates there; float64 (n,), n = 0 where there are too few pairs.

    The rates depend on the labels alone, so curves of several networks share them.
    """
    most = min(accepted(CURVE_FAR, scores.num_impostors), len(scores.impostors) - 1)
    if most < LEAST or not len(scores.genuine):
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    ends = torch.tensor([LEAST, most], dtype=torch.float64).log()
    steps = torch.linspace(ends[0].item(), ends[1].item(), CURVE_POINTS, dtype=torch.float64)
    counts = torch.unique(steps.exp().round().long().clamp(LEAST, most))
    falling = -scores.genuine  # rising: the number above a threshold is a place in it
    above = torch.searchsorted(falling, -scores.impostors[counts])
    return counts.double() / scores.num_impostors, above.double() / len(scores.genuine)
