"""A result table on disk: text, Markdown, CSV, HTML and PNG, each replaced in one step.

Every file depends on the table alone, so a reproduction that was killed and continued leaves the
same bytes as one that ran through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdtrain.reports.tables.data import Table
from kdtrain.reports.tables.page import page
from kdtrain.reports.tables.plot import picture
from kdtrain.reports.tables.text import TEXT_WIDTH, cells_csv, markdown, plain, trends_csv
from kdtrain.training.checkpoint import write_bytes, write_text


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
    for kind, text in (*texts.items(), ("trends", trends_csv(table))):
        write_text(paths[kind], text)
    write_bytes(paths["png"], png)
    return paths
