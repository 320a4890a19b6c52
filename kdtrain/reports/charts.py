"""Curves of the report as plain values, which a template draws as SVG in the page's colors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from kdtrain.reports.writing import count

# contrast of at least 3:1 to the white and the dark page
ROLE_COLORS = dict(teacher="#64748b", scratch="#3b82f6", control="#d97706", distilled="#059669")
OTHER_COLORS = ("#8b5cf6", "#db2777", "#0891b2", "#65a30d", "#e11d48", "#0d9488")
LEFT, RIGHT, TOP, BOTTOM = 42.0, 392.0, 8.0, 176.0
"""The frame of the curves, in the units of the template's viewBox."""
MOST_POINTS = 150
SPAN = 30.0
"""Values that span a larger factor get a logarithmic axis in a panel with log_y."""

Scale = tuple[Callable[[float], float], list[tuple[float, str]]]
"""A function from value to place, and the place and text of each tick."""


class Curve(NamedTuple):
    """One line of a panel."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashed: bool = False
    turns: Sequence[float] = ()
    """x of the rings on the line, where the learning rate changes."""


class Panel(NamedTuple):
    """One plot: its lines, and the words of its title and axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    floor: float | None = None
    """A dashed horizontal line."""
    log_x: bool = False
    log_y: bool = False
    """Logarithmic where all values are positive and span more than a factor of SPAN."""
    dots: bool = False
    """On curves of fewer than 40 points."""


def drawn(panel: Panel) -> dict[str, Any]:
    """The values that the template `chart` draws: the panel, its ticks and each curve's points."""
    right = [x for curve in panel.curves for x in curve.x] + [0.0] * (not panel.log_x)
    across, x_ticks = _scale(right, (LEFT, RIGHT), panel.log_x, whole=not panel.log_x)
    heights = [y for curve in panel.curves for y in curve.y]
    heights += [panel.floor] if panel.floor is not None else []
    wide = panel.log_y and min(heights) > 0 and max(heights) > SPAN * min(heights)
    up, y_ticks = _scale(heights if wide else [0.0, *heights], (BOTTOM, TOP), wide)
    curves = []
    for curve in panel.curves:
        rings = [(x, float(np.interp(x, curve.x, curve.y))) for x in curve.turns]
        ends = list(zip(curve.x, curve.y, strict=True)), rings
        points, rings = ([(round(across(x), 1), round(up(y), 1)) for x, y in both] for both in ends)
        curves.append((curve, points, rings))
    floor = None if panel.floor is None else round(up(panel.floor), 1)
    placed = dict(wide=wide, x_ticks=x_ticks, y_ticks=y_ticks, floor=floor, curves=curves)
    return panel._asdict() | placed


def thinned(values: Sequence[float]) -> list[float]:
    """At most MOST_POINTS values, means over equal parts."""
    parts = np.array_split(np.asarray(values, dtype=float), min(len(values), MOST_POINTS))
    return [float(part.mean()) for part in parts]


def _scale(
    values: Sequence[float], ends: tuple[float, float], logarithmic: bool, *, whole: bool = False
) -> Scale:
    """The values between two ends, with a few round ticks; whole: ticks at whole numbers."""
    low, high = min(values), max(values)
    if high == low:
        high = 10 * low if logarithmic else low + 1
    if logarithmic:
        ticks = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)).tick_values(low, high)
    else:
        ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
        low, high = (low, high) if whole else (ticks[0], ticks[-1])
    rise: Callable[[float], float] = math.log if logarithmic else float

    def place(value: float) -> float:
        share = (rise(value) - rise(low)) / (rise(high) - rise(low))
        return ends[0] + (ends[1] - ends[0]) * share

    return place, [(round(place(t), 1), count(t)) for t in ticks if low <= t <= high]
