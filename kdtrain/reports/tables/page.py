"""Result tables as one self-contained HTML page: every trend at the top, then table by table.

Nothing on the page depends on the clock, so tables made again from the same runs give the same
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kdtrain.reports.plots import data_uri
from kdtrain.reports.report import PAGE, STYLE
from kdtrain.reports.tables.data import Block, Cell, Row, Table, Trend, VerdictState
from kdtrain.reports.tables.plot import VERDICT_COLOURS, picture
from kdtrain.reports.tables.text import (
    DASH,
    difference_text,
    has_paper,
    name_text,
    own_text,
    paper_text,
    seeds_text,
    trend_paper_text,
)

KINDS = "control: no teacher, or trained as long; floor: learns nothing."
PAPER = (
    " extra: not in the paper. The paper's numbers are from its own data: compare order and gaps."
)
RULE = (
    "Difference in points with its 95 % interval from a paired bootstrap over seeds and test "
    "items, positive as claimed. held: the whole interval is above 0; reversed: below 0; a claim "
    "of no difference is held when the whole interval lies within its margin, reversed when it "
    "lies outside; a claim of no loss (≥) is held above minus its margin, reversed below."
)


def page(
    tables: Sequence[Table],
    pictures: Sequence[bytes] | None = None,
    subject: str = "Distillation transfer",
) -> str:
    """The HTML of one or several tables. pictures: their PNGs where they are drawn already.
    subject: what the page's title begins with.
    """
    drawn = pictures if pictures is not None else [picture(table) for table in tables]
    names = ", ".join(table.name for table in tables)
    title = f"{subject}: {names}"
    body = [f"<header><h1>{escape(title)}</h1></header>", _overview(tables)]
    body += [_section(table, png) for table, png in zip(tables, drawn, strict=True)]
    return PAGE.format(title=escape(title), style=STYLE + TABLE_STYLE, body="".join(body))


def _overview(tables: Sequence[Table]) -> str:
    """Every trend of every table as a chip; nothing for a single table, which shows its own."""
    if len(tables) < 2:
        return ""
    lines = []
    for table in tables:
        items = ""
        for trend in table.trends:
            words = escape(f"{trend.code} {trend.claim}")
            items += f"<li>{_chip(trend.verdict.state)}<span>{words}</span></li>"
        name = f'<a href="#{escape(table.name)}">{escape(table.name)}</a>'
        lines.append(f"<div><h4>{name}: {escape(table.title)}</h4><ul>{items}</ul></div>")
    return f"<section><h2>Trends</h2><div class=overview>{''.join(lines)}</div></section>"


def _section(table: Table, png: bytes) -> str:
    parts = [
        f'<section class=table id="{escape(table.name)}">',
        f"<h2>{escape(table.name)}: {escape(table.title)}</h2>",
        f"<p class=note>{escape(table.source)}</p>",
    ]
    parts += [f"<p class=warning>{escape(note)}</p>" for note in table.notes]
    parts += map(_block, table.blocks)
    parts.append(f"<p class=note>{escape(KINDS + (PAPER if has_paper(table.trends) else ''))}</p>")
    if table.trends:
        parts.append(_trends(table.trends))
    alt = f"{table.name}: the rows as a picture, and the trends as intervals"
    parts.append(
        f"<div class=scroll><img class=plot src='{data_uri(png)}' alt='{escape(alt)}'></div>"
    )
    rows = "".join(
        f"<dt>{escape(word)}</dt><dd>{_said(word, text)}</dd>" for word, text in table.setting
    )
    return "".join([*parts, f"<dl>{rows}</dl></section>"])


def _said(word: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if word == "command" else escape(text)


def _block(block: Block) -> str:
    way = "higher" if block.higher_is_better else "lower"
    head = "".join(f"<th>{escape(column)}</th>" for column in block.columns)
    rows = "".join(_row(row, block.digits) for row in block.rows)
    unit = escape(f"{block.metric}, {block.unit}, {way} is better")
    note = f"<p class=note>{unit}</p>" if block.unit else ""
    return (
        f"<h3>{escape(block.title)}</h3>{note}<div class=scroll><table>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Row, digits: int) -> str:
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    cells = "".join(_cell(cell, digits) for cell in row.cells)
    return f'<tr class={row.kind}><th scope="row">{escape(name_text(row))}{note}</th>{cells}</tr>'


def _cell(cell: Cell, digits: int) -> str:
    small = [text for text in (paper_text(cell, digits), cell.note) if text]
    below = "".join(f"<small>{escape(text)}</small>" for text in small)
    kind = "" if cell.state == "done" else f' class="{cell.state.replace(" ", "-")}"'
    return f"<td{kind}>{escape(own_text(cell, digits))}{below}</td>"


def _trends(trends: Sequence[Trend]) -> str:
    paper = has_paper(trends)
    titles = ("", "claim", "verdict", "difference, points", "agreeing", *(["paper"] * paper))
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = "".join(_trend(trend, paper) for trend in trends)
    return (
        f"<h3>Trends</h3><p class=note>{escape(RULE)}</p><div class=scroll><table class=trends>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _trend(trend: Trend, paper: bool) -> str:
    note = f"<small>{escape(trend.note)}</small>" if trend.note else ""
    items = f"<small>{trend.verdict.items:,} test items</small>" if trend.verdict.items else ""
    cells = (
        escape(trend.code),
        escape(trend.claim) + note,
        _chip(trend.verdict.state),
        escape(difference_text(trend)),
        escape(seeds_text(trend.verdict)) + items,
        *([trend_paper_text(trend).replace(DASH, "&ndash;")] if paper else []),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _chip(state: VerdictState) -> str:
    return f'<span class="chip" style="background:{VERDICT_COLOURS[state]}">{state}</span>'


TABLE_STYLE = """
h3 { margin-top: 26px; }
.table > dl { margin-top: 18px; }
.warning { color: #92400e; background: #fffbeb; border-left: 3px solid #f59e0b;
  padding: 6px 12px; margin: 10px 0 0; font-size: 14px; }
.scroll .plot { margin-top: 22px; }
.scroll th, .scroll td { padding-right: 20px; }
.scroll table { font-size: 14px; min-width: min(100%, 600px); }
.scroll td { white-space: nowrap; }
.table td small { white-space: normal; }
tr.control th, tr.extra th { font-weight: 400; }
tr.floor th, tr.floor td, tr.teacher th, tr.teacher td { color: var(--soft); font-weight: 400; }
td.not-run, td.unfinished, td.not-measured, td.none { color: var(--soft); }
td.diverged, td.failed { color: var(--bad); }
.trends th, .trends td { text-align: left; }
.trends td:nth-child(2) { white-space: normal; min-width: 180px; }
.trends th:nth-child(6), .trends td:nth-child(6) { text-align: right; }
.chip { color: #fff; border-radius: 9px; padding: 1px 9px; font-size: 12px; font-weight: 600;
  white-space: nowrap; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.overview { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr));
  gap: 10px 28px; }
.overview ul { list-style: none; margin: 0; padding: 0; font-size: 14px; }
.overview li { display: flex; gap: 7px; align-items: baseline; margin: 4px 0; }
.overview a { color: inherit; }
@media (max-width: 760px) { .scroll .plot { width: 820px; } }
@media (max-width: 560px) { main { padding: 12px 6px 40px; } section { padding: 14px 12px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } code { word-break: break-word; } }
@media print { section.table { break-inside: auto; break-before: page; } .plot, tr {
  break-inside: avoid; } .scroll { overflow: visible; } }
"""
