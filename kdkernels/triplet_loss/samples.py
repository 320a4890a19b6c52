"""Calls of triplet_loss that the contract runs: odd shapes, strides, every option."""

import torch
from torch import Tensor

from kdkernels.sample import Argument, Sample

MEMBERS = ("anchor", "positive", "negative")


def make(
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


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""

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
        make(1, 1, device=device),
        make(0, 7, device=device),
        make(0, 7, device=device, reduction="none", name="no rows, none"),
        make(3, 15, device=device, squared=False, margin=0.4),
        make(4, 16, device=device, reduction="sum"),
        make(7, 17, device=device, reduction="none"),
        make(5, 257, device=device),
        make(3, 4099, device=device, squared=False, reduction="none", margin=3.0),
        make(64, 512, device=device, spread=0.05, margin=0.4, name="64x512 of length 1"),
        make(40, 33, device=device, margin=-5.0, name="negative margin"),
        make(9, 100, device=device, spread=1e-4, squared=False, name="tiny"),
        make(9, 100, device=device, spread=100.0, name="large"),
        of("misaligned rows", wide[:, 1:65], wide[:, 3:67], wide[:, 5:69]),
        of("column-major", column_major.t(), plain, other),
        of("every second column", plain, every_second[:, ::2], other, squared=False),
        of("expanded negative", plain, other, one_row.expand(6, 64), reduction="none"),
        of("positive is the anchor", plain, plain.clone(), other, squared=False, margin=20.0),
        of("hinge exactly 0", grid, unit, far, margin=3.0, reduction="none"),
    ]
