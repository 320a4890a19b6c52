"""The oracle of triplet_loss, batch_triplet_loss, hidden_l2 and nearest_neighbor in NumPy:
docs/ops.md's formulas, gradients in closed form, and error bounds as fuzz_claim.py has them.
Shares no code with kdkernels.

The relative error of a squared distance in difference form is (D + 3) u: 3 u for a difference and
its square, D u for the sum. Squares that underflow subtract at most D DENORMAL.
"""

import numpy as np
from fuzz_claim import Array, Claim, per_row, total

DENORMAL = 2.0**-149  # these ops keep float32 numbers below 2^-126 (docs/ops.md)
# Beyond its rounding a stored float16 gradient is off by 2^-25 of its largest component
# (docs/ops.md), which is 2^9 times fuzz.KEPT_HALF.
OF_LARGEST = 2.0**9
CLOSE = 8.0  # native measures pairs again whose distance is below 1/8 of their norms' sum


def _root(squared: Array, bound: Array, u: float) -> tuple[Array, Array]:
    """The root of squared distances, and the bound of its error."""
    root = np.sqrt(squared)
    safe = np.where(root == 0, 1.0, root)
    return root, np.where(
        root == 0, np.sqrt(bound), np.minimum(bound / safe, np.sqrt(bound))
    ) + u * root


def _largest(gradient: Array) -> float:
    """The bound from which the power of two of a stored float16 gradient is chosen."""
    finite = np.where(np.isfinite(gradient), np.abs(gradient), 0.0)
    return OF_LARGEST * float(finite.max(initial=0.0))


def _decided(difference: Array, bound_per_unit: Array, is_certain: Array | bool) -> Array:
    """The unit roundoff above which the sign of a difference depends on rounding; infinite where
    `is_certain`."""
    size = np.abs(difference) / np.where(bound_per_unit == 0, 1.0, bound_per_unit)
    return np.where(is_certain | (bound_per_unit == 0), np.inf, size)


def _is_dyadic(margin: float) -> bool:
    return margin * 8 == int(margin * 8) and abs(margin) < 100


def triplet_op(
    values: dict[str, Array], options: dict, incoming: Array, u: float, is_exact: bool
) -> list[Claim]:
    """Claims on triplet_loss."""
    names = ("anchor", "positive", "negative")
    a, p, n = (values[name] for name in names)
    rows, depth = a.shape
    margin, squared = options["margin"], options["squared"]
    to = {}
    for name, other in (("p", p), ("n", n)):
        d = ((a - other) ** 2).sum(axis=1)
        bound = np.zeros_like(d) if is_exact else (depth + 3) * u * d + depth * DENORMAL
        to[name] = (d, bound) if squared else _root(d, bound, u)
    hinge = to["p"][0] - to["n"][0] + margin
    size = np.abs(to["p"][0]) + np.abs(to["n"][0]) + abs(margin)
    bound = to["p"][1] + to["n"][1] + 3 * u * size
    is_zero = is_exact & (
        (squared & _is_dyadic(margin)) | ((to["p"][0] == to["n"][0]) & (margin == 0))
    )
    decided = _decided(hinge, bound / u, is_zero & (hinge == 0))
    loss = np.where(np.isnan(hinge), np.nan, np.maximum(hinge, 0.0))
    divisor = max(1, rows) if options["reduction"] == "mean" else 1
    claims = []
    if options["reduction"] == "none":
        claims.append(Claim("loss", loss, bound))
    else:
        value, of_sum = total(loss, bound, u)
        claims.append(Claim("loss", value / divisor, of_sum / divisor))
    weight = per_row(incoming, divisor, rows) * np.where(
        hinge > 0, 1.0, np.where(np.isnan(hinge), np.nan, 0.0)
    )
    parts = {}
    for name, other in (("p", p), ("n", n)):
        difference = a - other
        d, d_bound = to[name]
        if squared:
            slope, slope_bound = np.full(rows, 2.0), np.zeros(rows)
        else:
            is_zero = d == 0
            slope = np.where(is_zero, 0.0, 1.0 / np.where(is_zero, 1.0, d))
            relative = np.minimum(d_bound / np.where(is_zero, 1.0, d), 2.0)
            slope_bound = slope * relative + np.where(relative > 0.5, slope, 0.0)
        value = (weight * slope)[:, None] * difference
        of_value = np.abs(value) * 8 * u + np.abs(weight * slope_bound)[:, None] * np.abs(
            difference
        )
        # a gradient may be formed from a - p and a - n: both are in its bound
        parts[name] = value, of_value + np.abs(weight)[:, None] * DENORMAL
    p_value, p_bound = parts["p"]
    n_value, n_bound = parts["n"]
    for name, value, of_value in (
        ("anchor", p_value - n_value, p_bound + n_bound),
        ("positive", -p_value, p_bound),
        ("negative", n_value, n_bound),
    ):
        largest = _largest(value)
        claims.append(Claim(f"d {name}", value, of_value, decided[:, None], largest=largest))
    return claims


def batch_op(
    values: dict[str, Array], options: dict, incoming: Array, u: float, is_exact: bool
) -> list[Claim]:
    """Claims on batch_triplet_loss.

    "all" takes distances from a matrix product of centered rows. Their error is (D + 40) u times
    the sum of both squared norms (see product_error.py), but at most CLOSE (D + 40) u of them.
    """
    x, labels = values["embeddings"], values["labels"]
    rows, depth = x.shape
    margin, mining, squared = options["margin"], options["mining"], options["squared"]
    reduction = options["reduction"]
    if rows == 0:
        shape = (0,) if reduction == "none" else ()
        return [Claim("loss", np.zeros(shape), 0.0), Claim("d embeddings", np.zeros_like(x), 0.0)]
    d2 = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    same_row = (x[:, None] == x[None]).all(axis=2)
    same = labels[:, None] == labels[None]
    positive, negative = same & ~np.eye(rows, dtype=bool), ~same
    centered = x - x.mean(axis=0)
    norms = (centered * centered).sum(axis=1)
    # of a distance in difference form, its denormal squares included
    per_unit = (depth + 3) * d2 + depth * DENORMAL / u
    d2_bound = per_unit * u
    if mining == "all":
        d2_bound = (depth + 40) * u * np.minimum(norms[:, None] + norms[None], CLOSE * d2)
    d2_bound = d2_bound + depth * DENORMAL
    d, d_bound = (d2, d2_bound) if squared else _root(d2, d2_bound, u)
    _, d_unit = (d2, per_unit) if squared else _root(d2, per_unit * u, u)
    d_unit = d_unit if squared else d_unit / u

    anchor = np.arange(rows)
    decided = np.inf
    if mining == "hard":
        counts = positive.any(axis=1) & negative.any(axis=1)
        p = np.where(positive, d2, -np.inf).argmax(axis=1)
        n = np.where(negative, d2, np.inf).argmin(axis=1)
        for chosen, candidates in ((p, positive), (n, negative)):
            gap = d2 - d2[anchor, chosen][:, None]
            unit = per_unit + per_unit[anchor, chosen][:, None]
            ties = same_row[chosen] | is_exact  # (N, N): rows like the chosen one
            at = _decided(gap, unit, ties | ~candidates | ~counts[:, None])
            decided = min(decided, at.min(initial=np.inf))
        a = anchor[counts]
        p, n = p[counts], n[counts]
    else:
        a, p = np.nonzero(positive)
        farther = negative[a] & (d2[a] > d2[a, p][:, None])
        if mining == "semihard":
            gap = d2[a] - d2[a, p][:, None]
            unit = per_unit[a] + per_unit[a, p][:, None]
            at = _decided(gap, unit, same_row[p] | is_exact | ~negative[a])
            decided = min(decided, at.min(initial=np.inf))
            n = np.where(farther, d2[a], np.inf).argmin(axis=1) if len(a) else a
            gap = d2[a] - d2[a, n][:, None]
            unit = per_unit[a] + per_unit[a, n][:, None]
            has = farther.any(axis=1)
            at = _decided(gap, unit, same_row[n] | is_exact | ~farther | ~has[:, None])
            decided = min(decided, at.min(initial=np.inf))
            a, p, n = a[has], p[has], n[has]
        else:
            pair, n = np.nonzero(negative[a])
            a, p = a[pair], p[pair]
    selection = decided if mining == "semihard" else np.inf

    hinge = d[a, p] - d[a, n] + margin
    size = d[a, p] + d[a, n] + abs(margin)
    bound = d_bound[a, p] + d_bound[a, n] + 3 * u * size
    unit = d_unit[a, p] + d_unit[a, n] + 3 * size
    is_zero = (squared and _is_dyadic(margin)) | ((d2[a, p] == d2[a, n]) & (margin == 0))
    certain = is_exact & is_zero
    signs = _decided(hinge, unit, certain).min(initial=np.inf)
    active = hinge > 0
    loss = np.maximum(hinge, 0.0)
    number = {"mean": len(a), "nonzero": int(active.sum())}.get(reduction, 1)
    divisor = max(1, number)
    at = min(selection, signs) if reduction == "nonzero" else selection
    if reduction == "none":
        per_anchor, of_anchor, sizes = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        np.add.at(per_anchor, a, loss)
        np.add.at(of_anchor, a, bound)
        np.add.at(sizes, a, np.abs(loss))
        number_each = np.bincount(a, minlength=rows)
        claims = [Claim("loss", per_anchor, of_anchor + (number_each + 2) * u * sizes, at)]
    else:
        value, of_sum = total(loss, bound, u)
        claims = [Claim("loss", value / divisor, of_sum / divisor, at)]

    weight = per_row(incoming, divisor, rows)
    slope = np.ones_like(d2) if squared else np.where(d2 == 0, 0.0, 0.5 / np.where(d == 0, 1.0, d))
    m, sizes = np.zeros_like(d2), np.zeros_like(d2)
    for other, sign in ((p, 1.0), (n, -1.0)):
        np.add.at(m, (a[active], other[active]), sign * weight[a[active]])
        np.add.at(sizes, (a[active], other[active]), np.abs(weight[a[active]]))
    m, sizes = m * slope, sizes * slope
    s, sizes = m + m.T, sizes + sizes.T
    gradient = 2 * (s.sum(axis=1)[:, None] * centered - s @ centered)
    reach = np.abs(centered)
    relative = 0.0 if squared else np.minimum(d2_bound / np.where(d2 == 0, 1.0, d2), 2.0)
    sums = sizes.sum(axis=1)[:, None] * reach + sizes @ reach
    difference = np.abs(x[:, None] - x[None])
    by_slope = np.einsum("ij,ijk->ik", sizes * relative, difference)
    bound = 2 * ((4 * rows + 20) * u * sums + by_slope) + DENORMAL * (1 + np.abs(weight).max())
    largest = _largest(gradient)
    at = min(decided, signs)
    claims.append(Claim("d embeddings", gradient, bound, at, largest=largest))
    return claims


def hidden_op(values: dict[str, Array], options: dict, incoming: Array, u: float) -> list[Claim]:
    """Claims on hidden_l2."""
    pairs = sum(name.startswith("student") for name in values)
    weights = values.get("weights", np.asarray(options.get("weights", [1.0] * pairs)))
    terms, bounds, claims = [], [], []
    for i in range(pairs):
        student, teacher = values[f"student{i}"], values[f"teacher{i}"]
        elements = student.size
        scale = 1.0
        if options["reduction"] == "batchmean" and student.ndim:
            scale = 1.0 / max(1, len(student))
        elif options["reduction"] == "mean":
            scale = 1.0 / max(1, elements)
        if weights[i] == 0:  # a pair of weight 0 is not computed
            student = teacher = np.zeros_like(student)
        difference = student - teacher
        term = scale * (difference * difference).sum()
        terms.append(term)
        bounds.append((elements + 6) * u * term + scale * elements * DENORMAL)
        coefficient = 2 * weights[i] * scale * incoming
        gradient = coefficient * difference
        bound = 6 * u * np.abs(gradient) + DENORMAL * (np.abs(coefficient) + np.abs(incoming))
        largest = _largest(gradient)
        claims.append(Claim(f"d student{i}", gradient, bound, largest=largest))
    value, bound = total(weights * np.asarray(terms), np.abs(weights) * np.asarray(bounds), u)
    claims.append(Claim("loss", value, bound + 2 * u * np.abs(weights * np.asarray(terms)).sum()))
    claims.append(Claim("terms", np.asarray(terms), np.asarray(bounds)))
    return claims


def nearest_op(values: dict[str, Array], u: float, is_exact: bool) -> list[Claim]:
    """Claims on nearest_neighbor."""
    queries = values["queries"]
    alone = "gallery" not in values
    gallery = queries if alone else values["gallery"]
    rows, depth = queries.shape
    if rows == 0:
        return [Claim("distance", np.zeros(0), 0.0), Claim("index", np.zeros(0), 0.0)]
    d2 = ((queries[:, None] - gallery[None]) ** 2).sum(axis=2)
    if alone:
        np.fill_diagonal(d2, np.inf)
    index = d2.argmin(axis=1)
    distance = d2[np.arange(rows), index]
    same = (gallery[index][:, None] == gallery[None]).all(axis=2) | is_exact
    is_own = np.eye(rows, dtype=bool) if alone else np.zeros_like(d2, dtype=bool)
    gap = np.where(is_own, 0.0, d2) - distance[:, None]
    unit = (depth + 3) * (np.where(is_own, 0.0, d2) + distance[:, None]) + depth * DENORMAL / u
    decided = _decided(gap, unit, same | is_own).min(axis=1)
    bound = (depth + 3) * u * distance + depth * DENORMAL
    return [Claim("distance", distance, bound), Claim("index", index.astype(float), 0.0, decided)]
