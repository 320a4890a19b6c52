"""hidden_l2 in Triton.

All pairs are cut into chunks of 16,384 elements, one program each; a program finds its pair in the
table of triton_table.py. Sums are stored per chunk and added in the order of the chunks by a second
launch, so neither the place of a pair in the list nor the GPU changes the bits of its term.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.hidden_l2 import triton_table as tables
from kdkernels.hidden_l2.triton_chunk import (
    CHUNK,
    ELEMENTS,
    INF,
    LARGEST_HALF,
    PLACE,
    SCALE,
    SCATTERED_TILE,
    as_stored,
    chunk_of_pair,
    clear_chunk,
    find,
    float_at,
    weight_of,
)

_VARYING = ["rows_of_table", "begin", "pairs", "first_chunk", "chunks", "weight_stride"]


@triton.jit(do_not_specialize=_VARYING)
def _sweep(
    table_ptr,
    weight_ptr,
    partial_ptr,  # a sum per chunk, then a largest difference per chunk where HALF
    weight_stride,
    rows_of_table,
    begin,
    pairs,
    first_chunk,
    chunks,  # of all launches
    STUDENT_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    chunk = first_chunk + tl.program_id(0)
    row = find(table_ptr, begin, pairs, chunk, PAIRS)
    place = tl.load(table_ptr + PLACE * rows_of_table + row)
    weight = weight_of(table_ptr, weight_ptr, weight_stride, rows_of_table, row, place)
    coefficient = 2.0 * weight * float_at(table_ptr, SCALE * rows_of_table + row)
    if HALF:
        coefficient, _ = as_stored(coefficient)
    total, largest = 0.0, 0.0
    if weight != 0.0:
        total, largest = chunk_of_pair(
            table_ptr,
            rows_of_table,
            row,
            chunk,
            coefficient,
            STUDENT_DTYPE,
            TEACHER_DTYPE,
            HAS_GRADIENT,
            HALF,
            UNIT,
            WIDE,
            DIMS,
            TILE,
        )
    elif HAS_GRADIENT:
        clear_chunk(table_ptr, rows_of_table, row, chunk, STUDENT_DTYPE)
    tl.store(partial_ptr + chunk, total)
    if HALF:
        tl.store(partial_ptr + chunks + chunk, largest)


@triton.jit(do_not_specialize=["rows_of_table", "chunks", "counter", "weight_stride"])
def _finish(
    table_ptr,
    weight_ptr,
    partial_ptr,
    parts_ptr,  # each row's part of the loss, then its `resize` where HALF
    terms_ptr,
    post_scale_ptr,
    loss_ptr,
    again_ptr,
    weight_stride,
    rows_of_table,
    chunks,
    counter,  # its place in the table
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program adds up a pair; the last one to come adds up the pairs, in the table's order.
    row = tl.program_id(0)
    first = tl.load(table_ptr + row)
    count = tl.cdiv(tl.load(table_ptr + ELEMENTS * rows_of_table + row), CHUNK).to(tl.int32)
    place = tl.load(table_ptr + PLACE * rows_of_table + row)
    acc = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + first + at, mask=at < count, other=0.0)
        if HALF:  # the others' places were left as they were allocated
            measured = (at < count) & ((place & 1) == 1)
            size = tl.load(partial_ptr + chunks + first + at, mask=measured, other=0.0)
            largest = tl.maximum(largest, size)
    scale = float_at(table_ptr, SCALE * rows_of_table + row)
    weight = weight_of(table_ptr, weight_ptr, weight_stride, rows_of_table, row, place)
    term = scale * tl.sum(acc, axis=0)
    tl.store(terms_ptr + (place >> 1), term)
    tl.store(parts_ptr + row, weight * term)
    post_scale = 1.0
    if HALF:
        stored, power = as_stored(2.0 * weight * scale)
        size = tl.abs(stored) / 256.0 * tl.max(largest, axis=0)  # finite where the factors are
        fits = (size >= 1.0 / 256.0) & (size <= LARGEST_HALF / 256.0)
        fits = fits | (size == 0.0) | ~(size < INF)
        # the power of two that brings the largest component to the end of float16's range
        resize = tl.where(fits, 1.0, common.power_for_half(size) / 256.0)
        post_scale = tl.where((place & 1) == 1, power / resize, 1.0)
        tl.store(parts_ptr + rows_of_table + row, resize)
    tl.store(post_scale_ptr + (place >> 1), post_scale)

    tl.debug_barrier()
    if tl.atomic_add(table_ptr + counter, 1) == rows_of_table - 1:
        acc = tl.zeros((BLOCK,), tl.float32)
        some = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, rows_of_table, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < rows_of_table
            acc += tl.load(parts_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
            if HALF:
                sizes = tl.load(
                    parts_ptr + rows_of_table + at, mask=mask, other=1.0, cache_modifier=".cg"
                )
                some = some | (sizes != 1.0).to(tl.int32)
        tl.store(loss_ptr, tl.sum(acc, axis=0))
        if HALF:
            tl.store(again_ptr, tl.max(some, axis=0))


@triton.jit(do_not_specialize=_VARYING)
def _again(
    table_ptr,
    weight_ptr,
    parts_ptr,
    again_ptr,
    weight_stride,
    rows_of_table,
    begin,
    pairs,
    first_chunk,
    chunks,  # of this launch
    STUDENT_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    # float16 gradients whose largest component was stored too large or too small, once more
    if tl.load(again_ptr) != 0:
        for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
            chunk = first_chunk + number
            row = find(table_ptr, begin, pairs, chunk, PAIRS)
            resize = tl.load(parts_ptr + rows_of_table + row)
            if resize != 1.0:
                place = tl.load(table_ptr + PLACE * rows_of_table + row)
                weight = weight_of(table_ptr, weight_ptr, weight_stride, rows_of_table, row, place)
                scale = float_at(table_ptr, SCALE * rows_of_table + row)
                stored, _ = as_stored(2.0 * weight * scale)
                chunk_of_pair(
                    table_ptr,
                    rows_of_table,
                    row,
                    chunk,
                    stored * resize,
                    STUDENT_DTYPE,
                    TEACHER_DTYPE,
                    True,
                    False,
                    UNIT,
                    WIDE,
                    DIMS,
                    TILE,
                )


@triton.jit
def _scale(gradient_ptr, count, factor, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    if count is None:  # a whole chunk
        for start in range(0, CHUNK, TILE):
            value = tl.load(gradient_ptr + start + at).to(tl.float32) * factor
            tl.store(gradient_ptr + start + at, value.to(gradient_ptr.dtype.element_ty))
    else:
        for start in range(0, count, TILE):
            inside = start + at < count
            value = tl.load(gradient_ptr + start + at, mask=inside).to(tl.float32) * factor
            value = value.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + at, value, mask=inside)


@triton.jit(do_not_specialize=["rows_of_table", "begin", "pairs", "first_chunk", "chunks"])
def _give(
    table_ptr,  # of columns first chunk, elements, place, address
    incoming_ptr,
    post_scale_ptr,
    rows_of_table,
    begin,
    pairs,
    first_chunk,
    chunks,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    arrives = tl.load(incoming_ptr).to(tl.float32)
    row = tl.arange(0, PAIRS)
    mask = row < pairs
    place = tl.load(table_ptr + 2 * rows_of_table + begin + row, mask=mask, other=0)
    factors = arrives * tl.load(post_scale_ptr + place, mask=mask, other=1.0)
    # A number of 1 leaves everything as it is: then no byte of the gradients moves.
    if tl.sum(((factors != 1.0) & mask).to(tl.int32), axis=0) > 0:
        for number in range(tl.program_id(0), chunks, tl.num_programs(0)):
            chunk = first_chunk + number
            pair = find(table_ptr, begin, pairs, chunk, PAIRS)
            factor = arrives * tl.load(
                post_scale_ptr + tl.load(table_ptr + 2 * rows_of_table + pair)
            )
            if factor != 1.0:
                done = (chunk - tl.load(table_ptr + pair)) * CHUNK
                left = tl.load(table_ptr + rows_of_table + pair) - done
                size: tl.constexpr = DTYPE.primitive_bitwidth // 8
                address = tl.load(table_ptr + 3 * rows_of_table + pair) + done * size
                if ((address & 15) == 0) & (left >= CHUNK):
                    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
                    _scale(pointer, None, factor, TILE)
                else:
                    pointer = address.to(tl.pointer_type(DTYPE))
                    _scale(pointer, tl.minimum(left, CHUNK).to(tl.int32), factor, SCATTERED_TILE)


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WARPS = 8
TILE = 4096  # 16 elements per thread, all loaded before the first is used: counted, not measured


def _form(student: Tensor, teacher: Tensor, gradient: Tensor, wanted: bool) -> tables.Form:
    return tables.Form(
        student.dtype,
        teacher.dtype,
        tuple(student.shape),
        student.stride(),
        teacher.stride(),
        gradient.stride() if wanted else None,
        (student.data_ptr() | teacher.data_ptr() | gradient.data_ptr()) % 16 == 0,
    )


def _options(plan: tables.Plan, sweep: tables.Sweep) -> dict[str, Any]:
    """The compile-time part of a launch."""
    return {
        "STUDENT_DTYPE": TRITON_DTYPES[sweep.student],
        "TEACHER_DTYPE": TRITON_DTYPES[sweep.teacher],
        "UNIT": sweep.unit,
        "WIDE": sweep.wide,
        "PAIRS": triton.next_power_of_2(sweep.pairs),
        "DIMS": plan.dims if sweep.unit > 0 else 0,
        "TILE": SCATTERED_TILE.value if sweep.unit == 1 else TILE,
        "num_warps": WARPS,
    }


def hidden_l2(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    weight_tensor: Tensor | None,
    reduction: str,
    want_gradient: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The raw op: loss, terms, gradients, post_scale.

    Launches: the table, one for the pairs of each dtype (one more for those that are no linear
    run), the sums; and where there are float16 gradients one that leaves at once unless the largest
    component of one was stored too large or too small. No tensor is copied, whatever its strides.
    """
    gradients = [
        torch.empty_like(s, requires_grad=False) if wanted else s.new_empty(0)
        for s, wanted in zip(students, want_gradient, strict=True)
    ]
    parts = zip(students, teachers, gradients, want_gradient, strict=True)
    plan = tables.plan(tuple(_form(*part) for part in parts), reduction)
    pairs = len(students)
    floats = {"dtype": torch.float32, "device": students[0].device}
    loss, terms, post_scale = (
        torch.empty((), **floats),
        torch.empty(pairs, **floats),
        torch.empty(pairs, **floats),
    )
    partial = torch.empty((2 if plan.half else 1) * plan.chunks, **floats)
    parts_of_loss = torch.empty((2 if plan.half else 1) * pairs, **floats)
    again = torch.empty((), dtype=torch.int32, device=students[0].device)
    weight_stride = 0 if weight_tensor is None else weight_tensor.stride(0)

    with common.on(students[0], "hidden_l2"):
        table = plan.table(weights, students, teachers, gradients)
        for sweep in plan.sweeps:
            common.launch(
                _sweep,
                (sweep.chunks,),
                table,
                weight_tensor,
                partial,
                weight_stride,
                pairs,
                sweep.begin,
                sweep.pairs,
                sweep.first_chunk,
                plan.chunks,
                HAS_GRADIENT=sweep.gradient,
                HALF=sweep.half,
                **_options(plan, sweep),
            )
        common.launch(
            _finish,
            (pairs,),
            table,
            weight_tensor,
            partial,
            parts_of_loss,
            terms,
            post_scale,
            loss,
            again,
            weight_stride,
            pairs,
            plan.chunks,
            plan.counter,
            HALF=plan.half,
            BLOCK=1024,
            num_warps=4,
        )
        for sweep in plan.sweeps:
            if not sweep.half:
                continue
            common.launch(
                _again,
                (min(sweep.chunks, 4 * common.multiprocessors(students[0].device)),),
                table,
                weight_tensor,
                parts_of_loss,
                again,
                weight_stride,
                pairs,
                sweep.begin,
                sweep.pairs,
                sweep.first_chunk,
                sweep.chunks,
                **_options(plan, sweep),
            )
    return loss, terms, gradients, post_scale


def hidden_l2_give_(gradients: list[Tensor], incoming: Tensor, post_scale: Tensor) -> None:
    """Every gradient times the incoming number and its `post_scale`, in place; a launch for each
    dtype, which leaves at once where all factors are 1, and the table before."""
    given = [i for i, g in enumerate(gradients) if g.numel() > 0]
    if not given:
        return
    given.sort(key=lambda i: str(gradients[i].dtype))
    chunks = [triton.cdiv(gradients[i].numel(), tables.CHUNK) for i in given]
    first = list(itertools.accumulate(chunks, initial=0))[:-1]
    elements = [gradients[i].numel() for i in given]
    addresses = [gradients[i].data_ptr() for i in given]
    device = gradients[given[0]].device
    with common.on(gradients[given[0]], "hidden_l2"):
        table = tables.fill([*first, *elements, *given, *addresses], gradients[given[0]])
        begin = 0
        for dtype in dict.fromkeys(gradients[i].dtype for i in given):
            pairs = sum(gradients[i].dtype == dtype for i in given)
            count = sum(chunks[begin : begin + pairs])
            common.launch(
                _give,
                (min(count, 8 * common.multiprocessors(device)),),
                table,
                incoming,
                post_scale,
                len(given),
                begin,
                pairs,
                first[begin],
                count,
                DTYPE=TRITON_DTYPES[dtype],
                PAIRS=triton.next_power_of_2(pairs),
                TILE=TILE,
                num_warps=WARPS,
            )
            begin += pairs
