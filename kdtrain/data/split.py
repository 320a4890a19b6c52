"""Training, validation and test parts, and the label noise of synthetic training images."""

from dataclasses import replace

import torch
from torch import Tensor

from kdtrain.config import DataConfig
from kdtrain.data.counter import counter_hash, counter_permutation, counter_uniform
from kdtrain.data.source import DataError, FaceSource

_STREAM_RANDOM, _STREAM_IDENTITY, _STREAM_NOISE, _STREAM_WRONG = 11, 12, 13, 14
_STREAM_VALIDATION = 15
_TRAIN, _TEST, _NEITHER = {"train", "0"}, {"test", "2"}, {"val", "valid", "validation", "1"}


def split_indices(source: FaceSource, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Returns (train, test) image indices, ascending int64, by config.split; a function of
    split_seed and the labels.

    "random": test_fraction of the images, at least one image per class for training. "identity":
    test_fraction of the identities, disjoint. "identity:random": the random split within the
    training identities of identity. "file:NAME:COLUMN": the column holds train or test (CelebA's 0
    and 2; validation images, 1, are in neither part); a list without header has the column
    `partition`. Raises DataError for a bad column or value, and for an empty part.
    """
    if config.split.startswith("file:"):
        return _file_split(source, config.split)
    if config.split == "identity:random":
        identities, _ = split_indices(source, replace(config, split="identity"))
        train, test = split_indices(source, replace(config, split="random"))
        return train[torch.isin(train, identities)], test[torch.isin(test, identities)]
    by_identity = config.split == "identity"
    drawn = _identity_split if by_identity else _random_split
    stream = _STREAM_IDENTITY if by_identity else _STREAM_RANDOM
    fraction, seed = config.test_fraction, config.split_seed
    is_test = drawn(source.labels, source.num_classes, fraction, seed, stream)
    return _checked(~is_test, is_test, config.split)


def hold_out(source: FaceSource, train: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Returns (train, validation): `train` (N,) ascending int64 without validation_fraction of it,
    and that part; a function of split_seed, the labels and `train`.

    By image, at least one image per class for training; with split "identity" by identity. Fraction
    0 holds nothing out. Raises DataError for an empty part.
    """
    fraction = config.validation_fraction
    if fraction == 0:
        return train, train[:0]
    identities, label = torch.unique(source.labels[train], return_inverse=True)
    drawn = _identity_split if config.split == "identity" else _random_split
    held_out = drawn(label, len(identities), fraction, config.split_seed, _STREAM_VALIDATION)
    if held_out.all() or not held_out.any():
        raise DataError(
            f"data.validation_fraction: {fraction} of {len(train)} training images of "
            f"{len(identities)} identities leaves {int((~held_out).sum())} to train and "
            f"{int(held_out.sum())} to validate; both parts need at least one"
        )
    return train[~held_out], train[held_out]


def training_labels(source: FaceSource, train: Tensor, config: DataConfig) -> Tensor:
    """Returns the labels to train with, (N,) int64.

    With probability config.noise a synthetic image in `train` takes the label of another identity,
    drawn uniformly; a function of (synthetic_seed, image). All other labels stay true.
    """
    labels = source.labels.clone()
    if config.kind != "synthetic" or config.noise == 0:
        return labels
    hit = counter_uniform(config.synthetic_seed, _STREAM_NOISE, train, draws=1)[:, 0] < config.noise
    wrong = train[hit]
    step = 1 + counter_hash(config.synthetic_seed, _STREAM_WRONG, wrong) % (source.num_classes - 1)
    labels[wrong] = (labels[wrong] + step) % source.num_classes
    return labels


def _identity_split(
    labels: Tensor, num_classes: int, fraction: float, seed: int, stream: int
) -> Tensor:
    order = counter_permutation(num_classes, seed, stream)
    return torch.isin(labels, order[: max(1, round(fraction * num_classes))])


def _random_split(
    labels: Tensor, num_classes: int, fraction: float, seed: int, stream: int = _STREAM_RANDOM
) -> Tensor:
    order = counter_permutation(len(labels), seed, stream)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[order[: round(fraction * len(labels))]] = True
    left = torch.bincount(labels[~is_test], minlength=num_classes)
    # a class with every image in the test part returns its first one, in hash order
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    first = torch.full((num_classes,), len(order)).scatter_reduce_(0, labels, places, "amin")
    is_test[order[first[left == 0]]] = False
    return is_test


def _file_split(source: FaceSource, split: str) -> tuple[Tensor, Tensor]:
    parts = split.split(":")
    if len(parts) != 3:
        raise ValueError(f"data.split: expected file:NAME:COLUMN, got {split!r}")
    _, file, column = parts
    columns = source.splits.get(file)
    if columns is None or column not in columns:
        known = ", ".join(f"{name}:{c}" for name, table in source.splits.items() for c in table)
        raise DataError(
            f"data.split: no column {file}:{column}; this source has: {known or 'none'}"
        )
    values = [value.lower() for value in columns[column]]
    for name, value in zip(source.names, values, strict=True):
        if value not in _TRAIN | _TEST | _NEITHER:
            raise DataError(
                f"{file}: column {column} of {name}: expected train or test, got {value!r}"
            )
    train = torch.tensor([value in _TRAIN for value in values])
    return _checked(train, torch.tensor([value in _TEST for value in values]), split)


def _checked(train: Tensor, test: Tensor, split: str) -> tuple[Tensor, Tensor]:
    if not train.any() or not test.any():
        raise DataError(
            f"data.split: {split!r} gives {int(train.sum())} training and {int(test.sum())} "
            "test images; both parts need at least one"
        )
    return train.nonzero()[:, 0], test.nonzero()[:, 0]
