"""Kernels of nearest_neighbor that measure: in difference form and in double, as little as decides.

`resolve` measures what triton_scan's candidates leave possible, `rescan` whole splits of the
gallery for the few queries whose candidates do not decide, `merge` brings a query's splits
together. The result does not depend on which rows were measured, nor in which order.
"""

import triton
import triton.language as tl

from kdkernels.nearest_neighbor.triton_scan import AMBIGUOUS, CLASSES, SAFE_NORM, UNSAFE

LARGEST = tl.constexpr(3.4028234e38)
NONE = tl.constexpr(2**62)  # the index of what was not found; above all others


@triton.jit
def _consider(
    best,
    index,
    query,
    row,
    wanted,
    queries_ptr,
    gallery_ptr,
    stride_queries,
    stride_gallery,
    columns,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # best and index (Q,) after the rows (Q, R) that are wanted; a distance NaN is never taken
    total = tl.zeros((row.shape[0], row.shape[1], BLOCK), tl.float64)
    query_row = queries_ptr + query[:, None, None] * stride_queries
    gallery_row = gallery_ptr + tl.where(wanted, row, 0).to(tl.int64)[:, :, None] * stride_gallery
    for first in tl.range(0, columns, BLOCK, num_stages=3):
        column = (first + tl.arange(0, BLOCK))[None, None, :]
        inside = column < columns
        q = tl.load(query_row + column, mask=inside, other=0.0).to(tl.float64)
        x = tl.load(gallery_row + column, mask=inside & wanted[:, :, None], other=0.0)
        difference = q - x.to(tl.float64)
        total += difference * difference
    distance = tl.sum(total, axis=2)
    usable = wanted & (distance == distance)
    if LEAVE_ONE_OUT:
        usable = usable & (row != query[:, None])
    distance = tl.where(usable, distance, float("inf"))
    least = tl.min(distance, axis=1)
    nearest = usable & (distance == least[:, None])
    lowest = tl.min(tl.where(nearest, row.to(tl.int64), NONE), axis=1)
    taken = (least < best) | ((least == best) & (lowest < index))
    return tl.where(taken, least, best), tl.where(taken, lowest, index)


@triton.jit
def _limit(best, norm, keep, absolute):
    # -2 score of the nearest row is not above this. For a query that is not safe, whose scores mean
    # nothing, it is inf, which nothing is above.
    limit = tl.minimum(best - keep * norm + absolute, LARGEST)
    return tl.where(norm <= SAFE_NORM, limit, float("inf"))


@triton.jit
def _finish(distance_ptr, index_ptr, query, best, index, inside, LEAVE_ONE_OUT: tl.constexpr):
    found = index < NONE
    lowest = query * 0
    if LEAVE_ONE_OUT:
        lowest = tl.where(query == 0, lowest + 1, lowest)
    distance = tl.where(found, best, float("nan")).to(tl.float32)
    tl.store(distance_ptr + query, distance, mask=inside)
    tl.store(index_ptr + query, tl.where(found, index, lowest), mask=inside)


@triton.jit(do_not_specialize=["query_count", "gallery_count", "splits"])
def resolve(
    queries_ptr,
    gallery_ptr,
    norm_ptr,
    score_ptr,
    place_ptr,
    rest_ptr,
    unsafe_ptr,
    counters_ptr,
    ambiguous_ptr,
    best_ptr,
    distance_ptr,
    index_ptr,
    stride_queries,
    stride_gallery,
    query_count,
    gallery_count,
    columns,
    splits,
    keep,
    absolute,
    LEAVE_ONE_OUT: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_X: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    inside = query < query_count
    query = tl.minimum(query, query_count - 1)
    norm = tl.load(norm_ptr + query).to(tl.float64)
    safe = inside & (norm <= SAFE_NORM)
    best = tl.full((QUERIES,), float("inf"), tl.float64)
    index = tl.full((QUERIES,), NONE, tl.int64)
    in_class = tl.arange(0, TILE_X // CLASSES)[None, :]
    unsafe = tl.load(counters_ptr + UNSAFE)
    for first in range(0, unsafe, TILE_X // CLASSES):
        wanted = safe[:, None] & (first + in_class < unsafe)
        row = tl.load(unsafe_ptr + first + in_class, mask=first + in_class < unsafe, other=0)
        best, index = _consider(
            best,
            index,
            query,
            tl.broadcast_to(row, (QUERIES, TILE_X // CLASSES)),
            wanted,
            queries_ptr,
            gallery_ptr,
            stride_queries,
            stride_gallery,
            columns,
            LEAVE_ONE_OUT,
            BLOCK,
        )

    slot = tl.arange(0, SLOTS)[None, :]
    at = query[:, None] * 2 * splits + slot
    score = tl.load(score_ptr + at, mask=slot < 2 * splits, other=float("-inf"))
    lower = tl.where(safe[:, None], -2.0 * score, float("inf")).to(tl.float64)
    least = tl.min(lower, axis=1)
    limit = tl.where(safe, _limit(best, norm, keep, absolute), LARGEST)
    open_queries = tl.sum((least <= limit).to(tl.int32), axis=0)
    while open_queries > 0:
        going = least <= limit
        number = tl.min(tl.where(lower == least[:, None], slot, SLOTS - 1), axis=1)
        place = tl.load(place_ptr + query * 2 * splits + number, mask=going, other=0)
        start = place // CLASSES * TILE_X + place % CLASSES
        row = start[:, None] + CLASSES * in_class
        best, index = _consider(
            best,
            index,
            query,
            row,
            going[:, None] & (row < gallery_count),
            queries_ptr,
            gallery_ptr,
            stride_queries,
            stride_gallery,
            columns,
            LEAVE_ONE_OUT,
            BLOCK,
        )
        limit = tl.where(safe, _limit(best, norm, keep, absolute), LARGEST)
        lower = tl.where(slot == number[:, None], float("inf"), lower)
        least = tl.min(lower, axis=1)
        open_queries = tl.sum((least <= limit).to(tl.int32), axis=0)

    _finish(distance_ptr, index_ptr, query, best, index, inside, LEAVE_ONE_OUT)
    tl.store(best_ptr + query, best, mask=inside)
    at = query[:, None] * splits + slot
    rest = tl.load(rest_ptr + at, mask=slot < splits, other=float("-inf"))
    possible = tl.min(-2.0 * rest, axis=1) <= limit
    listed = ((safe & possible) | (inside & (norm > SAFE_NORM))).to(tl.int32)
    found = tl.sum(listed, axis=0)
    if found > 0:
        place = tl.atomic_add(counters_ptr + AMBIGUOUS, found) + tl.cumsum(listed, axis=0) - 1
        tl.store(ambiguous_ptr + place, query.to(tl.int32), mask=listed != 0)


@triton.jit(do_not_specialize=["gallery_count", "splits", "split_rows"])
def rescan(
    queries_ptr,
    gallery_ptr,
    norm_ptr,
    rest_ptr,
    counters_ptr,
    ambiguous_ptr,
    best_ptr,
    distance_ptr,
    index_ptr,
    part_distance_ptr,
    part_index_ptr,
    stride_queries,
    stride_gallery,
    gallery_count,
    columns,
    splits,
    split_rows,
    keep,
    absolute,
    LEAVE_ONE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    one = tl.arange(0, 1)
    items = tl.load(counters_ptr + AMBIGUOUS) * splits
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % splits
        query = tl.load(ambiguous_ptr + item // splits + one).to(tl.int64)
        best = tl.load(best_ptr + query)
        found = tl.load(distance_ptr + query)
        index = tl.where(found == found, tl.load(index_ptr + query), NONE)
        norm = tl.load(norm_ptr + query).to(tl.float64)
        lower = -2.0 * tl.load(rest_ptr + query * splits + split)
        passed = lower > _limit(best, norm, keep, absolute)
        first = split * split_rows
        end = tl.minimum(first + split_rows, gallery_count)
        # nothing is nearer than a row at distance 0 with a lower index
        open_queries = tl.sum((~passed & ((best > 0.0) | (index > first))).to(tl.int32), axis=0)
        while (open_queries > 0) & (first < end):
            row = first + tl.arange(0, ROWS)[None, :]
            best, index = _consider(
                best,
                index,
                query,
                row,
                row < end,
                queries_ptr,
                gallery_ptr,
                stride_queries,
                stride_gallery,
                columns,
                LEAVE_ONE_OUT,
                BLOCK,
            )
            first += ROWS
            open_queries = tl.sum(((best > 0.0) | (index > first)).to(tl.int32), axis=0)
        tl.store(part_distance_ptr + item + one, best)
        tl.store(part_index_ptr + item + one, index)


@triton.jit(do_not_specialize=["splits"])
def merge(
    counters_ptr,
    ambiguous_ptr,
    part_distance_ptr,
    part_index_ptr,
    distance_ptr,
    index_ptr,
    splits,
    LEAVE_ONE_OUT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    one = tl.arange(0, 1)
    slot = tl.arange(0, SLOTS)[None, :]
    inside = slot < splits
    for item in range(tl.program_id(0), tl.load(counters_ptr + AMBIGUOUS), tl.num_programs(0)):
        query = tl.load(ambiguous_ptr + item + one).to(tl.int64)
        at = item * splits + slot
        distance = tl.load(part_distance_ptr + at, mask=inside, other=float("inf"))
        index = tl.load(part_index_ptr + at, mask=inside, other=NONE)
        best = tl.min(distance, axis=1)
        index = tl.min(tl.where(distance == best[:, None], index, NONE), axis=1)
        _finish(distance_ptr, index_ptr, query, best, index, one == 0, LEAVE_ONE_OUT)
