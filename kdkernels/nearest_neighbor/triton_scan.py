"""Kernels of nearest_neighbor that bound: norms, and one pass of matrix products over all pairs.

With q' and x' the rows less a center (less nothing for 16-bit operands), and keep = 1 - e,

    score = q'.x' - keep/2 ||x'||^2,      ||q - x||^2 >= keep ||q'||^2 - 2 score - f

where e and f bound what the products are off (triton_kernel.error_of_scores). Per query and split
of the gallery `scan` keeps the two best candidates and the score of the third. A candidate is a
class, every CLASSES-th row of a tile of the gallery, held by one thread.
"""

import triton
import triton.language as tl

CLASSES = tl.constexpr(8)  # two columns for each of the four lanes that share a row of a tile
SAFE_NORM = tl.constexpr(1e37)  # squared norms up to here cannot overflow a product
UNSAFE = tl.constexpr(0)  # places of the two counters
AMBIGUOUS = tl.constexpr(1)


@triton.jit(do_not_specialize=["count", "step"])
def center(
    gallery_ptr, center_ptr, stride, count, step, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    # Column means over every step-th row; what is not finite counts for nothing.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < columns)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    finite = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, tl.cdiv(count, step), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64) * step
        at = row[:, None] * stride + column[None, :]
        value = tl.load(gallery_ptr + at, mask=(row < count)[:, None] & inside, other=float("nan"))
        value = value.to(tl.float64)
        usable = value - value == 0.0
        total += tl.where(usable, value, 0.0)
        finite += tl.where(usable, 1.0, 0.0)
    mean = tl.sum(total, axis=0) / tl.maximum(tl.sum(finite, axis=0), 1.0)
    tl.store(center_ptr + column, mean.to(tl.float32), mask=column < columns)


@triton.jit(do_not_specialize=["count"])
def norms(
    rows_ptr,
    center_ptr,
    norm_ptr,
    half_ptr,
    unsafe_ptr,
    counters_ptr,
    stride,
    count,
    columns,
    keep,
    CENTERED: tl.constexpr,
    QUERIES: tl.constexpr,
    GALLERY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # For queries ||q'||^2: inf where it is not safe, NaN for a row that holds one. For the gallery
    # -keep/2 ||x'||^2: -inf, which no product overcomes, past its end and for rows that are not
    # safe; those without a NaN go on a list.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = rows_ptr + tl.minimum(row, count - 1).to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(start + column[None, :], mask=(column < columns)[None, :], other=0.0)
        value = value.to(tl.float32)
        if CENTERED:
            value -= tl.load(center_ptr + column, mask=column < columns, other=0.0)[None, :]
        total += value.to(tl.float64) * value.to(tl.float64)
    norm = tl.sum(total, axis=1)
    safe = norm <= SAFE_NORM
    if QUERIES:
        kept = tl.where(safe | (norm != norm), norm, float("inf")).to(tl.float32)
        tl.store(norm_ptr + row, kept, mask=row < count)
    if GALLERY:
        half = tl.where(safe & (row < count), -0.5 * keep * norm, float("-inf"))
        tl.store(half_ptr + row, half.to(tl.float32))
        listed = ((norm > SAFE_NORM) & (row < count)).to(tl.int32)
        found = tl.sum(listed)
        if found > 0:
            place = tl.atomic_add(counters_ptr + UNSAFE, found) + tl.cumsum(listed, axis=0) - 1
            tl.store(unsafe_ptr + place, row, mask=listed != 0)


@triton.jit
def _best_of_classes(score, TILE_Q: tl.constexpr, TILE_X: tl.constexpr):
    # (TILE_Q, TILE_X) -> (TILE_Q, CLASSES): columns of one class lie in one thread, no shuffles
    return tl.max(tl.reshape(score, (TILE_Q, TILE_X // CLASSES, CLASSES)), axis=1)


@triton.jit(do_not_specialize=["query_count", "gallery_count", "splits", "tiles_per_split"])
def scan(
    queries,
    gallery,
    center_ptr,
    half_ptr,
    score_ptr,
    place_ptr,
    rest_ptr,
    stride_queries,
    stride_gallery,
    query_count,
    gallery_count,
    columns,
    splits,
    tiles_per_split,
    LEAVE_ONE_OUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CENTERED: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # score = q'.x' - keep/2 ||x'||^2, the larger the nearer. Programs of one split run side by
    # side: its tiles come from memory once and from the L2 cache for all but the first of them.
    first = tl.program_id(0) * TILE_Q
    split = tl.program_id(1)
    row = first + tl.arange(0, TILE_Q)
    lane = tl.arange(0, TILE_X)
    within = tl.arange(0, BLOCK)
    kind = tl.arange(0, CLASSES)[None, :]
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(gallery_count, TILE_X))
    if not DESCRIPTORS:
        safe_row = tl.minimum(row, query_count - 1).to(tl.int64)
        query_rows = queries + safe_row[:, None] * stride_queries + within[None, :]

    best = tl.full((TILE_Q, CLASSES), float("-inf"), tl.float32)
    second = tl.full((TILE_Q, CLASSES), float("-inf"), tl.float32)
    best_tile = tl.zeros((TILE_Q, CLASSES), tl.int32)
    # The accumulator starts at the norms' share: the tile is judged by one maximum an element.
    # half is padded by two tiles: the next tile's is under way while this one's is used.
    half = tl.load(half_ptr + begin * TILE_X + lane)
    acc = tl.broadcast_to(half[None, :], (TILE_Q, TILE_X))
    half = tl.load(half_ptr + (begin + 1) * TILE_X + lane)

    # One loop over tiles and columns: loads for the next tile are under way at the end of this
    # one. What is loaded runs ahead of what is multiplied, so each has its own two counters.
    load_tile = begin
    load_column = 0
    tile = begin
    column = 0
    for _ in tl.range(0, (end - begin) * tl.cdiv(columns, BLOCK), num_stages=STAGES):
        if DESCRIPTORS:
            q = queries.load([first, load_column])
            x = gallery.load([load_tile * TILE_X, load_column])
        else:
            safe_column = tl.minimum(load_tile * TILE_X + lane, gallery_count - 1).to(tl.int64)
            gallery_rows = gallery + safe_column[:, None] * stride_gallery + within[None, :]
            if EVEN:
                q = tl.load(query_rows + load_column)
                x = tl.load(gallery_rows + load_column)
            else:
                inside = (load_column + within < columns)[None, :]
                q = tl.load(query_rows + load_column, mask=inside, other=0.0)
                x = tl.load(gallery_rows + load_column, mask=inside, other=0.0)
        if CENTERED:
            inside = load_column + within < columns
            center = tl.load(center_ptr + load_column + within, mask=inside, other=0.0)[None, :]
            q = q.to(tl.float32) - center
            x = x.to(tl.float32) - center
        if INTERPRETED:  # its products take bfloat16 for integers
            q = q.to(tl.float32)
            x = x.to(tl.float32)
        load_tile = tl.where(load_column + BLOCK >= columns, load_tile + 1, load_tile)
        load_column = tl.where(load_column + BLOCK >= columns, 0, load_column + BLOCK)
        acc = tl.dot(q, x.T, acc, input_precision=PRECISION)
        column += BLOCK
        if column >= columns:
            if INTERPRETED:  # its maximum keeps NaN, the hardware's drops it
                acc = tl.where(acc == acc, acc, float("-inf"))
            start = tile * TILE_X
            if LEAVE_ONE_OUT:
                if (first < start + TILE_X) & (start < first + TILE_Q):
                    own = row[:, None] == (start + lane)[None, :]
                    here = _best_of_classes(tl.where(own, float("-inf"), acc), TILE_Q, TILE_X)
                else:
                    here = _best_of_classes(acc, TILE_Q, TILE_X)
            else:
                here = _best_of_classes(acc, TILE_Q, TILE_X)
            second = tl.maximum(second, tl.minimum(best, here))
            best_tile = tl.where(here > best, tile, best_tile)
            best = tl.maximum(best, here)
            tile += 1
            column = 0
            acc = tl.broadcast_to(half[None, :], (TILE_Q, TILE_X))
            half = tl.load(half_ptr + (tile + 1) * TILE_X + lane)

    inside = row < query_count
    at = row.to(tl.int64) * splits + split
    place = best_tile * CLASSES + kind
    rest = tl.max(second, axis=1)
    for candidate in tl.static_range(2):
        top = tl.max(best, axis=1)
        chosen = kind == tl.min(tl.where(best == top[:, None], kind, CLASSES - 1), axis=1)[:, None]
        tl.store(score_ptr + 2 * at + candidate, top, mask=inside)
        tl.store(
            place_ptr + 2 * at + candidate, tl.sum(tl.where(chosen, place, 0), axis=1), mask=inside
        )
        best = tl.where(chosen, float("-inf"), best)
    tl.store(rest_ptr + at, tl.maximum(rest, tl.max(best, axis=1)), mask=inside)
