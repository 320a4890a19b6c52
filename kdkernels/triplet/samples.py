"""Calls of triplet_loss and batch_triplet_loss that the contract runs: odd shapes, strides, ties,
every option."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kdkernels.sample import Argument, Sample

MEMBERS = ("anchor", "positive", "negative")


def make_triplets(
    rows: int,
    features: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    device: str = "cpu",
    name: str = "",
    **options: object,
) -> Sample:
    """Normal features times `spread`; the margin is about the spread of the hinges unless given."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Argument] = {
        key: (torch.randn(rows, features, generator=generator) * spread).to(device)
        for key in MEMBERS
    }
    options.setdefault("margin", spread**2 * features**0.5)
    return Sample(name or f"{rows}x{features}", tensors, dict(options), MEMBERS)


def triplet_samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls of triplet_loss; the contract casts them to each dtype."""

    def of(
        name: str, anchor: Tensor, positive: Tensor, negative: Tensor, **options: object
    ) -> Sample:
        tensors: dict[str, Argument] = {
            "anchor": anchor,
            "positive": positive,
            "negative": negative,
        }
        return Sample(name, tensors, {"margin": 1.0, **options}, MEMBERS)

    generator = torch.Generator().manual_seed(9)
    wide, column_major, every_second, one_row, plain = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((6, 69), (64, 6), (6, 128), (1, 64), (6, 64))
    )
    other = torch.randn(6, 64, generator=generator).to(device)
    grid = torch.zeros(4, 8, device=device)
    unit, far = grid.clone(), grid.clone()
    unit[:, 0], far[:2, 0], far[2:, 0] = 1.0, 2.0, -3.0
    return [
        make_triplets(1, 1, device=device),
        make_triplets(0, 7, device=device),
        make_triplets(0, 7, device=device, reduction="none", name="no rows, none"),
        make_triplets(3, 15, device=device, squared=False, margin=0.4),
        make_triplets(4, 16, device=device, reduction="sum"),
        make_triplets(7, 17, device=device, reduction="none"),
        make_triplets(5, 257, device=device),
        make_triplets(3, 4099, device=device, squared=False, reduction="none", margin=3.0),
        make_triplets(64, 512, device=device, spread=0.05, margin=0.4, name="64x512 of length 1"),
        make_triplets(40, 33, device=device, margin=-5.0, name="negative margin"),
        make_triplets(9, 100, device=device, spread=1e-4, squared=False, name="tiny"),
        make_triplets(9, 100, device=device, spread=100.0, name="large"),
        of("misaligned rows", wide[:, 1:65], wide[:, 3:67], wide[:, 5:69]),
        of("column-major", column_major.t(), plain, other),
        of("every second column", plain, every_second[:, ::2], other, squared=False),
        of("expanded negative", plain, other, one_row.expand(6, 64), reduction="none"),
        of("positive is the anchor", plain, plain.clone(), other, squared=False, margin=20.0),
        of("hinge exactly 0", grid, unit, far, margin=3.0, reduction="none"),
    ]


def tensor(sample: Sample, name: str) -> Tensor:
    """The sample's argument of that name, which is a tensor."""
    value = sample.tensors[name]
    assert isinstance(value, Tensor)
    return value


def make_batch(
    people: Sequence[int],
    features: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    device: str = "cpu",
    name: str = "",
    **options: object,
) -> Sample:
    """people[i] pictures of person i in mixed order: a normal centre each, and half of that around
    it."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(people, dtype=torch.int64)
    labels = torch.repeat_interleave(torch.arange(len(people)), counts)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(len(people), features, generator=generator)
    around = torch.randn(len(labels), features, generator=generator)
    embeddings = (centres[labels] + 0.5 * around) * spread
    tensors = {"embeddings": embeddings.to(device), "labels": labels.to(device)}
    options.setdefault("margin", spread**2 * features)
    found = f"{len(labels)}x{features} {options.get('mining', 'hard')}"
    return Sample(name or found, dict(tensors), dict(options), ("embeddings",))


def batch_samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls of batch_triplet_loss; the contract casts them to each dtype."""
    mixed = [1, 4, 2, 7, 1, 3]
    found = [
        make_batch([2, 2, 2, 2], 3, device=device, margin=2.0),
        make_batch([2, 2, 2, 2], 3, device=device, mining="semihard", reduction="sum"),
        make_batch([2, 2, 2, 2], 3, device=device, mining="all", reduction="none", margin=2.0),
        make_batch([3, 3], 4, device=device, mining="all", margin=2.0),
        make_batch([], 7, device=device, name="no rows"),
        make_batch([], 7, device=device, reduction="none", name="no rows, none"),
    ]
    for mining in ("hard", "semihard", "all"):
        make = partial(make_batch, device=device, mining=mining)
        found += [
            make(mixed, 17, reduction="nonzero"),
            make(mixed, 33, reduction="none", squared=False, margin=1.0),
            make([4] * 16, 512, spread=0.05, margin=0.4),
            make([30, 33], 48, reduction="sum", squared=False, margin=0.3),
            make([4] * 13, 130, reduction="none"),
            make([40], 33, name=f"one person, {mining}"),
            make([1] * 40, 33, reduction="none", name=f"all alone, {mining}"),
            *_edited(device, mining),
        ]
    return found + _strided(device)


def _edited(device: str, mining: str) -> list[Sample]:
    def edit(name: str, change: Callable[[Tensor], Tensor], **options: object) -> Sample:
        sample = make_batch([3] * 8, 20, device=device)
        changed = {**sample.tensors, "embeddings": change(tensor(sample, "embeddings"))}
        options = {"margin": 20.0, **options, "mining": mining}
        return Sample(f"{name}, {mining}", changed, options, sample.differentiable)

    def close_clusters(x: Tensor) -> Tensor:
        # Three far points, everybody within 1/64 of one: the Gram form keeps few bits of these.
        return x[:3].repeat(8, 1) * 4.0 + x / 64.0

    return [
        edit("integers with ties", lambda x: (x * 1.5).round(), margin=3.0, squared=False),
        edit("twice the same rows", lambda x: x[:12].repeat(2, 1), reduction="none", squared=False),
        edit("all rows equal", lambda x: x[:1].repeat(24, 1), margin=0.5, squared=False),
        edit("far from the origin", lambda x: x + 64.0, margin=5.0),
        edit("close clusters", close_clusters, margin=0.01, reduction="sum"),
        edit("hinges of 0", lambda x: x.round().clamp(-1, 1), margin=0.0, reduction="nonzero"),
    ]


def _strided(device: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    wide, column_major, every_second = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((18, 67), (64, 18), (18, 128))
    )
    labels = torch.arange(36, device=device) // 6

    def of(name: str, embeddings: Tensor, labels: Tensor, **options: object) -> Sample:
        tensors = {"embeddings": embeddings, "labels": labels}
        return Sample(name, dict(tensors), {"margin": 9.0, **options}, ("embeddings",))

    return [
        of("misaligned rows", wide[:, 1:65], labels[::2], mining="all"),
        of("column-major", column_major.t(), labels[::2], mining="semihard"),
        of("every second column", every_second[:, ::2], labels[::2].int()),
        of("strided int32 labels", wide, labels.int()[::2] - 1000, mining="all"),
    ]


SAMPLES = {"triplet_loss": triplet_samples, "batch_triplet_loss": batch_samples}
