"""Calls of nearest_neighbor that the contract runs: odd shapes, strides, ties, extreme values."""

import torch
from torch import Tensor

from kdkernels.sample import Sample


def make(
    rows: int,
    gallery_rows: int | None,
    columns: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    name: str = "",
) -> Sample:
    """Normal numbers, quantized so that float16 and bfloat16 hold them and no two rows nearly tie.

    gallery_rows None: leave-one-out.
    """
    generator = torch.Generator().manual_seed(seed)
    queries = _normal(generator, rows, columns)
    gallery = None if gallery_rows is None else _normal(generator, gallery_rows, columns)
    return of(name or f"{rows}x{gallery_rows}x{columns}", queries, gallery, device)


def of(name: str, queries: Tensor, gallery: Tensor | None, device: str) -> Sample:
    """A sample over given tensors; there is nothing to differentiate."""
    moved = None if gallery is None else gallery.to(device)
    return Sample(name, {"queries": queries.to(device), "gallery": moved})


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""
    return [
        make(4, 5, 3, device=device),
        make(3, 9, 5, device=device),
        make(6, None, 4, device=device),
        make(2, None, 7, device=device),
        make(1, 1, 1, device=device),
        make(0, 4, 3, device=device),
        make(1, 40, 17, device=device),
        make(33, 257, 16, device=device),
        make(65, 63, 31, device=device),
        make(50, None, 127, device=device),
        make(5, 7, 2049, device=device),
        make(3, None, 4100, device=device),
        make(7, 2049, 12, device=device, name="two gallery tiles"),
        make(1030, 9, 8, device=device, name="two query tiles"),
        *_ties(device),
        *_strided(device),
        *_extreme(device),
    ]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=generator) * 32).round() / 32


def _ties(device: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    base = _normal(generator, 5, 9)
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0), torch.arange(4.0))
    return [
        of("every row twice", base, torch.cat([base, base]), device),
        of("duplicates left out", torch.cat([base, base, base]), None, device),
        of("all rows the same", base[:1].expand(20, 9).clone(), None, device),
        of("corners of a grid", grid, None, device),
        of("between grid points", grid[:9] + 0.5, grid, device),
    ]


def _strided(device: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    wide = _normal(generator, 12, 83)
    return [
        of("misaligned rows", wide[:5, 1:81], wide[5:, 3:83], device),
        of("column-major", _normal(generator, 19, 6).t(), _normal(generator, 19, 11).t(), device),
        of("every second", _normal(generator, 14, 40)[::2, ::2], _normal(generator, 8, 20), device),
        of("one row expanded", wide[:1].expand(4, 83), wide[1:], device),
    ]


def _extreme(device: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    infinite = _normal(generator, 6, 10)
    infinite[2, 3] = torch.inf
    holes = _normal(generator, 6, 10)
    holes[1, 4] = torch.nan
    alone = torch.full((9, 30), torch.nan)
    large = _normal(generator, 9, 10) * 8192
    tiny = _normal(generator, 9, 10) * 2.0**-9
    far = _normal(generator, 40, 6).round() + 100
    return [
        of("a row with inf", _normal(generator, 4, 10), infinite, device),
        of("a query with inf", infinite, _normal(generator, 4, 10), device),
        of("a row with NaN", _normal(generator, 4, 10), holes, device),
        of("NaN among the left out", holes, None, device),
        of("nothing but NaN", alone, None, device),
        of("large numbers", large, large.flip(0) + 8, device),
        of("small numbers", tiny, None, device),
        of("far from the origin", far, None, device),
    ]
