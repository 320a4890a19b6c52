"""batch_triplet_loss in Triton: the batch sorted by identity and centered.

Rows are sorted by label once, so that an identity's rows are one range of places. A place is a
row's number in that order, a row its number in the batch: ties are decided by rows, memory is read
by places. A row whose numbers are not finite, or near the end of float32, is centered to zero with
the norm inf: all its distances are measured.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common

INF = tl.constexpr(float("inf"))
LARGEST_NORM = tl.constexpr(1e37)  # sums and differences of such norms are finite
SHIFT_ROWS = 256  # rows that the shift is the mean of; any shift is right


@triton.jit
def lower_norm(norm, relative, absolute):
    """A row's share of the lower bound n_i + n_j - 2 G_ij - error."""
    return tl.where(norm == INF, -INF, norm * (1.0 - relative) - absolute)


@triton.jit
def upper_norm(norm, relative, absolute):
    """A row's share of the upper bound."""
    return norm * (1.0 + relative) + absolute


@triton.jit(do_not_specialize=["rows", "step"])
def _shift(
    x_ptr, shift_ptr, stride_x, rows, step, features, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    # the mean of every `step`-th row, without components of 1e18 or more
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.arange(0, BLOCK) * step
    mask = (at < rows)[:, None] & (column < features)[None, :]
    value = tl.load(
        x_ptr + at.to(tl.int64)[:, None] * stride_x + column[None, :], mask=mask, other=0.0
    )
    value = value.to(tl.float32)
    value = tl.where(tl.abs(value) < 1e18, value, 0.0)
    mean = tl.sum(value, axis=0) / tl.cdiv(rows, step).to(tl.float32)
    tl.store(shift_ptr + column, mean, mask=column < features)


@triton.jit
def _as_bfloat16(value):
    # rounded to 8 bits, still a float32; not for NaN or numbers beyond LARGEST_NORM
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "places"])
def _arrange(
    x_ptr, labels_ptr, shift_ptr, order_ptr, places_ptr, first_ptr, last_ptr, norms_ptr, high_ptr,
    low_ptr, halves_ptr, stride_x, stride_labels, stride_high, rows, places, features, relative,
    absolute, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Each row's place and its identity's range of places, by counting; then the centered row there.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, exists = row < rows, row < places
    label = tl.load(labels_ptr + row.to(tl.int64) * stride_labels, mask=inside, other=0)
    counts = tl.zeros([ROWS], tl.int32)  # smaller labels
    twins = tl.zeros([ROWS], tl.int32)  # equal ones
    earlier = tl.zeros([ROWS], tl.int32)  # equal ones in rows before
    for begin in range(0, rows, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        there = (other < rows)[None, :]
        theirs = tl.load(
            labels_ptr + other.to(tl.int64) * stride_labels, mask=other < rows, other=0
        )
        same = there & (theirs[None, :] == label[:, None])
        counts += tl.sum((there & (theirs[None, :] < label[:, None])).to(tl.int32), axis=1)
        twins += tl.sum(same.to(tl.int32), axis=1)
        earlier += tl.sum((same & (other[None, :] < row[:, None])).to(tl.int32), axis=1)
    place = tl.where(inside, counts + earlier, row)  # rows that fill the last tile stay last
    tl.store(order_ptr + place, tl.where(inside, row, 0), mask=exists)
    tl.store(places_ptr + row, place, mask=inside)
    tl.store(first_ptr + place, tl.where(inside, counts, rows), mask=exists)
    tl.store(last_ptr + place, tl.where(inside, counts + twins, rows), mask=exists)

    own_ptr = x_ptr + row.to(tl.int64)[:, None] * stride_x
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in range(0, features, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (column < features)[None, :]
        value = tl.load(own_ptr + column[None, :], mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < features, other=0.0)
        value = tl.where(mask, value - shift[None, :], 0.0)
        squares += value * value
    norm = tl.sum(squares, axis=1)
    is_usable = norm <= LARGEST_NORM  # not for NaN
    norm = tl.where(is_usable, norm, INF)
    tl.store(norms_ptr + place, norm, mask=exists)
    if halves_ptr is not None:  # what a product starts at; never chosen past the end
        half = tl.where(inside, -0.5 * lower_norm(norm, relative, absolute), -INF)
        tl.store(halves_ptr + place, half, mask=exists)
    for begin in range(0, stride_high, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (column < features)[None, :]
        value = tl.load(own_ptr + column[None, :], mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < features, other=0.0)
        value = tl.where(mask & is_usable[:, None], value - shift[None, :], 0.0)
        at = place.to(tl.int64)[:, None] * stride_high + column[None, :]
        fits = exists[:, None] & (column < stride_high)[None, :]
        if low_ptr is None:
            tl.store(high_ptr + at, value, mask=fits)
        else:
            high = _as_bfloat16(value)
            low = _as_bfloat16(value - high)
            tl.store(high_ptr + at, high.to(high_ptr.dtype.element_ty), mask=fits)
            tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=fits)


@dataclass(frozen=True)
class Batch:
    """A batch sorted by identity: N rows, D features, and P places, N or more."""

    x: Tensor  # (N, D) as given, columns side by side
    order: Tensor  # (P,) int32: the row at each place
    places: Tensor  # (N,) int32: the place of each row
    first: Tensor  # (P,) int32: where the place's identity begins
    last: Tensor  # (P,) int32: where it ends
    norms: Tensor  # (P,) float32: squared, of the centered rows by place
    centered: Tensor  # (P, D) float32; of `planes` the leading 8 bits


@dataclass(frozen=True)
class Planes:
    """Centered rows for a tiled product: whole tiles, as two bfloat16 numbers each."""

    low: Tensor  # (P, D in whole blocks): the next 8 bits of `centered`
    halves: Tensor  # (P,) float32: minus half of lower_norm


def all_registers() -> dict[str, int]:
    """The option of a kernel that may use every register a thread can have: left alone, NVIDIA's
    assembler spills a few of them so that more programs fit. AMD's has no such option."""
    return {} if torch.version.hip else {"maxnreg": 255}


def block_of_features(features: int) -> int:
    """Columns that a program reads of a row at a time."""
    return min(512, triton.next_power_of_2(features))


def arrange(embeddings: Tensor, labels: Tensor) -> Batch:
    """The batch sorted by identity and centered, in float32."""
    count, features = embeddings.shape
    centered = torch.empty((count, features), dtype=torch.float32, device=embeddings.device)
    return _sort(embeddings, labels, centered, None, None, (0.0, 0.0))


def arrange_planes(
    embeddings: Tensor, labels: Tensor, tile: int, columns: int, errors: tuple[float, float]
) -> tuple[Batch, Planes]:
    """The same with places in whole tiles, columns in whole blocks, and two bfloat16 planes.

    errors: e and f of lower_norm.
    """
    (count, features), device = embeddings.shape, embeddings.device
    # the interpreter multiplies bfloat16 as if it were integers; the numbers are the same
    dtype = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16
    shape = (triton.cdiv(count, tile) * tile, triton.cdiv(features, columns) * columns)
    high, low = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    halves = torch.empty(shape[0], dtype=torch.float32, device=device)
    return _sort(embeddings, labels, high, low, halves, errors), Planes(low, halves)


def _sort(
    embeddings: Tensor,
    labels: Tensor,
    centered: Tensor,
    low: Tensor | None,
    halves: Tensor | None,
    errors: tuple[float, float],
) -> Batch:
    x = embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()
    (count, features), (padded, width), device = x.shape, centered.shape, x.device

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    norms, shift = (
        torch.empty(size, dtype=torch.float32, device=device) for size in (padded, features)
    )
    batch = Batch(
        x, integers(padded), integers(count), integers(padded), integers(padded), norms, centered
    )
    narrow = min(32, triton.next_power_of_2(features))
    sample = min(SHIFT_ROWS, triton.next_power_of_2(count))
    common.launch(
        _shift, (triton.cdiv(features, narrow),), x, shift, x.stride(0), count,
        triton.cdiv(count, sample), features, BLOCK=sample, BLOCK_D=narrow, num_warps=8,
    )  # fmt: skip
    block = 16 if padded > 1024 else 4  # labels are read once a block; small batches fill the chip
    common.launch(
        _arrange, (triton.cdiv(padded, block),), x, labels, shift, batch.order, batch.places,
        batch.first, batch.last, norms, centered, low, halves, x.stride(0), labels.stride(0), width,
        count, padded, features, *errors, ROWS=block, BLOCK=min(256, triton.next_power_of_2(count)),
        BLOCK_D=min(128, block_of_features(width)), num_warps=4,
    )  # fmt: skip
    return batch
