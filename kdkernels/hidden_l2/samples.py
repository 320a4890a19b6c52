"""Calls of hidden_l2 that the contract runs: odd shapes, strides, many pairs, every option."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.sample import Argument, Sample


def make(
    shapes: Sequence[tuple[int, ...]],
    *,
    seed: int = 0,
    spread: float = 1.0,
    device: str = "cpu",
    name: str = "",
    **options: object,
) -> Sample:
    """Pairs of the given shapes, normal numbers times `spread`."""
    generator = torch.Generator().manual_seed(seed)
    students = [torch.randn(shape, generator=generator) * spread for shape in shapes]
    teachers = [torch.randn(shape, generator=generator) * spread for shape in shapes]
    return of(name or " ".join(map(str, shapes)), students, teachers, device, **options)


def of(
    name: str, students: list[Tensor], teachers: list[Tensor], device: str, **options: object
) -> Sample:
    """A sample over given tensors, moved to the device with their strides where they are dense."""
    tensors: dict[str, Argument] = {
        "students": [t.to(device) for t in students],
        "teachers": [t.to(device) for t in teachers],
    }
    return Sample(name, tensors, dict(options), ("students",))


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""
    several = [(4, 3, 5, 5), (4, 7), (2, 6, 2, 3), (1,), ()]
    return [
        make([(5, 5)], device=device),
        make([(3, 11), (7, 2)], device=device, reduction="mean"),
        make([(6, 7)], device=device, return_terms=True, reduction="sum"),
        make([(4, 3, 4)], device=device, weights=[0.3]),
        make(several, device=device, return_terms=True, name="several"),
        make(several, device=device, reduction="mean", weights=[0.5, 2.0, 0.0, -1.0, 3.0]),
        make(
            several,
            device=device,
            reduction="sum",
            return_terms=True,
            weights=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], device=device),
            name="weights as a tensor",
        ),
        make([(2, 9), (3, 0, 4), (0, 5)], device=device, return_terms=True, name="empty pairs"),
        make([(0, 3)], device=device, return_terms=True, name="one empty pair"),
        make([(2, 2047), (2, 2048), (1, 2049), (17, 241)], device=device, name="around a block"),
        make([(1, 65535), (2, 32768), (65537,)], device=device, name="around a chunk"),
        make([(3, 101)] * 40, device=device, reduction="mean", name="40 pairs"),
        make([(3, 500)], device=device, spread=1e3, reduction="mean", name="large numbers"),
        make([(8, 64, 9, 9)], device=device, spread=1e-3, reduction="mean", name="small numbers"),
        *_strided(device),
    ]


def _strided(device: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def channels_last(*shape: int) -> Tensor:
        return normal(*shape).contiguous(memory_format=torch.channels_last)

    shape = (3, 6, 5, 7)
    return [
        of("channels-last", [channels_last(*shape)], [channels_last(*shape)], device),
        of("channels-last student", [channels_last(*shape)], [normal(*shape)], device),
        of("channels-last teacher", [normal(*shape)], [channels_last(*shape)], device),
        of("transposed", [normal(70, 90).t()], [normal(90, 70)], device),
        of("both transposed", [normal(33, 65).t()], [normal(33, 65).t()], device),
        of("permuted", [normal(4, 5, 6).permute(2, 0, 1)], [normal(6, 4, 5)], device),
        of("expanded teacher", [normal(9, 40)], [normal(1, 40).expand(9, 40)], device),
        of("one number as teacher", [normal(9, 41)], [normal(1, 1).expand(9, 41)], device),
        of("expanded student", [normal(7, 1).expand(7, 30)], [normal(7, 30)], device),
        of("every second column", [normal(6, 3000)[:, ::2]], [normal(6, 3000)[:, 1::2]], device),
        of("misaligned rows", [normal(5, 103)[:, 1:101]], [normal(5, 103)[:, 3:103]], device),
        of("sliced maps", [normal(4, 8, 6, 6)[:, 2:5, 1:, :4]], [normal(4, 3, 5, 4)], device),
        of(
            "a mix",
            [channels_last(*shape), normal(12, 5).t(), normal(40)],
            [normal(*shape), normal(5, 12), normal(80)[::2]],
            device,
            reduction="mean",
            weights=[1.0, 0.25, 2.0],
            return_terms=True,
        ),
    ]
