"""Images of one source, decoded and resized to a square, from memory or batch by batch."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kdtrain.data.counter import counter_permutation
from kdtrain.data.source import FaceSource

MEMORY_LIMIT_BYTES = 2 << 30  # of "auto"
_CHUNK = 512
_READ_AHEAD = 2  # batches waiting at most
# Images per future: a future per image would take the training thread's interpreter lock 64 times
# per batch; larger parts leave a worker idle at the end of a batch.
_PART = 16
_STREAM_GRID = 41
_COLOURS = ("#40ff40", "#40c0ff", "#ffff40", "#ff8040", "#ff60ff")  # one per landmark


class ImageStore:
    """uint8 images (size x size, Pillow's antialiased bilinear resize) of a FaceSource.

    cache "memory" decodes everything now, "none" each batch in get(), or ahead in worker threads
    after prefetch(); "auto" is memory up to 2 GiB. Pixels are equal in every mode. An image that
    cannot be decoded raises DataError, here or from get().
    """

    def __init__(
        self, source: FaceSource, size: int, cache: str = "auto", workers: int = 0
    ) -> None:
        self.source = source
        self.size = size
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._ahead: dict[tuple[int, ...], list[Future[Tensor]]] = {}
        self._images: Tensor | None = None
        fits = source.num_images * 3 * size * size <= MEMORY_LIMIT_BYTES
        if cache == "memory" or (cache == "auto" and fits):
            images = torch.empty((source.num_images, 3, size, size), dtype=torch.uint8)
            for chunk in torch.arange(source.num_images).split(_CHUNK):
                images[chunk] = self._decode(chunk)
            self._images = images

    def get(self, indices: Tensor) -> Tensor:
        """Returns images (B, 3, size, size), uint8 on the CPU, of the source's `indices` (B,)."""
        if self._images is not None:
            return self._images[indices]
        waiting = self._ahead.pop(tuple(indices.tolist()), None)
        if waiting is not None:
            return torch.cat([future.result() for future in waiting])
        return self._decode(indices)

    def prefetch(self, indices: Tensor) -> None:
        """Starts decoding a batch in the worker threads, if any."""
        if self._images is not None or self._pool is None:
            return
        while len(self._ahead) >= _READ_AHEAD:  # a batch was never fetched: drop the oldest
            for future in self._ahead.pop(next(iter(self._ahead))):
                future.cancel()
        parts = indices.split(_PART)
        self._ahead[tuple(indices.tolist())] = [self._pool.submit(self._load, p) for p in parts]

    def landmarks_in_store(self) -> Tensor | None:
        """Returns the landmarks in store pixels, (N, 5, 2) float32, or None without landmarks."""
        if self.source.landmarks is None:
            return None
        return self.source.landmarks * (self.size / self.source.sizes.float()).unsqueeze(1)

    def _decode(self, indices: Tensor) -> Tensor:
        if self.source.read_batch is not None:
            images = self.source.read_batch(indices)
            if images.shape[-2:] == (self.size, self.size):
                return images
        if self._pool is None:
            return self._load(indices)
        return torch.cat(list(self._pool.map(self._load, indices.split(_PART))))

    def _load(self, indices: Tensor) -> Tensor:
        """Images (n, 3, size, size), by NumPy: each call of torch releases the interpreter lock."""
        loaded = np.empty((len(indices), self.size, self.size, 3), dtype=np.uint8)
        for place, index in enumerate(indices.tolist()):
            image = self.source.read(index)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            loaded[place] = np.asarray(image)
        return torch.from_numpy(loaded).permute(0, 3, 1, 2).contiguous()


def sample_grid(store: ImageStore, identities: int = 10, images: int = 8) -> Image.Image:
    """Returns a contact sheet: a row of each random identity's first store images, enlarged to
    about 96 pixels, with landmarks as dots in _COLOURS.
    """
    source, size = store.source, store.size
    scale = max(1, round(96 / size))
    side = size * scale
    points = store.landmarks_in_store()
    chosen = counter_permutation(source.num_classes, 0, _STREAM_GRID)[:identities].sort().values
    sheet = Image.new("RGB", (images * side, len(chosen) * side), "#202020")
    draw = ImageDraw.Draw(sheet)
    radius = max(1, round(side / 64))
    for row, identity in enumerate(chosen.tolist()):
        own = (source.labels == identity).nonzero()[:images, 0]
        for column, (index, image) in enumerate(zip(own.tolist(), store.get(own), strict=True)):
            left, top = column * side, row * side
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, top))
            if points is None:
                continue
            dots = points[index] * scale + torch.tensor([left, top])
            for colour, (x, y) in zip(_COLOURS, dots.tolist(), strict=True):
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return sheet
