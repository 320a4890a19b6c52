"""Further targets: unit embeddings by squared distance or cosine, relations between the images of a
batch (RKD), and attention transfer.

All compute in float32 at least, inside autocast too. A feature or map of length zero stays zero
without a gradient, so that equal features, empty maps and batches of one give finite losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdtrain.models.backbones.base import wide
from kdtrain.objectives.targets import Pair, halved

SHORTEST = 1e-12  # length below which a vector has no direction
# Squared distance relative to the squared lengths below which float32 features are equal
SAME = 1e-12
# Angles formed at a time, at least one vertex; on a CPU they fit its cache.
ANGLES = {"cpu": 1 << 16, "cuda": 1 << 22}


def embedding_sides(
    projection: nn.Module, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns n(P K_S) and n(K_T) of the embedding targets, (N, K_T) rows of unit length, from
    features (N, K_S) and (N, K_T); P is a targets.WidthMap.
    """
    with torch.autocast(student.device.type, enabled=False):
        return unit(projection(wide(student))), unit(wide(teacher))


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns 1 - cos(P K_S, K_T), mean over images, of the unit rows (N, D) of embedding_sides:
    half of embedding_l2, as |a - b|^2 = 2 (1 - cos). A zero row has cosine 0.
    """
    return (1 - (student * teacher).sum(1)).mean() if len(student) else student.sum()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the difference of distances within a batch to the teacher's, in units of their mean:

        psi(i, j) = |t_i - t_j| / mu,  mu the mean over the ordered pairs i != j
        huber(psi_S(i, j) - psi_T(i, j)), mean over these pairs; huber(x) = x^2 / 2 up to 1, then
        |x| - 1/2

    Relational knowledge distillation, Park et al. 2019 (arXiv 1904.05068), section 3.2.1. The paper
    sums over the pairs; the authors' code divides by N^2 instead of our N (N - 1). student (N,
    K_S), teacher (N, K_T): features, without a projection. No gradient with fewer than three
    images, and none if all student features are equal. Gradient to the student only.
    """
    ours = _relative(squared_distances(student))
    theirs = _relative(squared_distances(teacher.detach()))
    count = max(1, len(ours) * (len(ours) - 1))
    loss = F.huber_loss(ours, theirs, reduction="sum") / count
    return loss.to(wide(student).dtype)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the difference of angles within a batch to the teacher's:

        psi(i, j, k) = cos of the angle at t_j in the triangle t_i t_j t_k
        huber(psi_S - psi_T), mean over the ordered triples of three different images

    Relational knowledge distillation, Park et al. 2019 (arXiv 1904.05068), section 3.2.2; the
    authors' code divides by N^3 instead of our N (N - 1) (N - 2). student (N, K_S), teacher (N,
    K_T): features. An angle with two equal features has cosine 0 and no gradient, as in the
    authors' code. 0 for fewer than three images. Gradient to the student only, formed in forward in
    parts without N^3 memory; no double backward.
    """
    ours, theirs = (_scaled(squared_distances(f)) for f in (student, teacher.detach()))
    dtype = wide(student).dtype
    return _Angles.apply(ours.to(dtype), theirs.to(dtype))


def attention_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float
) -> list[Pair]:
    """Returns the pairs of attention transfer: |Q_S^j / |Q_S^j| - Q_T^j / |Q_T^j||^2 of each stage
    j.

    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2, with Q = attention_map (backbones.base)
    as one vector per image. Squared and averaged over images and places, as in the authors' code;
    eq. 2 has the length itself. The 1/2 is left to the weight: beta = 1000 is weight 1000 in their
    code, which has no 1/2. Larger maps are averaged two by two. A map of zeros stays zero.
    """
    pairs = []
    for ours, theirs in zip(student, teacher, strict=True):
        sides = halved(ours, theirs), halved(theirs, ours)
        rows = [unit(maps.flatten(1)) for maps in sides]
        pairs.append(Pair("attention", rows[0], rows[1], weight, "mean"))
    return pairs


def squared_distances(features: Tensor) -> Tensor:
    """Returns |f_i - f_j|^2 of rows (N, K) as (N, N) float64: 0 with zero gradient where i = j or
    two rows agree to float32's last bits.

    By products of the rows, without N x N x K differences; their cancellation in float64 is far
    below float32's rounding, and autocast leaves float64 alone.
    """
    rows = features.double()
    products = rows @ rows.T
    squares = products.diagonal()
    both = squares[:, None] + squares[None, :]
    distances = both - 2 * products
    # <= is False for NaN
    return distances.masked_fill(distances <= SAME * both, 0)


def unit(rows: Tensor) -> Tensor:
    """Returns rows (N, D) scaled to length 1; zero rows stay 0 without a gradient."""
    lengths = rows.norm(dim=1, keepdim=True)
    nothing = lengths <= SHORTEST
    return (rows / lengths.masked_fill(nothing, 1)).masked_fill(nothing, 0)


def _scaled(squared: Tensor) -> Tensor:
    """Squared distances in units of their mean, for float32's range; angles do not change."""
    mean = squared.detach().sum() / max(1, len(squared) * (len(squared) - 1))
    return squared / mean.masked_fill(mean <= 0, 1)


def _relative(squared: Tensor) -> Tensor:
    """Distances in units of their mean; 0 where all are 0."""
    same = squared <= 0
    distances = squared.masked_fill(same, 1).sqrt().masked_fill(same, 0)
    mean = distances.sum() / max(1, len(squared) * (len(squared) - 1))
    return distances / mean.masked_fill(mean <= 0, 1)


class _Angles(torch.autograd.Function):
    """Loss of the angles and its gradient from two (N, N) squared distances.

    With a_ij the squared distances and v_ij = a_ij^(-1/2) (0 where a is 0), by the law of cosines

        psi(i, j, k) = (a_ji + a_jk - a_ik) / 2 * v_ji * v_jk

    and with g = dloss / dpsi, which like psi is symmetric in i and k, and m = g v_ji v_jk / 2:

        dloss / da_ji = 2 sum_k m - v_ji^2 sum_k g psi      dloss / da_ik = - sum_j m
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher: (N, N) squared distances of one dtype."""
        size = len(student)
        count = max(1, size * (size - 1) * (size - 2))
        loss = student.new_zeros(())
        gradient = torch.zeros_like(student)
        ours, theirs = _inverse_root(student), _inverse_root(teacher)
        step = max(1, ANGLES[student.device.type] // max(1, size * size))
        for first in range(0, size, step):
            vertices = slice(first, first + step)
            psi, factors = _cosines(student, ours, vertices)
            error = psi - _cosines(teacher, theirs, vertices)[0]
            # i = k is no triangle
            error.diagonal(dim1=1, dim2=2).zero_()
            loss += F.huber_loss(error, torch.zeros_like(error), reduction="sum")
            slope = error.clamp_(-1, 1)
            gradient[vertices] -= ours[vertices].square() * (slope * psi).sum(2)
            slope *= factors
            gradient[vertices] += slope.sum(2)
            gradient -= slope.sum(0) / 2
        ctx.save_for_backward(gradient / count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradient to the student's squared distances."""
        (gradient,) = ctx.saved_tensors
        return incoming * gradient, None


def _inverse_root(squared: Tensor) -> Tensor:
    same = squared <= 0
    return squared.masked_fill(same, 1).rsqrt().masked_fill(same, 0)


def _cosines(squared: Tensor, inverse: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """psi with vertex j in `vertices`, (J, N, N) by i and k, and v_ji v_jk."""
    sides, roots = squared[vertices], inverse[vertices]
    factors = roots[:, :, None] * roots[:, None, :]
    psi = (sides[:, :, None] + sides[:, None, :] - squared[None]) * factors
    return psi.mul_(0.5), factors
