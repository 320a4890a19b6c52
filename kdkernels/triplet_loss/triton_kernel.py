"""triplet_loss in Triton.

A program takes a few whole rows: it loads the three members once, keeps a - p and a - n in
registers, and forms the three gradients from them, so memory sees three reads and three writes. A
second launch of one program adds up the programs' sums in a fixed order. One launch would need a
counter that is zero before it starts. Zeroing it is a launch as well, and one that outlives the
call would lie in whatever memory pool is current, which CUDA graph trees rewind.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.triplet_loss.triton_row import LARGEST_HALF, triplets

# Sizes and strides vary from call to call; the pointers' alignment is UNIT's business.
_VARYING = [
    *("anchor_ptr", "positive_ptr", "negative_ptr"),
    *("grad_anchor_ptr", "grad_positive_ptr", "grad_negative_ptr"),
    *("stride_anchor", "stride_positive", "stride_negative", "count", "features", "active_at_zero"),
]


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    grad_anchor_ptr,
    grad_positive_ptr,
    grad_negative_ptr,
    loss_ptr,  # (N,) where PER_ROW
    partial_ptr,  # a sum a program, then a largest size a program where MEASURE
    post_scale_ptr,
    stride_anchor,
    stride_positive,
    stride_negative,
    count,
    features,
    margin,
    eps,
    active_at_zero,
    scale,
    post_scale,
    SQUARED: tl.constexpr,
    PER_ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    MEASURE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    loss, largest = triplets(
        anchor_ptr,
        positive_ptr,
        negative_ptr,
        grad_anchor_ptr,
        grad_positive_ptr,
        grad_negative_ptr,
        stride_anchor,
        stride_positive,
        stride_negative,
        program * ROWS,
        count,
        features,
        margin,
        eps,
        active_at_zero,
        scale,
        SQUARED,
        GRADIENT,
        MEASURE,
        ONE_TILE,
        UNIT,
        ROWS,
        BLOCK_D,
    )
    if PER_ROW:
        row = program * ROWS + tl.arange(0, ROWS)
        tl.store(loss_ptr + row, loss, mask=row < count)
    else:
        tl.store(partial_ptr + program, tl.sum(loss, axis=0))
    if MEASURE:
        tl.store(partial_ptr + tl.num_programs(0) + program, tl.max(largest, axis=0))
    elif program == 0:
        tl.store(post_scale_ptr, post_scale)


@triton.jit(do_not_specialize=["programs"])
def _finish(
    loss_ptr,
    partial_ptr,
    post_scale_ptr,
    again_ptr,
    programs,
    divisor,
    scale,
    PER_ROW: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The loss in the order of the programs. Where the float16 gradients outgrew `scale`, the scale
    # to form them again with; else 0.
    acc = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < programs
        if not PER_ROW:
            acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
        if MEASURE:
            size = tl.load(partial_ptr + programs + at, mask=mask, other=0.0)
            largest = tl.maximum(largest, size)
    if not PER_ROW:
        tl.store(loss_ptr, tl.div_rn(tl.sum(acc, axis=0), divisor))
    if MEASURE:
        most = tl.max(largest, axis=0)
        outgrown = most > LARGEST_HALF
        bits = tl.where(outgrown, most / 32768.0, 1.0).to(tl.int32, bitcast=True)
        power = (254 << 23) - (bits & (255 << 23))  # 2^-floor(log2(most / 2^15))
        smaller = scale * 0.5 * power.to(tl.float32, bitcast=True)
        tl.store(again_ptr, tl.where(outgrown, smaller, 0.0))
        stored = tl.where(outgrown, smaller, scale)
        tl.store(post_scale_ptr, tl.div_rn(1.0, stored * divisor))


@triton.jit(do_not_specialize=_VARYING)
def _again(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    grad_anchor_ptr,
    grad_positive_ptr,
    grad_negative_ptr,
    again_ptr,
    stride_anchor,
    stride_positive,
    stride_negative,
    count,
    features,
    margin,
    eps,
    active_at_zero,
    ONE_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    scale = tl.load(again_ptr)
    if scale > 0.0:
        triplets(
            anchor_ptr,
            positive_ptr,
            negative_ptr,
            grad_anchor_ptr,
            grad_positive_ptr,
            grad_negative_ptr,
            stride_anchor,
            stride_positive,
            stride_negative,
            tl.program_id(0) * ROWS,
            count,
            features,
            margin,
            eps,
            active_at_zero,
            scale,
            True,
            True,
            False,
            ONE_TILE,
            UNIT,
            ROWS,
            BLOCK_D,
        )


@triton.jit
def _scale(gradient_ptr, at, mask, factor):
    if gradient_ptr is not None:
        value = tl.load(gradient_ptr + at, mask=mask).to(tl.float32)
        tl.store(gradient_ptr + at, (value * factor).to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["incoming_stride", "elements", "features"])
def _give(
    grad_anchor_ptr,
    grad_positive_ptr,
    grad_negative_ptr,
    incoming_ptr,
    post_scale_ptr,
    incoming_stride,
    elements,
    features,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # gradients[i] *= incoming[i // features] * post_scale
    factor = tl.load(post_scale_ptr)
    if not PER_ROW:
        factor *= tl.load(incoming_ptr).to(tl.float32)
    # A number of 1 leaves everything as it is: then no byte of the gradients moves.
    if PER_ROW or factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, elements, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < elements
            if PER_ROW:
                row = tl.where(inside, at, 0) // features
                factors = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32) * factor
            else:
                factors = factor
            if start + BLOCK <= elements:  # unmasked accesses are wide ones
                _scale(grad_anchor_ptr, at, None, factors)
                _scale(grad_positive_ptr, at, None, factors)
                _scale(grad_negative_ptr, at, None, factors)
            else:
                _scale(grad_anchor_ptr, at, inside, factors)
                _scale(grad_positive_ptr, at, inside, factors)
                _scale(grad_negative_ptr, at, inside, factors)


ELEMENTS = 2048  # of a member in a program of four warps: 16 a thread, 32 registers of differences
WIDEST_TILE = 8192  # features that stay in registers (16 warps); more are read a second time


def _tile(features: int) -> dict[str, int | bool]:
    """Rows and features of a program, and its warps: counted, not measured."""
    block = max(16, triton.next_power_of_2(features))
    one_tile = block <= WIDEST_TILE
    if not one_tile:
        block = WIDEST_TILE // 2
    warps = max(4, block // 512)
    return {
        "ONE_TILE": one_tile,
        "ROWS": max(1, ELEMENTS // block),
        "BLOCK_D": block,
        "num_warps": warps,
    }


def _unit(members: tuple[Tensor, ...], gradients: list[Tensor]) -> int:
    """Elements of a 16-byte access if every row of every tensor starts on 16 bytes, else 1."""
    unit = 16 // min(t.itemsize for t in members)
    even = members[0].shape[1] % unit == 0
    even = even and all(t.stride(0) % unit == 0 for t in members)
    return unit if even and all(t.data_ptr() % 16 == 0 for t in (*members, *gradients)) else 1


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    squared: bool,
    eps: float,
    active_at_zero: bool,
    reduction: str,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op: loss, three gradients, post_scale. A member whose columns are not next to each
    other is copied; rows may lie anywhere. float16 gradients: one launch more, which leaves at once
    unless a gradient outgrew its scale."""
    members = (anchor, positive, negative)
    count, features = anchor.shape
    gradients = [
        torch.empty((count, features) if want else (0,), dtype=t.dtype, device=t.device)
        for t, want in zip(members, wanted, strict=True)
    ]
    floats = {"dtype": torch.float32, "device": anchor.device}
    per_row = reduction == "none"
    if count == 0:
        loss = torch.zeros((0,) if per_row else (), **floats)
        return loss, gradients[0], gradients[1], gradients[2], torch.ones((), **floats)
    loss = torch.empty((count,) if per_row else (), **floats)
    post_scale = torch.empty((), **floats)

    divisor = float(count) if reduction == "mean" else 1.0
    half = any(g.dtype == torch.float16 and g.numel() > 0 for g in gradients)
    measure = half and squared
    scale = 1.0 / divisor
    if half:
        # A power of two without the mean's 1/n, which would flush to zero. A root's gradient is at
        # most 2. A square's keeps every difference of two float16 numbers at 2^10, up to 64; where
        # one is larger, all are formed again with a smaller power.
        scale = 2.0**10 if squared else 2.0**14
    members = tuple(t if t.stride(1) == 1 or features == 1 else t.contiguous() for t in members)
    tile = _tile(features)
    programs = triton.cdiv(count, int(tile["ROWS"]))
    unit = _unit(members, gradients)
    partial = torch.empty((2 if measure else 1) * programs, **floats)
    again = torch.empty((), **floats)
    pointers = (*members, *(g if g.numel() else None for g in gradients))
    sizes = (*(t.stride(0) // unit for t in members), count, features // unit)
    sizes = (*sizes, margin, eps, int(active_at_zero))
    options = {"UNIT": unit, **tile}
    with common.on(anchor, "triplet_loss"):
        common.launch(
            _forward,
            (programs,),
            *pointers,
            loss,
            partial,
            post_scale,
            *sizes,
            scale,
            1.0 / (scale * divisor) if half else 1.0,
            SQUARED=squared,
            PER_ROW=per_row,
            GRADIENT=any(wanted),
            MEASURE=measure,
            **options,
        )
        if measure or not per_row:
            common.launch(
                _finish,
                (1,),
                loss,
                partial,
                post_scale,
                again,
                programs,
                divisor,
                scale,
                PER_ROW=per_row,
                MEASURE=measure,
                BLOCK=min(8192, max(1024, triton.next_power_of_2(programs))),
                num_warps=8,
            )
        if measure:
            common.launch(_again, (programs,), *pointers, again, *sizes, **options)
    return loss, gradients[0], gradients[1], gradients[2], post_scale


def triplet_give_(gradients: list[Tensor], incoming: Tensor, post_scale: Tensor) -> None:
    """All gradients times the incoming one (0-d, or one a row) and `post_scale`, in place; one
    launch, which moves nothing where both are 1."""
    given = [g for g in gradients if g.numel() > 0]
    if not given:
        return
    assert all(g.is_contiguous() for g in given)
    per_row = incoming.dim() > 0
    elements, block = given[0].numel(), 2048
    programs = min(triton.cdiv(elements, block), 8 * common.multiprocessors(given[0].device))
    with common.on(given[0], "triplet_loss"):
        common.launch(
            _give,
            (programs,),
            *(g if g.numel() else None for g in gradients),
            incoming,
            post_scale,
            incoming.stride(0) if per_row else 0,
            elements,
            given[0].shape[1],
            PER_ROW=per_row,
            BLOCK=block,
            num_warps=4,
        )
