"""Gradients of batch_triplet_loss in Triton, without atomics: every row gathers what is its own.

For "hard" a row looks through all anchors for those that chose it, in their order. For "semihard"
and "all" the gradient is sum_j S_ij (x_i - x_j) with S = W + W^T, by a matrix product: a kernel
forms S, takes out the pairs that are too close for it and adds them by their differences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.batch_triplet_loss.triton_mining import (
    BATCH,
    CLOSE_SHARE,
    MOST_BLOCK,
    take,
)
from kdkernels.batch_triplet_loss.triton_sort import Batch, all_registers, block_of_features

LINES = 8  # rows of a spreading program: 32 bytes, what memory moves, of a line of W^T
SPREAD_BLOCK = 128


@triton.jit(do_not_specialize=["rows"])
def _add_up(
    totals_ptr, loss_ptr, factor_ptr, scale_ptr, rows, MEAN: tl.constexpr, NONZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # the loss, and 1 / divisor, which the gradient is multiplied by
    loss, triplets, active = (tl.zeros([BLOCK], tl.float64),) * 3
    for begin in range(0, rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < rows
        loss += tl.load(totals_ptr + at, mask=inside, other=0.0)
        triplets += tl.load(totals_ptr + rows + at, mask=inside, other=0.0)
        active += tl.load(totals_ptr + 2 * rows + at, mask=inside, other=0.0)
    divisor = tl.full([], 1.0, tl.float64)
    if MEAN:
        divisor = tl.maximum(tl.sum(triplets, axis=0), 1.0)
    if NONZERO:
        divisor = tl.maximum(tl.sum(active, axis=0), 1.0)
    tl.store(loss_ptr, (tl.sum(loss, axis=0) / divisor).to(tl.float32))
    tl.store(factor_ptr, (1.0 / divisor).to(tl.float32))
    tl.store(scale_ptr, 1.0)


@triton.jit(do_not_specialize=["rows"])
def _gather(
    x_ptr, partners_ptr, slopes_ptr, weights_ptr, gradient_ptr, stride_x, stride_weights, rows,
    features, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    # Row i's own triplet, then the anchors that chose i. weights: one an anchor, or stride 0.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < features
    own = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.zeros([BLOCK_D], tl.float32)
    weight = tl.load(weights_ptr + row * stride_weights).to(tl.float32)
    for member in tl.static_range(2):
        partner = tl.load(partners_ptr + member * rows + row)
        if partner >= 0:
            coefficient = tl.load(slopes_ptr + member * rows + row) * weight
            other = tl.load(x_ptr + partner.to(tl.int64) * stride_x + column, mask=mask, other=0.0)
            gradient += coefficient * (own - other.to(tl.float32))
    for begin in range(0, rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        positive = tl.load(partners_ptr + at, mask=at < rows, other=-1)
        negative = tl.load(partners_ptr + rows + at, mask=at < rows, other=-1)
        chosen = (positive == row) | (negative == row)
        number = tl.sum(chosen.to(tl.int32), axis=0)
        if number > 0:
            rank = tl.cumsum(chosen.to(tl.int32), axis=0)
            for done in range(0, number, BATCH):
                inside = tl.arange(0, BATCH) < number - done
                anchors = take(chosen, rank, at, done, BATCH)
                is_positive = tl.load(partners_ptr + anchors, mask=inside, other=-1) == row
                slope = tl.load(
                    slopes_ptr + anchors + tl.where(is_positive, 0, rows), mask=inside, other=0.0
                )
                anchors = anchors.to(tl.int64)
                theirs = tl.load(weights_ptr + anchors * stride_weights, mask=inside, other=0.0)
                factor = slope * theirs.to(tl.float32)
                there = inside[:, None] & mask[None, :]
                other_ptr = x_ptr + anchors[:, None] * stride_x + column[None, :]
                chooser = tl.load(other_ptr, mask=there, other=0.0).to(tl.float32)
                step = factor[:, None] * (own[None, :] - chooser)
                gradient += tl.sum(tl.where(there, step, 0.0), axis=0)
    value = gradient.to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + row * features + column, value, mask=mask)


@triton.jit
def _weight(weights_ptr, order_ptr, stride_weights, place, mask):
    if weights_ptr is None:
        return tl.where(mask, 1.0, 0.0)
    else:
        row = tl.load(order_ptr + place, mask=mask, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + row * stride_weights, mask=mask, other=0.0)
        return weight.to(tl.float32)


@triton.jit
def _coefficients(
    coefficients_ptr, stride, line, column, line_weight, column_weight, mask,
    OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    # S at lines x columns: own anchors' part of it, other anchors' part, or both
    total = tl.zeros([line.shape[0], column.shape[0]], tl.float32)
    if OWN:
        at = line.to(tl.int64)[:, None] * stride + column[None, :]
        own = tl.load(coefficients_ptr + at, mask=mask, other=0.0)
        total += tl.where(own != 0.0, own * line_weight[:, None], 0.0)
    if OTHERS:
        at = column.to(tl.int64)[None, :] * stride + line[:, None]
        other = tl.load(coefficients_ptr + at, mask=mask, other=0.0)
        total += tl.where(other != 0.0, other * column_weight[None, :], 0.0)
    return total


@triton.jit
def _is_close(gram_ptr, stride, line, column, line_norm, column_norm, mask, OWN: tl.constexpr):
    # also where a norm is inf
    if OWN:
        at = line.to(tl.int64)[:, None] * stride + column[None, :]
    else:
        at = column.to(tl.int64)[None, :] * stride + line[:, None]
    norm = line_norm[:, None] + column_norm[None, :]
    distance = norm - 2.0 * tl.load(gram_ptr + at, mask=mask, other=0.0)
    return ~(distance > norm * CLOSE_SHARE) & mask


@triton.jit(do_not_specialize=["lines", "columns", "first_line", "first_column"])
def _spread(
    x_ptr, centered_ptr, gram_ptr, coefficients_ptr, norms_ptr, order_ptr, weights_ptr,
    gradient_ptr, stride_x, stride_gram, stride_weights, lines, columns, first_line, first_column,
    features, OWN: tl.constexpr, OTHERS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    # Adds to the gradient of a few places all but - S X, and with OWN leaves S in place of G.
    # A line of S is a place's; with OWN a line of G and W too, without it a column of them.
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    is_line = line < lines
    line_norm = tl.load(norms_ptr + first_line + line, mask=is_line, other=0.0)
    line_weight = _weight(weights_ptr, order_ptr, stride_weights, first_line + line, is_line)
    line_row = tl.load(order_ptr + first_line + line, mask=is_line, other=0).to(tl.int64)
    place = (first_line + line).to(tl.int64)
    diagonal = tl.zeros([LINES], tl.float64)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_column = column < columns
        mask = is_line[:, None] & is_column[None, :]
        norm = tl.load(norms_ptr + first_column + column, mask=is_column, other=0.0)
        weight = _weight(weights_ptr, order_ptr, stride_weights, first_column + column, is_column)
        total = _coefficients(
            coefficients_ptr, stride_gram, line, column, line_weight, weight, mask, OWN, OTHERS
        )
        close = _is_close(gram_ptr, stride_gram, line, column, line_norm, norm, mask, OWN)
        apart = tl.where(close, 0.0, total)
        diagonal += tl.sum(apart, axis=1).to(tl.float64)
        by_hand = close & (total != 0.0)
        candidates = tl.max(by_hand.to(tl.int32), axis=0) > 0
        number = tl.sum(candidates.to(tl.int32), axis=0)
        if number > 0:
            rank = tl.cumsum(candidates.to(tl.int32), axis=0)
            for done in range(0, number, BATCH):
                inside = tl.arange(0, BATCH) < number - done
                some = take(candidates, rank, column, done, BATCH)
                these = is_line[:, None] & inside[None, :]
                some_norm = tl.load(norms_ptr + first_column + some, mask=inside, other=0.0)
                some_weight = _weight(
                    weights_ptr, order_ptr, stride_weights, first_column + some, inside
                )
                coefficient = _coefficients(
                    coefficients_ptr, stride_gram, line, some, line_weight, some_weight, these,
                    OWN, OTHERS,
                )  # fmt: skip
                near = _is_close(
                    gram_ptr, stride_gram, line, some, line_norm, some_norm, these, OWN
                )
                coefficient = tl.where(near, coefficient, 0.0)
                row = tl.load(order_ptr + first_column + some, mask=inside, other=0).to(tl.int64)
                for start in range(0, features, BLOCK_D):
                    k = start + tl.arange(0, BLOCK_D)
                    fits = k < features
                    here = is_line[:, None] & fits[None, :]
                    own = tl.load(
                        x_ptr + line_row[:, None] * stride_x + k[None, :], mask=here, other=0.0
                    ).to(tl.float32)
                    other = tl.load(
                        x_ptr + row[:, None] * stride_x + k[None, :],
                        mask=inside[:, None] & fits[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    step = coefficient[:, :, None] * (own[:, None, :] - other[None, :, :])
                    step = tl.where(coefficient[:, :, None] != 0.0, step, 0.0)
                    sum_ptr = gradient_ptr + place[:, None] * features + k[None, :]
                    sum_now = tl.load(sum_ptr, mask=here, other=0.0)
                    tl.store(sum_ptr, sum_now + tl.sum(step, axis=1), mask=here)
        if OWN:
            tl.debug_barrier()  # G is read to the end before S takes its place
            at = line.to(tl.int64)[:, None] * stride_gram + column[None, :]
            tl.store(gram_ptr + at, apart, mask=mask)
    tl.debug_barrier()
    scale = diagonal.to(tl.float32)
    for start in range(0, features, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        here = is_line[:, None] & (k < features)[None, :]
        at = place[:, None] * features + k[None, :]
        centered = tl.load(centered_ptr + at, mask=here, other=0.0)
        sum_now = tl.load(gradient_ptr + at, mask=here, other=0.0)
        tl.store(gradient_ptr + at, sum_now + scale[:, None] * centered, mask=here)


@triton.jit
def _largest(gradient_ptr, largest_ptr, elements, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cast((tl.cast(elements, tl.int64) + BLOCK - 1) // BLOCK, tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(gradient_ptr + at, mask=at < elements, other=0.0))
        largest = tl.maximum(largest, tl.where(value < float("inf"), value, 0.0))
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["programs"])
def _narrow(
    sums_ptr, order_ptr, factor_ptr, largest_ptr, gradient_ptr, scale_ptr, programs, features,
    PROGRAMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # A line of the gradient to its row, times `factor`. For float16 also times the power of two
    # that brings the largest number near the end of its range: small ones would be flushed to zero.
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < features
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place).to(tl.int64)
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    if largest_ptr is not None:
        lane = tl.arange(0, PROGRAMS)
        largest = tl.max(tl.load(largest_ptr + lane, mask=lane < programs, other=0.0), axis=0)
        exponent = ((largest * factor).to(tl.int32, bitcast=True) >> 23) - 126  # of [1/2, 1) 2^e
        exponent = tl.where(largest * factor > 0.0, 15 - exponent, 0)
        exponent = tl.minimum(tl.maximum(exponent, -100), 100)
        factor *= ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        if (place == 0) & (tl.program_id(1) == 0):
            tl.store(scale_ptr, ((127 - exponent) << 23).to(tl.float32, bitcast=True))
    value = tl.load(sums_ptr + place * features + column, mask=mask, other=0.0) * factor
    value = value.to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + row * features + column, value, mask=mask)


def add_up(totals: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, 1 / divisor and a scale of 1, 0-d each, from (3, N) sums of anchors, in order."""
    loss, factor, scale = (
        torch.empty((), dtype=torch.float32, device=totals.device) for _ in range(3)
    )
    count = totals.shape[1]
    common.launch(
        _add_up, (1,), totals, loss, factor, scale, count, MEAN=reduction == "mean",
        NONZERO=reduction == "nonzero", BLOCK=min(1024, triton.next_power_of_2(count)),
        num_warps=8,
    )  # fmt: skip
    return loss, factor, scale


def gather_hard(
    x: Tensor, partners: Tensor, slopes: Tensor, weights: Tensor, scale: Tensor | None
) -> Tensor:
    """The gradient of "hard" in x's dtype. weights: (N,) or 0-d, of the anchors. With `scale`
    float16 is stored times a power of two, which it receives the inverse of."""
    count, features = x.shape
    in_two_steps = x.dtype == torch.float16 and scale is not None
    dtype = torch.float32 if in_two_steps else x.dtype
    gradient = torch.empty((count, features), dtype=dtype, device=x.device)
    block_d = block_of_features(features)
    block = min(MOST_BLOCK, triton.next_power_of_2(count))
    common.launch(
        _gather, (count, triton.cdiv(features, block_d)), x, partners, slopes, weights, gradient,
        x.stride(0), weights.stride(0) if weights.dim() else 0, count, features, BLOCK=block,
        BLOCK_D=block_d, BATCH=BATCH, num_warps=4, **all_registers(),
    )  # fmt: skip
    return narrow(gradient, x.dtype, None, None, scale) if in_two_steps else gradient


def spread(
    batch: Batch,
    gram: Tensor,
    coefficients: Tensor,
    begin: int,
    weights: Tensor | None,
    gradient: Tensor,
) -> None:
    """Adds what the anchors at places [begin, begin + len(gram)) put into the gradient.

    gradient: (N, D) float32, by place. gram and coefficients: the anchors' lines of G and W; gram
    is overwritten. weights: (N,) by row, None for 1.
    """
    (count, features), lines = batch.x.shape, len(gram)
    line_stride = 0 if weights is None else weights.stride(0)

    def launch(first_line: int, lines: int, first_column: int, columns: int, **parts: bool) -> None:
        common.launch(
            _spread, (triton.cdiv(lines, LINES),), batch.x, batch.centered, gram, coefficients,
            batch.norms, batch.order, weights, gradient, batch.x.stride(0), gram.stride(0),
            line_stride, lines, columns, first_line, first_column, features, **parts, LINES=LINES,
            BLOCK=min(SPREAD_BLOCK, triton.next_power_of_2(columns)),
            BLOCK_D=min(64, block_of_features(features)), BATCH=BATCH, num_warps=4,
            **all_registers(),
        )  # fmt: skip

    some = slice(begin, begin + lines)
    if lines == count:
        launch(0, count, 0, count, OWN=True, OTHERS=True)
        gradient.addmm_(gram, batch.centered, alpha=-1)
        return
    launch(0, count, begin, lines, OWN=False, OTHERS=True)
    launch(begin, lines, 0, count, OWN=True, OTHERS=False)
    gradient[some].addmm_(gram, batch.centered, alpha=-1)
    gradient.addmm_(gram.t(), batch.centered[some], alpha=-1)


def narrow(
    sums: Tensor,
    dtype: torch.dtype,
    order: Tensor | None,
    factor: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """(N, D) float32 sums by place as the gradient by row, times `factor`; `scale` as in
    gather_hard."""
    count, features = sums.shape
    largest, programs = None, 1
    if dtype == torch.float16 and scale is not None:
        block = 4096
        programs = triton.cdiv(sums.numel(), block)
        programs = min(programs, 2 * common.multiprocessors(sums.device))
        largest = torch.empty(programs, dtype=torch.float32, device=sums.device)
        common.launch(
            _largest, (programs,), sums, largest, sums.numel(), BLOCK=block, num_warps=8
        )  # fmt: skip
    gradient = torch.empty((count, features), dtype=dtype, device=sums.device)
    block_d = block_of_features(features)
    common.launch(
        _narrow, (count, triton.cdiv(features, block_d)), sums, order, factor, largest, gradient,
        scale, programs, features, PROGRAMS=triton.next_power_of_2(programs), BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    return gradient
