"""Margins of a cosine head: what they take from the label's logit in the hard term.

Each changes the label's cosine c = cos(theta) to

    phi(c) = cos(theta + m2) - m3

and the kernels need its value and derivative at the label alone. m2 (radians) and m3 are floats,
|m2| at most pi and |m3| at most 10^6, or (N,) tensors without gradient, one number per row, which
are taken as they are."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

Amount = float | Tensor


class _Margin:
    """A setting of linear_kd_cross_entropy; the scale is an argument of the op."""

    def __call__(self, *_arguments: object, **_options: object) -> NoReturn:
        raise TypeError(
            f"{self} is a margin, not a loss: pass it to linear_kd_cross_entropy(features, weight, "
            f"target, normalize=True, scale=64.0, margin={self})"
        )


@dataclass(frozen=True)
class ArcFace(_Margin):
    """phi = cos(theta + m), m in radians: arXiv 1801.07698, eq. (3)."""

    m: Amount = 0.5

    def amounts(self) -> tuple[Amount, Amount]:
        """m2 and m3 of the common form."""
        return self.m, 0.0


@dataclass(frozen=True)
class CosFace(_Margin):
    """phi = cos(theta) - m: arXiv 1801.09414, eq. (4)."""

    m: Amount = 0.35

    def amounts(self) -> tuple[Amount, Amount]:
        """m2 and m3 of the common form."""
        return 0.0, self.m


@dataclass(frozen=True)
class CombinedMargin(_Margin):
    """phi = cos(theta + m2) - m3: arXiv 1801.07698, eq. (4) with its m1 = 1.

    The multiplicative m1 of SphereFace is left out: cos(m1 theta) needs an acos.
    """

    m2: Amount = 0.3
    m3: Amount = 0.2

    def amounts(self) -> tuple[Amount, Amount]:
        """m2 and m3 of the common form."""
        return self.m2, self.m3


Margin = ArcFace | CosFace | CombinedMargin


def adaface_margin(
    features: Tensor,
    *,
    m: float = 0.4,
    h: float = 0.333,
    mean: Tensor | float | None = None,
    std: Tensor | float | None = None,
) -> CombinedMargin:
    """AdaFace's margin of each row, adapted to its norm (arXiv 2204.00964, eq. 12 to 15).

        z = clip(h (|x| - mean) / std, -1, 1),   m2 = -m z,   m3 = m z + m

    features: (N, D) before normalization; their norms are clipped to 0.001 to 100. mean and std of
    the norms, numbers or 0-d tensors: the batch's own where not given, std then that of the batch
    itself (divided by N), so that one row has m2 = 0. AdaFace keeps running averages of both. h:
    how far a standard deviation moves the margin. Returns CombinedMargin with m2 and m3 (N,)
    float32, without gradient: none flows through the norms. ValueError for features that are not
    (N, D) of floating point.
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            "adaface_margin: features must be (N, D) of floating point, got "
            f"{tuple(features.shape)} {features.dtype}"
        )
    norms = torch.linalg.vector_norm(features.detach().float(), dim=1).clamp(0.001, 100.0)
    mean = norms.mean() if mean is None else mean
    std = norms.std(correction=0) if std is None else std
    z = ((norms - mean) / (std + 1e-3) * h).clamp(-1.0, 1.0)
    return CombinedMargin(-m * z, m * z + m)
