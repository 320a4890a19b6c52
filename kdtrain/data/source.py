"""A set of labelled face images, and how image files are decoded."""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtrain.config.program import name_bytes, regular

LANDMARKS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
# what Pillow raises on damaged images; struct.error and EOFError come from cut-off headers
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_8_BIT = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "RGBa"}
_16_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I of PNG", "I of PPM"}


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and, in a list, the line."""


@dataclass(kw_only=True)
class Issues:
    """Bad lines and images: on_error "raise" stops at the first, "skip" collects the messages."""

    on_error: str = "raise"
    messages: list[str] = field(default_factory=list)

    def report(self, message: str) -> None:
        """Raises DataError(message), or collects it."""
        if self.on_error == "raise":
            raise DataError(f"{message} (data.on_error: skip leaves such images out)")
        self.messages.append(message)


@dataclass(kw_only=True)
class FaceSource:
    """N images of C identities, decoded by `read` only.

    names: one per image, for errors and the fingerprint. labels: (N,) int64, 0..C-1 without gaps;
    class_names: C. landmarks: (N, 5, 2) float32 or None, (x, y) in original pixels, in the order of
    LANDMARKS (left is the viewer's). Coordinates are continuous, pixel i spans [i, i + 1): a mirror
    is x -> width - x, a resize a scaling, and lists of pixel indices are read as index + 0.5.
    sizes: (N, 2) int64 original width and height. groups: (N,) int64 or None, the frame's video,
    unique over the set. skipped: a message for each file that was not read. splits: file name ->
    column -> one value per image. read: index -> Pillow image, RGB, or DataError. read_batch, if
    any: int64 (B,) -> uint8 (B, 3, H, W).
    """

    name: str
    names: list[str]
    labels: Tensor
    class_names: list[str]
    landmarks: Tensor | None
    sizes: Tensor
    groups: Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    read: Callable[[int], Image.Image]
    read_batch: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError(f"{self.name}: no image left; skipped {len(self.skipped)}")
        present = torch.unique(self.labels)
        assert torch.equal(present, torch.arange(len(self.class_names))), "labels must have no gaps"
        assert len(self.names) == len(self.labels) == len(self.sizes)

    @property
    def num_images(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Returns a hex digest of names, sizes, labels, landmarks and groups."""
        names = "\n".join([self.name, *self.names, *self.class_names])
        digest = hashlib.sha256(name_bytes(names))
        for array in (self.sizes, self.labels, self.landmarks, self.groups):
            digest.update(b"none" if array is None else array.contiguous().numpy().tobytes())
        return digest.hexdigest()


def decode_image(path: Path) -> Image.Image:
    """Returns an image file (the first frame) as RGB. Orientation tags are ignored, as landmarks
    refer to stored pixels. By Pillow's mode:

        1, L, P, RGB, RGBX, CMYK, YCbCr, LAB, HSV     Pillow's conversion
        LA, PA, RGBA, RGBa, or a transparent colour   composited on black
        I;16, I;16L, I;16B, I;16N; I of PNG and PPM   16-bit grey: round(value / 257)
        F with every value in [0, 1]                  round(255 value)
        other F, I of other formats, La, any other    rejected: no range of values is defined

    Pillow reduces 16-bit colour to the high byte. Raises DataError for a file that is missing, not
    an image, cut off, or of a rejected mode.
    """
    try:
        # read at once: each of Pillow's twenty reads per JPEG releases the interpreter lock, and
        # two threads are then no faster than one (0.29 against 0.22 ms at 128 pixels)
        content = io.BytesIO(regular(path).read_bytes())
        with Image.open(content) as image:
            return _as_rgb(image)
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: cannot read this image: unknown format") from None
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot read this image: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; see decode_image. Raises ValueError for a rejected mode."""
    if {image.mode, f"{image.mode} of {image.format}"} & _16_BIT:
        grey = (np.asarray(image).astype(np.int32) + 128) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F" and ((values := np.asarray(image)) >= 0).all() and (values <= 1).all():
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
    if image.mode not in _8_BIT:
        raise ValueError(
            f"mode {image.mode} of {image.format} has no defined range of values; save it with 8 "
            "or 16 bits per channel"
        )
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def probe_images(paths: Sequence[Path], *, full: bool, workers: int) -> list[tuple[int, int] | str]:
    """Returns (width, height) of each image file, or an error message.

    Reads headers alone; `full` decodes every image, which finds files that are cut off.
    """

    def probe(path: Path) -> tuple[int, int] | str:
        try:
            with Image.open(regular(path)) as image:
                if full:
                    _as_rgb(image)
                return image.size
        except FileNotFoundError:
            return f"{path}: no such image"
        except _DECODE_ERRORS as error:
            return f"{path}: cannot read this image: {error}"

    if workers < 2:
        return [probe(path) for path in paths]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(probe, paths))


def number_classes(identities: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Returns labels (N,) int64 without gaps and sorted class names (as numbers if they are)."""
    distinct = set(identities)
    numeric = all(identity.isdecimal() for identity in distinct)
    ordered = sorted(distinct, key=(lambda name: (int(name), name)) if numeric else None)
    number = {identity: k for k, identity in enumerate(ordered)}
    return torch.tensor([number[identity] for identity in identities], dtype=torch.int64), ordered
