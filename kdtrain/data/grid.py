"""A sheet of sample pictures for people to look at."""

import torch
from PIL import Image, ImageDraw

from kdtrain.data.counter import counter_permutation
from kdtrain.data.source import FaceSource
from kdtrain.data.store import PictureStore

_STREAM_GRID = 41
_COLOURS = ("#40ff40", "#40c0ff", "#ffff40", "#ff8040", "#ff60ff")  # one per landmark


def sample_grid(
    source: FaceSource,
    store: PictureStore,
    *,
    people: int = 10,
    pictures: int = 8,
    scale: int | None = None,
    landmarks: bool = True,
    seed: int = 0,
) -> Image.Image:
    """Returns a sheet with a row of `pictures` store pictures for each of `people` people.

    People are drawn by seed among all, pictures are each person's first. Landmarks, where the
    source has them, are dots (left eye green, right eye blue, nose yellow, left mouth corner
    orange, right one pink). scale: enlargement (default: to about 96 pixels). Raises ValueError
    when people or pictures is not positive.
    """
    if people < 1 or pictures < 1:
        raise ValueError(
            f"sample_grid: people and pictures must be positive, got {people}, {pictures}"
        )
    size = store.size
    scale = scale or max(1, round(96 / size))
    points = store.landmarks_in_store() if landmarks and source.landmarks is not None else None
    chosen = counter_permutation(source.num_classes, seed, _STREAM_GRID)[:people].sort().values
    sheet = Image.new("RGB", (pictures * size * scale, len(chosen) * size * scale), "#202020")
    draw = ImageDraw.Draw(sheet)
    radius = max(1, round(size * scale / 64))
    for row, person in enumerate(chosen.tolist()):
        own = (source.labels == person).nonzero()[:pictures, 0]
        for column, (index, picture) in enumerate(zip(own.tolist(), store.get(own), strict=True)):
            corner = torch.tensor([column * size * scale, row * size * scale])
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((size * scale, size * scale), Image.Resampling.NEAREST)
            left, top = corner.tolist()
            sheet.paste(tile, (left, top))
            if points is None:
                continue
            for colour, (x, y) in zip(
                _COLOURS, (points[index] * scale + corner).tolist(), strict=True
            ):
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return sheet
