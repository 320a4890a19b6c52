"""The report's figures: curves drawn by matplotlib, faces and landmarks as small inline images."""

from __future__ import annotations

import base64
import functools
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from kdtrain.config.program import printable

ROLE_COLOURS = dict(teacher="#475569", scratch="#2563eb", control="#d97706", distilled="#059669")
OTHER_COLOURS = ("#7c3aed", "#db2777", "#0891b2", "#65a30d")
TERM_COLOURS = {
    "loss": "#111827",
    "hard": "#2563eb",
    "soft": "#059669",
    "hidden": "#d97706",
    "logits": "#7c3aed",
    "triplet": "#db2777",
    "points": "#0891b2",
    "embedding_l2": "#65a30d",
    "embedding_cosine": "#b45309",
    "rkd_distance": "#9333ea",
    "rkd_angle": "#0d9488",
    "attention": "#be123c",
}
WIDTH_IN, HEIGHT_IN, DPI = 11.0, 2.5, 150
INK, SOFT, LINE, LABEL, EDGE = "#1f2937", "#6b7280", "#e5e7eb", "#4b5563", "#9ca3af"
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": "#374151"}
SMALL: dict[str, Any] = {"va": "center", "fontsize": 7.5}


class Curve(NamedTuple):
    """One line of a plot; y may hold nan."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


class Panel(NamedTuple):
    """One plot: lines, what its axes say, and marks."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    floor: float | None = None
    """A dashed horizontal line."""
    breaks: Sequence[float] = ()
    """Dotted vertical lines, where the learning rate changes."""
    log_x: bool = False
    log_y: bool = False
    dots: bool = False


def panels(plots: Sequence[Panel], columns: int) -> str:
    """Plots in rows of `columns`, as a data URI of one PNG as wide as the page."""
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN * rows), dpi=DPI, layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    for axis, plot in itertools.zip_longest(figure.axes, plots):
        if plot is None:
            axis.set_visible(False)
        else:
            _draw(axis, plot)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return data_uri(buffer.getvalue())


def drawable(text: str) -> str:
    """A text as a figure can draw it: characters that its font lacks as escapes, and no $ that
    begins mathematics.
    """
    known = _characters()
    text = printable(text, lines=True)
    shown = (c if ord(c) in known or c == "\n" else ascii(c)[1:-1] for c in text)
    return "".join(shown).replace("$", r"\$")


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def style_axis(axis: Axes, hidden: Sequence[str], **ticks: Any) -> None:
    """Thin lines behind the curves, quiet numbers, and a frame without the `hidden` sides."""
    axis.tick_params(which="both", colors=LABEL, **ticks)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side not in hidden)
        spine.set_color(EDGE)


def _draw(axis: Axes, plot: Panel) -> None:
    few = all(len(curve.x) < 40 for curve in plot.curves)
    look: dict[str, Any] = {"linewidth": 1.4, "marker": "o" if plot.dots and few else None}
    for curve in plot.curves:
        axis.plot(curve.x, curve.y, color=curve.colour, markersize=2.5, **look)
    if plot.floor is not None:
        axis.axhline(plot.floor, color=EDGE, linestyle="--", linewidth=1.1)
    for place in plot.breaks:
        axis.axvline(place, color=EDGE, linestyle=":", linewidth=1)
    if plot.log_x:
        axis.set_xscale("log")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if plot.log_y:
        _logarithmic(axis, [value for curve in plot.curves for value in curve.y])
    axis.set_title(drawable(plot.title), fontsize=9, loc="left", color=INK)
    axis.set_xlabel(plot.x_label, fontsize=8, color=LABEL)
    axis.set_ylabel(plot.y_label, fontsize=8, color=LABEL)
    axis.grid(True, color=LINE, linewidth=0.6)
    style_axis(axis, ("top", "right"), labelsize=7)
    names = [drawable(curve.name) for curve in plot.curves] + ["floor"] * (plot.floor is not None)
    if plot.curves:
        # with names of its own a legend shows one that begins with _ too
        axis.legend(axis.lines[: len(names)], names, fontsize=6.5, **LEGEND)


def _logarithmic(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers, a few of them however short or long it is."""
    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(NullLocator())
    if np.nanmax(values) < 8 * np.nanmin(values):
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def face(image: np.ndarray) -> str:
    """A (3, H, W) uint8 image as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="png")
    return data_uri(buffer.getvalue())


def marked_face(image: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, object]:
    """A (3, H, W) image with (5, 2) true and predicted points, in pixels of the image, pixel
    centres at whole numbers + 0.5: what the page's template draws.
    """
    height, width = image.shape[1:]
    points = np.concatenate([true, predicted], axis=1).tolist()  # x, y, predicted x, y
    shown = [[f"{place:.2f}" for place in both] for both in points]
    return {"source": face(image), "width": width, "height": height, "points": shown}


def data_uri(png: bytes) -> str:
    """A PNG as the source of an image inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
