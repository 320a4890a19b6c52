"""A result table as one figure: for each block its rows as dots, then the trends as intervals.

Left ours, right the paper's numbers in a panel of their own: they come from other data, so what
can be compared is the order of rows and the gaps between them. Both panels have the same points an
inch where that fits, and then gaps compare by eye.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from kdtrain.reports import plots
from kdtrain.reports.plots import DPI, EDGE, INK, LABEL, LEGEND, LINE, SMALL, SOFT, WIDTH_IN
from kdtrain.reports.tables.data import ONE_SEED, Block, Cell, Row, Table, Trend
from kdtrain.reports.tables.text import difference_text, has_paper, name_text, own_text, seeds_text
from kdtrain.reports.writing import decimal

WIDTH_RATIOS = (2.1, 1.0)  # ours, the paper's
BAD = "#dc2626"
KIND_COLOURS = {"paper": "#2563eb", "control": "#b45309", "extra": "#7c3aed", "teacher": "#475569"}
COLUMN_COLOURS = ("#475569", "#d97706", "#2563eb", "#059669", "#db2777", "#0891b2")
VERDICT_COLOURS = {
    "held": "#059669",
    "reversed": BAD,
    "inconclusive": "#b45309",
    ONE_SEED: "#4b5563",
    "not run": EDGE,
    "diverged": "#b91c1c",
}
FLOOR_STYLES = ("--", ":", "-.")
NAME_WIDTH = 34
LANE_IN = 0.20
"""Height of one dot's lane; a row has a lane for each of its cells."""
ROW_GAP_IN = 0.12
EDGES_IN = 0.85
"""Title, axis and air of a block."""
LEGEND_IN = 0.17
LEGEND_CHARACTERS = 105
FAR = 1.0
"""A floor further away than this many spans of the dots is not drawn; the legend names it."""
SAME_SCALE = 4.0
"""Panels share points an inch unless the marks of one would shrink by more than this."""
HOW_TO_READ = (
    "Dot: mean over seeds; ticks: seeds; band: one standard deviation either way. "
    "Diamond: the paper's, on its own data: compare order and gaps."
)


Span = tuple[float, float]


class _Lane(NamedTuple):
    """The place of one cell."""

    y: float
    colour: str
    cell: Cell


class _Line(NamedTuple):
    """A row and its lanes; y in inches from the top of the block."""

    row: Row
    top: float
    bottom: float
    lanes: Sequence[_Lane]


class _Floor(NamedTuple):
    """A row that learns nothing: its legend, and (colour, value) for each line to draw."""

    text: str
    lines: Sequence[tuple[str, float]]
    style: str


def draw(table: Table) -> bytes:
    """A PNG of the table, 11 inches wide at 150 dots an inch; the same table gives the same
    bytes.
    """
    heights = [
        EDGES_IN + LEGEND_IN * len(_legend_rows(block)) + _bottom(_lines(block), 0.2)
        for block in table.blocks
    ]
    if table.trends:
        heights.append(trends_height(table.trends))
    figure = framed(table, HOW_TO_READ, sum(heights))
    grid = figure.add_gridspec(
        max(1, len(heights)), 2, width_ratios=WIDTH_RATIOS, height_ratios=heights or [1.0]
    )
    for number, block in enumerate(table.blocks):
        _draw_block(figure, grid, number, block)
    if table.trends:
        draw_trends(figure, grid, len(table.blocks), table.trends)
    return png_of(figure)


def framed(table: Table, words: str, height_in: float) -> Figure:
    """An empty figure with the table's title, and its source and `words` below."""
    figure = Figure(figsize=(WIDTH_IN, height_in + 0.7), dpi=DPI, layout="constrained")
    title = plots.drawable(f"{table.name}: {table.title}")
    words = plots.drawable(f"{table.source}. {words}")
    figure.suptitle(title, x=0.008, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel(words, x=0.008, ha="left", fontsize=7.5, color=SOFT)
    return figure


def trends_height(trends: Sequence[Trend]) -> float:
    """Inches of the claims as intervals."""
    return EDGES_IN + 0.34 * len(trends)


def png_of(figure: Figure, colours: int = 128) -> bytes:
    """A figure of few colours as a PNG: a palette of 128 takes a quarter of the room."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    image.save(packed, format="png", optimize=True)
    return packed.getvalue()


def _lines(block: Block) -> list[_Line]:
    """The rows that are drawn as dots, one below the other, a lane for each cell.

    One lane serves a row whose cells are one and the same network, such as the teacher.
    """
    lines, top = [], 0.0
    for row in block.rows:
        cells = _cells(row)
        if row.kind == "floor" or not cells:
            continue
        alone = len(cells) == len(row.cells) and len(set(row.cells)) == 1
        shown = [(KIND_COLOURS[row.kind], cells[0][1])] if alone else cells
        height = ROW_GAP_IN + LANE_IN * max(len(shown), _name(row).count("\n") + 1)
        first = top + (height - LANE_IN * len(shown)) / 2
        lanes = [_Lane(first + (k + 0.5) * LANE_IN, *one) for k, one in enumerate(shown)]
        lines.append(_Line(row, top, top + height, lanes))
        top += height
    return lines


def _bottom(lines: Sequence[_Line], empty: float) -> float:
    return lines[-1].bottom if lines else empty


def _name(row: Row) -> str:
    return textwrap.fill(plots.drawable(name_text(row)), NAME_WIDTH)


def _cells(row: Row) -> list[tuple[str, Cell]]:
    """The cells that the table has, each with its column's colour."""
    places = zip(itertools.cycle(COLUMN_COLOURS), row.cells, strict=False)
    return [(colour, cell) for colour, cell in places if cell.state != "none"]


def _draw_block(figure: Figure, grid: GridSpec, number: int, block: Block) -> None:
    lines, floors, legend = _lines(block), _floors(block), _legend_rows(block)
    lanes = [lane for line in lines for lane in line.lanes]
    papers = [(lane, lane.cell.paper) for lane in lanes if lane.cell.paper is not None]
    span = _span(block)
    if span is not None:
        span = _extent([*span, *(value for floor in floors for _, value in floor.lines)])
    left, right, same = _limits(span, _extent([paper for _, paper in papers]))

    ours = figure.add_subplot(grid[number, 0] if papers else grid[number, :])
    _frame(ours, block, lines, left)
    ours.set_yticklabels([_name(line.row) for line in lines])
    for label, line in zip(ours.get_yticklabels(), lines, strict=True):
        label.set_color(KIND_COLOURS[line.row.kind])
    step = _ticks(ours, block.unit)
    if span is None:
        ours.set_xticks([])  # nothing has a number yet
    for lane in lanes:
        _draw_ours(ours, lane, block.digits)
    for floor in floors:
        for colour, value in floor.lines:
            ours.axvline(value, color=colour, linestyle=floor.style, linewidth=1.2, zorder=1)
    _draw_legend(figure, ours, legend)
    title_axis(ours, block.title, above=len(legend))
    if papers:
        theirs = figure.add_subplot(grid[number, 1])
        _frame(theirs, block, lines, right)
        theirs.set_yticklabels([])
        _ticks(theirs, block.unit, step if same else None)
        for lane, paper in papers:
            theirs.plot(paper, lane.y, "D", color=lane.colour, markersize=4.5, mfc="white")
            _number(theirs, paper, lane, decimal(paper, block.digits))
        scale = "" if span is None else ", same axis" if same else ", another axis"
        title_axis(theirs, f"the paper, other data{scale}", light=True)


def _frame(axis: Axes, block: Block, lines: Sequence[_Line], limits: Span) -> None:
    axis.set_xlim(*limits)
    axis.set_ylim(_bottom(lines, 1.0), 0.0)
    axis.set_yticks([(line.top + line.bottom) / 2 for line in lines])
    for line in lines[1::2]:
        axis.axhspan(line.top, line.bottom, color="#f8fafc", zorder=0)
    way = "higher is better \N{RIGHTWARDS ARROW}"
    if not block.higher_is_better:
        way = "\N{LEFTWARDS ARROW} lower is better"
    plain_axis(axis, f"{block.metric}, {block.unit}   {way}")


def plain_axis(axis: Axes, label: str) -> None:
    """No frame but the axis below, with a label, and thin vertical lines."""
    axis.set_xlabel(plots.drawable(label), fontsize=8, color=LABEL)
    axis.grid(True, axis="x", color=LINE, linewidth=0.6)
    axis.tick_params(which="both", colors=LABEL, labelsize=8, length=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(EDGE)


def _ticks(axis: Axes, unit: str, step: float | None = None) -> float:
    """Set few round ticks, none beyond 100 %, `step` apart if given; return their distance."""
    low, high = axis.get_xlim()
    if step is None:
        places = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(low, high)
        step = float(places[1] - places[0])
    places = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    top = min(high, 100.0) if unit == "%" else high
    axis.set_xticks([place for place in places if place <= top])
    return step


def title_axis(axis: Axes, text: str, *, above: int = 0, light: bool = False) -> None:
    """Set a plot's title; above: rows of legend between the two."""
    look: dict[str, Any] = {"color": SOFT} if light else {"color": INK, "fontweight": "bold"}
    pad = 5 + 72 * LEGEND_IN * above
    axis.set_title(plots.drawable(text), fontsize=9, loc="left", pad=pad, **look)


def _draw_ours(axis: Axes, lane: _Lane, digits: int) -> None:
    """The mean with its spread and the seeds, or a word where there is no number."""
    cell, y, colour = lane.cell, lane.y, lane.colour
    if cell.value is None:
        bad = cell.state in ("diverged", "failed")
        look = {"color": BAD if bad else SOFT, "style": "italic", **SMALL}
        axis.text(0.01, y, own_text(cell), transform=axis.get_yaxis_transform(), **look)
        return
    *known, low, high = _marks(cell)
    axis.plot([low, high], [y, y], color=colour, lw=3.5, alpha=0.28, solid_capstyle="butt")
    if len(known) > 1:
        axis.plot(known, [y] * len(known), "|", color=colour, markersize=5, alpha=0.9)
    axis.plot(cell.value, y, "o", color=colour, markersize=5.5)
    text = decimal(cell.value, digits)
    if cell.seeds < len(cell.per_seed):
        text += f"  ({cell.seeds} of {len(cell.per_seed)} seeds)"
    _number(axis, max([*known, high]), lane, text)


def _number(axis: Axes, x: float, lane: _Lane, text: str) -> None:
    place = {"xytext": (6, 0), "textcoords": "offset points"}
    axis.annotate(text, (x, lane.y), color=lane.colour, **place, **SMALL)


def _floors(block: Block) -> list[_Floor]:
    """One line for a floor whose columns agree, else one per column in its colour; those far from
    every dot have a number in the legend alone.
    """
    floors, span = [], _span(block)
    for row in block.rows:
        if row.kind != "floor":
            continue
        cells = _cells(row)
        found = [(colour, cell.value) for colour, cell in cells if cell.value is not None]
        words = [decimal(value, block.digits) for _, value in found]
        if len(set(words)) == 1:
            found, words = [(SOFT, found[0][1])], words[:1]
        words += dict.fromkeys(cell.state for _, cell in cells if cell.value is None)
        room = FAR * (span[1] - span[0]) if span else 0.0
        near = [line for line in found if span and span[0] - room <= line[1] <= span[1] + room]
        off = ", off the scale" if len(near) < len(found) else ""
        style = FLOOR_STYLES[len(floors) % len(FLOOR_STYLES)]
        text = plots.drawable(f"floor: {row.name} {' / '.join(words)}{off}")
        floors.append(_Floor(text, near, style))
    return floors


def _legend_rows(block: Block) -> list[list[Line2D]]:
    """The columns' colours and the floors, in rows that fit the panel."""
    columns = block.columns if len(block.columns) > 1 else ()
    handles = [
        Line2D([], [], ls="", color=colour, marker="o", ms=5, label=plots.drawable(name))
        for colour, name in zip(itertools.cycle(COLUMN_COLOURS), columns, strict=False)
    ]
    for floor in _floors(block):
        handles.append(Line2D([], [], ls=floor.style, color=SOFT, lw=1.2, label=floor.text))
    rows: list[list[Line2D]] = []
    room = 0
    for handle in handles:
        length = len(str(handle.get_label())) + 6
        if length > room:
            rows.append([])
            room = LEGEND_CHARACTERS
        rows[-1].append(handle)
        room -= length
    return rows


def _draw_legend(figure: Figure, axis: Axes, rows: Sequence[Sequence[Line2D]]) -> None:
    look: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "fontsize": 7.5}
    look |= {"borderpad": 0.1, "borderaxespad": 0.1, "handletextpad": 0.4, "columnspacing": 1.2}
    for number, handles in enumerate(reversed(rows)):
        up = axis.transAxes + ScaledTranslation(0, number * LEGEND_IN, figure.dpi_scale_trans)
        legend = axis.legend(
            handles=handles, ncols=len(handles), bbox_transform=up, **look, **LEGEND
        )
        if number + 1 < len(rows):
            axis.add_artist(legend)  # the next legend would take its place


def draw_trends(figure: FigureBase, grid: GridSpec, number: int, trends: Sequence[Trend]) -> None:
    """Every claim's difference with its interval, the verdict beside it, the paper's as a
    diamond.
    """
    axis, side = figure.add_subplot(grid[number, 0]), figure.add_subplot(grid[number, 1])
    side.set_axis_off()
    side.set_xlim(0, 1)
    for area in (axis, side):
        area.set_ylim(len(trends) - 0.5, -0.5)
    axis.set_yticks(range(len(trends)))
    names = [plots.drawable(f"{trend.code}  {trend.claim}") for trend in trends]
    axis.set_yticklabels([textwrap.fill(name, NAME_WIDTH) for name in names])
    axis.axvline(0, color=INK, linewidth=1, zorder=1)
    for y, trend in enumerate(trends):
        verdict, colour = trend.verdict, VERDICT_COLOURS[trend.verdict.state]
        if verdict.margin is not None:
            width = verdict.margin * (1 if verdict.one_sided else 2)
            axis.barh(y, width, 0.7, -verdict.margin, color="#e0f2fe", zorder=0)
        words = verdict.state.replace(": ", ":\n")
        side.text(0, y, words, va="center", fontsize=8.5, color=colour, fontweight="bold")
        if verdict.difference is not None and verdict.low is not None and verdict.high is not None:
            axis.plot([verdict.low, verdict.high], [y, y], color=colour, linewidth=2)
            axis.plot(verdict.difference, y, "o", color=colour, markersize=6)
            text = f"{difference_text(trend)}\n{seeds_text(verdict)}"
            side.text(0.34, y, text, color=INK, linespacing=1.25, **SMALL)
        if trend.paper is not None:
            axis.plot(trend.paper, y, "D", color=SOFT, markersize=4.5, mfc="white", zorder=3)
    axis.margins(x=0.06)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7))
    plain_axis(axis, "difference in points, 95 % interval   as claimed \N{RIGHTWARDS ARROW}")
    paper = ", diamond the paper's" if has_paper(trends) else ""
    title_axis(axis, f"trends: dot ours{paper}")


def _marks(cell: Cell) -> list[float]:
    """Places of a cell's marks: its seeds, and the ends of its band."""
    if cell.value is None:
        return []
    spread = cell.spread or 0.0
    known = [value for value in cell.per_seed if value is not None]
    return [*known, cell.value - spread, cell.value + spread]


def _span(block: Block) -> Span | None:
    """From the lowest to the highest mark of a block, floors aside."""
    rows = [row for row in block.rows if row.kind != "floor"]
    return _extent([value for row in rows for cell in row.cells for value in _marks(cell)])


def _extent(values: Sequence[float]) -> Span | None:
    return (min(values), max(values)) if values else None


def _limits(ours: Span | None, paper: Span | None) -> tuple[Span, Span, bool]:
    """Limits of both panels, with room for numbers, and whether an inch has the same points."""
    left, right = _padded(ours, 0.12), _padded(paper, 0.3)
    rates = [(end - start) / n for (start, end), n in zip((left, right), WIDTH_RATIOS, strict=True)]
    fits = ours is not None and paper is not None and max(rates) <= SAME_SCALE * min(rates)
    if fits:
        left = _widened(left, max(rates) * WIDTH_RATIOS[0])
        right = _widened(right, max(rates) * WIDTH_RATIOS[1])
    return left, right, fits


def _padded(span: Span | None, room: float) -> Span:
    if span is None:
        return 0.0, 1.0
    width = max(span[1] - span[0], 0.02 * max(abs(span[0]), abs(span[1])), 1e-3)
    return span[0] - 0.06 * width, span[1] + room * width


def _widened(limits: Span, width: float) -> Span:
    extra = (width - (limits[1] - limits[0])) / 2
    return limits[0] - extra, limits[1] + extra
