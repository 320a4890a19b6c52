"""Hard mining of large batches in Triton: a tiled product whose epilogue keeps a few numbers an
anchor.

A program takes a tile of anchors and a share of all places. The centered rows come as two bfloat16
planes of 8 bits each, x = high + low, and the three products high high + high low + low high give G
with an error of about 2^-15: enough to find the candidates. Three bfloat16 products take half the
time of three TF32 ones and read half the bytes, and every GPU has them.

Places are scored by G_ij - lower_j / 2 for the nearest and upper_j / 2 - G_ij for the farthest,
where lower and upper bound the norm's share of a distance. Of a tile one class, every CLASSES-th
place, goes by its best score: that is one maximum an element, and no exchange between threads. A
share keeps its best class and the second best score. `_settle` measures the best class exactly,
then every share's best class whose bound is not above that, and all of a share where the second
best is not either. So the choice is that of measuring everything; only the time depends on the
data.

Rows are sorted by identity, so only tiles beside the diagonal hold positives and need a mask: they
are a kernel of their own, and the other one fits twice into a multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.batch_triplet_loss.triton_mining import (
    BATCH,
    NOBODY,
    far_distance,
    far_key,
    first_of,
    margin_in_two,
    measure,
    near_distance,
    near_key,
    store_hard,
)
from kdkernels.batch_triplet_loss.triton_sort import (
    INF,
    all_registers,
    arrange_planes,
    block_of_features,
    lower_norm,
    upper_norm,
)

CLASSES = tl.constexpr(8)  # two columns for each of the four lanes that share a line of a tile
# 128 x 128 x 32 in 3 stages takes 128 registers and 98 KB on sm_90: two programs a multiprocessor,
# one multiplies while the other looks for maxima; 56 of 64 KB on gfx942. Counted, not measured.
TILE = 128  # anchors of a program
WIDTH = 128  # places at a time; divides TILE
NARROW = 64  # beside the diagonal, where masks take registers; divides WIDTH
COLUMNS = 32
SHARES = 16  # of all places: 2048 programs at N=16,384, 512 at N=4096


@triton.jit
def _best_of_classes(score):
    # (lines, places) -> (lines, CLASSES)
    lines: tl.constexpr = score.shape[0]
    groups: tl.constexpr = score.shape[1] // CLASSES
    return tl.max(tl.reshape(score, (lines, groups, CLASSES)), axis=1)


@triton.jit
def _keep(here, start, best, second, best_start):
    second = tl.maximum(second, tl.minimum(best, here))
    best_start = tl.where(here > best, start, best_start)
    return tl.maximum(best, here), second, best_start


@triton.jit
def _store_best(best_ptr, second_ptr, class_ptr, at, best, second, best_start):
    # the best class of each line, its first place, and the best score of all others
    kind = tl.arange(0, CLASSES)[None, :]
    top = tl.max(best, axis=1)
    chosen = kind == tl.min(tl.where(best == top[:, None], kind, CLASSES - 1), axis=1)[:, None]
    rest = tl.max(tl.where(chosen, -INF, best), axis=1)
    tl.store(best_ptr + at, top)
    tl.store(second_ptr + at, tl.maximum(rest, tl.max(second, axis=1)))
    tl.store(class_ptr + at, tl.sum(tl.where(chosen, best_start + kind, 0), axis=1))


@triton.jit
def _scores(
    high_ptr, low_ptr, halves_ptr, stride, line, c, TILE: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # G - lower / 2 of lines and places: the accumulator starts at the norms' share
    k = tl.arange(0, COLUMNS)
    own = line.to(tl.int64)[:, None] * stride + k[None, :]
    other = c.to(tl.int64)[:, None] * stride + k[None, :]
    score = tl.broadcast_to(tl.load(halves_ptr + c)[None, :], (TILE, WIDTH))
    for column in range(0, stride, COLUMNS):
        own_high = tl.load(high_ptr + own + column)
        own_low = tl.load(low_ptr + own + column)
        high = tl.load(high_ptr + other + column)
        low = tl.load(low_ptr + other + column)
        score = tl.dot(own_low, high.T, score, input_precision="ieee")
        score = tl.dot(own_high, low.T, score, input_precision="ieee")
        score = tl.dot(own_high, high.T, score, input_precision="ieee")
    return score


@triton.jit(do_not_specialize=["tiles", "share"])
def _scan_tiles(
    high_ptr, low_ptr, halves_ptr, first_ptr, last_ptr, best_ptr, second_ptr, class_ptr, stride,
    tiles, share, TILE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # one share of the places for a tile of anchors, without the tiles that _scan_diagonal takes
    tile = tl.program_id(0) % tiles  # neighbors read the same share
    number = tl.program_id(0) // tiles
    places = tiles * TILE
    line = tile * TILE + tl.arange(0, TILE)
    begin = tl.load(first_ptr + tile * TILE) // WIDTH * WIDTH
    end = tl.load(last_ptr + tile * TILE + (TILE - 1))
    best = tl.full((TILE, CLASSES), -INF, tl.float32)
    second = tl.full((TILE, CLASSES), -INF, tl.float32)
    best_start = tl.zeros((TILE, CLASSES), tl.int32)
    for start in range(number * share, tl.minimum((number + 1) * share, places), WIDTH):
        if (start < begin) | (start >= end):
            c = start + tl.arange(0, WIDTH)
            score = _scores(high_ptr, low_ptr, halves_ptr, stride, line, c, TILE, WIDTH, COLUMNS)
            here = _best_of_classes(score)
            best, second, best_start = _keep(here, start, best, second, best_start)
    at = number.to(tl.int64) * places + line
    _store_best(best_ptr, second_ptr, class_ptr, at, best, second, best_start)


@triton.jit(do_not_specialize=["tiles"])
def _scan_diagonal(
    high_ptr, low_ptr, norms_ptr, halves_ptr, first_ptr, last_ptr, best_ptr, second_ptr, class_ptr,
    stride, tiles, relative, absolute, SHARES: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, NARROW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # the tiles that hold a tile of anchors' own identities: negatives and positives
    tile = tl.program_id(0)
    places = tiles * TILE
    line = tile * TILE + tl.arange(0, TILE)
    begin = tl.load(first_ptr + tile * TILE) // WIDTH * WIDTH
    end = tl.cdiv(tl.load(last_ptr + tile * TILE + (TILE - 1)), WIDTH) * WIDTH
    near = tl.full((TILE, CLASSES), -INF, tl.float32)
    next_near = tl.full((TILE, CLASSES), -INF, tl.float32)
    near_start = tl.zeros((TILE, CLASSES), tl.int32)
    far = tl.full((TILE, CLASSES), -INF, tl.float32)
    next_far = tl.full((TILE, CLASSES), -INF, tl.float32)
    far_start = tl.zeros((TILE, CLASSES), tl.int32)
    for start in range(begin, end, NARROW):
        c = start + tl.arange(0, NARROW)
        score = _scores(high_ptr, low_ptr, halves_ptr, stride, line, c, TILE, NARROW, COLUMNS)
        norm = tl.load(norms_ptr + c)
        error = upper_norm(norm, relative, absolute) - lower_norm(norm, relative, absolute)
        first, last = tl.load(first_ptr + line), tl.load(last_ptr + line)
        same = (c[None, :] >= first[:, None]) & (c[None, :] < last[:, None])
        distant = 0.5 * error[None, :] - score
        distant = tl.where(distant == distant, distant, INF)  # inf - inf: must be measured
        distant = tl.where(same & (c[None, :] != line[:, None]), distant, -INF)
        here = _best_of_classes(distant)
        far, next_far, far_start = _keep(here, start, far, next_far, far_start)
        here = _best_of_classes(tl.where(same, -INF, score))
        near, next_near, near_start = _keep(here, start, near, next_near, near_start)
    at = SHARES * places + line.to(tl.int64)
    _store_best(best_ptr, second_ptr, class_ptr, at, near, next_near, near_start)
    _store_best(best_ptr, second_ptr, class_ptr, at + places, far, next_far, far_start)


@triton.jit
def _measure_best(
    key, best, x_ptr, order_ptr, stride_x, rows, features, place, row, first, last, c, inside,
    BLOCK_D: tl.constexpr, FARTHEST: tl.constexpr,
):  # fmt: skip
    # the better of (key, best) and the places c that are of the wanted kind
    same = (c >= first) & (c < last)
    if FARTHEST:
        inside = inside & same & (c != place)
    else:
        inside = inside & (c < rows) & ~same
    others = tl.load(order_ptr + c, mask=inside, other=0)
    distance = measure(x_ptr, stride_x, row, others, inside, features, BLOCK_D)
    keys = far_key(distance) if FARTHEST else near_key(distance)
    return first_of(key, best, keys, others, inside)


@triton.jit
def _search(
    x_ptr, order_ptr, best_ptr, second_ptr, class_ptr, stride_x, rows, places, share, features,
    place, row, first, last, begin, end, own, SHARES: tl.constexpr, WIDTH: tl.constexpr,
    NARROW: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr, FARTHEST: tl.constexpr,
):  # fmt: skip
    # Key and row of the nearest negative or the farthest positive; own - 2 score bounds the key.
    key, best = tl.full([], INF, tl.float64), tl.full([], NOBODY, tl.int32)
    number = tl.arange(0, 2 * SHARES)  # the shares, then the diagonal's negatives and positives
    if FARTHEST:
        exists = number == SHARES + 1
    else:
        exists = number <= SHARES
    at = number.to(tl.int64) * places + place
    top = tl.load(best_ptr + at, mask=exists, other=-INF)
    second = tl.load(second_ptr + at, mask=exists, other=-INF)
    start = tl.load(class_ptr + at, mask=exists, other=0)
    bound = tl.where(top > -INF, own - 2.0 * top, INF).to(tl.float64)
    bound_second = tl.where(second > -INF, own - 2.0 * second, INF).to(tl.float64)
    member = tl.arange(0, WIDTH // CLASSES)
    # the best class of the most promising share, then of those that may be better still
    promising = tl.min(tl.where(bound == tl.min(bound, axis=0), number, 2 * SHARES - 1), axis=0)
    left = number == promising
    for _turn in tl.static_range(2):
        rank = tl.cumsum(left.to(tl.int32), axis=0)
        for done in range(0, tl.sum(left.to(tl.int32), axis=0)):
            chosen = left & (rank == done + 1)
            c = tl.sum(tl.where(chosen, start, 0), axis=0) + CLASSES * member
            is_narrow = tl.sum(tl.where(chosen, number, 0), axis=0) >= SHARES
            inside = member < tl.where(is_narrow, NARROW // CLASSES, WIDTH // CLASSES)
            key, best = _measure_best(
                key, best, x_ptr, order_ptr, stride_x, rows, features, place, row, first, last, c,
                inside, BLOCK_D, FARTHEST,
            )  # fmt: skip
        left = (top > -INF) & (number != promising) & ~(bound > key)
    # everything where the second best may be better
    left = (second > -INF) & ~(bound_second > key)
    rank = tl.cumsum(left.to(tl.int32), axis=0)
    for done in range(0, tl.sum(left.to(tl.int32), axis=0)):
        chosen = tl.sum(tl.where(left & (rank == done + 1), number, 0), axis=0)
        from_place = tl.where(chosen < SHARES, chosen * share, begin)
        to_place = tl.where(chosen < SHARES, (chosen + 1) * share, end)
        if FARTHEST:
            from_place, to_place = first, last
        for c_begin in range(from_place, to_place, BATCH):
            c = c_begin + tl.arange(0, BATCH)
            key, best = _measure_best(
                key, best, x_ptr, order_ptr, stride_x, rows, features, place, row, first, last, c,
                c < to_place, BLOCK_D, FARTHEST,
            )  # fmt: skip
    return key, best


@triton.jit(do_not_specialize=["rows", "places", "share"])
def _settle(
    x_ptr, norms_ptr, order_ptr, first_ptr, last_ptr, best_ptr, second_ptr, class_ptr, losses_ptr,
    totals_ptr, partners_ptr, slopes_ptr, stride_x, rows, places, share, features, margin,
    margin_rest, relative, absolute, SQUARED: tl.constexpr, WANT_GRADIENT: tl.constexpr,
    SHARES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(order_ptr + place)
    first, last = tl.load(first_ptr + place), tl.load(last_ptr + place)
    valid = (last - first > 1) & (last - first < rows)
    far, near = tl.full([], INF, tl.float64), tl.full([], INF, tl.float64)
    positive, negative = tl.full([], NOBODY, tl.int32), tl.full([], NOBODY, tl.int32)
    if valid:
        own = tl.load(norms_ptr + place)
        tile = place // TILE * TILE
        begin = tl.load(first_ptr + tile) // WIDTH * WIDTH  # what _scan_diagonal saw
        end = tl.cdiv(tl.load(last_ptr + tile + (TILE - 1)), WIDTH) * WIDTH
        near, negative = _search(
            x_ptr, order_ptr, best_ptr, second_ptr, class_ptr, stride_x, rows, places, share,
            features, place, row, first, last, begin, end, lower_norm(own, relative, absolute),
            SHARES, WIDTH, NARROW, BLOCK_D, BATCH, False,
        )  # fmt: skip
        far, positive = _search(
            x_ptr, order_ptr, best_ptr, second_ptr, class_ptr, stride_x, rows, places, share,
            features, place, row, first, last, begin, end, -upper_norm(own, relative, absolute),
            SHARES, WIDTH, NARROW, BLOCK_D, BATCH, True,
        )  # fmt: skip
    store_hard(
        losses_ptr, totals_ptr, partners_ptr, slopes_ptr, rows, row, valid,
        far_distance(far), positive, near_distance(near), negative, margin, margin_rest,
        SQUARED, WANT_GRADIENT,
    )  # fmt: skip


def error_of_planes(columns: int) -> tuple[float, float]:
    """e and f: n_i + n_j - 2 G_ij of the split rows is off by e (n_i + n_j) + f at most.

    bfloat16 rounds by 2^-8, so low is at most 2^-8 |x|, and what both planes leave out 2^-16 |x|:
    low low and twice that rest are missing, 3 * 2^-16 |x_i| |x_j|. Products of bfloat16 are exact
    in float32. Tensor cores cut off where a float32 sum would round: 2^-23 of the largest partial
    sum for each of the 3 D terms, and for the sum itself, once in at least 8 of them. Partial sums
    start at n_j / 2, so they stay below n_i + n_j. 40 units are for the norms and the sums.
    """
    return 3 * 2.0**-16 + (2 * 3 * columns * 1.125 + 40) * 2.0**-23, columns * 1e-36


def mine_hard_tiled(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    squared: bool,
    losses: Tensor,
    totals: Tensor,
    partners: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """triton_mining.mine for "hard" without G: O(N D) memory. Returns the embeddings as they
    were read."""
    count, features = embeddings.shape
    errors = error_of_planes(features)
    batch, planes = arrange_planes(embeddings, labels, TILE, COLUMNS, errors)
    (places, width), device = batch.centered.shape, embeddings.device
    tiles = places // TILE
    share = triton.cdiv(tiles, SHARES) * TILE
    # the shares, then the diagonal's negatives and positives, by place
    best, second = (
        torch.empty((SHARES + 2, places), dtype=torch.float32, device=device) for _ in range(2)
    )
    classes = torch.empty((SHARES + 2, places), dtype=torch.int32, device=device)
    found = (best, second, classes)
    sizes = {"TILE": TILE, "WIDTH": WIDTH}
    options = {"COLUMNS": COLUMNS, "num_warps": 8, "num_stages": 3}
    common.launch(
        _scan_tiles, (tiles * SHARES,), batch.centered, planes.low, planes.halves, batch.first,
        batch.last, *found, width, tiles, share, **sizes, **options,
    )  # fmt: skip
    common.launch(
        _scan_diagonal, (tiles,), batch.centered, planes.low, batch.norms, planes.halves,
        batch.first, batch.last, *found, width, tiles, *errors, SHARES=SHARES, NARROW=NARROW,
        **sizes, **options,
    )  # fmt: skip
    common.launch(
        _settle, (count,), batch.x, batch.norms, batch.order, batch.first, batch.last, *found,
        losses, totals, partners, slopes, batch.x.stride(0), count, places, share, features,
        *margin_in_two(margin), *errors, SQUARED=squared, WANT_GRADIENT=partners is not None,
        SHARES=SHARES, NARROW=NARROW, **sizes, BLOCK_D=min(128, block_of_features(features)),
        BATCH=4 * BATCH, num_warps=4, **all_registers(),
    )  # fmt: skip
    return batch.x
