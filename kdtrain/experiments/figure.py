"""A study with a row per arm as one figure: TAR over FAR, accuracy against parameters and against
speed, and the claims as intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator

from kdtrain.experiments.collect import Collection, curves
from kdtrain.experiments.study import METRICS, At, Study, pixels, where
from kdtrain.objectives import all_pairs
from kdtrain.reports.plots import LEGEND, LINE, SMALL, SOFT
from kdtrain.reports.tables.data import Table, Trend
from kdtrain.reports.tables.plot import (
    WIDTH_RATIOS,
    draw_trends,
    framed,
    plain_axis,
    png_of,
    title_axis,
    trends_height,
)
from kdtrain.reports.writing import count

TEACHER_COLOUR, CONTROL_COLOUR = "#111827", "#9ca3af"
COLOURS = (
    *("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d"),
    *("#92400e", "#4338ca", "#0d9488", "#be123c"),
)
ACCURACY = ("tar_at_far_0.001_all", "tar_at_far_0.01_all", "nn_top1_other_video", "nn_top1")
"""The accuracy that is drawn against cost: the first of these that was measured."""
CURVES_IN, LEAST_IN, NAME_IN = 3.6, 3.0, 0.2
MOST_TICKS = 4
BESIDE = 0.3
"""Arms of one cost take this share of the room between two costs."""
HOW_TO_READ = (
    "Lines and dots: means over seeds; bands and bars: from the lowest to the highest seed."
)


class _Dot(NamedTuple):
    """An arm at one resolution: cost and accuracy."""

    name: str
    colour: str
    x: float
    """Place on the axis."""
    cost: float
    """Parameters, or images per second."""
    y: float
    low: float
    high: float


def draw(collection: Collection, table: Table) -> bytes:
    """A PNG, 11 inches wide at 150 dots an inch; the same table gives the same bytes."""
    study, colours = collection.study, _colours(collection.study)
    parts: list[tuple[float, Callable[[FigureBase], None]]] = []
    names = len(study.rows) * len(study.resolutions or (None,))
    for second in study.sources:
        if any(curves(collection, at, second) for arm in study.rows for at in _places(study, arm)):
            parts.append((CURVES_IN, partial(_draw_curves, collection, second, colours)))
        if collection.sizes:
            height = max(LEAST_IN, 0.7 + NAME_IN * names)
            parts.append((height, partial(_draw_costs, collection, second, colours)))
    if table.trends:
        parts.append((trends_height(table.trends), partial(_draw_trends, table.trends)))
    heights = [height for height, _ in parts]
    figure = framed(table, HOW_TO_READ, sum(heights))
    grid = figure.add_gridspec(max(1, len(parts)), 1, height_ratios=heights or [1.0])
    for number, (_, draw_part) in enumerate(parts):
        draw_part(figure.add_subfigure(grid[number, 0]))
    return png_of(figure, 256)


def _draw_trends(trends: Sequence[Trend], part: FigureBase) -> None:
    draw_trends(part, part.add_gridspec(1, 2, width_ratios=WIDTH_RATIOS), 0, trends)


def _places(study: Study, arm: str) -> list[At]:
    """An arm at every resolution; a teacher has its own alone."""
    sides = (None,) if arm in study.teachers else study.resolutions or (None,)
    return [At(arm, side=side) for side in sides]


def _colours(study: Study) -> dict[str, str]:
    """One colour per arm, the same in every plot."""
    found, used = {}, 0
    for arm in study.rows:
        kind = study.kind(arm)
        if kind == "teacher" and arm == study.teachers[0]:
            found[arm] = TEACHER_COLOUR
        elif kind == "control" and CONTROL_COLOUR not in found.values():
            found[arm] = CONTROL_COLOUR
        else:
            found[arm] = COLOURS[used % len(COLOURS)]
            used += 1
    return found


def _draw_curves(
    collection: Collection, second: bool, colours: dict[str, str], part: FigureBase
) -> None:
    """TAR over FAR, a plot for each resolution."""
    study = collection.study
    sides = study.resolutions or (None,)
    axes = part.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    for axis, side in zip(axes, sides, strict=True):
        for arm in study.rows:
            found = curves(collection, At(arm, side=side), second)
            if found is None:
                continue
            far, tar = found
            dashes = "-" if study.kind(arm) == "paper" else "--"
            style: dict[str, Any] = {"color": colours[arm], "linewidth": 1.5, "label": arm}
            axis.plot(far, 100 * tar.mean(0), linestyle=dashes, **style)
            if len(tar) > 1:
                low, high = 100 * tar.min(0), 100 * tar.max(0)
                axis.fill_between(far, low, high, color=colours[arm], alpha=0.13, linewidth=0)
        places = [At(arm, side=side) for arm in study.students]
        floors = {
            far: collection.floor(places, "floors", f"tar_at_far_{far:g}_all", second)
            for far in all_pairs.FARS
        }
        marks = [(far, value) for far, value in floors.items() if value is not None]
        if marks:
            axis.plot(*zip(*marks, strict=True), "x", color=SOFT, markersize=5, label="raw pixels")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        _frame(axis, "false accept rate, all pairs of the test split")
        title_axis(axis, f"true accept rate, %{pixels(side)}{where(second)}")
    handles, names = axes[0].get_legend_handles_labels()
    legend = part.legend(handles, names, loc="outside right upper", fontsize=7.5, **LEGEND)
    legend.set_in_layout(True)


def _draw_costs(
    collection: Collection, second: bool, colours: dict[str, str], part: FigureBase
) -> None:
    """Accuracy against the backbone's parameters, and against images per second."""
    metrics = collection.metrics(second)
    metric = next((m for m in ACCURACY if m in metrics), metrics[0])
    titles = ("size", "parameters of the backbone"), ("speed", "images per second, 64 at a time")
    for axis, (word, label) in zip(part.subplots(1, 2), titles, strict=True):
        _frame(axis, label)
        _draw_dots(axis, _dots(collection, second, metric, colours, speed=word == "speed"))
        title_axis(axis, f"{METRICS.get(metric, metric)}, %, against {word}{where(second)}")


def _dots(
    collection: Collection, second: bool, metric: str, colours: dict[str, str], *, speed: bool
) -> list[_Dot]:
    dots = []
    for arm in collection.study.rows:
        for at in _places(collection.study, arm):
            cell = collection.cell(at, metric, second)
            key = collection.network(at, second)
            size, speeds = collection.sizes.get(key), collection.speeds.get(key, {})
            if cell.value is None or size is None or (speed and not speeds):
                continue
            x = speeds[max(speeds)].median if speed else float(size.backbone)
            seeds = [value for value in cell.per_seed if value is not None]
            name = arm if at.side is None else f"{arm}, {at.side} px"
            dots.append(_Dot(name, colours[arm], x, x, cell.value, min(seeds), max(seeds)))
    return dots


def _draw_dots(axis: Axes, dots: Sequence[_Dot]) -> None:
    """Dots with a bar over the seeds, and their names in a column on the right."""
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
            color=dot.colour,
            arrowprops={"arrowstyle": "-", "color": dot.colour, "linewidth": 0.5, "alpha": 0.5},
            **SMALL,
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
        last = len(mates) - 1
        for number, dot in enumerate(mates):
            share = (number - last / 2) / max(1, last)
            found.append(dot._replace(x=cost * math.exp(BESIDE * room * share)))
    return found


def _spread(places: Sequence[float], step: float) -> list[float]:
    """Rising places in [0, 1], moved apart to at least `step` and back below 1 at the top."""
    up = [*accumulate(places, lambda low, place: max(place, low + step), initial=-step)][1:]
    down = accumulate(up[::-1], lambda high, place: min(place, high - step), initial=1 + step)
    return [*down][:0:-1]


def _frame(axis: Axes, label: str) -> None:
    plain_axis(axis, label)
    axis.grid(True, axis="y", color=LINE, linewidth=0.6)
