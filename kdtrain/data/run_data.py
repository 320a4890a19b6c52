"""A run's images: source, split and store, served as device batches for training and evaluation."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdtrain.config import Config, DataConfig
from kdtrain.config.program import name_bytes
from kdtrain.data.build import build_source, list_file
from kdtrain.data.samplers import balanced_batches, random_batches
from kdtrain.data.source import FaceSource
from kdtrain.data.split import hold_out, split_indices, training_labels
from kdtrain.data.store import ImageStore
from kdtrain.data.transforms import area_average, augment, center, shrink, to_original

EVAL_BATCH = 256
SKIPPED_SHOWN = 5
LARGE_SHARE = 0.25  # of the test split's genuine pairs, from which one identity is named


class Batch(NamedTuple):
    """One crop and flip of each of B images, on the device."""

    images: Tensor  # (B, 3, s, s) float32 in [0, 255]
    labels: Tensor  # (B,) int64
    points: Tensor | None  # (B, 5, 2) landmarks in pixels of the crop
    flipped: Tensor  # (B,) bool: mirrored
    teacher_images: Tensor | None
    """(B, 3, t, t): the same crops at the teacher's input size, where it differs."""
    waited_s: float = 0.0  # Seconds spent waiting for the images, without augmentation

    @property
    def teacher_input(self) -> Tensor:
        """The images of the teacher forward pass."""
        return self.images if self.teacher_images is None else self.teacher_images


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """N images of one split for evaluation; s is the side of the network's input."""

    images: Tensor  # (N, 3, s, s) float32 in [0, 255]: centre crops
    labels: Tensor  # (N,) identity
    indices: Tensor  # (N,) index in the source
    sizes: Tensor  # (N, 2) original width and height
    points_original: Tensor | None = None  # (N, 5, 2) landmarks in original pixels
    groups: Tensor | None = None  # (N,) video
    to_original: Callable[[Tensor], Tensor] | None = None
    """Maps (N, 5, 2) crop pixels to original ones: a scale and an offset per image and axis."""


def training_batch(
    stored: Tensor,
    labels: Tensor,
    points: Tensor | None,
    indices: Tensor,
    config: Config,
    phase: int,
    epoch: int,
) -> Batch:
    """Returns augmented crops of stored images (B, 3, S, S) for student and teacher."""
    crops, points, frame = augment(stored, points, indices, config, phase=phase, epoch=epoch)
    images, smaller, _ = shrink(crops, points, frame, config.data.input_size)
    theirs = None
    if config.teacher.run is not None and config.teacher_side != config.data.input_size:
        theirs, _, _ = shrink(crops, None, frame, config.teacher_side)
    return Batch(images, labels, smaller, frame.flipped, theirs)


def shared_source(data: DataConfig, sources: dict[DataConfig, FaceSource]) -> FaceSource:
    """Returns the source of a data section, reused from `sources` where the settings declared with
    `source=True` and the split file are equal.
    """
    own = {f.name: getattr(data, f.name) for f in fields(data) if f.metadata.get("source")}
    split = data.split if data.split.startswith("file:") else "random"
    read = DataConfig(**own, split=split, input_size=data.store_size)
    if read not in sources:
        sources[read] = build_source(read)
    return sources[read]


def parts(source: FaceSource, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Returns training, validation and test indices: split_indices, then hold_out."""
    train, test = split_indices(source, config.data)
    train, validation = hold_out(source, train, config.data)
    return train, validation, test


def data_key(fingerprint: str, train: Tensor, test: Tensor) -> str:
    """Returns a digest of the source's fingerprint and of both index lists (int64)."""
    digest = hashlib.sha256(fingerprint.encode())
    for part in (train, test):
        digest.update(part.numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def identities_key(names: Iterable[str], data: DataConfig) -> str:
    """Returns 16 hex digits over the identities in class order, and synthetic ones' seed."""
    names = list(names)
    if data.kind == "synthetic":
        names.append(f"drawn from seed {data.synthetic_seed}")
    return hashlib.sha256(name_bytes("\n".join(names))).hexdigest()[:16]


class RunData:
    """The images of one run, in batches: a pure function of the config and of (phase, epoch, step),
    so that a resumed run reads the same ones.
    """

    def __init__(self, config: Config, source: FaceSource | None = None) -> None:
        """source: None builds it from config.data."""
        self.config = config
        self.source = build_source(config.data) if source is None else source
        self.train, self.validation, self.test = parts(self.source, config)
        self.key = data_key(self.source.fingerprint(), self.train, self.test)
        self.labels = training_labels(self.source, self.train, config.data)
        self.device = torch.device(config.train.device)
        self.store = ImageStore(
            self.source, config.data.store_size, config.data.cache, config.data.workers
        )
        self.points = self.store.landmarks_in_store()

    def epoch(self, number: int) -> list[Tensor]:
        """Returns the index lists of the batches of an epoch, counted from the start of the run."""
        config = self.config
        if config.balanced:
            identities, images = config.triplet.identities, config.triplet.images_per_identity
            return balanced_batches(
                self.train, self.labels, identities, images, config.seed, number
            )
        return random_batches(
            self.train, config.optim.batch_size, config.seed, number, config.train.drop_last
        )

    def batch(self, indices: Tensor, phase: int, epoch: int, following: Tensor | None) -> Batch:
        """Returns the augmented images of one step; prefetches `following` if not in memory."""
        started = time.perf_counter()
        stored = self.store.get(indices)
        waited_s = time.perf_counter() - started
        if following is not None:
            self.store.prefetch(following)
        points = None if self.points is None else self.points[indices].to(self.device)
        stored, labels = stored.to(self.device), self.labels[indices].to(self.device)
        batch = training_batch(stored, labels, points, indices, self.config, phase, epoch)
        return batch._replace(waited_s=waited_s)

    def teacher_view(self, indices: Tensor, mirrored: bool) -> Tensor:
        """Returns the teacher's input where training has fixed views (data.fixed_views)."""
        data = self.config.data
        stored = self.store.get(indices).to(self.device)
        crops, _, _ = center(stored, None, data.crop_side, self.config.augment, mirrored=mirrored)
        side = self.config.teacher_side
        return crops if side == data.crop_side else area_average(crops, side)

    def evaluation(self, indices: Tensor) -> Iterator[EvalBatch]:
        """Yields centre crops of the images `indices`, in order."""
        source, data = self.source, self.config.data
        for part in indices.split(EVAL_BATCH):
            stored = self.store.get(part).to(self.device)
            points = None if self.points is None else self.points[part].to(self.device)
            crop = center(stored, points, data.crop_side, self.config.augment)
            images, _, frame = shrink(*crop, data.input_size)
            sizes = source.sizes[part]
            yield EvalBatch(
                images=images,
                labels=source.labels[part].to(self.device),
                points_original=None if source.landmarks is None else source.landmarks[part],
                indices=part,
                groups=None if source.groups is None else source.groups[part],
                to_original=partial(
                    to_original, frame=frame, sizes=sizes, store_size=data.store_size
                ),
                sizes=sizes,
            )

    @property
    def held_out(self) -> Tensor:
        """The images of evaluations during training: the validation part, else the test split."""
        return self.validation if len(self.validation) else self.test

    def unseen(self) -> int:
        """Returns the number of test images of identities without a training image."""
        labels = self.source.labels
        return int((~torch.isin(labels[self.test], labels[self.train])).sum())

    def names(self, indices: Tensor, limit: int = 4) -> str:
        """Returns the names of a batch's first images, for messages."""
        shown = [self.source.names[int(i)] for i in indices[:limit]]
        rest = len(indices) - len(shown)
        return ", ".join(shown) + (f" and {rest} more" if rest else "")

    def notes(self) -> list[str]:
        """Returns notes for readers of the results: skipped files, images that are not square, an
        unused official partition, an identity with most genuine pairs.
        """
        source, data, lines = self.source, self.config.data, []
        if source.skipped:
            shown = "; ".join(source.skipped[:SKIPPED_SHOWN])
            more = "; ..." if len(source.skipped) > SKIPPED_SHOWN else ""
            lines.append(f"{len(source.skipped)} skipped: {shown}{more}")
        oblong = (source.sizes[:, 0] != source.sizes[:, 1]).nonzero()[:, 0]
        if len(oblong):
            width, height = source.sizes[oblong[0]].tolist()
            lines.append(
                f"{len(oblong)} of {source.num_images} images are not square (the first is "
                f"{width} x {height}) and are squeezed to {data.store_size} x {data.store_size}"
            )
        partition = list_file(Path(data.root or ""), "list_eval_partition")
        if data.kind == "celeba" and partition and not data.split.startswith("file:"):
            lines.append(
                f"data.split {data.split} does not use {partition.name}; "
                f"file:{partition.name}:partition does"
            )
        counts = torch.bincount(source.labels[self.test])
        pairs = counts * (counts - 1) // 2
        largest, genuine = int(counts.argmax()), max(1, int(pairs.sum()))
        if self.config.task != "alignment" and pairs[largest] > LARGE_SHARE * genuine:
            lines.append(
                f"identity {source.class_names[largest]} has "
                f"{100 * int(counts[largest]) / len(self.test):.0f} % of the test images and "
                f"{100 * int(pairs[largest]) / genuine:.0f} % of their genuine pairs, so metrics "
                "of pairs depend on it"
            )
        return lines

    def summary(self) -> dict[str, object]:
        """Returns the section `data` of results.json."""
        return {
            "name": self.source.name,
            "images": self.source.num_images,
            "classes": self.source.num_classes,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "test_of_unseen_identities": self.unseen(),
            "skipped": len(self.source.skipped),
            "notes": self.notes(),
            "identities_key": identities_key(self.source.class_names, self.config.data),
        }
