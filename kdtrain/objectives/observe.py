"""Evaluation of a network on one split: outputs, metrics, and samples for the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import nearest_neighbor
from kdtrain.data.run_data import EvalBatch
from kdtrain.models.network import NUM_POINTS, FaceNetwork, Outputs, evaluating
from kdtrain.objectives import all_pairs, evaluate

PAIR_FOLDS = 10
SAMPLES = 12  # images that a report shows
SHOWN_SIDE = 96  # their largest side in pixels
GALLERY = 2000  # images that a report searches for neighbours


class Seen(NamedTuple):
    """A network's outputs on N images of a split, on the CPU except the features."""

    hidden: Tensor  # (N, K) float32, on the network's device
    hits: Tensor  # (N,) bool: the highest logit is the label's
    surprise: Tensor  # (N,) cross-entropy with the label
    labels: Tensor  # (N,) identity
    indices: Tensor  # (N,) index in the source
    groups: Tensor | None  # (N,) video, if any
    landmarks: Landmarks | None  # True and predicted points, with a landmark head
    shown: Tensor  # (n, 3, h, h) uint8: the first images, for the report
    side: int  # Side of the network's input in pixels


class Landmarks(NamedTuple):
    """Points of N images, (N, 5, 2) each."""

    true: Tensor  # Original pixels
    predicted: Tensor  # Original pixels
    true_crop: Tensor  # Pixels of the network's input
    predicted_crop: Tensor  # Pixels of the network's input
    sizes: Tensor  # (N, 2) original width and height


def look(network: FaceNetwork, batches: Iterable[EvalBatch], device: torch.device) -> Seen:
    """Runs the network in eval mode, without storing images and logits, which may be large. Raises
    ValueError without an image, and for a landmark head on data without landmarks.
    """
    rows: list[tuple[Tensor, ...]] = []
    groups: list[Tensor] = []
    landmarks: list[Landmarks] = []
    shown: list[Tensor] = []
    room, side = GALLERY, 0
    with evaluating(network):
        for batch in batches:
            images, labels = batch.images.to(device), batch.labels.to(device)
            outputs: Outputs = network(images)
            assert outputs.logits is not None
            surprise = F.cross_entropy(outputs.logits.float(), labels, reduction="none")
            hits = evaluate.hits(outputs.logits, labels)
            row = (hits.cpu(), surprise.cpu(), labels.cpu(), batch.indices.cpu())
            rows.append((outputs.hidden.float(), *row))
            if batch.groups is not None:
                groups.append(batch.groups.cpu())
            if outputs.points is not None:
                landmarks.append(_landmarks(batch, outputs.points))
            shown.append(_shrunk(images[:room]))
            room -= len(shown[-1])
            side = images.shape[-1]
    if not rows:
        raise ValueError("evaluate: no image to look at; the test split is empty")
    return Seen(
        *map(torch.cat, zip(*rows, strict=True)),
        groups=torch.cat(groups) if groups else None,
        landmarks=Landmarks(*map(torch.cat, zip(*landmarks, strict=True))) if landmarks else None,
        shown=torch.cat(shown),
        side=side,
    )


def pixels(batches: Iterable[EvalBatch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns raw pixels as features (N, D), labels and videos (N,). Raises ValueError for none."""
    rows, labels, groups = [], [], []
    for batch in batches:
        rows.append(evaluate.raw_pixels(batch.images))
        labels.append(batch.labels.cpu())
        if batch.groups is not None:
            groups.append(batch.groups.cpu())
    if not rows:
        raise ValueError("floors: no image to look at; the split is empty")
    return torch.cat(rows), torch.cat(labels), torch.cat(groups) if groups else None


class Measured(NamedTuple):
    """Results of one way to measure features."""

    metrics: dict[str, float]
    items: dict[str, Tensor]
    """1 or 0, float32: (N,) per image, or (P,) per pair in the order of make_pairs."""
    samples: dict[str, np.ndarray]  # Curves for the report


def pairs(rows: Tensor, labels: Tensor, gallery: Tensor | None = None) -> Measured:
    """Returns accuracy in ten folds and TAR at FAR 0.01 of features (N, D) by cosine, on the same
    pairs for every run; nothing with too few identities for ten folds. gallery (N, D): another
    network's features, of each pair's second image.
    """
    counts = torch.unique(labels, return_counts=True)[1]
    if int((counts > 1).sum()) < 2 * PAIR_FOLDS:
        return Measured({}, {}, {})
    a, b, same = evaluate.make_pairs(labels, seed=0, folds=PAIR_FOLDS)
    ours, theirs = rows[a], (rows if gallery is None else gallery)[b]
    hits = evaluate.pair_hits(ours, theirs, same, PAIR_FOLDS)
    mean, spread = evaluate.over_folds(hits, PAIR_FOLDS)
    far, tar = evaluate.roc(evaluate.cosine(ours, theirs), same)
    shown = evenly(len(far), 400)
    metrics = {
        "pair_accuracy": mean,
        "pair_accuracy_std": spread,
        "tar_at_far_0.01": tar[far <= 0.01].max().item(),
        "pairs": len(same),
    }
    samples = {"roc_far": far[shown].numpy(), "roc_tar": tar[shown].numpy()}
    return Measured(metrics, {"pair_accuracy": hits.float()}, samples)


def verified(
    rows: Tensor,
    labels: Tensor,
    groups: Tensor | None,
    *,
    normalize: bool,
    gallery: Tensor | None = None,
    backend: str | None = None,
) -> Measured:
    """Returns verification's metrics of features (N, D): nearest neighbours, `pairs`, all_pairs.

    normalize: scale to unit length before distances. gallery (N, D): another network's features of
    the same images, which are searched.
    """
    queries, others = rows, gallery
    if normalize:
        queries = F.normalize(rows, dim=1)
        others = None if gallery is None else F.normalize(gallery, dim=1)
    hits = evaluate.nn_hits(queries, labels, groups, gallery=others, backend=backend)
    found = pairs(rows, labels, gallery)
    scores = all_pairs.pair_scores(rows, labels, groups, gallery=gallery)
    far, tar = all_pairs.curve(scores)
    curve = {"all_far": far.numpy(), "all_tar": tar.numpy()} if len(far) else {}
    shares = evaluate.nn_shares(hits) | found.metrics | all_pairs.metrics(scores)
    return Measured(shares, hits | found.items, found.samples | curve)


def asymmetric(found: Measured) -> Measured:
    """Returns the results of `verified` with a gallery under names asym_..., without the counts,
    which equal those without a gallery. The first image of a pair is the query.
    """
    counts = ("nn_queries", "nn_lone", "pairs")
    return Measured(
        {f"asym_{k}": v for k, v in found.metrics.items() if not k.startswith(counts)},
        {f"asym_{k}": v for k, v in found.items.items()},
        {f"asym_{k}": v for k, v in found.samples.items()},
    )


def neighbour_samples(rows: Tensor, seen: Seen, backend: str | None) -> dict[str, np.ndarray]:
    """Returns evenly spaced test images, each with its nearest of the first GALLERY test images.

    rows (N, D): features to search by. Queries have another image of their identity, if any does.
    """
    count = len(seen.shown)
    if count < 2:
        return {}
    labels = seen.labels[:count]
    distance, nearest = (t.cpu() for t in nearest_neighbor(rows[:count], backend=backend))
    _, identity, images = torch.unique(labels, return_inverse=True, return_counts=True)
    with_mate = (images[identity] > 1).nonzero()[:, 0]
    pool = with_mate if len(with_mate) else torch.arange(count)
    chosen = pool[evenly(len(pool), SAMPLES)]
    return {
        "queries": seen.shown[chosen].numpy(),
        "neighbours": seen.shown[nearest[chosen]].numpy(),
        "query_labels": labels[chosen].numpy(),
        "neighbour_labels": labels[nearest[chosen]].numpy(),
        "distances": distance[chosen].sqrt().numpy(),
        "gallery": np.array(count),
    }


def landmark_samples(seen: Seen, errors: Tensor) -> dict[str, np.ndarray]:
    """Returns evenly spaced test images with true and predicted points in their pixels.

    errors (N,): NRMSE of every image.
    """
    assert seen.landmarks is not None
    chosen = evenly(len(seen.shown), SAMPLES)
    scale = seen.shown.shape[-1] / seen.side
    return {
        "images": seen.shown[chosen].numpy(),
        "true": (seen.landmarks.true_crop[chosen] * scale).float().numpy(),
        "predicted": (seen.landmarks.predicted_crop[chosen] * scale).float().numpy(),
        "errors": errors[chosen].numpy(),
    }


def original(batch: EvalBatch, points: Tensor) -> Tensor:
    """Returns crop points (N, 5, 2) in original pixels, on the CPU."""
    assert batch.to_original is not None
    return batch.to_original(points.to(batch.images.device)).cpu()


def true_points(batch: EvalBatch) -> tuple[Tensor, Tensor]:
    """Returns true landmarks (N, 5, 2) in original pixels and in crop pixels, on the CPU.

    The latter by the inverse of `to_original`, from two corners. Raises ValueError without any.
    """
    if batch.points_original is None or batch.to_original is None:
        raise ValueError("alignment: landmarks are needed, and this data has none")
    true, side = batch.points_original.cpu(), batch.images.shape[-1]
    corner = batch.images.new_zeros(len(true), NUM_POINTS, 2)
    first, last = original(batch, corner), original(batch, corner + side)
    return true, (true - first) / (last - first) * side


def _landmarks(batch: EvalBatch, points: Tensor) -> Landmarks:
    """points (N, 10): of the landmark head."""
    side = batch.images.shape[-1]
    crop = (points.float().reshape(-1, NUM_POINTS, 2) + 0.5) * side
    true, true_crop = true_points(batch)
    return Landmarks(true, original(batch, crop), true_crop, crop.cpu(), batch.sizes.cpu())


def evenly(count: int, limit: int) -> Tensor:
    """Returns indices of at most `limit` of `count` rows, evenly spaced, with first and last."""
    if count <= limit:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).round().long()


def _shrunk(images: Tensor) -> Tensor:
    """Images for the report: uint8 on the CPU, at most SHOWN_SIDE wide."""
    if images.shape[-1] > SHOWN_SIDE:
        images = F.interpolate(images, size=(SHOWN_SIDE, SHOWN_SIDE), mode="area")
    return images.round().clamp(0, 255).to(torch.uint8).cpu()
