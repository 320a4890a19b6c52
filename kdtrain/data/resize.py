"""A cropped picture at another resolution: exact area averages, for two networks that read the same
crop at two sizes.
"""

from math import gcd

import torch
from torch import Tensor

from kdtrain.data.transforms import Frame


def shrink(
    crops: Tensor, landmarks: Tensor | None, frame: Frame, side: int
) -> tuple[Tensor, Tensor | None, Frame]:
    """Returns what augment and center return, of the same windows and flips at `side` pixels.

    Crops as area_average makes them, landmarks in the new pixels; crops of that size already come
    back as they are. Raises ValueError for a side that is larger than the crop's.
    """
    if side == frame.input_size:
        return crops, landmarks, frame
    factor = side / frame.input_size
    smaller = Frame(
        scale=frame.scale / factor, offset=frame.offset, flipped=frame.flipped, input_size=side
    )
    return (
        area_average(crops, side),
        None if landmarks is None else landmarks * factor,
        smaller,
    )


def area_average(pictures: Tensor, side: int) -> Tensor:
    """Returns pictures (B, C, S, S) at side x side pixels: each the mean of the area it covers.

    A pixel of the result spans S / side pixels of the picture, and one that it covers in part
    counts by that part: the mean of blocks where S is a multiple of side, antialiased at every
    ratio. Weights are whole numbers and the division comes last, so that sums of whole values up
    to 255 are exact for S up to 256 and a mirrored picture gives the mirrored result. Elementwise:
    a picture's bits do not depend on its batch. Raises ValueError for a side larger than S.
    """
    size = pictures.shape[-1]
    if not 0 < side <= size:
        raise ValueError(
            f"area_average: side must be from 1 to the pictures' {size} pixels, as they are never "
            f"enlarged; got {side}"
        )
    whole, part = size // gcd(size, side), side // gcd(size, side)
    rows = _sums(_sums(pictures, side, whole, part, 2), side, whole, part, 3)
    return rows / (whole * whole)


def _sums(pictures: Tensor, side: int, whole: int, part: int, axis: int) -> Tensor:
    """Weighted sums along an axis: pixel i of `side` covers [i * whole, (i + 1) * whole) on a scale
    on which pixel j of the picture covers [j * part, (j + 1) * part).
    """
    start = torch.arange(side, device=pictures.device) * whole
    first = start // part
    shape = [1] * pictures.dim()
    shape[axis] = side
    total = None
    for step in range((whole + part - 2) // part + 1):  # the most pixels that one can touch
        place = first + step
        low, high = place * part, (place + 1) * part
        weight = (torch.minimum(high, start + whole) - torch.maximum(low, start)).clamp(min=0)
        # where nothing is left to cover the weight is 0, at the last pixel too
        taken = pictures.index_select(axis, place.clamp(max=pictures.shape[axis] - 1))
        taken = taken * weight.to(pictures.dtype).reshape(shape)
        total = taken if total is None else total + taken
    assert total is not None
    return total
