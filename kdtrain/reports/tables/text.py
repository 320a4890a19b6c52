"""A result table as words: for the terminal, as plain text, as Markdown and as CSV.

`row_entries` and `trend_entries` are the one walk over a table's rows and trends: every writer, the
page included, shows what they yield.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.config.program import printable
from kdtrain.reports.tables.data import ONE_SEED, Block, Cell, Row, Table, Trend, Verdict
from kdtrain.reports.writing import DASH, decimal, direction

CELL_COLUMNS = (
    *("table", "block", "row", "kind", "column", "metric", "state"),
    *("mean", "spread", "seeds", "per_seed", "paper", "note"),
)
TREND_COLUMNS = (
    *("table", "code", "claim", "state", "difference", "low", "high", "margin"),
    *("seeds", "agreeing", "items", "paper", "note"),
)
STATE_STYLES = {
    **{"held": "bold green", "reversed": "bold red", "inconclusive": "bold yellow"},
    ONE_SEED: "bold",
    **{"diverged": "red", "failed": "red", "unfinished": "cyan"},
    **{"not run": "dim", "not measured": "dim", "none": "dim"},
    "no difference": "dim",
}
TREND_TITLES = ("", "claim", "verdict", "difference", "agreeing", "paper")
TRENDS_NOTE = (
    "Difference in points [95 % interval], positive as claimed; agreeing: seeds whose own mean is "
    "as claimed."
)
TEXT_WIDTH = 140  # three columns of "61.3 ± 1.2 (paper 64.5)" beside a name


class Entry(NamedTuple):
    """One place of a printed row."""

    own: str
    paper: str = ""
    """The paper's number, "paper 64.5", or "" where it has none."""
    note: str = ""
    state: str = ""
    """Of a cell or a verdict."""

    @property
    def line(self) -> str:
        """A cell in one line: "61.3 ± 1.2 (paper 64.5)"."""
        return f"{self.own} ({self.paper})" if self.paper else self.own


def row_entries(block: Block) -> Iterator[tuple[Row, list[Entry]]]:
    """Every row of a block with what its line shows: the name, then a place for each column."""
    for row in block.rows:
        entries = [Entry(name_text(row), note=row.note)]
        for cell in row.cells:
            paper = "" if cell.paper is None else f"paper {decimal(cell.paper, block.digits)}"
            entries.append(Entry(own_text(cell, block.digits), paper, cell.note, cell.state))
        yield row, entries


def trend_entries(trends: Sequence[Trend]) -> Iterator[tuple[Trend, list[Entry]]]:
    """Every trend with what its line shows, a place for each of `trend_titles`."""
    for trend in trends:
        state = trend.verdict.state
        entries = [
            Entry(trend.code),
            Entry(trend.claim, note=trend.note),
            Entry(state, state=state),
            Entry(difference_text(trend)),
            Entry(seeds_text(trend.verdict)),
            Entry(decimal(trend.paper, trend.digits, sign=True)),
        ]
        yield trend, entries[: len(trend_titles(trends))]


def trend_titles(trends: Sequence[Trend]) -> tuple[str, ...]:
    """The columns of these trends."""
    return TREND_TITLES if has_paper(trends) else TREND_TITLES[:-1]


def own_text(cell: Cell, digits: int = 1) -> str:
    """Our side of a cell: "61.3 ± 1.2", with the seeds that it has when some are missing, or its
    state.
    """
    if cell.value is None:
        return DASH if cell.state == "none" else cell.state
    if cell.shown:
        return cell.shown
    text = decimal(cell.value, digits)
    if cell.spread is not None:
        text += f" ± {decimal(cell.spread, digits)}"
    if cell.seeds < len(cell.per_seed):
        text += f", {cell.seeds} of {len(cell.per_seed)} seeds"
    return text


def name_text(row: Row) -> str:
    """A row's name, with its kind behind it unless it is the paper's or part of the name."""
    if row.kind == "paper" or row.kind in row.name.lower():
        return row.name
    return f"{row.name} ({row.kind})"


def heading_text(block: Block) -> str:
    """A block in one line: "TITLE: METRIC, %, higher is better"; the title alone without a unit."""
    return ": ".join(filter(None, (block.title, measure_text(block))))


def measure_text(block: Block) -> str:
    """METRIC, unit and direction, "top1, %, higher is better"; "" without a unit."""
    way = direction(not block.higher_is_better)
    return f"{block.metric}, {block.unit}, {way}" if block.unit else ""


def difference_text(trend: Trend) -> str:
    """The difference in points, "+3.1 [+0.9, +5.4]", with the margin where the claim is that there
    is none; a dash if not run.
    """
    verdict = trend.verdict
    if verdict.difference is None or verdict.low is None or verdict.high is None:
        return DASH
    numbers = (verdict.difference, verdict.low, verdict.high)
    mean, low, high = (decimal(number, trend.digits, sign=True) for number in numbers)
    text = f"{mean} [{low}, {high}]"
    sign = "-" if verdict.one_sided else "±"
    return text if verdict.margin is None else f"{text}, margin {sign}{verdict.margin:g}"


def seeds_text(verdict: Verdict) -> str:
    """Seeds whose own mean agrees with the claim: "2 of 3 seeds"; a dash if not run."""
    if not verdict.seeds:
        return DASH
    if verdict.seeds == 1:
        return f"{verdict.agreeing} of 1 seed, interval over items only"
    return f"{verdict.agreeing} of {verdict.seeds} seeds"


def has_paper(trends: Sequence[Trend]) -> bool:
    """Whether any trend has a difference of the paper's, so that there is a column for it."""
    return any(trend.paper is not None for trend in trends)


def show(table: Table, console: Console) -> None:
    """Print a table, its trends, notes and setting to a terminal or a file."""
    console.print(_text(f"{table.name}: {table.title}", "bold"))
    console.print(_text(table.source, "dim"))
    for note in table.notes:
        console.print(_text(f"! {note}", "yellow"))
    for block in table.blocks:
        grid = _frame(heading_text(block))
        for column in ("", *block.columns):
            grid.add_column(_text(column), justify="right" if grid.columns else "left")
        last = None
        for row, (name, *cells) in row_entries(block):
            if last is not None and (last == "paper") != (row.kind == "paper"):
                grid.add_section()
            last = row.kind
            words = (_words(cell._replace(note="")) for cell in cells)
            grid.add_row(_words(name), *words, style="dim" if row.kind == "floor" else "")
        console.print(grid)
    if table.trends:
        grid = _frame("trends: difference in points [95 % interval], positive as claimed")
        for title in trend_titles(table.trends):
            grid.add_column(title, justify="right" if title == "paper" else "left")
        for _, entries in trend_entries(table.trends):
            grid.add_row(*map(_words, entries))
        console.print(grid)
    for word, text in table.setting:
        console.print(_text(f"{word}: {text}"))


def _frame(title: str) -> Grid:
    heading = _text(title, "bold")
    return Grid(box=box.SIMPLE_HEAD, pad_edge=False, title=heading, title_justify="left")


def _words(entry: Entry) -> Text:
    # assembled, as the style is of the first words alone
    text = Text.assemble(_text(entry.own, STATE_STYLES.get(entry.state, "")))
    for space, small in ((" ", entry.paper and f"({entry.paper})"), ("\n", entry.note)):
        if small:
            text.append(space).append(_text(small, "dim"))
    return text


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text, lines=True), style)


def plain(table: Table, width: int = TEXT_WIDTH) -> str:
    """The text of `show` without colours, in lines of at most `width` characters."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, emoji=False)
    show(table, console)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines).rstrip() + "\n"


def markdown(table: Table) -> str:
    """A table as Markdown, for docs, with the figure beside the file."""
    parts = [f"## {table.name}: {_flat(table.title)}", _flat(table.source)]
    if table.notes:
        parts.append("\n".join(f"- **{_flat(note)}**" for note in table.notes))
    for block in table.blocks:
        rows = [list(map(_flat_entry, entries)) for _, entries in row_entries(block)]
        grid = _grid(["", *map(_flat, block.columns)], rows)
        parts += [f"### {_flat(heading_text(block))}", grid]
    if table.trends:
        rows = [list(map(_flat_entry, entries)) for _, entries in trend_entries(table.trends)]
        for row in rows:
            row[2] = f"**{row[2]}**"  # the verdict
        parts += ["### Trends", TRENDS_NOTE, _grid(trend_titles(table.trends), rows)]
    parts.append(f"![{table.name}]({table.name}.png)")
    if table.setting:
        parts.append("\n".join(f"- {_flat(word)}: {_flat(text)}" for word, text in table.setting))
    return "\n\n".join(parts) + "\n"


def _flat_entry(entry: Entry) -> str:
    return _flat(f"{entry.line} [{entry.note}]" if entry.note else entry.line)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flat(text: str) -> str:
    """One line without what Markdown would take for the end of a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def cells_csv(table: Table) -> str:
    """Every cell as a line of CSV: numbers in percent, per_seed with ; between, empty for none."""
    return _csv(
        CELL_COLUMNS,
        (
            {
                **{"table": table.name, "block": block.title, "row": row.name, "kind": row.kind},
                **{"column": column, "metric": block.metric, "mean": cell.value, **vars(cell)},
                **{"seeds": cell.seeds, "per_seed": ";".join(map(_number, cell.per_seed))},
            }
            for block in table.blocks
            for row in block.rows
            for column, cell in zip(block.columns, row.cells, strict=True)
        ),
    )


def trends_csv(table: Table) -> str:
    """Every trend as a line of CSV: differences in points."""
    records = ({"table": table.name, **vars(t.verdict), **vars(t)} for t in table.trends)
    return _csv(TREND_COLUMNS, records)


def _csv(columns: Sequence[str], records: Iterable[Mapping[str, object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        values = [record[column] for column in columns]
        writer.writerow(_number(v) if isinstance(v, float) or v is None else v for v in values)
    return buffer.getvalue()


def _number(value: float | None) -> str:
    """Six decimals, enough for a share of 846 images; nothing for None."""
    return "" if value is None else repr(round(value, 6))
