"""A result table as words: for the terminal, as plain text, as Markdown and as CSV.

The wording of cells and verdicts is here once; page.py and plot.py use it too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from kdtrain.reports.tables.data import Block, Cell, Row, Table, Trend, Verdict

DASH = "\N{EN DASH}"
ARM_COLUMNS = (
    *("table", "block", "row", "kind", "column", "metric", "state"),
    *("mean", "spread", "seeds", "per_seed", "paper", "note"),
)
TREND_COLUMNS = (
    *("table", "code", "claim", "state", "difference", "low", "high", "margin"),
    *("seeds", "agreeing", "items", "paper", "note"),
)
STATE_STYLES = {
    "held": "bold green",
    "reversed": "bold red",
    "inconclusive": "bold yellow",
    "not run": "dim",
    "diverged": "red",
    "failed": "red",
    "unfinished": "cyan",
    "not measured": "dim",
}
TEXT_WIDTH = 140  # three columns of "61.3 ± 1.2 (paper 64.5)" beside a name


def own_text(cell: Cell, digits: int = 1) -> str:
    """Our side of a cell: "61.3 ± 1.2", with the seeds that it has when some are missing, or its
    state.
    """
    if cell.value is None:
        return DASH if cell.state == "none" else cell.state
    if cell.shown:
        return cell.shown
    text = f"{cell.value:.{digits}f}"
    if cell.spread is not None:
        text += f" ± {cell.spread:.{digits}f}"
    if cell.seeds < len(cell.per_seed):
        text += f", {cell.seeds} of {len(cell.per_seed)} seeds"
    return text


def paper_text(cell: Cell, digits: int = 1) -> str:
    """The paper's side, "paper 64.5", or "" where the paper has no such number."""
    return "" if cell.paper is None else f"paper {cell.paper:.{digits}f}"


def cell_text(cell: Cell, digits: int = 1) -> str:
    """A cell in one line: "61.3 ± 1.2 (paper 64.5)"."""
    own, paper = own_text(cell, digits), paper_text(cell, digits)
    return f"{own} ({paper})" if paper else own


def name_text(row: Row) -> str:
    """A row's name, with its kind behind it unless it is the paper's or the name says so."""
    if row.kind == "paper" or row.kind in row.name.lower():
        return row.name
    return f"{row.name} ({row.kind})"


def heading_text(block: Block) -> str:
    """A block in one line: "TITLE: METRIC, %, higher is better"; the title alone without a unit."""
    if not block.unit:
        return block.title
    way = "higher" if block.higher_is_better else "lower"
    return f"{block.title}: {block.metric}, {block.unit}, {way} is better"


def difference_text(trend: Trend) -> str:
    """The difference in points, "+3.1 [+0.9, +5.4]", with the margin where the claim is that there
    is none; a dash if not run.
    """
    verdict, digits = trend.verdict, trend.digits
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        return DASH
    text = (
        f"{verdict.difference:+.{digits}f} [{verdict.low:+.{digits}f}, {verdict.high:+.{digits}f}]"
    )
    sign = "-" if verdict.one_sided else "±"
    return text if verdict.margin is None else f"{text}, margin {sign}{verdict.margin:g}"


def seeds_text(verdict: Verdict) -> str:
    """Seeds whose own mean agrees with the claim: "2 of 3 seeds"; a dash if not run."""
    if not verdict.seeds:
        return DASH
    if verdict.seeds == 1:
        return f"{verdict.agreeing} of 1 seed, interval over items only"
    return f"{verdict.agreeing} of {verdict.seeds} seeds"


def trend_paper_text(trend: Trend) -> str:
    """The paper's own difference in points, or a dash."""
    return DASH if trend.paper is None else f"{trend.paper:+.{trend.digits}f}"


def has_paper(trends: Sequence[Trend]) -> bool:
    """Whether any trend has a difference of the paper's, so that there is a column for it."""
    return any(trend.paper is not None for trend in trends)


def show(table: Table, console: Console) -> None:
    """Print a table, its trends, notes and setting to a terminal or a file."""
    console.print(f"[bold]{escape(table.name)}: {escape(table.title)}[/]", highlight=False)
    console.print(escape(table.source), style="dim", highlight=False)
    for note in table.notes:
        console.print(f"! {escape(note)}", style="yellow", highlight=False)
    for block in table.blocks:
        console.print(_block_grid(block))
    if table.trends:
        console.print(_trend_grid(table.trends))
    for word, text in table.setting:
        console.print(f"{escape(word)}: {escape(text)}", highlight=False)


def plain(table: Table, width: int = TEXT_WIDTH) -> str:
    """What `show` prints, without colours, in lines of at most `width` characters."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, emoji=False)
    show(table, console)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines).rstrip() + "\n"


def _block_grid(block: Block) -> Grid:
    grid = Grid(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=escape(heading_text(block)),
        title_justify="left",
        title_style="bold",
    )
    grid.add_column("")
    for column in block.columns:
        grid.add_column(escape(column), justify="right")
    last = None
    for row in block.rows:
        if last is not None and (last == "paper") != (row.kind == "paper"):
            grid.add_section()
        last = row.kind
        name = escape(name_text(row)) + (f"\n[dim]{escape(row.note)}[/]" if row.note else "")
        cells = [_styled(cell, block.digits) for cell in row.cells]
        grid.add_row(name, *cells, style="dim" if row.kind == "floor" else "")
    return grid


def _styled(cell: Cell, digits: int) -> str:
    style = "dim" if cell.state == "none" else STATE_STYLES.get(cell.state)
    own = escape(own_text(cell, digits))
    own = f"[{style}]{own}[/]" if style else own
    paper = paper_text(cell, digits)
    return f"{own} [dim]({paper})[/]" if paper else own


def _trend_grid(trends: Sequence[Trend]) -> Grid:
    grid = Grid(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="trends: difference in points [95 % interval], positive as claimed",
        title_justify="left",
        title_style="bold",
    )
    paper = ("paper",) if has_paper(trends) else ()
    for title in ("", "claim", "verdict", "difference", "agreeing", *paper):
        grid.add_column(title, justify="right" if title == "paper" else "left")
    for trend in trends:
        state = trend.verdict.state
        claim = escape(trend.claim) + (f"\n[dim]{escape(trend.note)}[/]" if trend.note else "")
        grid.add_row(
            escape(trend.code),
            claim,
            f"[{STATE_STYLES[state]}]{state}[/]",
            escape(difference_text(trend)),
            seeds_text(trend.verdict),
            *([trend_paper_text(trend)] if paper else []),
        )
    return grid


def markdown(table: Table, *, figure: str | None = None) -> str:
    """A table as Markdown, for docs. figure: a picture to show, a path beside the file."""
    parts = [f"## {table.name}: {_flat(table.title)}", _flat(table.source)]
    if table.notes:
        parts.append("\n".join(f"- **{_flat(note)}**" for note in table.notes))
    for block in table.blocks:
        rows = [_row_cells(row, block.digits) for row in block.rows]
        parts.append(f"### {_flat(heading_text(block))}")
        parts.append(_grid(["", *map(_flat, block.columns)], rows))
    if table.trends:
        parts.append("### Trends")
        parts.append(
            "Difference in points [95 % interval], positive as claimed; agreeing: seeds whose own "
            "mean is as claimed."
        )
        head = ["", "claim", "verdict", "difference", "agreeing", "paper"]
        kept = len(head) if has_paper(table.trends) else -1
        rows = [_trend_cells(trend)[:kept] for trend in table.trends]
        parts.append(_grid(head[:kept], rows))
    if figure is not None:
        parts.append(f"![{table.name}]({figure})")
    if table.setting:
        parts.append("\n".join(f"- {_flat(word)}: {_flat(text)}" for word, text in table.setting))
    return "\n\n".join(parts) + "\n"


def _row_cells(row: Row, digits: int) -> list[str]:
    texts = [name_text(row), *(cell_text(cell, digits) for cell in row.cells)]
    notes = [row.note, *(cell.note for cell in row.cells)]
    pairs = zip(texts, notes, strict=True)
    return [_flat(f"{text} [{note}]" if note else text) for text, note in pairs]


def _trend_cells(trend: Trend) -> list[str]:
    verdict = trend.verdict
    return [
        _flat(trend.code),
        _flat(trend.claim + (f" [{trend.note}]" if trend.note else "")),
        f"**{verdict.state}**",
        difference_text(trend),
        seeds_text(verdict),
        trend_paper_text(trend),
    ]


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flat(text: str) -> str:
    """One line without what Markdown would take for the end of a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def cells_csv(table: Table) -> str:
    """Every cell as a line of CSV: numbers in percent, per_seed with ; between, empty for none."""
    return _csv(ARM_COLUMNS, _cell_records(table))


def _cell_records(table: Table) -> Iterator[Sequence[object]]:
    for block in table.blocks:
        for row in block.rows:
            for column, cell in zip(block.columns, row.cells, strict=True):
                yield (
                    *(table.name, block.title, row.name, row.kind, column, block.metric),
                    cell.state,
                    _number(cell.value),
                    _number(cell.spread),
                    cell.seeds,
                    ";".join(map(_number, cell.per_seed)),
                    _number(cell.paper),
                    cell.note,
                )


def trends_csv(table: Table) -> str:
    """Every trend as a line of CSV: differences in points."""
    return _csv(TREND_COLUMNS, map(_trend_record, [table.name] * len(table.trends), table.trends))


def _trend_record(name: str, trend: Trend) -> Sequence[object]:
    verdict = trend.verdict
    numbers = map(_number, (verdict.difference, verdict.low, verdict.high, verdict.margin))
    return (
        *(name, trend.code, trend.claim, verdict.state, *numbers),
        *(verdict.seeds, verdict.agreeing, verdict.items, _number(trend.paper), trend.note),
    )


def _csv(columns: Sequence[str], records: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(records)
    return buffer.getvalue()


def _number(value: float | None) -> str:
    """Six decimals, as a share of 846 pictures has no more to say; nothing for None."""
    return "" if value is None else repr(round(value, 6))
