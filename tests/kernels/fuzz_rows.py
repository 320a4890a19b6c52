"""The oracle of the two cross-entropy ops in NumPy: docs/ops.md's formulas, gradients in closed
form, and error bounds as fuzz_claim.py has them. Shares no code with kdkernels."""

from dataclasses import dataclass, field

import numpy as np
from fuzz_claim import TINY, Array, Claim, per_row, total

BLOCK = 2048  # native may move a row's reference after each block of classes
SMALLEST_TAIL = 2.0**-20
SMALLEST_SINE = 2.0**-20
UNDERFLOW = 2.0**-100  # a probability below may be 0 in float32


@dataclass
class Row:
    """Terms per row and the gradient by the logits, with bounds."""

    hard: Array
    soft: Array
    entropy: Array
    gradient: Array
    hard_bound: Array
    soft_bound: Array
    entropy_bound: Array
    gradient_bound: Array
    is_judged: Array = field(default_factory=lambda: np.ones(0, dtype=bool))


@dataclass
class Softmax:
    """exp(z) / sum exp(z) of shifted logits z <= 0, with bounds of the errors.

    The error of an exponential is 4 u |z| for its argument (three roundings, and the constant
    log2 e), as much again where native moves its reference, and 20 u: 4 u for exp itself
    (docs/ops.md: 2e-7), four times for the fourth power at temperature 4, and the products.
    dz: a given error of z.
    """

    log: Array  # (N, C) log probabilities
    probs: Array
    bound: Array  # (N, C) of probs
    log_sum: Array  # (N, 1)
    log_sum_bound: Array  # (N, 1)

    @classmethod
    def of(cls, z: Array, dz: Array, u: float) -> "Softmax":
        classes = z.shape[1]
        exp = np.exp(z)
        sums = exp.sum(axis=1, keepdims=True)
        probs = exp / sums
        moves = 6 * (-(-classes // BLOCK) - 1)
        relative = np.where(probs == 0, 0.0, u * (8 * np.abs(z) + 20 + moves) + dz)
        of_sum = (probs * relative).sum(axis=1, keepdims=True) + (classes + 2) * u
        bound = probs * np.expm1(np.minimum(relative + of_sum + 2 * u, 40.0))
        log_sum = np.log(sums)
        return cls(
            z - log_sum, probs, np.minimum(bound, 1.0) + TINY,
            log_sum, of_sum + 3 * u * np.abs(log_sum) + 2 * u,
        )  # fmt: skip


def shifted(s: Array) -> Array:
    return s - s.max(axis=1, keepdims=True)


def _times(probs: Array, log: Array) -> Array:
    """probs log with 0 log 0 = 0."""
    return np.where(probs == 0, 0.0, probs * log)


def _of_quotient(s: Array, u: float) -> Array:
    """The error of s / tau, times tau. Eager divides before it shifts, so that the quotient of a
    logit far from 0 is rounded; native shifts first."""
    return u * np.where(np.isfinite(s), np.abs(s), 0.0)


def _hard(h: Array, dh: Array, label: Array, smoothing: float, u: float) -> tuple[Array, ...]:
    """Hard term, its gradient by the logits h, and bounds."""
    classes = h.shape[1]
    z = shifted(h)
    softmax = Softmax.of(z, dh, u)
    rows = np.arange(len(h))
    hot = np.full_like(h, smoothing / classes)
    hot[rows, label] += 1.0 - smoothing
    value = -softmax.log[rows, label]
    if smoothing != 0.0:  # as F.cross_entropy: 0 times an infinite term is NaN
        value = (1.0 - smoothing) * value - smoothing * softmax.log.mean(axis=1)
    sizes = np.where(hot == 0, 0.0, np.where(np.isfinite(z), np.abs(z), 0.0) + softmax.log_sum)
    bound = (hot * (4 * u * sizes + dh)).sum(axis=1) + softmax.log_sum_bound[:, 0]
    bound += (smoothing * (classes + 4) + 4) * u * (hot * sizes).sum(axis=1)
    bound += u * smoothing * sizes[rows, label]  # 1 - smoothing, of a rounded number
    gradient = softmax.probs - hot
    gradient_bound = softmax.bound + 6 * u * (softmax.probs + hot)
    gradient_bound[rows, label] += u * smoothing
    return value, bound + 2 * u * np.abs(value), gradient, gradient_bound


def _soft(s: Array, ds: Array, t: Array, dt: Array, tau: float, u: float) -> tuple[Array, ...]:
    """Soft term, its gradient times tau, entropy, bounds, and the rows that are defined."""
    classes = s.shape[1]
    zs, zt = shifted(s) / tau, shifted(t) / tau
    ds, dt = ds + _of_quotient(s, u), dt + _of_quotient(t, u)
    p, q = Softmax.of(zs, ds / tau, u), Softmax.of(zt, dt / tau, u)

    def cross(log: Array, z: Array, log_sum: Array, log_sum_bound: Array, dz: Array):
        value = -_times(q.probs, log).sum(axis=1)
        is_there = (q.probs > 0) & np.isfinite(log)
        size = np.where(is_there, np.abs(z) + log_sum, 0.0)
        bound = (np.where(is_there, np.abs(log), 0.0) * q.bound).sum(axis=1)
        bound += (q.probs * np.where(is_there, dz + (classes + 14) * u * size, 0.0)).sum(axis=1)
        return value, bound + log_sum_bound[:, 0] + 2 * u * np.abs(value)

    value, bound = cross(p.log, zs, p.log_sum, p.log_sum_bound, ds / tau)
    entropy, entropy_bound = cross(q.log, zt, q.log_sum, q.log_sum_bound, dt / tau)
    # not defined: a student's 0 where the teacher's probability may underflow in float32
    is_judged = ~((p.log == -np.inf) & (q.probs < UNDERFLOW) & (t > -np.inf)).any(axis=1)
    gradient_bound = p.bound + q.bound + 6 * u * (p.probs + q.probs)
    return value, bound, p.probs - q.probs, gradient_bound, entropy, entropy_bound, is_judged


def _sparse(
    s: Array, ds: Array, indices: Array, log_probs: Array, tau: float, u: float
) -> tuple[Array, ...]:
    """The same for a sparse teacher: k bins, and one for all other classes."""
    classes, k = s.shape[1], indices.shape[1]
    z = shifted(s) / tau
    ds = ds + _of_quotient(s, u)
    soft = Softmax.of(z, ds / tau, u)
    p = np.exp(log_probs)
    dp = p * (u * (4 + np.where(p > 0, np.abs(log_probs), 0.0)))
    tail = (1.0 - p.sum(axis=1)).clip(0.0)
    d_tail = dp.sum(axis=1) + u * tail
    is_judged = np.abs(tail - SMALLEST_TAIL) > 2 * d_tail
    tail = np.where(tail < SMALLEST_TAIL, 0.0, tail)
    if k == classes:
        tail, is_judged = np.zeros_like(tail), np.ones_like(is_judged)
    others = np.ones_like(s, dtype=bool)
    np.put_along_axis(others, indices, False, axis=1)
    in_tail = np.where(others, z, -np.inf)
    most = in_tail.max(axis=1)
    most = np.where(np.isfinite(most), most, 0.0)
    weights = np.exp(in_tail - most[:, None])
    sums = weights.sum(axis=1)
    log_tail = np.log(sums) + most - soft.log_sum[:, 0]
    share = np.where(sums[:, None] > 0, weights / np.where(sums > 0, sums, 1.0)[:, None], 0.0)
    z_size = np.where(np.isfinite(z), np.abs(z), 0.0)
    r_share = u * (8 * z_size + classes + 24) + ds / tau
    d_log_tail = (share * r_share).sum(axis=1) + (classes + 8) * u
    d_log_tail += soft.log_sum_bound[:, 0] + 2 * u * (np.abs(most) + soft.log_sum[:, 0])

    log_top = np.take_along_axis(soft.log, indices, axis=1)
    d_log_top = np.take_along_axis(8 * u * z_size + ds / tau, indices, axis=1) + soft.log_sum_bound
    value = -_times(p, log_top).sum(axis=1) - _times(tail, log_tail)
    d_log_top = np.where(np.isfinite(log_top), d_log_top, 0.0)
    size_top = np.where(np.isfinite(log_top), np.abs(log_top), 0.0)
    size_tail = np.where((tail > 0) & np.isfinite(log_tail), np.abs(log_tail), 0.0)
    bound = (dp * size_top + p * (d_log_top + (k + 6) * u * size_top)).sum(axis=1)
    bound += np.where(tail > 0, d_tail * size_tail + tail * (d_log_tail + 6 * u * size_tail), 0.0)
    entropy = -_times(p, log_probs).sum(axis=1) - _times(tail, np.log(tail))
    size_log = np.where(p > 0, np.abs(log_probs), 0.0)
    log_of_tail = np.where(tail > 0, np.abs(np.log(np.where(tail > 0, tail, 1.0))), 0.0)
    entropy_bound = (dp * (size_log + 1) + (k + 6) * u * p * size_log).sum(axis=1)
    entropy_bound += np.where(
        tail > 0, d_tail * (1 + log_of_tail) + 6 * u * tail * log_of_tail, 0.0
    )

    # where the student has no tail, the teacher's tail is left out of the gradient
    left = np.where(sums > 0, tail, 0.0)
    every = p.sum(axis=1) + left
    teacher = left[:, None] * share
    np.put_along_axis(teacher, indices, p, axis=1)
    d_teacher = d_tail[:, None] * share + left[:, None] * share * np.expm1(
        np.minimum(2 * r_share, 40)
    )
    np.put_along_axis(d_teacher, indices, dp, axis=1)
    gradient = every[:, None] * soft.probs - teacher
    gradient_bound = (
        1.02 * soft.bound + d_teacher + (d_tail + (classes + 8) * u)[:, None] * soft.probs
    )
    gradient_bound += 6 * u * (soft.probs + teacher) + TINY
    return (
        value,
        bound + 2 * u * np.abs(value),
        gradient,
        gradient_bound,
        entropy,
        entropy_bound,
        is_judged,
    )


def rows_of(
    s: Array, ds: Array, values: dict[str, Array], options: dict, u: float, *,
    teacher: tuple[Array, Array] | None, hard: tuple[Array, ...] | None = None,
) -> Row:  # fmt: skip
    """Terms and gradient of rows that count. teacher: logits and the bound of their error. hard:
    value, bound, derivative and its bound of the label's logit in the hard term, each (N,)."""
    rows = len(s)
    zero = np.zeros(rows, dtype=s.dtype)
    found = Row(zero, zero, zero, np.zeros_like(s), zero, zero, zero, np.zeros_like(s))
    found.is_judged = np.ones(rows, dtype=bool)
    tau, alpha = options["temperature"], options["alpha"]
    if "target" in values:
        label, place = values["target"], np.arange(rows)
        h, dh = s, ds
        if hard is not None:
            h, dh = s.copy(), ds.copy()
            h[place, label], dh[place, label] = hard[0], hard[1]
        value, bound, gradient, gradient_bound = _hard(h, dh, label, options["label_smoothing"], u)
        if hard is not None:
            by_label, by_label_bound = gradient[place, label], gradient_bound[place, label]
            gradient[place, label] = hard[2] * by_label
            gradient_bound[place, label] = np.abs(hard[2]) * by_label_bound + hard[3] * np.abs(
                by_label
            )
        found.hard, found.hard_bound = value, bound
        found.gradient, found.gradient_bound = gradient, gradient_bound
    if alpha != 0.0 and (teacher is not None or "indices" in values):
        if teacher is not None:
            parts = _soft(s, ds, *teacher, tau, u)
        else:
            parts = _sparse(s, ds, values["indices"], values["log_probs"], tau, u)
        found.soft, found.soft_bound, gradient, gradient_bound, *rest = parts
        found.entropy, found.entropy_bound, found.is_judged = rest
        slope = factor_of(options) / tau
        found.gradient = found.gradient + slope * gradient
        found.gradient_bound = found.gradient_bound + abs(slope) * (gradient_bound + TINY)
        found.gradient_bound = found.gradient_bound + 2 * u * np.abs(found.gradient)
    # the products that make a gradient of probabilities, and its additions, may underflow too
    slope = factor_of(options) / tau if found.soft_bound.any() else 0.0
    found.gradient_bound = found.gradient_bound + 4 * TINY * (1 + abs(slope))
    return found


def factor_of(options: dict) -> float:
    """alpha, times tau^2 where tau_squared."""
    return options["alpha"] * (options["temperature"] ** 2 if options["tau_squared"] else 1.0)


def only(row: Row, counts: Array) -> None:
    """Rows that count for nothing have zeros."""
    for name in ("hard", "soft", "entropy", "gradient"):
        for field_name in (name, f"{name}_bound"):
            value = getattr(row, field_name)
            mask = counts if value.ndim == 1 else counts[:, None]
            setattr(row, field_name, np.where(mask, value, 0.0))
    row.is_judged = row.is_judged | ~counts


def claims_of_rows(
    row: Row, counts: Array, hits: tuple[float, float], options: dict, u: float
) -> list[Claim]:
    """Claims on the loss and the terms."""
    factor = factor_of(options)
    has_soft = options["alpha"] != 0.0 and bool(row.soft.any())
    loss = row.hard + factor * row.soft if has_soft else row.hard
    bound = row.hard_bound + abs(factor) * row.soft_bound
    finite = np.isfinite(row.hard) & np.isfinite(row.soft)
    bound = bound + 3 * u * np.where(finite, np.abs(row.hard) + np.abs(factor * row.soft), 0.0)
    divisor = max(1, int(counts.sum()))
    claims = []
    if options["reduction"] == "none":
        claims.append(Claim("loss", loss, bound, is_judged=row.is_judged))
    else:
        by = divisor if options["reduction"] == "mean" else 1
        value, bound = total(loss, bound, u)
        claims.append(Claim("loss", value / by, bound / by, is_judged=row.is_judged.all()))
    terms, bounds = [], []
    for name in ("hard", "soft", "entropy"):
        value, bound = total(getattr(row, name), getattr(row, f"{name}_bound"), u)
        terms.append(value / divisor)
        bounds.append(bound / divisor)
    every = row.is_judged.all()
    claims.append(
        Claim(
            "terms",
            np.asarray([*terms, hits[0], float(counts.sum())]),
            np.asarray([*bounds, hits[1], 0.0]),
            is_judged=True if every else np.asarray([False, False, False, True, True]),
        )
    )
    return claims


def hits_of(s: Array, ds: Array, label: Array, counts: Array) -> tuple[float, float]:
    """Rows whose first largest logit is the label's, and how many of them rounding decides."""
    if s.shape[0] == 0:
        return 0.0, 0.0
    place = np.arange(len(s))
    is_distribution = ~np.isnan(shifted(s)).any(axis=1)
    is_hit = (s.argmax(axis=1) == label) & is_distribution & counts
    near = np.abs(s - s[place, label][:, None]) <= ds + ds[place, label][:, None]
    near[place, label] = False
    unsure = (near & (ds > 0)).any(axis=1) & counts
    return float(is_hit.sum()), float(unsure.sum())


def logits_op(values: dict[str, Array], options: dict, incoming: Array, u: float) -> list[Claim]:
    """Claims on kd_cross_entropy."""
    s = values["student"]
    counts = np.ones(len(s), dtype=bool)
    known = dict(values)
    if "target" in values:
        counts = values["target"] != options["ignore_index"]
        known["target"] = np.where(counts, values["target"], 0)
    s = np.where(counts[:, None], s, 0.0)
    teacher = None
    if "teacher" in values:
        t = np.where(counts[:, None], values["teacher"], 0.0)
        teacher = t, np.zeros_like(t)
    row = rows_of(s, np.zeros_like(s), known, options, u, teacher=teacher)
    only(row, counts)
    hits = (0.0, 0.0)
    if "target" in values:
        hits = hits_of(s, np.zeros_like(s), known["target"], counts)
    claims = claims_of_rows(row, counts, hits, options, u)
    divisor = max(1, int(counts.sum())) if options["reduction"] == "mean" else 1
    weight = per_row(incoming, divisor, len(s))[:, None]
    gradient = weight * row.gradient
    bound = np.abs(weight) * row.gradient_bound + 5 * u * np.abs(gradient)
    bound = bound + 2 * TINY * np.abs(weight) * divisor  # stored before the incoming gradient
    soft = factor_of(options) / options["temperature"] if teacher is not None else 0.0
    claims.append(
        Claim(
            "d student", gradient, bound, is_judged=row.is_judged[:, None],
            largest=np.abs(weight) * (1 + 2 * abs(soft)),
        )
    )  # fmt: skip
    return claims


@dataclass
class Head:
    """Logits of a linear head, with what its gradient needs."""

    x: Array  # (N, D), unit rows where normalized
    w: Array
    x_norm: Array | float
    w_norm: Array | float
    logits: Array
    bound: Array

    @classmethod
    def of(cls, x: Array, w: Array, bias: Array | None, scale: float | None, u: float) -> "Head":
        depth = x.shape[1]
        if scale is None:
            logits, size = x @ w.T, np.abs(x) @ np.abs(w).T
            bound = (depth + 2) * u * size
            if bias is not None:
                logits = logits + bias
                bound = bound + u * (np.abs(logits) + np.abs(bias))
            return cls(x, w, 1.0, 1.0, logits, bound)
        norms = [np.sqrt((m * m).sum(axis=1, keepdims=True)) for m in (x, w)]
        x, w = (m / np.where(n == 0, 1.0, n) for m, n in zip((x, w), norms, strict=True))
        logits, size = scale * (x @ w.T), scale * (np.abs(x) @ np.abs(w).T)
        bound = (depth + 4) * u * size + (depth + 10) * u * np.abs(logits)
        return cls(x, w, *norms, logits, bound)


def _through_norm(by_unit: Array, size: Array, bound: Array, unit: Array, norm: Array, u: float):
    """A gradient by unit rows as one by the rows, with its bound. Rows of zeros have 0."""
    along = (by_unit * unit).sum(axis=1, keepdims=True)
    value = by_unit - along * unit
    depth = unit.shape[1]
    along_size = (size * np.abs(unit)).sum(axis=1, keepdims=True)
    along_bound = (bound * np.abs(unit)).sum(axis=1, keepdims=True) + (
        3 * depth + 12
    ) * u * along_size
    bound = (
        bound + along_bound * np.abs(unit) + (depth + 8) * u * (size + along_size * np.abs(unit))
    )
    inverse = np.where(norm == 0, 0.0, 1.0 / np.where(norm == 0, 1.0, norm))
    return value * inverse, bound * inverse


def _margin(
    x: Array, w: Array, d_cosine: Array, m2: Array, m3: Array, u: float
) -> tuple[Array, ...]:
    """cos(theta + m2) - m3 of unit rows, its derivative by the cosine, bounds, and the rows whose
    value and whose derivative are defined.

    The sine is |x - w| |x + w| / 2. A norm is off by (D / 2 + 4) u, so the error of each length is
    at most (D + 10) u.
    """
    near, far = (np.sqrt(((x + sign * w) ** 2).sum(axis=1)) for sign in (-1.0, 1.0))
    is_zero = (x == 0).all(axis=1) | (w == 0).all(axis=1)
    cosine = (x * w).sum(axis=1)
    sine = np.where(is_zero, 1.0, near * far / 2)
    on_chord = sine <= SMALLEST_SINE
    d_sine = (x.shape[1] + 10) * u * (near + far) / 2 + u * sine
    safe = np.maximum(sine, SMALLEST_SINE)
    turned = np.cos(m2), np.sin(m2)
    value = cosine * turned[0] - sine * turned[1]
    bound = np.abs(turned[0]) * d_cosine
    bound += np.abs(turned[1]) * (d_sine + np.where(on_chord, SMALLEST_SINE, 0.0))
    bound += 8 * u * (np.abs(cosine * turned[0]) + np.abs(sine * turned[1]) + np.abs(m2))
    slope = turned[0] + cosine * turned[1] / safe
    d_slope = np.abs(turned[1]) * (d_cosine / safe + np.abs(cosine) * d_sine / (safe * safe))
    d_slope += 8 * u * (np.abs(turned[0]) + np.abs(cosine * turned[1] / safe) + np.abs(m2))
    is_smooth = ~(on_chord & (turned[1] != 0))
    is_judged = np.ones_like(is_smooth)
    room = 4 * d_cosine + 8 * u
    for is_beyond, edge, continued, its_slope in (
        ((m2 > 0) & (cosine < -turned[0]), -turned[0], cosine - m2 * turned[1], 1.0),
        ((m2 < 0) & (cosine > turned[0]), turned[0], np.ones_like(cosine), 0.0),
    ):
        value = np.where(is_beyond, continued, value)
        bound = np.where(is_beyond, d_cosine + 8 * u * (1 + np.abs(m2)), bound)
        slope, d_slope = np.where(is_beyond, its_slope, slope), np.where(is_beyond, 2 * u, d_slope)
        is_smooth = is_smooth | is_beyond
        is_judged = is_judged & ~((m2 != 0) & (np.abs(cosine - edge) <= room))
    bound = bound + 2 * u * (np.abs(value) + np.abs(m3))
    return value - m3, bound, slope, d_slope, is_judged, is_smooth


def linear_op(values: dict[str, Array], options: dict, incoming: Array, u: float) -> list[Claim]:
    """Claims on linear_kd_cross_entropy."""
    options = {"scale": 1.0, "margin_grad": "exact", **options}
    is_normalized = options["normalize"]
    x, every_weight = values["features"], values["weight"]
    rows, every = len(x), len(every_weight)
    chosen = values.get("classes", np.arange(every))
    counts = np.ones(rows, dtype=bool)
    known = {}
    if "target" in values:
        counts = values["target"] != options["ignore_index"]
        places = np.searchsorted(chosen, np.where(counts, values["target"], chosen[0]))
        known["target"] = places
    mask = counts[:, None]
    x = np.where(mask, x, 0.0)
    if "target" not in values and options["alpha"] == 0.0:
        x = np.zeros_like(x)  # nothing is computed, so a NaN has no effect
    bias = values["bias"][chosen] if "bias" in values else None
    scale = options["scale"] if is_normalized else None
    head = Head.of(x, every_weight[chosen], bias, scale, u)
    s, ds = head.logits, head.bound
    teacher = None
    if "teacher" in values:
        t = np.where(mask, values["teacher"][:, chosen], 0.0)
        teacher = t, np.zeros_like(t)
    elif "teacher_features" in values:
        of_teacher = Head.of(
            np.where(mask, values["teacher_features"], 0.0),
            values["teacher_weight"][chosen],
            values["teacher_bias"][chosen] if "teacher_bias" in values else None,
            options.get("teacher_scale", options["scale"]) if is_normalized else None,
            u,
        )
        teacher = of_teacher.logits, of_teacher.bound
    elif "indices" in values:
        known["indices"] = values["indices"]
        known["log_probs"] = np.where(mask, values["log_probs"], 0.0)
    hard = None
    margin_judged = is_smooth = np.ones(rows, dtype=bool)
    m2 = values.get("m2", options.get("m2"))
    m3 = values.get("m3", options.get("m3"))
    if "target" in known and not (m2 is None and m3 is None):
        m2, m3 = (np.broadcast_to(0.0 if m is None else m, (rows,)) for m in (m2, m3))
        place = np.arange(rows), known["target"]
        *hard, margin_judged, is_smooth = _margin(
            head.x, head.w[known["target"]], ds[place] / scale, m2, m3, u
        )
        hard[0], hard[1] = scale * hard[0], scale * hard[1] + 2 * u * np.abs(scale * hard[0])
        if options["margin_grad"] == "straight_through":
            hard[2], hard[3] = np.ones(rows), np.zeros(rows)
            is_smooth = np.ones(rows, dtype=bool)
        hard = tuple(hard)
    row = rows_of(s, ds, known, options, u, teacher=teacher, hard=hard)
    row.is_judged = row.is_judged & margin_judged
    only(row, counts)
    hits = hits_of(s, ds, known["target"], counts) if "target" in known else (0.0, 0.0)
    claims = claims_of_rows(row, counts, hits, options, u)

    divisor = max(1, int(counts.sum())) if options["reduction"] == "mean" else 1
    weight = per_row(incoming, divisor, rows)[:, None]
    g, dg = weight * row.gradient, np.abs(weight) * (row.gradient_bound + TINY)
    dg = dg + 5 * u * np.abs(g)
    factor = scale if is_normalized else 1.0
    g, dg, size = factor * g, factor * dg, np.abs(factor * g)
    row_judged = row.is_judged & (is_smooth | ~counts)
    is_judged = row_judged.all()
    classes = len(chosen)

    for name, mine, other, norm, forward in (
        ("features", head.x, head.w, head.x_norm, (g, dg, size)),
        ("weight", head.w, head.x, head.w_norm, (g.T, dg.T, size.T)),
    ):
        g_, dg_, size_ = forward
        value, sizes = g_ @ other, size_ @ np.abs(other)
        bound = dg_ @ np.abs(other) + (g_.shape[1] + head.x.shape[1] + 12) * u * sizes
        if is_normalized:
            value, bound = _through_norm(value, sizes, bound, mine, norm, u)
        judged = row_judged[:, None] if name == "features" else is_judged
        if np.isnan(value).any():  # a row of zeros has gradient 0 or, with a NaN around, NaN
            judged = judged & np.broadcast_to(norm != 0, value.shape)
        if name == "weight" and classes != every:
            judged = np.broadcast_to(judged, value.shape)
            value, bound = _scattered(value, bound, chosen, every)
            of_chosen, judged = judged, np.full(value.shape, is_judged)
            judged[chosen] = of_chosen
        claims.append(Claim(f"d {name}", value, bound, is_judged=judged, roundings=1))
    value, bound = g.sum(axis=0), dg.sum(axis=0) + (rows + 4) * u * size.sum(axis=0)
    if classes != every:
        value, bound = _scattered(value, bound, chosen, every)
    claims.append(Claim("d bias", value, bound, is_judged=is_judged, roundings=1))
    return claims


def _scattered(value: Array, bound: Array, chosen: Array, every: int) -> tuple[Array, Array]:
    """Values of chosen classes among all, 0 of the others."""
    found = [np.zeros((every, *value.shape[1:]), dtype=value.dtype) for _ in range(2)]
    found[0][chosen], found[1][chosen] = value, bound
    return found[0], found[1]
