"""Metrics as pure functions of tensors: classification, landmarks, nearest neighbours, pairs,
floors.

Metrics are fractions (0.85, not 85 %).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import nearest_neighbor


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (N,) bool: the highest logit (first of ties) is the label's; False for NaN."""
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def normalizer(true: Tensor, sizes: Tensor, kind: str = "interocular") -> Tensor:
    """Returns (N,) the lengths in original pixels that landmark errors are divided by.

    true (N, 5, 2) landmarks, eyes first; sizes (N, 2) image width and height. interocular: distance
    of the eyes (Wu et al. 2015). diagonal: of the landmarks' bounding box. side: sqrt(width *
    height) of the image. Raises ValueError for a length that is not positive.
    """
    true = true.double()
    if kind == "interocular":
        length = (true[:, 0] - true[:, 1]).norm(dim=1)
    elif kind == "diagonal":
        length = (true.amax(1) - true.amin(1)).norm(dim=1)
    else:
        length = sizes.double().prod(1).sqrt()
    if not bool((length > 0).all()):
        row = int((~(length > 0)).nonzero()[0, 0])
        raise ValueError(
            f"normalizer: the {kind} length of image {row} is {length[row].item()}; "
            "correct its landmarks or choose another normalizer"
        )
    return length


def per_point_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Returns (N, 5) Euclidean distances of predicted and true landmarks, both (N, 5, 2)."""
    return (predicted.double() - true.double()).norm(dim=2)


def nrmse_per_image(
    predicted: Tensor, true: Tensor, sizes: Tensor, kind: str = "interocular"
) -> Tensor:
    """Returns (N,) sqrt(mean_i e_i^2) / d: e_i of `per_point_error`, d of `normalizer`. NRMSE is
    the mean over images. Points are in original pixels, as the aspect ratio matters.
    """
    return per_point_error(predicted, true).square().mean(1).sqrt() / normalizer(true, sizes, kind)


def failure_rate(errors: Tensor, limit: float = 0.1) -> float:
    """Returns the share of errors (N,) above `limit` or NaN."""
    return (~(errors <= limit)).double().mean().item()


def ced(errors: Tensor, limit: float = 0.1, steps: int = 101) -> tuple[Tensor, Tensor, float]:
    """Returns the cumulative error distribution: thresholds (steps,), the share of errors (N,) at
    or below each, and the exact area of the step curve over [0, limit], divided by limit.
    """
    errors = errors.double().nan_to_num(nan=float("inf"))
    thresholds = torch.linspace(0, limit, steps, dtype=torch.float64)
    below = torch.searchsorted(errors.sort().values, thresholds, right=True).double() / len(errors)
    area = (1 - errors / limit).clamp(min=0).mean().item()
    return thresholds, below, area


def nn_hits(
    queries: Tensor,
    labels: Tensor,
    groups: Tensor | None = None,
    *,
    gallery: Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Returns "nn_top1", float32 (N,): 1 if a query's nearest row by Euclidean distance, leave-one-
    out, is of the same identity, else 0; nan for a lone query, whose identity has no other image.

    queries (N, D) features, labels (N,). With groups (N,), the images' videos, also
    "nn_top1_other_video", where images of the query's own video are no neighbours. gallery (N, D):
    another network's features of the same images, which are searched in place of the queries.
    Raises ValueError for fewer than two rows.
    """
    if gallery is None:
        gallery = queries
        nearest = nearest_neighbor(queries, backend=backend)[1]
    else:
        own = torch.arange(len(queries), device=queries.device)
        nearest = _nearest_other_group(queries, gallery, own, backend)

    def hit(nearest: Tensor, mates: Tensor) -> Tensor:
        return torch.where(mates > 0, (labels[nearest] == labels).float(), float("nan"))

    labels = labels.to(queries.device)
    identities = torch.unique(labels, return_inverse=True)[1]
    mates = torch.bincount(identities)[identities] - 1
    result = {"nn_top1": hit(nearest, mates)}
    if groups is not None:
        groups = groups.to(queries.device)
        video = torch.unique(torch.stack([identities, groups], 1), dim=0, return_inverse=True)[1]
        mates = mates + 1 - torch.bincount(video)[video]
        others = _nearest_other_group(queries, gallery, groups, backend)
        result["nn_top1_other_video"] = hit(others, mates)
    return result


def nn_shares(hits: dict[str, Tensor]) -> dict[str, float]:
    """Returns the means of `nn_hits` without lone queries, "nn_top1" (nan without a query), and the
    counts "nn_queries" and "nn_lone"; the same for other videos.
    """
    result: dict[str, float] = {}
    for name, hit in hits.items():
        valid, suffix = hit[~hit.isnan()], name.removeprefix("nn_top1")
        result[name] = valid.double().mean().item() if len(valid) else float("nan")
        result[f"nn_queries{suffix}"] = len(valid)
        result[f"nn_lone{suffix}"] = len(hit) - len(valid)
    return result


def _nearest_other_group(
    queries: Tensor, gallery: Tensor, groups: Tensor, backend: str | None
) -> Tensor:
    """(N,) index of each query's nearest gallery row of another group by the rule of
    `nearest_neighbor`, or its own index without one; groups (N,) of both.

    Group numbers have two digits of base sqrt(N), and two groups differ in at least one: 2 sqrt(N)
    searches among rows of another first or another second digit find the nearest row.
    """
    number = torch.unique(groups, return_inverse=True)[1]
    base = math.isqrt(len(queries)) + 1
    found = torch.full((2, len(queries)), -1, device=queries.device)
    distance = queries.new_full(found.shape, float("nan"), dtype=torch.float32)
    for place, digit in enumerate((number // base, number % base)):
        for value in torch.unique(digit).tolist():
            mine, others = (digit == value).nonzero()[:, 0], (digit != value).nonzero()[:, 0]
            if len(others):
                least, index = nearest_neighbor(queries[mine], gallery[others], backend=backend)
                distance[place, mine], found[place, mine] = least, others[index]
    nearest = torch.where((distance[1] < distance[0]) | (found[0] < 0), found[1], found[0])
    # equal as float32, or NaN: `nearest_neighbor` compares in double
    same = ~(distance[0] < distance[1]) & ~(distance[1] < distance[0]) & (found[0] != found[1])
    for row in (same & (found >= 0).all(0)).nonzero()[:, 0].tolist():
        pair = found[:, row].sort().values
        nearest[row] = pair[nearest_neighbor(queries[row, None], gallery[pair], backend=backend)[1]]
    return torch.where(nearest < 0, torch.arange(len(nearest), device=nearest.device), nearest)


def make_pairs(
    labels: Tensor, seed: int, folds: int = 10, per_fold: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns verification pairs in LFW's layout: per fold genuine pairs, then as many impostor
    pairs.

    labels (N,). Two index tensors (P,) and `same` (P,) bool, P = folds * 2 * pairs, without
    repetition; the identities of folds are disjoint. `per_fold` pairs of each kind, or as many as
    every fold has, of at most 100 images per identity. Raises ValueError for a fold without any.
    """
    random = np.random.RandomState(seed)  # numpy never changes this legacy stream
    values = labels.cpu().numpy()
    order = random.permutation(len(values))
    order = order[np.argsort(values[order], kind="stable")]
    identities = np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
    identities = [identities[i][:100] for i in random.permutation(len(identities))]
    identities.sort(key=len, reverse=True)  # stable: equal identities stay in random order
    members: list[list[np.ndarray]] = [[] for _ in range(folds)]
    for rank, identity in enumerate(identities):
        lap, seat = divmod(rank, folds)
        members[seat if lap % 2 == 0 else folds - 1 - seat].append(identity)
    sames, images, available = [], [], []
    for fold in members:
        same = [identity[np.stack(np.triu_indices(len(identity), 1), 1)] for identity in fold]
        sames.append(np.concatenate([*same, np.zeros((0, 2), order.dtype)]))
        images.append(np.concatenate([*fold, np.zeros(0, order.dtype)]))
        count = len(images[-1])
        available.append(min(len(sames[-1]), count * (count - 1) // 2 - len(sames[-1])))
    number = min(per_fold, *available)
    if number < 1:
        raise ValueError(
            f"make_pairs: each of {folds} folds needs a pair of one and one of two identities; "
            f"{len(identities)} identities with {len(values)} images lack such pairs; lower folds"
        )
    pairs = []
    for same, pool in zip(sames, images, strict=True):
        pairs.append(same[random.permutation(len(same))[:number]])
        pairs.append(_different_pairs(random, pool, values, number))
    index = torch.from_numpy(np.concatenate(pairs).astype(np.int64))
    same_identity = torch.tensor(([True] * number + [False] * number) * folds)
    return index[:, 0], index[:, 1], same_identity


def _different_pairs(
    random: np.random.RandomState, pool: np.ndarray, values: np.ndarray, number: int
) -> np.ndarray:
    """`number` distinct random pairs of two identities among the images `pool`."""
    found: dict[tuple[int, int], None] = {}
    while len(found) < number:
        drawn = np.sort(pool[random.randint(len(pool), size=(2 * number, 2))], axis=1)
        for a, b in drawn[values[drawn[:, 0]] != values[drawn[:, 1]]].tolist():
            found.setdefault((a, b))
    return np.array(list(found)[:number])


def cosine(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Returns (P,) cosines of corresponding rows in float64; 0 where a row is all zero."""
    a, b = F.normalize(features_a.double(), dim=1), F.normalize(features_b.double(), dim=1)
    return (a * b).sum(1)


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """Returns the lowest t for which "score >= t means same" is right most often.

    Candidates: -inf, +inf, and the middle between any two neighbouring distinct scores.
    """
    scores, order = scores.double().sort()
    same = same[order]
    distinct = torch.cat([torch.ones_like(same[:1]), scores[1:] != scores[:-1]])
    start = distinct.nonzero()[:, 0]  # a cut at i accepts rows i and later
    negatives = torch.cat([torch.zeros(1, dtype=torch.long), (~same).long().cumsum(0)])
    positives = torch.cat([torch.zeros(1, dtype=torch.long), same.long().cumsum(0)])
    cuts = torch.cat([start, torch.tensor([len(scores)])])
    right = negatives[cuts] + positives[-1] - positives[cuts]
    cut = int(cuts[int(right.argmax())])
    if cut == 0:
        return float("-inf")
    if cut == len(scores):
        return float("inf")
    return (0.5 * (scores[cut - 1] + scores[cut])).item()


def over_folds(hits: Tensor, folds: int = 10) -> tuple[float, float]:
    """Returns mean and population standard deviation over contiguous folds of the share of hits."""
    result = torch.stack([fold.double().mean() for fold in hits.tensor_split(folds)])
    return result.mean().item(), result.std(correction=0).item()


def pair_hits(features_a: Tensor, features_b: Tensor, same: Tensor, folds: int = 10) -> Tensor:
    """Returns (P,) bool on the CPU: a pair's cosine is on the right side of the threshold.

    features_a, features_b (P, D); same (P,) bool, in contiguous folds (the first P % folds get one
    more). Each fold takes the `best_threshold` of the other folds. Raises ValueError for a feature
    that is not finite.
    """
    scores, same = cosine(features_a, features_b).cpu(), same.bool().cpu()
    if not bool(scores.isfinite().all()):
        raise ValueError("pair_hits: features must be finite, got nan or inf in them")
    hits = torch.empty_like(same)
    for fold in torch.arange(len(same)).tensor_split(folds):
        others = torch.ones_like(same)
        others[fold] = False
        threshold = best_threshold(scores[others], same[others])
        hits[fold] = (scores[fold] >= threshold) == same[fold]
    return hits


def roc(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Returns false and true accept rates of pairs of both kinds at thresholds that fall from +inf
    through every distinct score; "score >= threshold" accepts.
    """
    scores, same = scores.double().cpu(), same.bool().cpu()
    genuine = int(same.sum())
    scores, order = scores.sort(descending=True)
    same = same[order]
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    tar = torch.cat([torch.zeros(1), same.double().cumsum(0)[last] / genuine]).double()
    far = torch.cat([torch.zeros(1), (~same).double().cumsum(0)[last] / (len(same) - genuine)])
    return far.double(), tar


def raw_pixels(images: Tensor, side: int = 32) -> Tensor:
    """Returns (N, 3 * s * s) pixels as features; larger images are averaged down to `side`."""
    images = images.float()
    if images.shape[-1] > side:
        images = F.interpolate(images, size=(side, side), mode="area")
    return images.flatten(1)


def gallery_top1(
    queries: Tensor,
    labels: Tensor,
    gallery: Iterable[tuple[Tensor, Tensor]],
    *,
    backend: str | None = None,
) -> float:
    """Returns the share of queries (N, D) whose nearest gallery row has the same label.

    gallery: an iterable of (rows (M, D), labels (M,)), searched part by part. Ties go to the first.
    """
    labels = labels.to(queries.device)
    best = queries.new_full((len(queries),), float("inf"), dtype=torch.float32)
    found = torch.full_like(labels, -1)
    for rows, row_labels in gallery:
        distance, index = nearest_neighbor(queries, rows.to(queries), backend=backend)
        closer = distance < best
        best = torch.where(closer, distance, best)
        found = torch.where(closer, row_labels.to(found)[index], found)
    return (found == labels).double().mean().item()
