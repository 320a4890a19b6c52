"""A comparison as one figure: TAR over FAR, accuracy against parameters and against speed, and the
claims as intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator

from kdtrain.experiments.comparison.collect import METRICS, Comparison, curves, floor
from kdtrain.experiments.comparison.request import Place
from kdtrain.experiments.study import cell_of, where
from kdtrain.objectives import all_pairs
from kdtrain.reports.plots import DPI, INK, LABEL, LINE, SOFT, WIDTH_IN
from kdtrain.reports.tables.data import Table
from kdtrain.reports.tables.plot import draw_trends, plain_axis, png_of, title_axis
from kdtrain.reports.writing import count

TEACHER_COLOUR, CONTROL_COLOUR = "#111827", "#9ca3af"
COLOURS = (
    *("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"),
    *("#92400e", "#4338ca", "#0d9488", "#be123c"),
)
ACCURACY = ("tar_at_far_0.001_all", "tar_at_far_0.01_all", "nn_top1_other_video", "nn_top1")
"""What stands for accuracy against cost: the first of them that was measured."""
CURVES_IN, LEAST_IN, NAME_IN = 3.6, 3.0, 0.2
MOST_TICKS = 4
BESIDE = 0.3
"""Methods of one cost take this share of the room between two costs."""
HOW_TO_READ = (
    "Lines and dots: means over seeds; bands and bars: from the lowest to the highest seed."
)


class _Dot(NamedTuple):
    """A method at one resolution, with what it costs and reaches."""

    name: str
    colour: str
    x: float
    """Where it is drawn."""
    cost: float
    """Parameters, or images per second."""
    y: float
    low: float
    high: float


def draw(comparison: Comparison, table: Table) -> bytes:
    """A PNG, 11 inches wide at 150 dots an inch; the same table gives the same bytes."""
    colours = _colours(comparison)
    rows: list[tuple[str, bool, float]] = []
    for second in comparison.request.sources:
        places = comparison.request.places(second)
        if any(curves(comparison, m, p) for m in comparison.methods for p in places):
            rows.append(("curves", second, CURVES_IN))
        names = len(comparison.methods) * len(places)
        if comparison.sizes:
            rows.append(("costs", second, max(LEAST_IN, 0.7 + NAME_IN * names)))
    if table.trends:
        rows.append(("trends", False, 0.85 + 0.34 * len(table.trends)))
    heights = [height for _, _, height in rows]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.7), dpi=DPI, layout="constrained")
    title = f"{table.name}: {table.title}"
    figure.suptitle(title, x=0.008, ha="left", fontsize=11, fontweight="bold", color=INK)
    words = f"{table.source}. {HOW_TO_READ}"
    figure.supxlabel(words, x=0.008, ha="left", fontsize=7.5, color=SOFT)
    grid = figure.add_gridspec(max(1, len(rows)), 1, height_ratios=heights or [1.0])
    for number, (kind, second, _) in enumerate(rows):
        part = figure.add_subfigure(grid[number, 0])
        if kind == "curves":
            _draw_curves(part, comparison, second, colours)
        elif kind == "costs":
            _draw_costs(part, comparison, second, colours)
        else:
            inner = part.add_gridspec(1, 2, width_ratios=(2.1, 1.0))
            draw_trends(part, inner, 0, table.trends)
    return png_of(figure, 256)


def _colours(comparison: Comparison) -> dict[str, str]:
    """One colour a method, the same in every plot."""
    found, used = {}, 0
    teachers = comparison.request.teachers
    for method in comparison.methods:
        kind = comparison.kind(method)
        if kind == "teacher" and method == teachers[0]:
            found[method] = TEACHER_COLOUR
        elif kind == "control" and CONTROL_COLOUR not in found.values():
            found[method] = CONTROL_COLOUR
        else:
            found[method] = COLOURS[used % len(COLOURS)]
            used += 1
    return found


def _draw_curves(
    part: FigureBase, comparison: Comparison, second: bool, colours: dict[str, str]
) -> None:
    """TAR over FAR, a plot for each resolution."""
    places = comparison.request.places(second)
    axes = part.subplots(1, len(places), squeeze=False, sharey=True)[0]
    for axis, place in zip(axes, places, strict=True):
        for method in comparison.methods:
            found = curves(comparison, method, place)
            if found is None:
                continue
            far, tar = found
            dashes = "-" if comparison.kind(method) == "paper" else "--"
            style: dict[str, Any] = {"color": colours[method], "linewidth": 1.5, "label": method}
            axis.plot(far, 100 * tar.mean(0), linestyle=dashes, **style)
            if len(tar) > 1:
                low, high = 100 * tar.min(0), 100 * tar.max(0)
                axis.fill_between(far, low, high, color=colours[method], alpha=0.13, linewidth=0)
        known = [
            (f, floor(comparison, "floors", f"tar_at_far_{f:g}_all", place)) for f in all_pairs.FARS
        ]
        marks = [(f, value) for f, value in known if value is not None]
        if marks:
            axis.plot(*zip(*marks, strict=True), "x", color=SOFT, markersize=5, label="raw pixels")
        axis.set_xscale("log")
        axis.set_xlabel("false accept rate, all pairs of the test split", fontsize=8, color=LABEL)
        axis.set_ylim(bottom=0)
        _frame(axis)
        title_axis(axis, f"true accept rate, %{place.title}")
    handles, names = axes[0].get_legend_handles_labels()
    legend = part.legend(
        handles, names, loc="outside right upper", fontsize=7.5, frameon=False, labelcolor="#374151"
    )
    legend.set_in_layout(True)


def _draw_costs(
    part: FigureBase, comparison: Comparison, second: bool, colours: dict[str, str]
) -> None:
    """Accuracy against the backbone's parameters, and against images per second."""
    metric = next((m for m in ACCURACY if m in comparison.metrics(second)), ACCURACY[-1])
    titles = ("size", "parameters of the backbone"), ("speed", "images per second, 64 at a time")
    for axis, (word, label) in zip(part.subplots(1, 2), titles, strict=True):
        _draw_dots(axis, _dots(comparison, second, metric, colours, speed=word == "speed"))
        axis.set_xlabel(label, fontsize=8, color=LABEL)
        title_axis(axis, f"{METRICS[metric]}, %, against {word}{where(second)}")


def _dots(
    comparison: Comparison, second: bool, metric: str, colours: dict[str, str], *, speed: bool
) -> list[_Dot]:
    dots = []
    for method in comparison.methods:
        teacher = method in comparison.request.teachers
        for place in [Place(None, second)] if teacher else comparison.request.places(second):
            cell = cell_of(comparison.of(method, place), metric)
            key = comparison.network(method, place)
            size, found = comparison.sizes.get(key), comparison.speeds.get(key)
            if cell.value is None or size is None or (speed and found is None):
                continue
            x = float(size.backbone)
            if speed and found is not None:
                x = found[max(found)].median
            seeds = [value for value in cell.per_seed if value is not None]
            name = method if place.side is None else f"{method}, {place.side} px"
            ends = min(seeds), max(seeds)
            dots.append(_Dot(name, colours[method], x, x, cell.value, *ends))
    return dots


def _draw_dots(axis: Axes, dots: Sequence[_Dot]) -> None:
    """Dots with a bar over the seeds, and their names in a column on the right."""
    _frame(axis)
    if not dots:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=SOFT)
        return
    axis.set_xscale("log")
    dots = _side_by_side(dots)
    for dot in dots:
        axis.plot([dot.x, dot.x], [dot.low, dot.high], color=dot.colour, linewidth=1.5, alpha=0.5)
        axis.plot(dot.x, dot.y, "o", color=dot.colour, markersize=5)
    values = [value for dot in dots for value in (dot.low, dot.high)]
    room = max(max(values) - min(values), 1.0)
    low, high = min(values) - 0.08 * room, max(values) + 0.08 * room
    axis.set_ylim(low, high)
    places = [dot.x for dot in dots]
    axis.set_xlim(min(places) / 1.2, max(places) * 1.2)
    known = sorted({dot.cost for dot in dots})
    if len(known) <= MOST_TICKS:
        axis.set_xticks(known, [count(int(x)) for x in known])
    else:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(int(x))))
    axis.xaxis.set_minor_locator(NullLocator())
    ordered = sorted(dots, key=lambda dot: dot.y)
    step = 1 / max(len(ordered), 12)
    spots = _spread([(dot.y - low) / (high - low) for dot in ordered], step)
    for dot, spot in zip(ordered, spots, strict=True):
        axis.annotate(
            f"{dot.name} {dot.y:.1f}",
            (dot.x, dot.y),
            xytext=(1.04, spot),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=dot.colour,
            arrowprops={"arrowstyle": "-", "color": dot.colour, "linewidth": 0.5, "alpha": 0.5},
        )


def _side_by_side(dots: Sequence[_Dot]) -> list[_Dot]:
    """The dots with those of one cost beside each other, on a logarithmic axis."""
    alike: dict[float, list[_Dot]] = {}
    for dot in dots:
        alike.setdefault(dot.cost, []).append(dot)
    costs = sorted(alike)
    room = min((math.log(b / a) for a, b in pairwise(costs)), default=1.0)
    found = []
    for cost, mates in alike.items():
        for number, dot in enumerate(mates):
            share = (number - (len(mates) - 1) / 2) / max(1, len(mates) - 1)
            found.append(dot._replace(x=cost * math.exp(BESIDE * room * share)))
    return found


def _spread(places: Sequence[float], step: float) -> list[float]:
    """Rising places in [0, 1], moved apart to at least `step` and back below 1 at the top."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + step) if found else max(place, 0.0))
    top = 1.0
    for number in range(len(found) - 1, -1, -1):
        found[number] = min(found[number], top)
        top = found[number] - step
    return found


def _frame(axis: Axes) -> None:
    plain_axis(axis)
    axis.grid(True, axis="y", color=LINE, linewidth=0.6)
