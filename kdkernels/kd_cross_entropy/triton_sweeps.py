"""Kernels for rows that do not fit into registers: two sweeps, by one program a row or by several.

The second sweep runs backwards: what the first one read last is still in the L2.
"""

import triton
import triton.language as tl

from kdkernels.kd_cross_entropy.triton_row import (
    add_exponentials,
    coefficients,
    count_share,
    edge_sums,
    exponentials,
    gradient_of,
    largest,
    left_of_label,
    merge,
    merge_label,
    move,
    references,
    store_label,
    store_row,
    top_logit,
    weight_of,
    zero_gradient,
)
from kdkernels.kd_cross_entropy.triton_tiles import (
    INFINITY,
    VARYING,
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

STATISTICS = tl.constexpr(9)  # of a part of a row: three maxima, six sums


@triton.jit
def _sweep_statistics(
    student, teacher, label, head, begin, end, body, classes, with_head, with_tail, scale, more,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Statistics of the classes from position `begin` to `end` behind the head and of the edges
    that are wanted; and the sum of `more`. Lanes keep to themselves until the end: no
    exchange within the sweep."""
    VEC: tl.constexpr = PLAN.vec
    GROUP: tl.constexpr = PLAN.tiles * PLAN.lanes * VEC
    column, on_edge = edge_columns(head, body, classes, with_head, with_tail, PLAN)
    on_edge = others(on_edge, column, label, PLAN)
    s_max, t_max = load_edge(student, teacher, column, on_edge, PLAN)
    before = tl.where(column < label, s_max, -INFINITY)
    refs = references(s_max, t_max)
    sums = edge_sums(s_max, t_max, on_edge, refs, scale, PLAN)
    groups = (end - begin) // GROUP
    s_first = vectors_of(student, head, PLAN.wide_student)
    t_first = vectors_of(teacher, head, PLAN.wide_teacher)
    for group in range(groups):
        s_max, t_max, before, sums = _add_group(
            s_max, t_max, before, sums, s_first, t_first, begin + group * GROUP, end,
            label - head, scale, False, PLAN,
        )  # fmt: skip
    s_max, t_max, before, sums = _add_group(
        s_max, t_max, before, sums, s_first, t_first, begin + groups * GROUP, end,
        label - head, scale, True, PLAN,
    )  # fmt: skip
    return merge(s_max, t_max, before, sums, more, scale, PLAN)


@triton.jit
def _add_group(
    s_max, t_max, before, sums, student, teacher, begin, end, label_at, scale,
    MASKED: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Statistics of lanes with a group of tiles more; references move once for all of them, so a
    sweep needs 1 / (tiles vec) of an exponential more than one a class and softmax."""
    at = begin + positions(PLAN)
    s_tiles, t_tiles = load_tiles(
        student, teacher, at, end, 0, PLAN.tiles, MASKED, "evict_last", PLAN
    )
    s_tiles, t_tiles = without_label(s_tiles, t_tiles, at, label_at, PLAN.tiles, PLAN)
    old = references(s_max, t_max)
    s_max = largest(s_tiles, s_max, PLAN.tiles)
    if PLAN.has_teacher:
        t_max = largest(t_tiles, t_max, PLAN.tiles)
    if PLAN.terms and PLAN.has_target:
        before = left_of_label(s_tiles, at, label_at, before, PLAN.tiles, PLAN)
    refs = references(s_max, t_max)
    sums = move(sums, old, refs, scale, PLAN)
    refs = (refs[0][:, None], refs[1][:, None])
    full: tl.constexpr = 0 if MASKED else PLAN.tiles
    sums, parked = add_exponentials(
        sums, s_tiles, t_tiles, at, end, refs, scale, PLAN.tiles, full, PLAN
    )
    return s_max, t_max, before, sums


@triton.jit
def _gradient_group(
    student, teacher, gradient, begin, end, refs, factors, scale,
    MASKED: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    at = begin + positions(PLAN)
    s_tiles, t_tiles = load_tiles(
        student, teacher, at, end, 0, PLAN.tiles, MASKED, "evict_first", PLAN
    )
    TILES: tl.constexpr = PLAN.tiles
    for i in tl.static_range(TILES):
        a, b, u, p, v = exponentials(s_tiles[i], t_tiles[i], refs, scale, PLAN)
        value = gradient_of(u, p, v, factors, PLAN)
        here = at + i * PLAN.lanes * PLAN.vec
        store_tile(gradient, here, value, end, MASKED)


@triton.jit
def _sweep_gradient(
    student, teacher, gradient, label, s_label, t_label, valid, head, begin, end, body, classes,
    with_head, with_tail, refs, totals, weight, slope, numbers, PLAN: tl.constexpr,
):  # fmt: skip
    """The gradient of the same classes, the last ones first: those are still in the L2."""
    VEC: tl.constexpr = PLAN.vec
    GROUP: tl.constexpr = PLAN.tiles * PLAN.lanes * VEC
    scale, inverse_tau, alpha, smoothing = numbers
    factors = coefficients(totals, weight, valid, classes, numbers, PLAN)
    groups = (end - begin) // GROUP
    s_first = vectors_of(student, head, PLAN.wide_student)
    t_first = vectors_of(teacher, head, PLAN.wide_teacher)
    g_first = vectors_of(gradient, head, PLAN.wide_gradient)
    _gradient_group(
        s_first, t_first, g_first, begin + groups * GROUP, end, refs, factors,
        scale, True, PLAN,
    )  # fmt: skip
    for group in range(groups):
        _gradient_group(
            s_first, t_first, g_first, begin + (groups - 1 - group) * GROUP,
            end, refs, factors, scale, False, PLAN,
        )  # fmt: skip
    column, on_edge = edge_columns(head, body, classes, with_head, with_tail, PLAN)
    s_edge, t_edge = load_edge(student, teacher, column, on_edge, PLAN)
    a, b, u, p, v = exponentials(s_edge, t_edge, refs, scale, PLAN)
    value = gradient_of(u, p, v, factors, PLAN).to(gradient.dtype.element_ty)
    tl.store(gradient + column, value, mask=on_edge)
    if PLAN.has_target:
        is_here = (label >= head + begin) & (label < head + end)
        is_here |= (label < head) & with_head
        is_here |= (label >= head + body) & with_tail
        if is_here:
            store_label(
                gradient, label, s_label, t_label, refs, factors, weight, slope, numbers, PLAN
            )


@triton.jit
def _part_of(part, parts, body, PLAN: tl.constexpr):
    """Positions where a part of a row begins and ends."""
    VEC: tl.constexpr = PLAN.vec
    per_part = tl.cdiv(body // VEC, parts) * VEC
    begin = tl.minimum(part * per_part, body)
    end = tl.minimum(begin + per_part, body)
    return tl.multiple_of(begin, VEC), tl.multiple_of(end, VEC)


@triton.jit(do_not_specialize=VARYING)
def two_sweeps(
    student_ptr, teacher_ptr, target_ptr, gradient_ptr, loss_ptr, terms_ptr, count_ptr, margin_ptr,
    stride_student, stride_teacher, stride_target, stride_gradient, row_count, classes,
    ignore_index, scale, inverse_tau, alpha, smoothing, gradient_scale, PLAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student, teacher = student_ptr + row * stride_student, teacher_ptr + row * stride_teacher
    gradient = gradient_ptr + row * stride_gradient
    label, valid, counts = label_of(target_ptr, stride_target, row, classes, ignore_index, PLAN)
    if counts:
        numbers = (scale, inverse_tau, alpha, smoothing)
        head, body = geometry(student, teacher, classes, PLAN)
        s_label, t_label = load_label(student, teacher, label, PLAN)
        margin = load_margin(margin_ptr, row, PLAN)
        labels = (target_ptr, stride_target, row_count, ignore_index)
        s_max, t_max, before, sums, count = _sweep_statistics(
            student, teacher, label, head, 0, body, body, classes, True, True, scale,
            count_share(labels, PLAN), PLAN,
        )  # fmt: skip
        refs = references(s_max, t_max)
        most = top_logit(s_max, s_label, PLAN)
        is_hit = (s_label == most) & (before < most)
        found, totals, slope = merge_label(
            refs, is_hit, sums, s_label, t_label, margin, valid, classes, numbers, PLAN
        )
        store_row(loss_ptr, terms_ptr, row, found, PLAN)
        if PLAN.gradient:
            weight = weight_of(count, count_ptr, gradient_scale, PLAN)
            _sweep_gradient(
                student, teacher, gradient, label, s_label, t_label, valid, head, 0, body, body,
                classes, True, True, refs, totals, weight, slope, numbers, PLAN,
            )  # fmt: skip
    else:
        store_row(loss_ptr, terms_ptr, row, (0.0, 0.0, 0.0, 0.0, 0.0), PLAN)
        if PLAN.gradient:
            zero_gradient(gradient, 0, classes, PLAN)


@triton.jit(do_not_specialize=VARYING)
def split_statistics(
    student_ptr, teacher_ptr, target_ptr, statistics_ptr, stride_student, stride_teacher,
    stride_target, classes, parts, ignore_index, scale, PLAN: tl.constexpr,
):  # fmt: skip
    """Statistic i of part p of row r at statistics[r, i, p]."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    student, teacher = student_ptr + row * stride_student, teacher_ptr + row * stride_teacher
    label, valid, counts = label_of(target_ptr, stride_target, row, classes, ignore_index, PLAN)
    if counts:
        head, body = geometry(student, teacher, classes, PLAN)
        begin, end = _part_of(part, parts, body, PLAN)
        no_more = tl.full((PLAN.lanes,), 0.0, tl.float32)
        s_max, t_max, before, sums, _ = _sweep_statistics(
            student, teacher, label, head, begin, end, body, classes, part == 0, part == parts - 1,
            scale, no_more, PLAN,
        )  # fmt: skip
        found = (s_max, t_max, before) + sums
        for i in tl.static_range(STATISTICS):
            tl.store(statistics_ptr + (row * STATISTICS + i) * parts + part, found[i])


@triton.jit(do_not_specialize=VARYING)
def split_gradient(
    student_ptr, teacher_ptr, target_ptr, gradient_ptr, statistics_ptr, loss_ptr, terms_ptr,
    count_ptr, margin_ptr, stride_student, stride_teacher, stride_target, stride_gradient,
    row_count, classes, parts, ignore_index, scale, inverse_tau, alpha, smoothing, gradient_scale,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Merges a row's parts and forms the gradient of one; its loss comes from part 0. Without
    gradients there is one program a row. The last rows come first: they are still in the L2."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    share = parts if PLAN.gradient else 1
    row, part = (program // share).to(tl.int64), program % share
    student, teacher = student_ptr + row * stride_student, teacher_ptr + row * stride_teacher
    gradient = gradient_ptr + row * stride_gradient
    label, valid, counts = label_of(target_ptr, stride_target, row, classes, ignore_index, PLAN)
    head, body = geometry(student, teacher, classes, PLAN)
    begin, end = _part_of(part, parts, body, PLAN)
    with_head, with_tail = part == 0, part == parts - 1
    if counts:
        numbers = (scale, inverse_tau, alpha, smoothing)
        s_label, t_label = load_label(student, teacher, label, PLAN)
        margin = load_margin(margin_ptr, row, PLAN)
        lane = tl.arange(0, PLAN.parts)
        record = statistics_ptr + row * STATISTICS * parts + lane
        read = ()
        for i in tl.static_range(STATISTICS):
            nothing = -INFINITY if i < 3 else 0.0
            read = read + (tl.load(record + i * parts, mask=lane < parts, other=nothing),)
        sums = (read[3], read[4], read[5], read[6], read[7], read[8])
        s_max, t_max, before, sums, _ = merge(read[0], read[1], read[2], sums, read[3], scale, PLAN)
        refs = references(s_max, t_max)
        most = top_logit(s_max, s_label, PLAN)
        is_hit = (s_label == most) & (before < most)
        found, totals, slope = merge_label(
            refs, is_hit, sums, s_label, t_label, margin, valid, classes, numbers, PLAN
        )
        if part == 0:
            store_row(loss_ptr, terms_ptr, row, found, PLAN)
        if PLAN.gradient:
            labels = (target_ptr, stride_target, row_count, ignore_index)
            count = tl.sum(count_share(labels, PLAN), axis=0)
            weight = weight_of(count, count_ptr, gradient_scale, PLAN)
            _sweep_gradient(
                student, teacher, gradient, label, s_label, t_label, valid, head, begin, end, body,
                classes, with_head, with_tail, refs, totals, weight, slope, numbers, PLAN,
            )  # fmt: skip
    else:
        if part == 0:
            store_row(loss_ptr, terms_ptr, row, (0.0, 0.0, 0.0, 0.0, 0.0), PLAN)
        if PLAN.gradient:
            first = tl.where(with_head, 0, head + begin)
            zero_gradient(gradient, first, tl.where(with_tail, classes, head + end), PLAN)
