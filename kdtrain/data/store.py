"""Pictures of one source, decoded and resized to a square, from memory or decoded batch by
batch.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtrain.data.source import FaceSource

MEMORY_LIMIT_BYTES = 2 << 30  # "auto" keeps a set up to this size in memory
_CHUNK = 512
_READ_AHEAD = 2  # batches waiting at most
# Pictures that a worker decodes at a time. A future for each picture wakes the training thread and
# takes its interpreter lock 64 times a batch; larger parts leave a worker idle at a batch's end.
_PART = 16


class PictureStore:
    """uint8 pictures (size x size, Pillow's antialiased bilinear resize) of a FaceSource.

    cache "memory" decodes everything now, "none" decodes each batch when it is asked for (or, with
    workers > 0, ahead, by that many threads, after `prefetch`), "auto" is memory up to 2 GiB. The
    pixels are the same in every mode. A picture that cannot be decoded raises DataError naming its
    file: here in "memory", from get() in "none". (With data.on_error "skip" the source has already
    left such pictures out.)
    """

    def __init__(
        self, source: FaceSource, size: int, cache: str = "auto", workers: int = 0
    ) -> None:
        if cache not in ("auto", "memory", "none"):
            raise ValueError(f"PictureStore: cache must be auto, memory or none, got {cache!r}")
        if size < 1 or workers < 0:
            raise ValueError(
                f"PictureStore: expected size >= 1 and workers >= 0, got {size} and {workers}"
            )
        self.source = source
        self.size = size
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._ahead: dict[tuple[int, ...], list[Future[Tensor]]] = {}
        self._pictures: Tensor | None = None
        fits = source.num_pictures * 3 * size * size <= MEMORY_LIMIT_BYTES
        if cache == "memory" or (cache == "auto" and fits):
            pictures = torch.empty((source.num_pictures, 3, size, size), dtype=torch.uint8)
            for chunk in torch.arange(source.num_pictures).split(_CHUNK):
                pictures[chunk] = self._decode(chunk)
            self._pictures = pictures

    @property
    def in_memory(self) -> bool:
        return self._pictures is not None

    def get(self, indices: Tensor) -> Tensor:
        """Returns pictures (B, 3, size, size), uint8 on the CPU, of the source's numbers `indices`
        (B,).
        """
        if self._pictures is not None:
            return self._pictures[indices]
        waiting = self._ahead.pop(tuple(indices.tolist()), None)
        if waiting is not None:
            return torch.cat([future.result() for future in waiting])
        return self._decode(indices)

    def prefetch(self, indices: Tensor) -> None:
        """Starts decoding a coming batch in the worker threads; without workers, or in memory,
        nothing is to be done.
        """
        if self._pictures is not None or self._pool is None:
            return
        while len(self._ahead) >= _READ_AHEAD:  # asked for and never fetched: forget the oldest
            for future in self._ahead.pop(next(iter(self._ahead))):
                future.cancel()
        parts = indices.split(_PART)
        self._ahead[tuple(indices.tolist())] = [self._pool.submit(self._load, p) for p in parts]

    def landmarks_in_store(self) -> Tensor:
        """Returns the landmarks in store pixels, (N, 5, 2) float32. Raises ValueError when the
        source has none.
        """
        if self.source.landmarks is None:
            raise ValueError(f"PictureStore: the source {self.source.name!r} has no landmarks")
        return self.source.landmarks * (self.size / self.source.sizes.float()).unsqueeze(1)

    def close(self) -> None:
        """Stops the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._ahead.clear()

    def _decode(self, indices: Tensor) -> Tensor:
        if self.source.read_batch is not None:
            pictures = self.source.read_batch(indices)
            if pictures.shape[-2:] == (self.size, self.size):
                return pictures
        if self._pool is None:
            return self._load(indices)
        return torch.cat(list(self._pool.map(self._load, indices.split(_PART))))

    def _load(self, indices: Tensor) -> Tensor:
        """Pictures (n, 3, size, size). NumPy alone in the loop: each of torch's calls would hand
        the interpreter lock over and wait for it again.
        """
        loaded = np.empty((len(indices), self.size, self.size, 3), dtype=np.uint8)
        for place, index in enumerate(indices.tolist()):
            picture = self.source.read(index)
            if picture.size != (self.size, self.size):
                picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
            loaded[place] = np.asarray(picture)
        return torch.from_numpy(loaded).permute(0, 3, 1, 2).contiguous()
