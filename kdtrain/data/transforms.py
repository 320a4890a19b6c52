"""Crops and flips of image batches with their landmarks, on any device, and back to original
pixels.

Augmentation is a pure function of (seed, phase, epoch, image), without a generator: batches,
workers and a resumed run see the same crops, and teacher outputs can be cached.
"""

from dataclasses import dataclass, replace
from math import gcd
from typing import TypeAlias

import torch
from torch import Tensor

from kdtrain.config import AugmentConfig, Config
from kdtrain.data.counter import counter_uniform

_STREAM_AUGMENT = 21
_MIRROR = (1, 0, 2, 4, 3)  # landmarks of a mirrored image
Crops: TypeAlias = "tuple[Tensor, Tensor | None, Frame]"
"""Crops (B, 3, s, s), landmarks (B, 5, 2) in crop pixels, and the place of the crops."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Place of crops in their images: store = crop * scale + offset, once flips are mirrored back.

    scale: (B,) store pixels per crop pixel. offset: (B, 2) the crop's corner (x, y) in store
    pixels. flipped: (B,) bool. input_size: side of the crop in crop pixels.
    """

    scale: Tensor
    offset: Tensor
    flipped: Tensor
    input_size: int


def augment(
    images: Tensor,
    landmarks: Tensor | None,
    indices: Tensor,
    config: Config,
    *,
    phase: int,
    epoch: int,
) -> Crops:
    """Returns (crops float32 (B, 3, s, s) in [0, 255], landmarks (B, 5, 2) in crop pixels, frame).

    images: uint8 (B, 3, S, S). landmarks: (B, 5, 2) store pixels. indices: (B,) int64 in the
    source. s: data.crop_side. augment.crop "random" is an s x s window at a uniform whole-pixel
    place; "jitter" a square of side S * u, u uniform in [scale_min, scale_max], at a uniform place,
    resampled bilinearly; augment.flip mirrors half of the images and swaps left and right
    landmarks. Raises ValueError for wrong shapes, and for "random" with s above S.
    """
    how, input_size = config.augment, config.data.crop_side
    _check(images, landmarks, how, input_size, "augment")
    if indices.shape != (len(images),):
        raise ValueError(
            f"augment: indices must be ({len(images)},) like images, got {tuple(indices.shape)}"
        )
    side = images.shape[-1]
    place = indices.to(images.device)
    draw = counter_uniform(config.seed, _STREAM_AUGMENT, phase, epoch, place, draws=4)  # (B, 4)
    flipped = (draw[:, 0] < 0.5) & bool(how.flip)
    if how.crop == "random":
        places = side - input_size + 1
        offset = (draw[:, 2:4] * places).floor_()
        scale = torch.ones_like(draw[:, 0])
    else:
        width = side * (how.scale_min + (how.scale_max - how.scale_min) * draw[:, 1])
        offset = draw[:, 2:4] * (side - width).unsqueeze(1)
        scale = width / input_size
    frame = Frame(scale=scale, offset=offset, flipped=flipped, input_size=input_size)
    return _crop(images, landmarks, frame, how.crop == "random")


def center(
    images: Tensor,
    landmarks: Tensor | None,
    input_size: int,
    config: AugmentConfig,
    *,
    mirrored: bool = False,
) -> Crops:
    """Returns the same as augment for evaluation: the centre crop, flipped if `mirrored`.

    crop "random": the middle s x s window (an odd remainder goes right and down); "jitter": the
    middle square of the mean side. Where fixed_views is not None, these are the crops of augment.
    """
    _check(images, landmarks, config, input_size, "center")
    side, count = images.shape[-1], len(images)
    if config.crop == "random":
        corner, scale = float((side - input_size) // 2), 1.0
    else:
        width = side * (config.scale_min + config.scale_max) / 2
        corner, scale = (side - width) / 2, width / input_size
    device = images.device
    frame = Frame(
        scale=torch.full((count,), scale, device=device),
        offset=torch.full((count, 2), corner, device=device),
        flipped=torch.full((count,), mirrored, device=device),
        input_size=input_size,
    )
    return _crop(images, landmarks, frame, config.crop == "random")


def fixed_views(config: AugmentConfig, store_size: int, crop_size: int) -> int | None:
    """Returns the number of views of an image in training if the crop is the whole stored image: 1,
    or 2 with config.flip; None if crops differ from epoch to epoch. Raises ValueError for a crop
    that is not a function of (seed, phase, epoch, image).
    """
    if config.crop not in ("random", "jitter"):
        raise ValueError(
            f"fixed_views: augment.crop {config.crop!r} is not a function of (seed, phase, epoch, "
            "image), so teacher outputs cannot be cached; set teacher.cache to none"
        )
    whole = crop_size == store_size
    if config.crop == "jitter":
        whole = config.scale_min == config.scale_max == 1
    return (1 + bool(config.flip)) if whole else None


def shrink(crops: Tensor, landmarks: Tensor | None, frame: Frame, side: int) -> Crops:
    """Returns the same windows and flips at `side` pixels: crops by area_average, landmarks in the
    new pixels. Crops of that side are returned unchanged. Raises ValueError for a larger side.
    """
    if side == frame.input_size:
        return crops, landmarks, frame
    factor = side / frame.input_size
    smaller = replace(frame, scale=frame.scale / factor, input_size=side)
    return area_average(crops, side), None if landmarks is None else landmarks * factor, smaller


def area_average(images: Tensor, side: int) -> Tensor:
    """Returns images (B, C, S, S) at side x side pixels: each pixel the mean of the area it covers.

    A pixel of the result spans S / side pixels of the image, partly covered ones by their share.
    Weights are whole numbers and the division comes last: sums of whole values up to 255 are exact
    for S up to 256, and a mirrored image gives the mirrored result. Elementwise, so that an image's
    bits do not depend on its batch. Raises ValueError for a side larger than S.
    """
    size = images.shape[-1]
    if not 0 < side <= size:
        raise ValueError(
            f"area_average: side must be from 1 to the images' {size} pixels, as they are never "
            f"enlarged; got {side}"
        )
    whole, part = size // gcd(size, side), side // gcd(size, side)
    rows = _sums(_sums(images, side, whole, part, 2), side, whole, part, 3)
    return rows / (whole * whole)


def to_original(points: Tensor, frame: Frame, sizes: Tensor, store_size: int) -> Tensor:
    """Returns original-pixel coordinates (B, 5, 2) of crop-pixel points, unflipped; sizes: (B, 2).
    Differentiable.
    """
    factor = sizes.to(points.device, points.dtype) / store_size
    points = _mirror(points, frame) * frame.scale.reshape(-1, 1, 1) + frame.offset.unsqueeze(1)
    return points * factor.unsqueeze(1)


def _check(
    images: Tensor, landmarks: Tensor | None, config: AugmentConfig, input_size: int, who: str
) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"{who}: images must be (B, 3, S, S), got {tuple(images.shape)}")
    if landmarks is not None and landmarks.shape != (len(images), 5, 2):
        raise ValueError(
            f"{who}: landmarks must be ({len(images)}, 5, 2), got {tuple(landmarks.shape)}"
        )
    side = images.shape[-1]
    if config.crop == "random" and not 0 < input_size <= side:
        raise ValueError(
            f"{who}: data.input_size must be at most data.store_size {side}, got {input_size}"
        )


def _mirror(points: Tensor, frame: Frame) -> Tensor:
    """Mirrors the points of flipped crops and swaps left and right; its own inverse."""
    mirrored = points[:, _MIRROR]
    mirrored = torch.stack([frame.input_size - mirrored[..., 0], mirrored[..., 1]], -1)
    return torch.where(frame.flipped.reshape(-1, 1, 1), mirrored, points)


def _crop(images: Tensor, landmarks: Tensor | None, frame: Frame, whole_pixels: bool) -> Crops:
    ticks = torch.arange(frame.input_size, device=images.device)
    flipped, scale, left, top = (
        each.reshape(-1, 1, 1, 1) for each in (frame.flipped, frame.scale, *frame.offset.unbind(1))
    )
    across = torch.where(flipped, frame.input_size - 1 - ticks, ticks)  # (B, 1, 1, s)
    down = ticks.unsqueeze(1)  # (s, 1)
    if whole_pixels:
        rows = images.take_along_dim(down + top.long(), 2)
        crops = rows.take_along_dim(across + left.long(), 3).float()
    else:
        crops = _sample(images.float(), (down + 0.5) * scale + top, 2)
        crops = _sample(crops, (across + 0.5) * scale + left, 3)
    if landmarks is not None:
        landmarks = landmarks.to(images.device)
        landmarks = (landmarks - frame.offset.unsqueeze(1)) / frame.scale.reshape(-1, 1, 1)
        landmarks = _mirror(landmarks, frame)
    return crops, landmarks, frame


def _sample(images: Tensor, places: Tensor, axis: int) -> Tensor:
    """Linear interpolation along one axis; pixel i has its centre at i + 0.5, edges repeat."""
    # elementwise after two gathers: bits do not depend on the batch
    last = images.shape[axis] - 1
    places = (places - 0.5).clamp(0, last)
    low = places.floor().clamp(max=max(last - 1, 0))
    part = places - low
    low = low.long()
    first = images.take_along_dim(low, axis)
    return first + (images.take_along_dim((low + 1).clamp(max=last), axis) - first) * part


def _sums(images: Tensor, side: int, whole: int, part: int, axis: int) -> Tensor:
    """Weighted sums: pixel i covers [i * whole, (i + 1) * whole), one of the image `part`."""
    start = torch.arange(side, device=images.device) * whole
    shape = [1] * images.dim()
    shape[axis] = side
    total = torch.zeros((), device=images.device)
    for step in range((whole + part - 2) // part + 1):  # the most pixels that one covers
        place = start // part + step
        low, high = place * part, (place + 1) * part
        weight = (torch.minimum(high, start + whole) - torch.maximum(low, start)).clamp(min=0)
        # 0 for pixels outside, also beyond the last one
        taken = images.index_select(axis, place.clamp(max=images.shape[axis] - 1))
        total = total + taken * weight.to(images.dtype).reshape(shape)
    return total
