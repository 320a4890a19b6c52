"""Positions of the classes of a row pair, and their loads and stores.

A row is cut into an edge (what lies before the first and after the last 16-byte boundary: fewer
than 2 VEC classes, one a lane) and vectors of VEC classes; a tile is a vector a lane. So every
class count and every row pitch gets 16-byte accesses, and no address outside the row is touched.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
# Arguments that change from call to call: no kernel is compiled for their value or divisibility.
VARYING = (
    "stride_student",
    "stride_teacher",
    "stride_target",
    "stride_gradient",
    "row_count",
    "classes",
    "parts",
    "ignore_index",
)


@dataclass(frozen=True)
class Plan:
    """Compile-time parameters of a kernel; neither N nor C, so that they may vary without
    compiling."""

    vec: int  # classes in a vector: 16 bytes of the narrower dtype
    lanes: int  # vectors in a tile: the threads of a program
    tiles: int  # tiles in registers at a time
    full: int  # how many of them the one-tile kernel loads without a mask
    power: int  # tau where exp(s) is taken as its power; 0 where it takes its own exponential
    pivot_is_teacher: bool  # whose addresses decide where vectors begin
    wide_student: bool  # whether vectors of each tensor begin on 16-byte boundaries
    wide_teacher: bool
    wide_gradient: bool
    has_teacher: bool
    has_target: bool
    smoothing: bool
    terms: bool
    gradient: bool
    divisor: str  # "one"; or the rows that count: "counted here", "given"
    parts: int  # a power of two, at least the programs that share a row
    margin: bool = False  # whether the label has another logit in the hard term


@triton.jit
def geometry(student, teacher, classes, PLAN: tl.constexpr):
    """Classes before the first vector, and classes in vectors."""
    pivot = teacher if PLAN.pivot_is_teacher else student
    size: tl.constexpr = pivot.dtype.element_ty.primitive_bitwidth // 8
    before = (-(pivot.to(tl.int64) // size)) & (PLAN.vec - 1)
    head = tl.minimum(before, classes).to(tl.int32)
    return head, (classes - head) // PLAN.vec * PLAN.vec


@triton.jit
def vectors_of(row, head, WIDE: tl.constexpr):
    """Where a row's vectors begin: on a 16-byte boundary where WIDE."""
    first = row + head
    if WIDE:  # the hint stays on the addition that makes the pointer; on an argument it is lost
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def positions(PLAN: tl.constexpr):
    """Positions of the first tile's classes: (lanes, vec)."""
    return tl.arange(0, PLAN.lanes)[:, None] * PLAN.vec + tl.arange(0, PLAN.vec)[None, :]


@triton.jit
def edge_columns(head, body, classes, with_head, with_tail, PLAN: tl.constexpr):
    """Columns of the edge, one a lane: the head in the first lanes, then the tail; and which lanes
    hold one."""
    lane = tl.arange(0, PLAN.lanes)
    in_head = lane < PLAN.vec
    column = tl.where(in_head, lane, head + body + lane - PLAN.vec)
    return column, tl.where(in_head, (lane < head) & with_head, (column < classes) & with_tail)


@triton.jit
def others(exists, column, label, PLAN: tl.constexpr):
    """Which lanes hold a class that sums are taken of: with a margin the label is a part of its
    own, which is merged like that of a split row (triton_row.merge_label)."""
    if PLAN.margin:
        return exists & (column != label)
    else:
        return exists


@triton.jit
def without_label(s_tiles, t_tiles, at, label_at, TILES: tl.constexpr, PLAN: tl.constexpr):
    """The tiles, with a margin -inf at the label."""
    if PLAN.margin:
        s_others, t_others = (), ()
        for i in tl.static_range(TILES):
            is_label = at + i * PLAN.lanes * PLAN.vec == label_at
            s_others = s_others + (tl.where(is_label, -INFINITY, s_tiles[i]),)
            t_others = t_others + (tl.where(is_label, -INFINITY, t_tiles[i]),)
        return s_others, t_others
    else:
        return s_tiles, t_tiles


@triton.jit
def load_margin(margin_ptr, row, PLAN: tl.constexpr):
    """The amount added to the label's logit in the hard term, and its slope."""
    if PLAN.margin:
        return tl.load(margin_ptr + row * 2), tl.load(margin_ptr + row * 2 + 1)
    else:
        return 0.0, 1.0


@triton.jit
def load_edge(student, teacher, column, exists, PLAN: tl.constexpr):
    """Both networks' logits on the edge, -inf in lanes without one."""
    s = tl.load(student + column, mask=exists, other=-INFINITY).to(tl.float32)
    t = s
    if PLAN.has_teacher:
        t = tl.load(teacher + column, mask=exists, other=-INFINITY).to(tl.float32)
    return s, t


@triton.jit
def load_label(student, teacher, label, PLAN: tl.constexpr):
    """Both networks' logits at the label; 0 where there is none."""
    s, t = 0.0, 0.0
    if PLAN.has_target:
        s = tl.load(student + label).to(tl.float32)
        t = s
        if PLAN.has_teacher:
            t = tl.load(teacher + label).to(tl.float32)
    return s, t


@triton.jit
def label_of(target_ptr, stride_target, row, classes, ignore_index, PLAN: tl.constexpr):
    """The row's label as a column, a factor that is NaN where it is no class, and whether the row
    counts."""
    if PLAN.has_target:
        label = tl.load(target_ptr + row * stride_target).to(tl.int64)
        is_class = (label >= 0) & (label < classes)
        column = tl.where(is_class, label, 0).to(tl.int32)
        return column, tl.where(is_class, 1.0, float("nan")), label != ignore_index
    else:
        return 0, 1.0, row >= 0


@triton.jit
def load_tile(base, at, limit, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    """Float32 logits at base + at; -inf from `limit` (a multiple of vec) on where MASKED."""
    if MASKED:
        x = tl.load(base + at, mask=at < limit, other=-INFINITY, eviction_policy=EVICTION)
    else:
        x = tl.load(base + at, eviction_policy=EVICTION)
    return x.to(tl.float32)


@triton.jit
def load_tiles(
    student,
    teacher,
    at,
    limit,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Tiles FIRST to LAST of both networks, behind the head, as two tuples."""
    SIZE: tl.constexpr = PLAN.lanes * PLAN.vec
    s_tiles, t_tiles = (), ()
    for i in tl.static_range(FIRST, LAST):
        s = load_tile(student, at + i * SIZE, limit, MASKED, EVICTION)
        t = s
        if PLAN.has_teacher:
            t = load_tile(teacher, at + i * SIZE, limit, MASKED, EVICTION)
        s_tiles, t_tiles = s_tiles + (s,), t_tiles + (t,)
    return s_tiles, t_tiles


@triton.jit
def store_tile(base, at, value, limit, MASKED: tl.constexpr):
    value = value.to(base.dtype.element_ty)
    if MASKED:
        tl.store(base + at, value, mask=at < limit)
    else:
        tl.store(base + at, value)
