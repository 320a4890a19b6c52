"""The inputs of the cases: `maker(seed, device, **sizes)`, the same numbers for the same seed on
one kind of device."""

import torch
from torch import Tensor

from bench.case import Inputs

# The hidden layers of a ResNet-50 on 112 x 112 faces: the stem, three in each of 16 blocks, the
# pooled features; (channels, side).
RESNET50_TAPS = [
    (64, 56),
    *((channels, side)
      for width, side, blocks in ((64, 28, 3), (128, 14, 4), (256, 7, 6), (512, 4, 3))
      for channels in (width, width, 4 * width) * blocks),
    (2048, 1),
]  # fmt: skip


def generator(seed: int, device: str) -> torch.Generator:
    """A generator on the device: a CPU would take too long for a GPU case's numbers."""
    return torch.Generator(device).manual_seed(seed)


def logits(
    seed: int,
    device: str,
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.0,
) -> Inputs:
    """Student and teacher logits and labels: normal times 3, or uniform in +-spread."""
    g = generator(seed, device)

    def one() -> Tensor:
        values = torch.empty(rows, classes, device=device)
        if spread:
            return values.uniform_(-spread, spread, generator=g).to(dtype)
        return values.normal_(0, 3, generator=g).to(dtype)

    target = torch.randint(classes, (rows,), generator=g, device=device)
    return {"student": one(), "teacher": one(), "target": target}


def heads(
    seed: int,
    device: str,
    rows: int,
    classes: int,
    features: int,
    with_teacher: bool,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Features, a classifier's weight and labels, for logits of about +-3; and the same of a
    teacher."""
    g = generator(seed, device)

    def normal(*shape: int, scale: float) -> Tensor:
        values = torch.empty(shape, device=device)
        return values.normal_(0, scale, generator=g).to(dtype)

    def head() -> list[Tensor]:
        size = 3.0 * features**-0.5
        return [normal(rows, features, scale=1.0), normal(classes, features, scale=size)]

    student = head()
    target = torch.randint(classes, (rows,), generator=g, device=device)
    inputs = {"features": student[0], "weight": student[1], "target": target}
    return {**inputs, "teacher": head()} if with_teacher else inputs


def on_grid(x: Tensor) -> Tensor:
    """Rows of about unit norm with entries in multiples of 2^-11.

    Squared distances up to 4 are then exact in float32, whatever the order of the sums, so every
    correct way of mining selects the same rows and a gradient can be compared with the float64 one
    tightly.
    """
    unit = x / x.norm(dim=1, keepdim=True) * 0.99
    return (unit * 2048).round() / 2048


def identities(seed: int, device: str, count: int, images: int, features: int) -> Inputs:
    """Shuffled embeddings; squared distances about 1.6 inside an identity, 2 between identities."""
    g = generator(seed, device)
    labels = torch.arange(count, device=device).repeat_interleave(images)
    labels = labels[torch.randperm(len(labels), generator=g, device=device)]
    centers = torch.randn(count, features, generator=g, device=device)
    noise = torch.randn(len(labels), features, generator=g, device=device)
    return {"embeddings": on_grid(0.2**0.5 * centers[labels] + 0.8**0.5 * noise), "labels": labels}


def triplets(seed: int, device: str, rows: int, features: int) -> Inputs:
    """Anchors with a related positive and an unrelated negative: half of the hinges active."""
    g = generator(seed, device)
    anchor, noise, negative = (
        torch.randn(rows, features, generator=g, device=device) for _ in range(3)
    )
    positive = 0.2 * anchor + 0.96**0.5 * noise
    return {name: on_grid(x) for name, x in
            [("anchor", anchor), ("positive", positive), ("negative", negative)]}  # fmt: skip


def feature_maps(
    seed: int,
    device: str,
    batch: int,
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Normal feature maps: (count, channels, side) for each stage of a network."""
    g = generator(seed, device)

    def maps() -> list[Tensor]:
        return [
            torch.randn(batch, channels, side, side, generator=g, device=device).to(dtype)
            for count, channels, side in shapes
            for _ in range(count)
        ]

    return {"students": maps(), "teachers": maps()}


def search(
    seed: int,
    device: str,
    queries: int,
    gallery: int,
    features: int,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Unrelated query and gallery rows; bfloat16 keeps them on their grid, a coarser one."""
    g = generator(seed, device)

    def rows(count: int) -> Tensor:
        return on_grid(torch.randn(count, features, generator=g, device=device)).to(dtype)

    return {"queries": rows(queries), "gallery": rows(gallery)}
