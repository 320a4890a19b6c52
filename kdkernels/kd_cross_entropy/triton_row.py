"""The mathematics of one row pair on the device: exponentials, statistics, losses, gradient.

Exponentials are relative to the row's maxima: u = 2^((s - m) log2(e) / tau), v likewise for the
teacher. At an integer temperature exp(s - m) = u^tau and takes no exponential of its own. The
derivation is in docs/ops.md.
"""

import triton
import triton.language as tl

from kdkernels.kd_cross_entropy.triton_tiles import INFINITY

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, for -inf - -inf is NaN


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT by repeated squaring."""
    if EXPONENT == 1:
        return x
    elif EXPONENT % 2 == 0:
        half = power(x, EXPONENT // 2)
        return half * half
    else:
        return power(x, EXPONENT - 1) * x


@triton.jit
def references(s_max, t_max):
    """References of the exponentials: the maxima, finite where no logit is."""
    return tl.maximum(s_max, LOWEST), tl.maximum(t_max, LOWEST)


@triton.jit
def exponentials(s, t, refs, scale, PLAN: tl.constexpr):
    """The arguments a and b of u and v; u, p = exp(s - m) and v."""
    ahead = s - refs[0]
    a = ahead * scale
    u = tl.exp2(a)
    p = power(u, PLAN.power) if PLAN.power > 0 else tl.exp2(ahead * LOG2E)
    if PLAN.has_teacher:
        b = (t - refs[1]) * scale
        v = tl.exp2(b)
    else:
        b, v = a, u
    return a, b, u, p, v


@triton.jit
def weighted(v, argument):
    """v * argument, and 0 where v is 0, at an argument of -inf too."""
    return tl.where(v == 0.0, 0.0, v * argument)


@triton.jit
def largest(tiles, edge, TILES: tl.constexpr):
    """Each lane's maximum over its tiles and its edge class."""
    most = tiles[0]
    for i in tl.static_range(1, TILES):
        most = tl.maximum(most, tiles[i])
    return tl.maximum(tl.max(most, axis=1), edge)


@triton.jit
def left_of_label(s_tiles, at, label_at, before, TILES: tl.constexpr, PLAN: tl.constexpr):
    """`before`, or a lane's maximum over tiles left of the label where that is larger."""
    for i in tl.static_range(TILES):
        is_left = at + i * PLAN.lanes * PLAN.vec < label_at
        before = tl.maximum(before, tl.max(tl.where(is_left, s_tiles[i], -INFINITY), axis=1))
    return before


@triton.jit
def is_first(student, label, s_label, s_max, PLAN: tl.constexpr):
    """Whether the label is the first class with the row's maximum: a look at the classes left of it
    (which are still in the cache) where it has the maximum, as it rarely does at first."""
    found = s_label == s_max
    if found:
        BLOCK: tl.constexpr = 4 * PLAN.lanes
        ties = tl.full((BLOCK,), 0, tl.int32)
        for begin in range(0, label, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            s = tl.load(student + column, mask=column < label, other=-INFINITY).to(tl.float32)
            ties = tl.maximum(ties, (s == s_max).to(tl.int32))
        found = tl.max(ties, axis=0) == 0
    return found


@triton.jit
def _max2(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def _sum2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _sum5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def row_maxima(s_max, t_max, PLAN: tl.constexpr):
    """The maxima of the row from those of its lanes, in one exchange."""
    if PLAN.has_teacher:
        return tl.reduce((s_max, t_max), 0, _max2)
    else:
        most = tl.max(s_max, axis=0)
        return most, most


@triton.jit
def row_sums(sums, more, PLAN: tl.constexpr):
    """The sums of the row, and that of `more`, from those of its lanes: one exchange, another for
    what only terms and smoothing need. Always in the same order."""
    P, U, V, VA, VB, S = sums
    if PLAN.has_teacher:
        P, U, V, VA, more = tl.reduce((P, U, V, VA, more), 0, _sum5)
    else:
        P, more = tl.reduce((P, more), 0, _sum2)
        U, V, VA = P, P, P
    if PLAN.terms or PLAN.smoothing:
        VB, S = tl.reduce((VB, S), 0, _sum2)
    else:
        VB, S = P, P
    return (P, U, V, VA, VB, S), more


@triton.jit
def edge_sums(s, t, exists, refs, scale, PLAN: tl.constexpr):
    """A lane's sums over its edge class: of p, u, v, v a, v b and s."""
    a, b, u, p, v = exponentials(s, t, refs, scale, PLAN)
    return p, u, v, weighted(v, a), weighted(v, b), tl.where(exists, s, 0.0)


@triton.jit
def add_exponentials(
    sums,
    s_tiles,
    t_tiles,
    at,
    limit,
    refs,
    scale,
    TILES: tl.constexpr,
    FULL: tl.constexpr,
    PLAN: tl.constexpr,
):
    """A lane's sums with TILES more tiles (from FULL on masked), and the tiles' u, p and v."""
    P, U, V, VA, VB, S = sums
    us, ps, vs = (), (), ()
    for i in tl.static_range(TILES):
        a, b, u, p, v = exponentials(s_tiles[i], t_tiles[i], refs, scale, PLAN)
        us, ps, vs = us + (u,), ps + (p,), vs + (v,)
        # one running sum a lane: one for each place in a vector would not leave enough registers
        P += tl.sum(p, axis=1)
        if PLAN.has_teacher:
            U += tl.sum(u, axis=1)
            V += tl.sum(v, axis=1)
            VA += tl.sum(weighted(v, a), axis=1)
            if PLAN.terms:
                VB += tl.sum(weighted(v, b), axis=1)
        if PLAN.smoothing:
            s = s_tiles[i]
            if PLAN.margin:  # the label, and what is masked: cosines are finite
                s = tl.where(s == -INFINITY, 0.0, s)
            elif i >= FULL:
                s = tl.where(at + i * PLAN.lanes * PLAN.vec < limit, s, 0.0)
            S += tl.sum(s, axis=1)
    return (P, U, V, VA, VB, S), (us, ps, vs)


@triton.jit
def move(sums, old, new, scale, PLAN: tl.constexpr):
    """Sums that were taken against the references `old`, against `new`."""
    P, U, V, VA, VB, S = sums
    by = (old[0] - new[0]) * scale
    shift = tl.exp2(by)
    P *= power(shift, PLAN.power) if PLAN.power > 0 else tl.exp2((old[0] - new[0]) * LOG2E)
    U *= shift
    if PLAN.has_teacher:
        by_t = (old[1] - new[1]) * scale
        shift = tl.exp2(by_t)
        VA = tl.where(shift == 0.0, 0.0, (VA + V * by) * shift)
        VB = tl.where(shift == 0.0, 0.0, (VB + V * by_t) * shift)
        # lanes without a class: 0 * -inf
        VA = tl.where(V == 0.0, 0.0, VA)
        VB = tl.where(V == 0.0, 0.0, VB)
        V *= shift
    return P, U, V, VA, VB, S


@triton.jit
def merge(s_max, t_max, before, sums, more, scale, PLAN: tl.constexpr):
    """The statistics of a row, and the sum of `more`, from those of its lanes or parts."""
    old = references(s_max, t_max)
    s_max, t_max = row_maxima(s_max, t_max, PLAN)
    if PLAN.terms and PLAN.has_target:
        before = tl.max(before, axis=0)
    else:
        before = s_max
    sums = move(sums, old, references(s_max, t_max), scale, PLAN)
    sums, more = row_sums(sums, more, PLAN)
    return s_max, t_max, before, sums, more


@triton.jit
def losses(refs, is_hit, sums, s_label, valid, classes, numbers, PLAN: tl.constexpr):
    """(loss, hard, soft, entropy, hit) of a row; and P, U, V, NaN where the row is no
    distribution."""
    P, U, V, VA, VB, S = sums
    scale, inverse_tau, alpha, smoothing = numbers
    P = tl.where(P > 0.0, P, float("nan"))
    zero = P * 0.0
    loss, hard, soft, entropy, hit = zero, zero, zero, zero, zero
    if PLAN.has_target:
        log_sum = tl.log2(P) * LN2  # relative to the maximum, like the label's logit
        hard = (log_sum - (s_label - refs[0])) * valid
        if PLAN.smoothing:
            smooth = log_sum + refs[0] - S / classes
            hard = hard * (1.0 - smoothing) + smoothing * smooth
        hit = tl.where(is_hit & (P == P), 1.0, 0.0)
        loss = hard
    if PLAN.has_teacher:
        U, V = tl.where(U > 0.0, U, float("nan")), tl.where(V > 0.0, V, float("nan"))
        soft = (tl.log2(U) - VA / V) * LN2
        entropy = (tl.log2(V) - VB / V) * LN2
        loss += alpha * soft
    return (loss, hard, soft, entropy, hit), (P, U, V)


@triton.jit
def top_logit(s_max, s_label, PLAN: tl.constexpr):
    """The row's maximum, from that of the classes its sums are taken of."""
    return tl.maximum(s_max, s_label) if PLAN.margin else s_max


@triton.jit
def merge_label(
    refs, is_hit, sums, s_label, t_label, margin, valid, classes, numbers, PLAN: tl.constexpr
):
    """The results of losses(), and the derivative of the loss by the label's logit, with a margin.

    There the label is a part of its own, with one logit in the hard term and another in the soft
    one: left out of the sums it never has to be taken out of them, which would cancel where its
    probability is near 1. P, U and V come back relative to the references of the other classes, so
    they may be infinite; a gradient over them is then 0, as it should be.
    """
    if PLAN.margin:
        scale, inverse_tau, alpha, smoothing = numbers
        P, U, V, VA, VB, S = sums
        top = references(tl.maximum(refs[0], s_label), tl.maximum(refs[1], t_label))
        _, U_top, V_top, VA_top, VB_top, _ = move(sums, refs, top, scale, PLAN)
        a, b, u, p, v = exponentials(s_label, t_label, top, scale, PLAN)
        U_top, V_top = U_top + u, V_top + v
        s_hard = s_label + margin[0]
        hard_top = tl.maximum(refs[0], s_hard)
        rest = P * tl.exp2((refs[0] - hard_top) * LOG2E)
        mine = tl.exp2((s_hard - hard_top) * LOG2E)
        merged = (
            rest + mine, U_top, V_top, VA_top + weighted(v, a), VB_top + weighted(v, b), S + s_hard
        )  # fmt: skip
        found, totals = losses(
            (hard_top, top[1]), is_hit, merged, s_hard, valid, classes, numbers, PLAN
        )
        slope = margin[1] * valid * (smoothing - smoothing / classes - rest / (rest + mine))
        if PLAN.has_teacher:
            slope += alpha * inverse_tau * (u / U_top - v / V_top)
        P = tl.where(totals[0] == totals[0], P + tl.exp2((s_hard - refs[0]) * LOG2E), float("nan"))
        U = tl.where(totals[1] == totals[1], U + tl.exp2((s_label - refs[0]) * scale), float("nan"))
        V = tl.where(totals[2] == totals[2], V + tl.exp2((t_label - refs[1]) * scale), float("nan"))
        return found, (P, U, V), slope
    else:
        found, totals = losses(refs, is_hit, sums, s_label, valid, classes, numbers, PLAN)
        return found, totals, 0.0


@triton.jit
def coefficients(totals, weight, valid, classes, numbers, PLAN: tl.constexpr):
    """A, B, D and E of the gradient A p + B u - D v - E."""
    P, U, V = totals
    scale, inverse_tau, alpha, smoothing = numbers
    A, B, D, E = 0.0, 0.0, 0.0, 0.0
    if PLAN.has_target:
        A = weight * valid / P
        E = weight * smoothing / classes
    if PLAN.has_teacher:
        soft = weight * alpha * inverse_tau
        B, D = soft / U, soft / V
    return A, B, D, E


@triton.jit
def gradient_of(u, p, v, factors, PLAN: tl.constexpr):
    A, B, D, E = factors
    if PLAN.has_target and PLAN.has_teacher:
        if PLAN.power > 0:
            # A u^(power - 1), beginning with A: a shared u^2 would be kept in registers from the
            # sums on, half a row more
            plain = A
            MORE: tl.constexpr = PLAN.power - 1
            for _ in tl.static_range(MORE):
                plain = plain * u
            value = u * (plain + B) - D * v
        else:
            value = A * p + (B * u - D * v)
    elif PLAN.has_teacher:
        value = B * u - D * v
    else:
        value = A * p
    return value - E if PLAN.smoothing else value


@triton.jit
def store_label(
    gradient, label, s_label, t_label, refs, factors, weight, slope, numbers, PLAN: tl.constexpr
):
    """The label's column once more, with its one-hot or, with a margin, as merge_label found it;
    after a barrier, as another lane wrote it."""
    if PLAN.margin:
        value = weight * slope
    else:
        scale, inverse_tau, alpha, smoothing = numbers
        a, b, u, p, v = exponentials(s_label, t_label, refs, scale, PLAN)
        value = gradient_of(u, p, v, factors, PLAN) - weight * (1.0 - smoothing)
    tl.debug_barrier()
    tl.store(gradient + label, value.to(gradient.dtype.element_ty))


@triton.jit
def count_labels(labels, BLOCK: tl.constexpr):
    """The number of labels that are not ignore_index, as BLOCK numbers to be added up."""
    target_ptr, stride_target, row_count, ignore_index = labels
    found = tl.full((BLOCK,), 0.0, tl.float32)
    for begin in range(0, row_count, BLOCK):
        at = begin + tl.arange(0, BLOCK).to(tl.int64)
        label = tl.load(target_ptr + at * stride_target, mask=at < row_count, other=0)
        found += ((at < row_count) & (label != ignore_index)).to(tl.float32)
    return found


@triton.jit
def count_share(labels, PLAN: tl.constexpr):
    """Each lane's share of that count where programs count for themselves, else 0."""
    if PLAN.divisor == "counted here":
        return count_labels(labels, PLAN.lanes)
    else:
        return tl.full((PLAN.lanes,), 0.0, tl.float32)


@triton.jit
def weight_of(count, count_ptr, gradient_scale, PLAN: tl.constexpr):
    """The factor of the gradients: gradient_scale, over the rows that count for a mean."""
    if PLAN.divisor == "one":
        return gradient_scale
    elif PLAN.divisor == "counted here":
        return gradient_scale / tl.maximum(count, 1.0)
    else:
        return gradient_scale / tl.maximum(tl.load(count_ptr), 1.0)


@triton.jit
def store_row(loss_ptr, terms_ptr, row, found, PLAN: tl.constexpr):
    loss, hard, soft, entropy, hit = found
    tl.store(loss_ptr + row, loss)
    if PLAN.terms:
        tl.store(terms_ptr + row * 4, hard)
        tl.store(terms_ptr + row * 4 + 1, soft)
        tl.store(terms_ptr + row * 4 + 2, entropy)
        tl.store(terms_ptr + row * 4 + 3, hit)


@triton.jit
def zero_gradient(gradient, begin, end, PLAN: tl.constexpr):
    """Gradient 0 from column `begin` to `end`, of a row that counts for nothing."""
    lane = tl.arange(0, PLAN.lanes)
    zero = tl.full((PLAN.lanes,), 0.0, gradient.dtype.element_ty)
    for at in tl.range(begin, end, PLAN.lanes, loop_unroll_factor=1):
        tl.store(gradient + at + lane, zero, mask=at + lane < end)
