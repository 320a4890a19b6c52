"""The rule that judges a trend: a paired bootstrap over seeds and test items, fixed beforehand.

Two arms were measured on the same test items, by networks of the same seeds. D (S, n) holds, for
every seed and item, by how much one arm did better; its mean is the difference. A resample draws
S seeds and n items with replacement and takes the mean over the drawn rows and columns of D. The
interval runs from the 2.5th to the 97.5th percentile of 10,000 such means.

Every seed is tested on the same items, so a resample draws its items once, for all its seeds
(Owen 2007, "The pigeonhole bootstrap"). With items drawn anew for each seed, what makes one item
easier than another would average out over seeds as if every seed had items of its own: in
simulated experiments without any difference, three seeds and items that decide half of the
variance, such an interval missed 0 in 16 % instead of 5 %; drawn once, it missed 0 in 4 %. What no
bootstrap mends is a small number of seeds: where seeds differ as much as items do together, three
of them missed 0 in 10 % and two in 12 %. So a verdict also says in how many seeds it agrees.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdtrain.reports.tables.data import ONE_SEED, Verdict, VerdictState

Scores = Sequence[np.ndarray | None]
"""One arm: per seed an array (n,) over the same test items, nan where an item was not measured;
None where that seed has no result. An empty sequence: the arm was not run."""

RESAMPLES = 10_000
LEVEL = 0.95
MARGIN_POINTS = 2.0  # "about neutral", "not worse": no difference larger than this
DRAWN_AT_ONCE = 1 << 20  # items: 8 MB each of places, mixed rows and picked values


def compare(better: Scores, worse: Scores, *, higher_is_better: bool) -> Verdict:
    """Whether one arm does better than another: held, reversed, inconclusive or not run.

        D[s, i] = better[s][i] - worse[s][i]   (worse - better where lower is better)

    held: the whole 95 % interval of the mean of D is above 0; reversed: below 0. better, worse:
    `Scores` with the seeds in the same order, as shares (1 is 100 %). A seed that either arm lacks
    (None, or nan throughout) is left out; then every item that is nan in either arm in any of the
    remaining seeds; not run when nothing is left. One seed gives ONE_SEED, no verdict: its
    interval resamples items alone and does not show how seeds differ. The same arguments give the
    same verdict. Raises ValueError for arms of different numbers of seeds, arrays that are not
    (n,), n that differ, infinite scores.
    """
    paired = _differences("compare", better, worse, 1.0 if higher_is_better else -1.0)
    return _verdict(paired, 0.0, math.inf, operator.gt)


def neutral(a: Scores, b: Scores) -> Verdict:
    """Whether two arms are about level: held, reversed, inconclusive or not run.

    held: the whole 95 % interval of the mean of a - b lies within +-MARGIN_POINTS; reversed: the
    whole interval lies outside, on one side; inconclusive: it crosses an end. `difference` is
    a - b in points; `agreeing` counts the seeds whose mean lies within the margin. Everything else
    as in `compare`.
    """
    found = _verdict(_differences("neutral", a, b, 1.0), -MARGIN_POINTS, MARGIN_POINTS)
    return replace(found, margin=MARGIN_POINTS)


def at_least(better: Scores, worse: Scores, *, higher_is_better: bool = True) -> Verdict:
    """Whether one arm does no worse than another: held, reversed, inconclusive or not run.

    held: the whole 95 % interval of the mean of better - worse lies above -MARGIN_POINTS;
    reversed: the whole interval lies below it; inconclusive: it crosses. `agreeing` counts the
    seeds whose mean lies above. Everything else as in `neutral`.
    """
    paired = _differences("at_least", better, worse, 1.0 if higher_is_better else -1.0)
    found = _verdict(paired, -MARGIN_POINTS, math.inf)
    return replace(found, margin=MARGIN_POINTS, one_sided=True)


def _verdict(
    paired: np.ndarray | None, least: float, most: float, above: Callable[..., Any] = operator.ge
) -> Verdict:
    """The verdict of (S, n) differences by `least` to `most` points; above: > or >=."""
    if paired is None:
        return Verdict("not run")
    low, high = _interval(paired)
    state: VerdictState = "inconclusive"
    if len(paired) == 1:
        state = ONE_SEED
    elif above(low, least) and high <= most:
        state = "held"
    elif low > most or high < least:
        state = "reversed"
    means = 100 * paired.mean(axis=1)
    return Verdict(
        state,
        difference=float(means.mean()),
        low=low,
        high=high,
        seeds=len(means),
        agreeing=int((above(means, least) & (means <= most)).sum()),
        items=paired.shape[1],
    )


def pooled(arms: Sequence[Scores]) -> list[np.ndarray | None]:
    """One arm from several that were tested on the same items: per seed and item their mean.

    For a claim that spans settings, such as "hidden hurts" over widths and initialisations: pool
    each side over the settings, then `compare`. A seed that one of the arms lacks is None; an item
    that is nan in one of them is nan. Raises ValueError when numbers of seeds or items differ.
    """
    joined: list[np.ndarray | None] = []
    for scores in zip(*arms, strict=True):
        known = [_checked("pooled", array) for array in scores if array is not None]
        joined.append(np.mean(known, axis=0) if len(known) == len(arms) else None)
    return joined


def _differences(where: str, a: Scores, b: Scores, sign: float) -> np.ndarray | None:
    """(S, n) of what both arms measured, or None when that is nothing."""
    if len(a) == 0 or len(b) == 0:
        return None
    if len(a) != len(b):
        raise ValueError(
            f"{where}: both arms must have the same seeds, got {len(a)} and {len(b)}; "
            "give None for a seed without a result"
        )
    rows = []
    for number, (one, other) in enumerate(zip(a, b, strict=True)):
        arrays = [_checked(where, array) for array in (one, other) if array is not None]
        lengths = [len(array) for array in arrays + rows[:1]]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{where}: all arrays must be over the same test items, got {lengths[0]} "
                f"and {next(n for n in lengths if n != lengths[0])} items (seed number {number})"
            )
        if len(arrays) == 2 and not np.isnan(row := sign * (arrays[0] - arrays[1])).all():
            rows.append(row)
    if not rows:
        return None
    paired = np.stack(rows)
    paired = paired[:, ~np.isnan(paired).any(axis=0)]
    return paired if paired.shape[1] else None


def _checked(where: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{where}: scores must be (items,) for each seed, got {array.shape}")
    if np.isinf(array).any():
        raise ValueError(f"{where}: scores must be finite, or nan where not measured; got infinity")
    return array


def _interval(paired: np.ndarray) -> tuple[float, float]:
    """Ends of the percentile interval of the mean of (S, n) differences, in points."""
    seeds, items = paired.shape
    generator = np.random.default_rng(0)
    shares = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    means = np.empty(RESAMPLES)
    step = max(1, DRAWN_AT_ONCE // items)
    for start in range(0, RESAMPLES, step):
        mixed = shares[start : start + step] @ paired  # (R, n): the mean over the drawn seeds
        places = generator.integers(items, size=mixed.shape)
        means[start : start + step] = np.take_along_axis(mixed, places, axis=1).mean(axis=1)
    tail = (1 - LEVEL) / 2
    # thirds of right-or-wrong scores cancel to 1e-18 instead of 0, which is no difference to judge
    low, high = 100 * np.round(np.quantile(means, [tail, 1 - tail]), 12)
    return float(low), float(high)
