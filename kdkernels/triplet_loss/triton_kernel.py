"""triplet_loss in Triton.

A program takes a few whole rows: it loads the three members once, keeps a - p and a - n in
registers, and forms the three gradients from them, so memory sees three reads and three writes. A
second launch of one program adds up the programs' sums in a fixed order. One launch would need a
counter that is zero before it starts. Zeroing it is a launch as well, and one that outlives the
call would lie in whatever memory pool is current, which CUDA graph trees rewind.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.triplet_loss.triton_row import LARGEST_HALF, is_half, triplets

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
    partial_ptr,  # a sum per program, then three largest sizes per program where MEASURE
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
    power,  # of two, that float16 gradients are stored times
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
        (power, power, power),
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
        for member in tl.static_range(3):
            at = (member + 1) * tl.num_programs(0) + program
            tl.store(partial_ptr + at, tl.max(largest[member], axis=0))
    elif program == 0:
        tl.store(post_scale_ptr, 1.0 / power if is_half(grad_anchor_ptr) else 1.0)
        tl.store(post_scale_ptr + 1, 1.0 / power if is_half(grad_positive_ptr) else 1.0)
        tl.store(post_scale_ptr + 2, 1.0 / power if is_half(grad_negative_ptr) else 1.0)


@triton.jit(do_not_specialize=["programs"])
def _finish(
    loss_ptr,
    partial_ptr,
    post_scale_ptr,
    again_ptr,
    programs,
    divisor,
    power,
    PER_ROW: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The loss in the order of the programs. again: the power that each member's gradient is stored
    # times, and then whether some member needs another one than `power`.
    if not PER_ROW:
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, programs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            acc += tl.load(partial_ptr + at, mask=at < programs, other=0.0)
        tl.store(loss_ptr, tl.div_rn(tl.sum(acc, axis=0), divisor))
    if MEASURE:
        again = 0.0
        for member in tl.static_range(3):
            largest = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, programs, BLOCK):
                at = start + tl.arange(0, BLOCK)
                place = (member + 1) * programs + at
                size = tl.load(partial_ptr + place, mask=at < programs, other=0.0)
                largest = tl.maximum(largest, size)
            most = tl.max(largest, axis=0)
            # 0 where the member is not stored in float16: it stays as it is
            fits = (most == 0.0) | ((most * power <= LARGEST_HALF) & (most * power >= 1.0))
            own = tl.where(fits, power, common.power_for_half(most))
            tl.store(again_ptr + member, own)
            tl.store(post_scale_ptr + member, tl.where(most == 0.0, 1.0, 1.0 / own))
            again = tl.where(fits, again, 1.0)
        tl.store(again_ptr + 3, again)


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
    scale,
    ONE_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.load(again_ptr + 3) > 0.0:
        powers = (tl.load(again_ptr), tl.load(again_ptr + 1), tl.load(again_ptr + 2))
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
            powers,
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
    # member's gradients[i] *= incoming[i // features] * post_scale[member]
    anchor = tl.load(post_scale_ptr)
    positive = tl.load(post_scale_ptr + 1)
    negative = tl.load(post_scale_ptr + 2)
    if not PER_ROW:
        arrives = tl.load(incoming_ptr).to(tl.float32)
        anchor *= arrives
        positive *= arrives
        negative *= arrives
    # Numbers of 1 leave everything as it is: then no byte of the gradients moves.
    if PER_ROW or anchor != 1.0 or positive != 1.0 or negative != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, elements, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < elements
            if PER_ROW:
                row = tl.where(inside, at, 0) // features
                arriving = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
            else:
                arriving = 1.0
            if start + BLOCK <= elements:  # unmasked accesses are wide ones
                _scale(grad_anchor_ptr, at, None, arriving * anchor)
                _scale(grad_positive_ptr, at, None, arriving * positive)
                _scale(grad_negative_ptr, at, None, arriving * negative)
            else:
                _scale(grad_anchor_ptr, at, inside, arriving * anchor)
                _scale(grad_positive_ptr, at, inside, arriving * positive)
                _scale(grad_negative_ptr, at, inside, arriving * negative)


ELEMENTS = (
    2048  # of a member in a program of four warps: 16 per thread, 32 registers of differences
)
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
    unless a member's largest gradient is far from what its power suits."""
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
        return loss, gradients[0], gradients[1], gradients[2], torch.ones(3, **floats)
    loss = torch.empty((count,) if per_row else (), **floats)
    post_scale = torch.empty(3, **floats)

    divisor = float(count) if reduction == "mean" else 1.0
    half = any(g.dtype == torch.float16 and g.numel() > 0 for g in gradients)
    measure = half and squared
    scale = 1.0 / divisor
    power = 1.0
    if half:
        # Without a power the mean's 1/n would flush to zero. A root's gradient is at most 2. For
        # squares the power suits differences from 2^-10 to 31; where a member's largest one is
        # outside, all are formed again, the member with a power of its own.
        power = 2.0 ** ((10 if squared else 14) + math.floor(math.log2(divisor)))
    members = tuple(t if t.stride(1) == 1 or features == 1 else t.contiguous() for t in members)
    tile = _tile(features)
    programs = triton.cdiv(count, int(tile["ROWS"]))
    unit = _unit(members, gradients)
    partial = torch.empty((4 if measure else 1) * programs, **floats)
    again = torch.empty(4, **floats)
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
            power,
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
                power,
                PER_ROW=per_row,
                MEASURE=measure,
                BLOCK=min(8192, max(1024, triton.next_power_of_2(programs))),
                num_warps=8,
            )
        if measure:
            common.launch(_again, (programs,), *pointers, again, *sizes, scale, **options)
    return loss, gradients[0], gradients[1], gradients[2], post_scale


def triplet_give_(gradients: list[Tensor], incoming: Tensor, post_scale: Tensor) -> None:
    """All gradients times the incoming one (0-d, or one per row) and their own `post_scale`, in
    place; one launch, which moves nothing where all are 1."""
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
