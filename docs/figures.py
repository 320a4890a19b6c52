"""Draws the figures of README and docs/results from the CSV files there: `python docs/figures.py`.

claims-THEME.png for README: distillation against its control. For every NAME-trends.csv below
docs/results its claims as NAME-THEME.png, which NAME.md shows.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).resolve().parent
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        **{"page": "#ffffff", "ink": "#1f2937", "soft": "#596273", "line": "#e5e7eb"},
        **{"held": "#047857", "reversed": "#dc2626", "inconclusive": "#b45309"},
    },
    "dark": {
        **{"page": "#0d1117", "ink": "#e6edf3", "soft": "#9aa4b2", "line": "#2b323b"},
        **{"held": "#34d399", "reversed": "#f87171", "inconclusive": "#fbbf24"},
    },
}
WIDTH_IN, ROW_IN, DPI = 11.0, 0.186, 120
QUESTION = "Does distillation beat the same student trained without a teacher?"
INTERVAL = (
    "Difference in points, 95 % interval of a paired bootstrap over three seeds and the test images"
)
CLAIMS_NOTE = (
    f"{INTERVAL}; held: above 0. Nearest-neighbour top-1 on new identities;\n"
    "the paper's recipe: top-1 of classification."
)
TABLE_NOTE = f"{INTERVAL}. Diamond: the paper's difference. A claim of ≥ or neutral has a margin."
SYNTHETIC, PHOTOGRAPHS = "synthetic faces", "photographs of faces"
CLAIMS = (
    ("AdaDistill", "systems/comparison", "adadistill > student, NN top-1"),
    ("ProxylessKD", "systems/comparison", "proxyless > student, NN top-1"),
    ("soft + feature target, 24 px", "resolutions/comparison", "kd > scratch, NN top-1, 24 pixels"),
    ("soft + feature target, 16 px", "resolutions/comparison", "kd > scratch, NN top-1, 16 pixels"),
    ("soft target", "systems/comparison", "soft > student, NN top-1"),
    ("the paper's recipe, 1/2 kernels", "faces/table2", "1/2: Ours > softmax alone, same rates"),
    ("the paper's recipe, 1/4 kernels", "faces/table2", "1/4: Ours > softmax alone, same rates"),
    ("the paper's recipe, 1/8 kernels", "faces/table2", "1/8: Ours > softmax alone, same rates"),
)
"""Rows of README's figure: words, table, and the claim on photographs. The same claim on synthetic
faces has "second source" or "second data source" behind it."""


class Claim(NamedTuple):
    """One line of a figure; numbers in points."""

    words: str
    difference: float
    low: float
    high: float
    state: str
    paper: float | None = None


def read(table: str) -> dict[str, Claim]:
    """The claims with a number of docs/results/TABLE-trends.csv, by their text."""
    with open(DOCS / "results" / f"{table}-trends.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["difference"]]
    return {
        row["claim"]: Claim(
            f"{row['code']}  {row['claim']}",
            *(float(row[name]) for name in ("difference", "low", "high")),
            row["state"],
            float(row["paper"]) if row["paper"] else None,
        )
        for row in rows
    }


def main() -> None:
    """Draw every figure and show it in the Markdown beside it."""
    sources: dict[str, list[Claim]] = {SYNTHETIC: [], PHOTOGRAPHS: []}
    for words, table, claim in CLAIMS:
        found = read(table)
        sources[PHOTOGRAPHS].append(found[claim]._replace(words=words))
        second = next(
            found[s] for n in ("", "data ") if (s := f"{claim}, second {n}source") in found
        )
        sources[SYNTHETIC].append(second._replace(words=words))
    for theme in THEMES:
        draw(sources, DOCS / f"claims-{theme}.png", theme, title=QUESTION, row_in=0.36)
    for path in sorted(DOCS.glob("results/*/*-trends.csv")):
        name = path.name.removesuffix("-trends.csv")
        claims = list(read(f"{path.parent.name}/{name}").values())
        for theme in THEMES:
            draw({"": claims}, path.with_name(f"{name}-{theme}.png"), theme)
        page = path.with_name(f"{name}.md")
        picture = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.png">\n'
            f'<img src="{name}-light.png" alt="claims of {name} with their intervals"></picture>'
        )
        page.write_text(re.sub(rf"!\[{name}\]\({name}.png\)", picture, page.read_text("utf-8")))


def draw(
    panels: Mapping[str, Sequence[Claim]],
    path: Path,
    theme: str,
    *,
    title: str = "",
    row_in: float = ROW_IN,
) -> None:
    """Write a PNG of claims as intervals, a panel for each group, which share their rows' names."""
    look = THEMES[theme]
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(WIDTH_IN, 0.8 + 0.3 * bool(title) + row_in * rows), dpi=DPI,
                    layout="constrained", facecolor=look["page"])  # fmt: skip
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=look["ink"], weight="bold")
    note = CLAIMS_NOTE if title else TABLE_NOTE
    figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=look["soft"])
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    for axis, (name, claims) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, fontsize=10, loc="left", color=look["ink"])
        _draw_panel(axis, claims, look, 9.5 if title else 8)
    axes[0].set_yticks(range(rows), [claim.words for claim in next(iter(panels.values()))])
    axes[0].set_ylim(rows - 0.5, -0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def _draw_panel(axis: Axes, claims: Sequence[Claim], look: Mapping[str, str], size: float) -> None:
    axis.set_facecolor(look["page"])
    axis.axvline(0, color=look["soft"], linewidth=1)
    axis.grid(True, axis="x", color=look["line"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.tick_params(axis="y", labelsize=size, labelcolor=look["ink"], length=0)
    axis.tick_params(axis="x", labelsize=8, labelcolor=look["soft"], length=0)
    for place, claim in enumerate(claims):
        color = look[claim.state]
        axis.plot([claim.low, claim.high], [place, place], color=color, linewidth=2.2)
        axis.plot(claim.difference, place, "o", color=color, markersize=5.5)
        if claim.paper is not None:
            axis.plot(claim.paper, place, "D", color=look["ink"], markersize=4, mfc="none")
        words = f"{round(claim.difference, 1) + 0.0:+.1f} {claim.state}"
        axis.text(1.01, place, words, transform=axis.get_yaxis_transform(), va="center",
                  fontsize=size, color=color)  # fmt: skip


if __name__ == "__main__":
    main()
