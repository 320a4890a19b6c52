"""Triton kernels of kd_cross_entropy: a row in registers, two sweeps, rows split over programs.

The row's formulas are in triton_row.py, the derivation in docs/ops.md. With s the element size,
`_one_tile` moves 3 N C s bytes, the floor; the others at most 5 N C s, less what the L2 holds.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.kd_cross_entropy.triton_row import (
    add_exponentials,
    coefficients,
    count_labels,
    count_share,
    edge_sums,
    exponentials,
    gradient_of,
    is_first,
    largest,
    merge_label,
    references,
    row_maxima,
    row_sums,
    store_label,
    store_row,
    top_logit,
    weight_of,
    zero_gradient,
)
from kdkernels.kd_cross_entropy.triton_sweeps import (
    STATISTICS,
    split_gradient,
    split_statistics,
    two_sweeps,
)
from kdkernels.kd_cross_entropy.triton_tiles import (
    VARYING,
    Plan,
    edge_columns,
    geometry,
    label_of,
    load_edge,
    load_label,
    load_margin,
    load_tiles,
    others,
    positions,
    store_tile,
    vectors_of,
    without_label,
)

ONE_TILE_CLASSES = 16384  # up to here a row pair stays in registers
PART_CLASSES = 8192  # a program's share of a split row, at least
PROGRAMS_WANTED = 4  # programs a multiprocessor that rows are split into, where there are few
COUNTED_HERE = 4096  # labels that every program counts itself: 32 KB that come from the L2
LARGEST_POWER = 8  # integer temperatures up to here need one exponential for both softmaxes


@triton.jit
def _row_in_registers(
    student, teacher, gradient, outputs, row, label, valid, margin, classes, labels, numbers,
    gradient_scale, PLAN: tl.constexpr,
):  # fmt: skip
    loss_ptr, terms_ptr, count_ptr = outputs
    scale, inverse_tau, alpha, smoothing = numbers
    head, body = geometry(student, teacher, classes, PLAN)
    VEC: tl.constexpr = PLAN.vec
    limit = tl.multiple_of(body, VEC)
    at = positions(PLAN)
    column, on_edge = edge_columns(head, body, classes, True, True, PLAN)

    # 1. The row pair into registers, and its maxima.
    s_first = vectors_of(student, head, PLAN.wide_student)
    t_first = vectors_of(teacher, head, PLAN.wide_teacher)
    s_full, t_full = load_tiles(
        s_first, t_first, at, limit, 0, PLAN.full, False, "evict_first", PLAN
    )
    s_rest, t_rest = load_tiles(
        s_first, t_first, at, limit, PLAN.full, PLAN.tiles, True, "evict_first", PLAN
    )
    s_tiles, t_tiles = s_full + s_rest, t_full + t_rest
    s_tiles, t_tiles = without_label(s_tiles, t_tiles, at, label - head, PLAN.tiles, PLAN)
    on_others = others(on_edge, column, label, PLAN)
    s_edge, t_edge = load_edge(student, teacher, column, on_others, PLAN)
    s_label, t_label = load_label(student, teacher, label, PLAN)
    count = count_share(labels, PLAN)  # its loads wait together with the row's
    s_max = largest(s_tiles, s_edge, PLAN.tiles)
    t_max = s_max
    if PLAN.has_teacher:
        t_max = largest(t_tiles, t_edge, PLAN.tiles)
    s_max, t_max = row_maxima(s_max, t_max, PLAN)
    most = top_logit(s_max, s_label, PLAN)
    is_hit = s_label == most
    if PLAN.terms and PLAN.has_target:
        is_hit = is_first(student, label, s_label, most, PLAN)

    # 2. Exponentials in the place of the logits, and their sums.
    refs = references(s_max, t_max)
    sums = edge_sums(s_edge, t_edge, on_others, refs, scale, PLAN)
    sums, parked = add_exponentials(
        sums, s_tiles, t_tiles, at, limit, refs, scale, PLAN.tiles, PLAN.full, PLAN
    )
    sums, count = row_sums(sums, count, PLAN)
    found, totals, slope = merge_label(
        refs, is_hit, sums, s_label, t_label, margin, valid, classes, numbers, PLAN
    )
    store_row(loss_ptr, terms_ptr, row, found, PLAN)

    # 3. The gradient from the exponentials.
    if PLAN.gradient:
        weight = weight_of(count, count_ptr, gradient_scale, PLAN)
        factors = coefficients(totals, weight, valid, classes, numbers, PLAN)
        us, ps, vs = parked
        g_first = vectors_of(gradient, head, PLAN.wide_gradient)
        TILES: tl.constexpr = PLAN.tiles
        for i in tl.static_range(TILES):
            value = gradient_of(us[i], ps[i], vs[i], factors, PLAN)
            here = at + i * PLAN.lanes * PLAN.vec
            store_tile(g_first, here, value, limit, i >= PLAN.full)
        a, b, u, p, v = exponentials(s_edge, t_edge, refs, scale, PLAN)
        value = gradient_of(u, p, v, factors, PLAN).to(gradient.dtype.element_ty)
        tl.store(gradient + column, value, mask=on_edge)
        if PLAN.has_target:
            store_label(
                gradient, label, s_label, t_label, refs, factors, weight, slope, numbers, PLAN
            )


@triton.jit(do_not_specialize=VARYING)
def _one_tile(
    student_ptr, teacher_ptr, target_ptr, gradient_ptr, loss_ptr, terms_ptr, count_ptr, margin_ptr,
    stride_student, stride_teacher, stride_target, stride_gradient, row_count, classes,
    ignore_index, scale, inverse_tau, alpha, smoothing, gradient_scale, PLAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, valid, counts = label_of(target_ptr, stride_target, row, classes, ignore_index, PLAN)
    if counts:
        _row_in_registers(
            student_ptr + row * stride_student, teacher_ptr + row * stride_teacher,
            gradient_ptr + row * stride_gradient, (loss_ptr, terms_ptr, count_ptr), row, label,
            valid, load_margin(margin_ptr, row, PLAN), classes,
            (target_ptr, stride_target, row_count, ignore_index),
            (scale, inverse_tau, alpha, smoothing), gradient_scale, PLAN,
        )  # fmt: skip
    else:
        store_row(loss_ptr, terms_ptr, row, (0.0, 0.0, 0.0, 0.0, 0.0), PLAN)
        if PLAN.gradient:
            zero_gradient(gradient_ptr + row * stride_gradient, 0, classes, PLAN)


@triton.jit(do_not_specialize=VARYING)
def _count_rows(target_ptr, count_ptr, stride_target, row_count, ignore_index, BLOCK: tl.constexpr):
    labels = (target_ptr, stride_target, row_count, ignore_index)
    tl.store(count_ptr, tl.sum(count_labels(labels, BLOCK), axis=0))


@triton.jit(do_not_specialize=VARYING)
def _finish(
    target_ptr, loss_ptr, terms_ptr, total_ptr, means_ptr, post_scale_ptr, stride_target, row_count,
    ignore_index, gradient_scale, REDUCTION: tl.constexpr, HAS_TARGET: tl.constexpr,
    TERMS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the loss at total_ptr, (hard, soft, entropy, hits, counted rows) at means_ptr,
    and what backward multiplies by: 1, or with SCALED what undoes float16's scale."""
    count = tl.cast(row_count, tl.float32)
    if HAS_TARGET and (TERMS or REDUCTION == "mean"):
        labels = (target_ptr, stride_target, row_count, ignore_index)
        count = tl.sum(count_labels(labels, BLOCK), axis=0)
    divisor = tl.maximum(count, 1.0)
    lane = tl.arange(0, BLOCK)
    if REDUCTION != "none":
        total = tl.full((BLOCK,), 0.0, tl.float32)
        for begin in range(0, row_count, BLOCK):
            total += tl.load(loss_ptr + begin + lane, mask=begin + lane < row_count, other=0.0)
        loss = tl.sum(total, axis=0)
        tl.store(total_ptr, loss / divisor if REDUCTION == "mean" else loss)
    if TERMS:
        for i in tl.static_range(4):
            total = tl.full((BLOCK,), 0.0, tl.float32)
            for begin in range(0, row_count, BLOCK):
                at = (begin + lane).to(tl.int64) * 4 + i
                total += tl.load(terms_ptr + at, mask=begin + lane < row_count, other=0.0)
            term = tl.sum(total, axis=0)
            tl.store(means_ptr + i, term if i == 3 else term / divisor)
        tl.store(means_ptr + 4, count)
    undo = 1.0
    if SCALED:
        undo = 1.0 / (gradient_scale * divisor if REDUCTION == "mean" else gradient_scale)
    tl.store(post_scale_ptr, undo)


def make_plan(
    student: Tensor,
    teacher: Tensor | None,
    gradient: Tensor | None,
    *,
    has_target: bool,
    temperature: float,
    smoothing: bool,
    terms: bool,
    divisor: str,
    parts: int,
    margin: bool = False,
) -> Plan:
    """The variant for tensors with unit column stride; parts 0 means a row in registers."""
    pivot = student
    if teacher is not None and teacher.element_size() < student.element_size():
        pivot = teacher
    vec = 16 // pivot.element_size()
    whole = temperature == int(temperature) and temperature <= LARGEST_POWER
    exponent = 1 if teacher is None else int(temperature) if whole else 0
    if parts == 0:
        # Registers that hold the row's exponentials, one array of them for each kind. 96 leave
        # enough of the 128 that two programs of 8 warps, or one of 16, may have (counted); with a
        # teacher of fewer bytes per class, whose vectors are twice the student's, sm_100 spills
        # two.
        arrays = 1 if teacher is None else 2 if exponent else 3
        most = 96 if pivot is student else 72
        warps = next(
            w
            for w in (1, 2, 4, 8, 16, 32)
            if triton.cdiv(student.shape[1], common.warp_size() * w * vec) * vec * arrays <= most
        )
        lanes = common.warp_size() * warps
        tiles = triton.cdiv(student.shape[1], lanes * vec)
        full = max(0, student.shape[1] - 2 * (vec - 1)) // (lanes * vec)
    else:
        # 16 classes per thread and network are 32 KB in flight per program: two hide the latency.
        lanes, tiles, full = common.warp_size() * 8, 16 // vec, 0
    return Plan(
        vec=vec,
        lanes=lanes,
        tiles=tiles,
        full=full,
        power=exponent,
        pivot_is_teacher=pivot is not student,
        wide_student=_is_aligned_like(student, pivot),
        wide_teacher=teacher is not None and _is_aligned_like(teacher, pivot),
        wide_gradient=gradient is not None and _is_aligned_like(gradient, pivot),
        has_teacher=teacher is not None,
        has_target=has_target,
        smoothing=smoothing,
        terms=terms,
        gradient=gradient is not None,
        divisor=divisor,
        parts=triton.next_power_of_2(parts),
        margin=margin,
    )


def _is_aligned_like(tensor: Tensor, pivot: Tensor) -> bool:
    """Whether the tensor's rows are on 16-byte boundaries wherever the pivot's are."""
    per_vector = 16 // tensor.element_size()
    first = tensor.data_ptr() // tensor.element_size() - pivot.data_ptr() // pivot.element_size()
    pitch = tensor.stride(0) - pivot.stride(0) if tensor.shape[0] > 1 else 0
    return first % per_vector == 0 and pitch % per_vector == 0


def with_unit_columns(tensor: Tensor) -> Tensor:
    """The tensor where its rows are without gaps, else a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def parts_of(student: Tensor) -> int:
    """Programs that share a row: 0 where one keeps it in registers, 1 where one sweeps it twice."""
    rows_here, classes = student.shape
    side_by_side = common.multiprocessors(student.device)
    if classes <= ONE_TILE_CLASSES:
        return 0
    if rows_here >= side_by_side:
        return 1
    wanted = triton.cdiv(PROGRAMS_WANTED * side_by_side, rows_here)
    return max(1, min(wanted, classes // PART_CLASSES))


def launch_rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    gradient: Tensor | None,
    outputs: tuple[Tensor, Tensor | None, Tensor],
    margin: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    divisor: str,
    gradient_scale: float,
) -> None:
    """The row kernel alone, on logits with unit column stride; at least one row.

    outputs: losses (N,), terms (N, 4) or None, and the number of rows that count, which is read
    where divisor is "given". margin: (N, 2) or None. The gradient may take the student's place
    where parts_of(student) is 0 or 1: a lane has read what it writes, and all have read the label.
    """
    n, classes = student.shape
    loss, terms, count = outputs
    parts = parts_of(student)
    plan = make_plan(
        student,
        teacher,
        gradient,
        has_target=target is not None,
        temperature=temperature,
        smoothing=label_smoothing != 0.0,
        terms=terms is not None,
        divisor=divisor,
        parts=parts,
        margin=margin is not None,
    )
    teacher_or_any = student if teacher is None else teacher
    target_or_any = loss if target is None else target
    target_stride = 0 if target is None else target.stride(0)
    gradient_or_any = student if gradient is None else gradient
    tensors = (student, teacher_or_any, target_or_any)
    strides = (student.stride(0), teacher_or_any.stride(0), target_stride)
    scale = math.log2(math.e) / temperature
    numbers = (scale, 1.0 / temperature, alpha, label_smoothing, gradient_scale)
    warps = plan.lanes // common.warp_size()
    # 128 registers leave room for two programs of 8 warps: one loads while the other computes.
    # Without a limit the compiler spills a few in places, to make room for one program more.
    # Accesses of single classes need more for their addresses.
    is_wide = plan.wide_student and plan.wide_gradient and plan.wide_teacher == plan.has_teacher
    limit = common.register_limit(128 if is_wide or gradient is None else 168)
    outputs_or_any = (
        loss,
        loss if terms is None else terms,
        count,
        loss if margin is None else margin,
    )
    sizes = (gradient_or_any.stride(0), n, classes)
    if parts <= 1:
        kernel = two_sweeps if parts else _one_tile
        everything = (
            *tensors,
            gradient_or_any,
            *outputs_or_any,
            *strides,
            *sizes,
            ignore_index,
            *numbers,
        )
        common.launch(kernel, (n,), *everything, PLAN=plan, num_warps=warps, **limit)
    else:
        statistics = torch.empty(
            (n, STATISTICS.value, parts), dtype=torch.float32, device=student.device
        )
        common.launch(
            split_statistics,
            (n * parts,),
            *tensors,
            statistics,
            *strides,
            classes,
            parts,
            ignore_index,
            scale,
            PLAN=plan,
            num_warps=warps,
            **limit,
        )
        common.launch(
            split_gradient,
            (n if gradient is None else n * parts,),
            *tensors,
            gradient_or_any,
            statistics,
            *outputs_or_any,
            *strides,
            *sizes,
            parts,
            ignore_index,
            *numbers,
            PLAN=plan,
            num_warps=warps,
            **limit,
        )


def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    want_gradient: bool,
    want_terms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op (its schema is in op.py). Logits whose columns are strided are copied first."""
    n, classes = student.shape
    floats = {"dtype": torch.float32, "device": student.device}
    gradient = torch.empty(
        (n, classes) if want_gradient else (0,), dtype=student.dtype, device=student.device
    )
    if n == 0:
        loss = torch.zeros(0 if reduction == "none" else (), **floats)
        return (
            loss,
            torch.zeros(5 if want_terms else 0, **floats),
            gradient,
            torch.ones((), **floats),
        )
    student = with_unit_columns(student)
    teacher = None if teacher is None else with_unit_columns(teacher)
    temperature = 1.0 if teacher is None else temperature

    # float16 would flush a soft gradient / n to zero. Stored without 1/n and as large as its bound
    # allows, it survives; the power of two costs no rounding.
    is_half = want_gradient and student.dtype == torch.float16
    gradient_scale = 1.0
    if is_half:
        gradient_scale = 2.0 ** math.floor(math.log2(32768.0 / (1.0 + abs(alpha) / temperature)))
    divisor = "one"
    if reduction == "mean" and want_gradient and not is_half:
        if target is None:
            gradient_scale = 1.0 / n
        else:
            divisor = "counted here" if n <= COUNTED_HERE else "given"

    per_row = torch.empty(n, **floats)
    terms = torch.empty((n, 4) if want_terms else (0,), **floats)
    total, means = torch.empty((), **floats), torch.empty(5 if want_terms else 0, **floats)
    count, post_scale = torch.empty((), **floats), torch.empty((), **floats)
    target_or_any = per_row if target is None else target
    target_stride = 0 if target is None else target.stride(0)
    with common.on(student, "kd_cross_entropy"):
        if divisor == "given":
            labels = (target_or_any, count, target_stride, n, ignore_index)
            common.launch(_count_rows, (1,), *labels, BLOCK=1024, num_warps=4)
        launch_rows(
            student,
            teacher,
            target,
            gradient if want_gradient else None,
            (per_row, terms if want_terms else None, count),
            None,
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            divisor=divisor,
            gradient_scale=gradient_scale,
        )
        common.launch(
            _finish,
            (1,),
            target_or_any,
            per_row,
            terms,
            total,
            means,
            post_scale,
            target_stride,
            n,
            ignore_index,
            gradient_scale,
            REDUCTION=reduction,
            HAS_TARGET=target is not None,
            TERMS=want_terms,
            SCALED=is_half,
            BLOCK=1024,
            num_warps=4,
        )
    return per_row if reduction == "none" else total, means, gradient, post_scale
