"""Calls of batch_triplet_loss that the contract runs: odd shapes, strides, ties, every option."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kdkernels.sample import Sample


def tensor(sample: Sample, name: str) -> Tensor:
    """The sample's argument of that name, which is a tensor."""
    value = sample.tensors[name]
    assert isinstance(value, Tensor)
    return value


def make(
    identities: Sequence[int],
    features: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    device: str = "cpu",
    name: str = "",
    **options: object,
) -> Sample:
    """identities[i] rows of identity i in mixed order: a normal center each, and half of that
    around it."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(identities, dtype=torch.int64)
    labels = torch.repeat_interleave(torch.arange(len(identities)), counts)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(len(identities), features, generator=generator)
    around = torch.randn(len(labels), features, generator=generator)
    embeddings = (centers[labels] + 0.5 * around) * spread
    tensors = {"embeddings": embeddings.to(device), "labels": labels.to(device)}
    options.setdefault("margin", spread**2 * features)
    found = f"{len(labels)}x{features} {options.get('mining', 'hard')}"
    return Sample(name or found, dict(tensors), dict(options), ("embeddings",))


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""
    mixed = [1, 4, 2, 7, 1, 3]
    found = [
        make([2, 2, 2, 2], 3, device=device, margin=2.0),
        make([2, 2, 2, 2], 3, device=device, mining="semihard", reduction="sum"),
        make([2, 2, 2, 2], 3, device=device, mining="all", reduction="none", margin=2.0),
        make([3, 3], 4, device=device, mining="all", margin=2.0),
        make([], 7, device=device, name="no rows"),
        make([], 7, device=device, reduction="none", name="no rows, none"),
    ]
    for mining in ("hard", "semihard", "all"):
        mined = partial(make, device=device, mining=mining)
        found += [
            mined(mixed, 17, reduction="nonzero"),
            mined(mixed, 33, reduction="none", squared=False, margin=1.0),
            mined([4] * 16, 512, spread=0.05, margin=0.4),
            mined([30, 33], 48, reduction="sum", squared=False, margin=0.3),
            mined([4] * 13, 130, reduction="none"),
            mined([40], 33, name=f"one identity, {mining}"),
            mined([1] * 40, 33, reduction="none", name=f"all alone, {mining}"),
            *_edited(device, mining),
        ]
    return found + _strided(device)


def _edited(device: str, mining: str) -> list[Sample]:
    def edit(name: str, change: Callable[[Tensor], Tensor], **options: object) -> Sample:
        sample = make([3] * 8, 20, device=device)
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
