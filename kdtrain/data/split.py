"""Which pictures are trained on and which are tested on, and the label noise of synthetic training
sets.
"""

import torch
from torch import Tensor

from kdtrain.config import DataConfig
from kdtrain.data.counter import counter_hash, counter_permutation, counter_uniform
from kdtrain.data.source import DataError, FaceSource

_STREAM_RANDOM, _STREAM_IDENTITY, _STREAM_NOISE, _STREAM_WRONG = 11, 12, 13, 14
_STREAM_VALIDATION = 15
_TRAIN, _TEST, _NEITHER = {"train", "0"}, {"test", "2"}, {"val", "valid", "validation", "1"}


def split_indices(source: FaceSource, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Returns (train, test) picture numbers, ascending int64, by config.split; a function of
    split_seed and the labels.

    "random": test_fraction of the pictures, but every class keeps at least one for training.
    "identity": test_fraction of the people, so no person is on both sides. "file:NAME:COLUMN": the
    column says train or test (CelebA's 0 and 2; validation pictures, 1, are in neither); COLUMN of
    a list without header is `partition`. Raises ValueError for an unknown split, DataError for a
    bad column or value, and when either side is empty.
    """
    fraction = config.test_fraction
    if config.split in ("random", "identity") and not 0 < fraction < 1:
        raise ValueError(f"data.test_fraction: expected a number between 0 and 1, got {fraction}")
    if config.split == "random":
        is_test = _random_split(source.labels, source.num_classes, fraction, config.split_seed)
    elif config.split == "identity":
        order = counter_permutation(source.num_classes, config.split_seed, _STREAM_IDENTITY)
        chosen = torch.zeros(source.num_classes, dtype=torch.bool)
        chosen[order[: max(1, round(fraction * source.num_classes))]] = True
        is_test = chosen[source.labels]
    elif config.split.startswith("file:"):
        return _file_split(source, config.split)
    else:
        raise ValueError(
            f"data.split: expected random, identity or file:NAME:COLUMN, got {config.split!r}"
        )
    return _checked(~is_test, is_test, config.split)


def hold_out(source: FaceSource, train: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Returns (train, validation): `train` (N,) ascending int64 without validation_fraction of it,
    and that part; a function of split_seed, the labels and `train`.

    By picture, where every class of `train` keeps at least one; with split "identity" by person, so
    that no person is on two sides. Fraction 0 holds nothing out. DataError when either side is
    empty.
    """
    fraction = config.validation_fraction
    if fraction == 0:
        return train, train[:0]
    people, label = torch.unique(source.labels[train], return_inverse=True)
    if config.split == "identity":
        order = counter_permutation(len(people), config.split_seed, _STREAM_VALIDATION)
        chosen = torch.zeros(len(people), dtype=torch.bool)
        chosen[order[: max(1, round(fraction * len(people)))]] = True
        held_out = chosen[label]
    else:
        held_out = _random_split(
            label, len(people), fraction, config.split_seed, stream=_STREAM_VALIDATION
        )
    if held_out.all() or not held_out.any():
        raise DataError(
            f"data.validation_fraction: {fraction} of {len(train)} training pictures of "
            f"{len(people)} people leaves {int((~held_out).sum())} to train and "
            f"{int(held_out.sum())} to validate; both parts need at least one"
        )
    return train[~held_out], train[held_out]


def training_labels(source: FaceSource, train: Tensor, config: DataConfig) -> Tensor:
    """Returns the labels to train with, (N,) int64: source.labels, with label noise on synthetic
    training pictures.

    Each picture in `train` takes, with probability config.noise, the label of another person drawn
    uniformly; a function of (synthetic_seed, picture). Pictures outside `train`, other sources, and
    every evaluation keep the true label.
    """
    labels = source.labels.clone()
    if config.kind != "synthetic" or config.noise == 0:
        return labels
    if not 0 <= config.noise < 1:
        raise ValueError(f"data.noise: expected a number in [0, 1), got {config.noise}")
    hit = counter_uniform(config.synthetic_seed, _STREAM_NOISE, train, draws=1)[:, 0] < config.noise
    wrong = train[hit]
    step = 1 + counter_hash(config.synthetic_seed, _STREAM_WRONG, wrong) % (source.num_classes - 1)
    labels[wrong] = (labels[wrong] + step) % source.num_classes
    return labels


def _random_split(
    labels: Tensor, num_classes: int, fraction: float, seed: int, stream: int = _STREAM_RANDOM
) -> Tensor:
    order = counter_permutation(len(labels), seed, stream)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[order[: round(fraction * len(labels))]] = True
    kept = torch.bincount(labels[~is_test], minlength=num_classes)
    # a class whose pictures all fell into the test part gives its first one (in hash order) back
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    first = torch.full((num_classes,), len(order)).scatter_reduce_(0, labels, places, "amin")
    is_test[order[first[kept == 0]]] = False
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
            "test pictures; both parts need at least one"
        )
    return train.nonzero()[:, 0], test.nonzero()[:, 0]
