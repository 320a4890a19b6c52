"""Baselines: the code that users write today. Every speed-up is measured against these lines, and
every result is checked first.

They share no code with kdkernels' eager.py on purpose: eager.py is the specification, this file is
current practice. All take the case's tensors and options by name and return the loss;
nearest_neighbor returns the distances alone.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_cross_entropy(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """F.cross_entropy with the labels plus that with the teacher's softened probabilities."""
    soft_target = torch.softmax(teacher / temperature, dim=1)
    return F.cross_entropy(student, target) + F.cross_entropy(student / temperature, soft_target)


@cache
def compiled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """`function` with these options under torch.compile, for static shapes."""

    def call(*tensors: Any) -> Tensor:
        return function(*tensors, **options)

    return torch.compile(call, fullgraph=True, dynamic=False)


def kd_cross_entropy_compiled(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """The compiled baseline; the first call compiles and is never timed."""
    return compiled(kd_cross_entropy, temperature=temperature)(student, teacher, target)


def linear_kd(
    features: Tensor, weight: Tensor, target: Tensor, teacher: list[Tensor], *, temperature: float
) -> Tensor:
    """Two linear layers, then `kd_cross_entropy` on their logits."""
    with torch.no_grad():
        of_teacher = F.linear(teacher[0], teacher[1])
    return kd_cross_entropy(F.linear(features, weight), of_teacher, target, temperature=temperature)


def linear_kd_compiled(
    features: Tensor, weight: Tensor, target: Tensor, teacher: list[Tensor], *, temperature: float
) -> Tensor:
    """`linear_kd` under torch.compile."""
    return compiled(linear_kd, temperature=temperature)(features, weight, target, teacher)


def linear_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """A linear layer and F.cross_entropy; without a teacher the temperature has no effect."""
    return F.cross_entropy(F.linear(features, weight), target)


def linear_cross_entropy_compiled(
    features: Tensor, weight: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """`linear_cross_entropy` under torch.compile."""
    return compiled(linear_cross_entropy, temperature=temperature)(features, weight, target)


def linear_cross_entropy_of_torch(
    features: Tensor, weight: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """torch's own op for both, on its reference path."""
    return F.linear_cross_entropy(features, weight, target)


def linear_cross_entropy_chunked(
    features: Tensor, weight: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """torch's own op, in chunks of its choice; a second backward needs an option."""
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(features, weight, target, options=options)


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float) -> Tensor:
    """Squared differences, sums, relu, mean."""
    to_positive = (anchor - positive).square().sum(dim=1)
    to_negative = (anchor - negative).square().sum(dim=1)
    return F.relu(to_positive - to_negative + margin).mean()


def triplet_loss_compiled(
    anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float
) -> Tensor:
    """`triplet_loss` under torch.compile."""
    return compiled(triplet_loss, margin=margin)(anchor, positive, negative)


def squared_distances(embeddings: Tensor) -> Tensor:
    """(N, N) squared distances from the Gram matrix."""
    gram = embeddings @ embeddings.T
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)


def label_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) masks: another image of the same identity, and an image of another identity."""
    same = labels[:, None] == labels[None, :]
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & others, ~same


def mine(distances: Tensor, labels: Tensor, mining: str) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor, positive and negative indices of the hard or the semi-hard triplets."""
    positives, negatives = label_masks(labels)
    inf = float("inf")
    if mining == "hard":
        usable = positives.any(dim=1) & negatives.any(dim=1)
        positive = distances.masked_fill(~positives, -inf).argmax(dim=1)
        negative = distances.masked_fill(~negatives, inf).argmin(dim=1)
        anchor = usable.nonzero()[:, 0]
        return anchor, positive[anchor], negative[anchor]
    anchor, positive = positives.nonzero(as_tuple=True)
    rows = distances[anchor]  # (P, N)
    candidates = negatives[anchor] & (rows > distances[anchor, positive][:, None])
    nearest, negative = rows.masked_fill(~candidates, inf).min(dim=1)
    found = nearest < inf
    return anchor[found], positive[found], negative[found]


def batch_triplet_loss(embeddings: Tensor, labels: Tensor, *, margin: float, mining: str) -> Tensor:
    """Gram matrix, masks and index selection; "all" as (N, K-1, N), K images per identity."""
    distances = squared_distances(embeddings)
    if mining == "all":
        hinge, negatives = all_hinges(distances, labels, margin)
        return hinge[negatives.expand_as(hinge)].mean()
    anchor, positive, negative = mine(distances.detach(), labels, mining)
    return F.relu(distances[anchor, positive] - distances[anchor, negative] + margin).mean()


def all_hinges(distances: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """relu(d(a,p) - d(a,n) + margin) (N, K-1, N) and the (N, 1, N) mask of true negatives."""
    positives, negatives = label_masks(labels)
    index = positives.nonzero()[:, 1].view(len(labels), -1)  # (N, K-1)
    hinge = F.relu(distances.gather(1, index)[:, :, None] - distances[:, None, :] + margin)
    return hinge, negatives[:, None, :]


def batch_triplet_loss_masked(
    embeddings: Tensor, labels: Tensor, *, margin: float, mining: str
) -> Tensor:
    """All triplets with the mask multiplied in, not selected: the fastest of the plain ways."""
    assert mining == "all"
    hinge, negatives = all_hinges(squared_distances(embeddings), labels, margin)
    return (hinge * negatives).sum() / (negatives.sum() * hinge.shape[1])


def batch_triplet_loss_mined_apart(
    embeddings: Tensor, labels: Tensor, *, margin: float, mining: str
) -> Tensor:
    """Mining without gradient, then triplet_loss on the selected rows: no GEMM in backward."""
    with torch.no_grad():
        anchor, positive, negative = mine(squared_distances(embeddings), labels, mining)
    return triplet_loss(
        embeddings[anchor], embeddings[positive], embeddings[negative], margin=margin
    )


def batch_hard_static(embeddings: Tensor, labels: Tensor, *, margin: float, mining: str) -> Tensor:
    """Hard triplets mined without gradient, with shapes that depend on no data: anchors without a
    triplet are masked, not left out, so the host never waits for the GPU."""
    assert mining == "hard"
    with torch.no_grad():
        distances = squared_distances(embeddings)
        positives, negatives = label_masks(labels)
        usable = positives.any(dim=1) & negatives.any(dim=1)
        inf = float("inf")
        positive = distances.masked_fill(~positives, -inf).argmax(dim=1)
        negative = distances.masked_fill(~negatives, inf).argmin(dim=1)
    to_positive = (embeddings - embeddings[positive]).square().sum(dim=1)
    to_negative = (embeddings - embeddings[negative]).square().sum(dim=1)
    hinge = F.relu(to_positive - to_negative + margin)
    return torch.where(usable, hinge, 0.0).sum() / usable.sum()


def batch_hard_compiled(
    embeddings: Tensor, labels: Tensor, *, margin: float, mining: str
) -> Tensor:
    """`batch_hard_static` under torch.compile."""
    return compiled(batch_hard_static, margin=margin, mining=mining)(embeddings, labels)


def hidden_l2(students: list[Tensor], teachers: list[Tensor], *, reduction: str) -> Tensor:
    """F.mse_loss summed over the pairs."""
    terms = [F.mse_loss(s, t, reduction=reduction) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(terms).sum()


def hidden_l2_compiled(students: list[Tensor], teachers: list[Tensor], *, reduction: str) -> Tensor:
    """`hidden_l2` under torch.compile."""
    return compiled(hidden_l2, reduction=reduction)(students, teachers)


def nearest_neighbor(queries: Tensor, gallery: Tensor) -> tuple[Tensor]:
    """torch.cdist in chunks of 1024 queries, then the minimum: squared distances (N,)."""
    return (torch.cat([torch.cdist(q, gallery).amin(dim=1) for q in queries.split(1024)]).square(),)


SEARCH_CHUNK = 5000  # queries at a time: a matrix of 1 GB in bfloat16 with 100,000 gallery rows


def nearest_in_chunk(queries: Tensor, gallery: Tensor, norms: Tensor) -> Tensor:
    """The index of the least ||x_j||^2 - 2 q.x_j: that of the nearest row."""
    return (norms - 2 * (queries @ gallery.T).float()).argmin(dim=1)


def search_by(
    nearest: Callable[[Tensor, Tensor, Tensor], Tensor], queries: Tensor, gallery: Tensor
) -> tuple[Tensor]:
    """`nearest` on every chunk, and the squared distances (N,) of the rows found."""
    norms = gallery.float().square().sum(dim=1)
    index = torch.cat([nearest(q, gallery, norms) for q in queries.split(SEARCH_CHUNK)])
    return ((queries.float() - gallery[index].float()).square().sum(dim=1),)


def nearest_neighbor_gemm(queries: Tensor, gallery: Tensor) -> tuple[Tensor]:
    """One matrix product per chunk in the inputs' precision, then the minimum."""
    return search_by(nearest_in_chunk, queries, gallery)


def nearest_neighbor_compiled(queries: Tensor, gallery: Tensor) -> tuple[Tensor]:
    """`nearest_neighbor_gemm` with the work on a chunk under torch.compile."""
    return search_by(compiled(nearest_in_chunk), queries, gallery)
