"""Mining of batch_triplet_loss in Triton by lines of the Gram matrix.

The Gram matrix G of the centered rows gives the squared distance n_i + n_j - 2 G_ij with an error
of at most `relative` (n_i + n_j) + `absolute`. Decisions within that error (the nearest candidate,
the sign of a hinge, a distance much smaller than its norms) are measured again from the
differences, in double, as the native kernels do. A place is a row's number in the order of
identities, a row its number in the batch: ties are decided by rows.
"""

import ctypes
import math

import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.batch_triplet_loss.triton_sort import (
    INF,
    Batch,
    all_registers,
    block_of_features,
    lower_norm,
    upper_norm,
)
from kdkernels.product_error import error_of_products

NOBODY = tl.constexpr(2**31 - 1)  # a row after all others
ROUNDING = tl.constexpr(2.0**-22)  # a float of a double, with room for the arithmetic around it
CLOSE_SHARE = tl.constexpr(0.125)  # below this share of n_i + n_j the Gram form has lost 3 bits
# Stand-ins for what does not compare: larger than every finite distance, which is below 1e84.
INFINITE = tl.constexpr(1e300)
UNDEFINED = tl.constexpr(1e301)

MOST_BLOCK = 1024  # places that a mining program looks at together
POSITIVES = 8  # positives that share one reading of the negatives
BATCH = 4  # rows measured together
MEASURED_COLUMNS = 256  # of them at a time, as double


@triton.jit
def measure(x_ptr, stride, row, others, inside, features, BLOCK_D: tl.constexpr):
    """Squared distances from one row to others, in double."""
    total = tl.zeros([others.shape[0], BLOCK_D], tl.float64)
    own_ptr = x_ptr + row.to(tl.int64) * stride
    others_ptr = x_ptr + others.to(tl.int64)[:, None] * stride
    for begin in range(0, features, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        own = tl.load(own_ptr + column, mask=column < features, other=0.0)
        mask = inside[:, None] & (column < features)[None, :]
        other = tl.load(others_ptr + column[None, :], mask=mask, other=0.0)
        difference = own.to(tl.float32).to(tl.float64)[None, :]
        difference -= other.to(tl.float32).to(tl.float64)
        total += difference * difference
    return tl.sum(total, axis=1)


@triton.jit
def take(candidates, rank, at, done, BATCH: tl.constexpr):
    """The next BATCH of the candidates after the first `done`; rank: their running count."""
    slot = tl.arange(0, BATCH)
    hit = candidates[None, :] & (rank[None, :] == done + 1 + slot[:, None])
    return tl.sum(tl.where(hit, at[None, :], 0), axis=1)


@triton.jit
def near_key(distance):
    """The key of a squared distance when the nearest is searched: NaN comes first."""
    return tl.where(distance != distance, -1.0, tl.minimum(distance, INFINITE))


@triton.jit
def near_distance(key):
    """The squared distance back from its near_key."""
    return tl.where(key < 0.0, float("nan"), tl.where(key >= INFINITE, INF, key))


@triton.jit
def far_key(distance):
    """The same where the farthest is wanted: the least key is the farthest, NaN comes first."""
    return tl.where(distance != distance, -UNDEFINED, -tl.minimum(distance, INFINITE))


@triton.jit
def far_distance(key):
    """The squared distance back from its far_key."""
    return tl.where(key <= -UNDEFINED, float("nan"), tl.where(key <= -INFINITE, INF, -key))


@triton.jit
def first_of(key, row, keys, others, eligible):
    """The least key with its row, of (key, row) and the eligible ones of (keys, others); of equal
    keys the lowest row."""
    keys = tl.where(eligible, keys, INF)
    least = tl.min(keys, axis=0)
    lowest = tl.min(tl.where(eligible & (keys == least), others, NOBODY), axis=0)
    better = (least < key) | ((least == key) & (lowest < row))
    return tl.where(better, least, key), tl.where(better, lowest, row)


@triton.jit
def farthest_positive(
    key, best, x_ptr, stride, order_ptr, place, row, begin, end, features,
    BATCH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """far_key and row of the farthest of places [begin, end) but `place`, if farther than `key`."""
    for start in range(begin, end, BATCH):
        at = start + tl.arange(0, BATCH)
        inside = (at < end) & (at != place)
        others = tl.load(order_ptr + at, mask=inside, other=0)
        distance = measure(x_ptr, stride, row, others, inside, features, BLOCK_D)
        key, best = first_of(key, best, far_key(distance), others, inside)
    return key, best


@triton.jit
def root(squared_distance, SQUARED: tl.constexpr):
    return squared_distance if SQUARED else tl.sqrt(squared_distance)


@triton.jit
def slope(distance, SQUARED: tl.constexpr):
    """The part of W that a triplet adds for a pair: the derivative without x_i - x_j. 0 at distance
    0, as which one below 2^-100 counts: its inverse would overflow."""
    if SQUARED:
        return tl.zeros_like(distance).to(tl.float32) + 2.0
    else:
        single = distance.to(tl.float32)
        at_zero = single < 7.888609e-31
        return tl.where(at_zero, 0.0, 1.0 / tl.where(at_zero, 1.0, single))


@triton.jit
def both_parts(margin, margin_rest):
    """The margin in double, see margin_in_two."""
    return tl.full([], margin, tl.float64) + tl.full([], margin_rest, tl.float64)


@triton.jit
def store_hard(
    losses_ptr, totals_ptr, partners_ptr, slopes_ptr, rows, row, valid,
    to_positive, positive, to_negative, negative, margin, margin_rest,
    SQUARED: tl.constexpr, WANT_GRADIENT: tl.constexpr,
):  # fmt: skip
    """An anchor's one triplet: its loss and counts, and partners and slopes (-1 and 0 for none)."""
    near, far = root(to_positive, SQUARED), root(to_negative, SQUARED)
    hinge = near - far + both_parts(margin, margin_rest)
    is_active = valid & ~(hinge <= 0.0)  # a NaN goes on: it has to come out
    loss = tl.where(is_active, hinge, 0.0)
    tl.store(losses_ptr + row, loss.to(tl.float32))
    tl.store(totals_ptr + row, loss)
    tl.store(totals_ptr + rows + row, valid.to(tl.float64))
    tl.store(totals_ptr + 2 * rows + row, is_active.to(tl.float64))
    if WANT_GRADIENT:
        tl.store(partners_ptr + row, tl.where(is_active, positive, -1))
        tl.store(partners_ptr + rows + row, tl.where(is_active, negative, -1))
        tl.store(slopes_ptr + row, tl.where(is_active, slope(near, SQUARED), 0.0))
        tl.store(slopes_ptr + rows + row, tl.where(is_active, -slope(far, SQUARED), 0.0))


@triton.jit
def _negatives(
    gram_ptr, norms_ptr, begin, rows, first, last, BLOCK: tl.constexpr
):  # fmt: skip
    # places, which of them are negatives, their norms and the doubled products with the anchor
    at = begin + tl.arange(0, BLOCK)
    is_negative = (at < rows) & ((at < first) | (at >= last))
    norm = tl.load(norms_ptr + at, mask=at < rows, other=0.0)
    return at, is_negative, norm, 2.0 * tl.load(gram_ptr + at, mask=is_negative, other=0.0)


@triton.jit
def _nearest_negatives(
    x_ptr, gram_ptr, norms_ptr, order_ptr, stride_x, rows, features, row, own, first, last,
    limit, relative, absolute, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    # For each limit the nearest negative that is strictly farther: near_key and row.
    single = limit.to(tl.float32)
    surely, possibly = single * (1.0 + ROUNDING), single * (1.0 - ROUNDING)
    own_lower, own_upper = lower_norm(own, relative, absolute), upper_norm(own, relative, absolute)
    bound = tl.zeros_like(single) + INF
    for begin in range(0, rows, BLOCK):
        at, is_negative, norm, twice = _negatives(
            gram_ptr, norms_ptr, begin, rows, first, last, BLOCK
        )
        lower = own_lower + lower_norm(norm, relative, absolute) - twice
        upper = own_upper + upper_norm(norm, relative, absolute) - twice
        is_sure = is_negative[None, :] & (lower[None, :] > surely[:, None])
        bound = tl.minimum(bound, tl.min(tl.where(is_sure, upper[None, :], INF), axis=1))
    key = tl.zeros_like(limit) + INF
    best = tl.zeros_like(limit).to(tl.int32) + NOBODY
    for begin in range(0, rows, BLOCK):
        at, is_negative, norm, twice = _negatives(
            gram_ptr, norms_ptr, begin, rows, first, last, BLOCK
        )
        lower = own_lower + lower_norm(norm, relative, absolute) - twice
        upper = own_upper + upper_norm(norm, relative, absolute) - twice
        may = ~(lower[None, :] > bound[:, None]) & ~(upper[None, :] < possibly[:, None])
        candidates = is_negative & (tl.max(may.to(tl.int32), axis=0) > 0)
        number = tl.sum(candidates.to(tl.int32), axis=0)
        if number > 0:
            rank = tl.cumsum(candidates.to(tl.int32), axis=0)
            for done in range(0, number, BATCH):
                inside = tl.arange(0, BATCH) < number - done
                places = take(candidates, rank, at, done, BATCH)
                others = tl.load(order_ptr + places, mask=inside, other=0)
                distance = measure(x_ptr, stride_x, row, others, inside, features, BLOCK_D)
                eligible = inside[:, None] & ~(distance[:, None] <= limit[None, :])
                keys = near_key(distance)[:, None] + tl.zeros_like(limit)[None, :]
                named = others[:, None] + tl.zeros_like(best)[None, :]
                key, best = first_of(key, best, keys, named, eligible)
    return key, best


@triton.jit(do_not_specialize=["rows"])
def _mine_hard(
    x_ptr, gram_ptr, norms_ptr, order_ptr, first_ptr, last_ptr, losses_ptr, totals_ptr,
    partners_ptr, slopes_ptr, stride_x, stride_gram, rows, features, margin, margin_rest,
    relative, absolute, SQUARED: tl.constexpr, WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(order_ptr + place)
    first, last = tl.load(first_ptr + place), tl.load(last_ptr + place)
    valid = (last - first > 1) & (last - first < rows)
    far, near = tl.full([], INF, tl.float64), tl.full([], INF, tl.float64)
    positive, negative = tl.full([], NOBODY, tl.int32), tl.full([], NOBODY, tl.int32)
    if valid:
        far, positive = farthest_positive(
            far, positive, x_ptr, stride_x, order_ptr, place, row, first, last, features,
            BATCH, BLOCK_D,
        )  # fmt: skip
        keys, best = _nearest_negatives(
            x_ptr, gram_ptr + place.to(tl.int64) * stride_gram, norms_ptr, order_ptr, stride_x,
            rows, features, row, tl.load(norms_ptr + place), first, last,
            tl.full([1], -INF, tl.float64), relative, absolute, BLOCK, BLOCK_D, BATCH,
        )  # fmt: skip
        near, negative = tl.min(keys, axis=0), tl.min(best, axis=0)
    store_hard(
        losses_ptr, totals_ptr, partners_ptr, slopes_ptr, rows, row, valid,
        far_distance(far), positive, near_distance(near), negative, margin, margin_rest,
        SQUARED, WANT_GRADIENT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "begin"])
def _mine_semihard(
    x_ptr, gram_ptr, coefficients_ptr, norms_ptr, order_ptr, places_ptr, first_ptr, last_ptr,
    losses_ptr, totals_ptr, stride_x, stride_gram, begin, rows, features, margin, margin_rest,
    relative, absolute, SQUARED: tl.constexpr, WANT_GRADIENT: tl.constexpr,
    POSITIVES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    place = begin + tl.program_id(0)
    line = tl.program_id(0).to(tl.int64) * stride_gram
    row = tl.load(order_ptr + place)
    first, last = tl.load(first_ptr + place), tl.load(last_ptr + place)
    own = tl.load(norms_ptr + place)
    margin64 = both_parts(margin, margin_rest)
    loss, triplets, active = (tl.zeros([], tl.float64),) * 3
    lane = tl.arange(0, POSITIVES)
    has_triplets = (last - first > 1) & (last - first < rows)
    for start in range(first, tl.where(has_triplets, last, first), POSITIVES):
        at = start + lane
        is_positive = (at < last) & (at != place)
        positives = tl.load(order_ptr + at, mask=is_positive, other=0)
        limit = measure(x_ptr, stride_x, row, positives, is_positive, features, BLOCK_D)
        limit = tl.where(is_positive, limit, INF)  # nothing is farther
        key, negative = _nearest_negatives(
            x_ptr, gram_ptr + line, norms_ptr, order_ptr, stride_x, rows, features, row, own,
            first, last, limit, relative, absolute, BLOCK, BLOCK_D, BATCH,
        )  # fmt: skip
        exists = is_positive & (key < INF)
        near, far = root(limit, SQUARED), root(near_distance(key), SQUARED)
        hinge = near - far + margin64
        is_active = exists & ~(hinge <= 0.0)
        loss += tl.sum(tl.where(is_active, hinge, 0.0), axis=0)
        triplets += tl.sum(exists.to(tl.float64), axis=0)
        active += tl.sum(is_active.to(tl.float64), axis=0)
        if WANT_GRADIENT:
            line_ptr = coefficients_ptr + line
            tl.store(line_ptr + at, slope(near, SQUARED), mask=is_active)
            to_negative = slope(far, SQUARED)
            # one after another: several positives may have the same negative
            for one in tl.static_range(POSITIVES):
                chosen = is_active & (lane == one)
                if tl.max(chosen.to(tl.int32), axis=0) > 0:
                    there = tl.load(places_ptr + tl.sum(tl.where(chosen, negative, 0), axis=0))
                    tl.debug_barrier()
                    sum_now = tl.load(line_ptr + there)
                    tl.debug_barrier()
                    step = tl.sum(tl.where(chosen, to_negative, 0.0), axis=0)
                    tl.store(line_ptr + there, sum_now - step)
    tl.store(losses_ptr + row, loss.to(tl.float32))
    tl.store(totals_ptr + row, loss)
    tl.store(totals_ptr + rows + row, triplets)
    tl.store(totals_ptr + 2 * rows + row, active)


@triton.jit(do_not_specialize=["rows", "begin"])
def _mine_all(
    x_ptr, gram_ptr, coefficients_ptr, norms_ptr, order_ptr, first_ptr, last_ptr,
    losses_ptr, totals_ptr, stride_x, stride_gram, begin, rows, features, margin, margin_rest,
    relative, absolute, SQUARED: tl.constexpr, WANT_GRADIENT: tl.constexpr,
    POSITIVES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    place = begin + tl.program_id(0)
    line = tl.program_id(0).to(tl.int64) * stride_gram
    row = tl.load(order_ptr + place)
    first, last = tl.load(first_ptr + place), tl.load(last_ptr + place)
    own = tl.load(norms_ptr + place)
    margin64 = both_parts(margin, margin_rest)
    lane = tl.arange(0, POSITIVES)
    if WANT_GRADIENT:
        line_ptr = coefficients_ptr + line
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(line_ptr + at, tl.zeros([BLOCK], tl.float32), mask=at < last)
    has_triplets = (last - first > 1) & (last - first < rows)
    loss, active = (tl.zeros([], tl.float64),) * 2
    for block in range(0, rows, BLOCK):
        at, is_negative, norm, twice = _negatives(
            gram_ptr + line, norms_ptr, block, rows, first, last, BLOCK
        )
        norm += own
        value = norm - twice  # inf where a norm is
        slack = norm * relative + absolute
        close = ~(value > norm * CLOSE_SHARE)
        if not SQUARED:
            value = tl.sqrt_rn(tl.maximum(value, 0.0))
            # twice what sqrt(d + slack) - sqrt(d) is, to first order
            slack = tl.where(close, INF, slack / tl.maximum(value, 1e-30)) + value * ROUNDING
        count = tl.zeros([BLOCK], tl.float32)  # active triplets of each negative
        tl.debug_barrier()  # the sums of the positives, below, were stored by other threads
        for start in range(first, tl.where(has_triplets, last, first), POSITIVES):
            p = start + lane
            is_positive = (p < last) & (p != place)
            positives = tl.load(order_ptr + p, mask=is_positive, other=0)
            squared = measure(x_ptr, stride_x, row, positives, is_positive, features, BLOCK_D)
            to_positive = root(squared, SQUARED)
            edge = to_positive + margin64  # a negative nearer than this has a positive hinge
            single = edge.to(tl.float32)
            doubt = (tl.abs(to_positive) + tl.abs(margin64)).to(tl.float32) * ROUNDING
            hinge = single[:, None] - value[None, :]
            unsure = ~(tl.abs(hinge) > slack[None, :] + doubt[:, None]) & is_positive[:, None]
            candidates = is_negative & (close | (tl.max(unsure.to(tl.int32), axis=0) > 0))
            counted = (is_negative & ~candidates)[None, :] & is_positive[:, None] & (hinge > 0.0)
            count += tl.sum(counted.to(tl.float32), axis=0)
            part = tl.sum(tl.where(counted, hinge, 0.0), axis=1).to(tl.float64)
            number = tl.sum(counted.to(tl.float32), axis=1).to(tl.float64)
            part += tl.where(number > 0.0, (edge - single.to(tl.float64)) * number, 0.0)
            unclear = tl.sum(candidates.to(tl.int32), axis=0)
            if unclear > 0:
                rank = tl.cumsum(candidates.to(tl.int32), axis=0)
                for done in range(0, unclear, BATCH):
                    inside = tl.arange(0, BATCH) < unclear - done
                    places = take(candidates, rank, at, done, BATCH)
                    others = tl.load(order_ptr + places, mask=inside, other=0)
                    exact = measure(x_ptr, stride_x, row, others, inside, features, BLOCK_D)
                    exact = root(exact, SQUARED)
                    exact_hinge = to_positive[:, None] - exact[None, :] + margin64
                    on = inside[None, :] & is_positive[:, None] & ~(exact_hinge <= 0.0)
                    part += tl.sum(tl.where(on, exact_hinge, 0.0), axis=1)
                    number += tl.sum(on.to(tl.float64), axis=1)
                    each = tl.sum(on.to(tl.float32), axis=0)
                    here = inside[:, None] & (places[:, None] == at[None, :])
                    count += tl.sum(tl.where(here, each[:, None], 0.0), axis=0)
                    # the distance is known now: a close one is measured once for all positives
                    is_here = tl.max(here.to(tl.int32), axis=0) > 0
                    known = tl.where(here, exact.to(tl.float32)[:, None], 0.0)
                    value = tl.where(is_here, tl.sum(known, axis=0), value)
                    slack = tl.where(is_here, tl.abs(value) * ROUNDING, slack)
                    close = close & ~(is_here & (value < INF))
            loss += tl.sum(part, axis=0)
            active += tl.sum(number, axis=0)
            if WANT_GRADIENT:
                so_far = tl.load(line_ptr + p, mask=is_positive, other=0.0)
                so_far += number.to(tl.float32) * slope(to_positive, SQUARED)
                tl.store(line_ptr + p, so_far, mask=is_positive)
        if WANT_GRADIENT:
            tl.store(line_ptr + at, -count * slope(value, SQUARED), mask=is_negative)
    number_positives = last - first - 1
    triplets = number_positives.to(tl.float64) * (rows - number_positives - 1).to(tl.float64)
    tl.store(losses_ptr + row, loss.to(tl.float32))
    tl.store(totals_ptr + row, loss)
    tl.store(totals_ptr + rows + row, triplets)
    tl.store(totals_ptr + 2 * rows + row, active)


def margin_in_two(margin: float) -> tuple[float, float]:
    """The margin as two float32 numbers: a kernel's arguments have no more."""
    single = ctypes.c_float(margin).value
    return single, margin - single if math.isfinite(single) else 0.0


def mine(
    batch: Batch,
    gram: Tensor,
    coefficients: Tensor | None,
    begin: int,
    mining: str,
    margin: float,
    squared: bool,
    losses: Tensor,
    totals: Tensor,
    partners: Tensor | None = None,
    slopes: Tensor | None = None,
) -> None:
    """Mines for the anchors at places [begin, begin + len(gram)) from their lines of G.

    Writes each one's loss (N,) and the sums of losses, triplets and active triplets (3, N), by row;
    for "hard" its partners and slopes (2, N), else its line of W, by place, in `coefficients`.
    """
    (count, features), device = batch.x.shape, batch.x.device
    block = min(MOST_BLOCK, triton.next_power_of_2(count))
    numbers = (*margin_in_two(margin), *error_of_products(features, device.type))
    sizes = {
        "BLOCK": block,
        "BLOCK_D": min(MEASURED_COLUMNS, block_of_features(features)),
        "BATCH": BATCH,
        "num_warps": 8 if block > 512 else 4,
        **all_registers(),
    }
    strides = (batch.x.stride(0), gram.stride(0))
    grid = (len(gram),)
    if mining == "hard":
        common.launch(
            _mine_hard, grid, batch.x, gram, batch.norms, batch.order, batch.first, batch.last,
            losses, totals, partners, slopes, *strides, count, features, *numbers,
            SQUARED=squared, WANT_GRADIENT=partners is not None, **sizes,
        )  # fmt: skip
    elif mining == "semihard":
        common.launch(
            _mine_semihard, grid, batch.x, gram, coefficients, batch.norms, batch.order,
            batch.places, batch.first, batch.last, losses, totals, *strides, begin, count,
            features, *numbers, SQUARED=squared, WANT_GRADIENT=coefficients is not None,
            POSITIVES=POSITIVES, **sizes,
        )  # fmt: skip
    else:
        common.launch(
            _mine_all, grid, batch.x, gram, coefficients, batch.norms, batch.order, batch.first,
            batch.last, losses, totals, *strides, begin, count, features, *numbers,
            SQUARED=squared, WANT_GRADIENT=coefficients is not None, POSITIVES=POSITIVES, **sizes,
        )  # fmt: skip
