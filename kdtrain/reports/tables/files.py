"""A result table on disk: text, Markdown, CSV, HTML and PNG, each replaced in one step.

Every file depends on the table alone, so a reproduction that was killed and continued leaves the
same bytes as one that ran through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdtrain.reports.plots import data_uri
from kdtrain.reports.tables.data import Table
from kdtrain.reports.tables.plot import VERDICT_COLOURS, picture
from kdtrain.reports.tables.text import (
    TEXT_WIDTH,
    cells_csv,
    has_paper,
    markdown,
    measure_text,
    plain,
    row_entries,
    trend_entries,
    trend_titles,
    trends_csv,
)
from kdtrain.reports.writing import render
from kdtrain.training.checkpoint import write_bytes, write_text


def page(
    tables: Sequence[Table],
    pictures: Sequence[bytes] | None = None,
    subject: str = "Distillation transfer",
) -> str:
    """The self-contained HTML of one or several tables: every trend at the top, then table by
    table. pictures: their PNGs where they are drawn already. subject: what the page's title begins
    with.
    """
    drawn = pictures if pictures is not None else [picture(table) for table in tables]
    return render(
        "tables.html.j2",
        title=f"{subject}: {', '.join(table.name for table in tables)}",
        tables=list(zip(tables, map(data_uri, drawn), strict=True)),
        colours=VERDICT_COLOURS,
        has_paper=has_paper,
        measure=measure_text,
        row_entries=row_entries,
        trend_entries=trend_entries,
        trend_titles=trend_titles,
    )


def write(
    table: Table,
    folder: str | Path,
    *,
    png: bytes | None = None,
    subject: str | None = None,
    width: int = TEXT_WIDTH,
) -> dict[str, Path]:
    """Write a table's files into `folder`, made if need be; return their paths by what they are.

    NAME.txt, NAME.md (shows NAME.png), NAME.csv (a line for each cell), NAME-trends.csv, NAME.png,
    NAME.html (self-contained). png: its picture, where it is not the one of plot.py. subject: of
    the page; width: characters of a line of text.
    """
    drawn = picture(table) if png is None else png
    html = page([table], [drawn], *([] if subject is None else [subject]))
    return _write(table, Path(folder), drawn, html, width)


def write_all(tables: Sequence[Table], folder: str | Path) -> dict[str, Path]:
    """Write several tables' files, and tables.html with all of them; return the paths as NAME.KIND,
    and the page as "html".
    """
    place = Path(folder)
    pictures = [picture(table) for table in tables]
    paths = {}
    for table, png in zip(tables, pictures, strict=True):
        written = _write(table, place, png, page([table], [png]))
        paths |= {f"{table.name}.{kind}": path for kind, path in written.items()}
    paths["html"] = place / "tables.html"
    place.mkdir(parents=True, exist_ok=True)
    write_text(paths["html"], page(tables, pictures))
    return paths


def _write(
    table: Table, folder: Path, png: bytes, html: str, width: int = TEXT_WIDTH
) -> dict[str, Path]:
    texts = {
        "txt": plain(table, width),
        "md": markdown(table, figure=f"{table.name}.png"),
        "csv": cells_csv(table),
        "html": html,
    }
    paths = {kind: folder / f"{table.name}.{kind}" for kind in (*texts, "png")}
    paths["trends"] = folder / f"{table.name}-trends.csv"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in (*texts.items(), ("trends", trends_csv(table))):
        write_text(paths[kind], text)
    write_bytes(paths["png"], png)
    return paths
