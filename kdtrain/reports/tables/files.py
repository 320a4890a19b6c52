"""A result table on disk: text, Markdown, CSV, HTML and PNG, each replaced in one step.

Every file depends on the table alone, so a study that was killed and resumed leaves files that are
bitwise identical to those of a study that ran through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdtrain.reports.plots import data_uri
from kdtrain.reports.tables import text
from kdtrain.reports.tables.data import Table
from kdtrain.reports.tables.plot import VERDICT_COLOURS
from kdtrain.reports.writing import render
from kdtrain.training.checkpoint import write_bytes, write_text


def page(tables: Sequence[tuple[Table, bytes]], subject: str) -> str:
    """The self-contained HTML of one or several tables: every trend at the top, then table by
    table, with its PNG. subject: the beginning of the page's title.
    """
    return render(
        "tables.html.j2",
        title=f"{subject}: {', '.join(table.name for table, _ in tables)}",
        tables=[(table, data_uri(png)) for table, png in tables],
        colours=VERDICT_COLOURS,
        text=text,
    )


def write(
    table: Table, folder: str | Path, png: bytes, *, subject: str, width: int = text.TEXT_WIDTH
) -> Path:
    """Write a table's files into `folder`, made if need be; return the page.

    NAME.txt, NAME.md (shows NAME.png), NAME.csv (a line for each cell), NAME-trends.csv, NAME.png,
    NAME.html (self-contained). png: its figure. subject: of the page; width: characters of a line
    of text.
    """
    contents: dict[str, str | bytes] = {
        ".txt": text.plain(table, width),
        ".md": text.markdown(table),
        ".csv": text.cells_csv(table),
        ".html": page([(table, png)], subject),
        ".png": png,
        "-trends.csv": text.trends_csv(table),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in contents.items():
        path = folder / f"{table.name}{ending}"
        write_bytes(path, content.encode() if isinstance(content, str) else content)
    return folder / f"{table.name}.html"


def write_all(
    tables: Sequence[tuple[Table, bytes]], folder: str | Path, subject: str, width: int
) -> Path:
    """Write the files of tables with their figures; return the page: of several tables it is
    tables.html, which shows all of them.
    """
    pages = [write(table, folder, png, subject=subject, width=width) for table, png in tables]
    if len(tables) == 1:
        return pages[0]
    path = Path(folder) / "tables.html"
    write_text(path, page(tables, subject))
    return path
