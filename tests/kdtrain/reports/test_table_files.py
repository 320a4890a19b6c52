"""Result tables on disk: a made-up table with a cell of every state, in all five formats."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kdtrain.reports.tables import files as table_files
from kdtrain.reports.tables.data import Block, Cell, CellState, Row, Table, Trend, Verdict
from kdtrain.reports.tables.files import page
from kdtrain.reports.tables.plot import WIDTH_RATIOS, _floors, _limits, _lines, _span, draw
from kdtrain.reports.tables.text import cells_csv, markdown, plain, row_entries, show, trends_csv
from kdtrain.training import checkpoint

ACCURACY = Block(
    "targets | from scratch",
    ("R/4", "R/8"),
    (
        Row(
            "hidden",
            "paper",
            (Cell.of((60.0, 61.0, 62.9), paper=60.08), Cell(paper=64.49)),
            "mean over elements",
        ),
        Row(
            "soft <eq. 2>",
            "paper",
            (
                Cell(per_seed=(None,) * 3, paper=61.27, state="diverged", note="loss NaN at 7"),
                Cell(per_seed=(44.0, None, None), state="unfinished"),
            ),
        ),
        Row("softmax alone", "control", (Cell.of((70.0, None, 71.0)), Cell(state="failed"))),
        Row("tau^2", "extra", (Cell.of((83.25,)), Cell(state="none"))),
        Row("teacher", "teacher", (Cell.of((94.0, 94.5, 95.0), paper=88.61),) * 2),
        Row("raw pixels", "floor", (Cell.of((43.5,)),) * 2),
    ),
    "top1",
)
ERROR = Block(
    "alignment",
    ("none",),
    (
        Row("Pretrain", "paper", (Cell.of((11.0, 11.25, 11.5), paper=3.36),)),
        Row("mean landmarks", "floor", (Cell.of((37.0,)),)),
    ),
    "nrmse",
    higher_is_better=False,
    digits=2,
)
TRENDS = (
    Trend("T1", "soft > hidden", Verdict("held", 11.84, 8.9, 14.7, 3, 3, 846), 1.19),
    Trend("T2", "full > control", Verdict("reversed", -2.6, -4.8, -0.4, 3, 0, 846)),
    Trend("T4", "hidden helps", Verdict("inconclusive", 0.1, -0.2, 0.4, 1, 1, 846), 0.12, digits=2),
    Trend("T5", "soft about neutral", Verdict("held", 0.2, -1.1, 1.4, 3, 2, 773, 2.0), -0.2),
    Trend("T1", "hidden > logits", Verdict("not run"), 0.31, "logits diverged"),
)
TABLE = Table(
    "table1",
    "initialisations & targets",
    "arXiv 1709.02929, table 1",
    (ACCURACY, ERROR),
    TRENDS,
    ("uninformative: the teacher does not beat raw pixels",),
    (("data", "faces <846>"), ("command", "python -m kdtrain reproduce table1")),
)


def test_the_table_of_these_tests_has_a_cell_of_every_state() -> None:
    cells = [cell for block in TABLE.blocks for row in block.rows for cell in row.cells]
    assert {cell.state for cell in cells} | {"not measured", "no difference"} == set(
        get_args(CellState)
    )


def test_a_cell_without_what_its_metric_needs_is_not_a_dash() -> None:
    row = Row("soft", "paper", (Cell(state="not measured", paper=61.27),))
    block = Block("pairs", ("/8",), (row,), "pair_accuracy")
    table = dataclasses.replace(TABLE, blocks=(block,), trends=())
    assert "not measured (paper 61.3)" in plain(table)
    assert "not measured" in page([(table, b"")], "Distillation transfer")
    assert {trend.verdict.state for trend in TRENDS} == {
        *("held", "reversed", "inconclusive", "not run")
    }


def test_a_cell_says_mean_spread_and_paper_or_why_it_has_no_number() -> None:
    texts = [entry.line for _, (_, *cells) in row_entries(ACCURACY) for entry in cells]
    assert texts == [
        *("61.3 ± 1.5 (paper 60.1)", "not run (paper 64.5)"),
        *("diverged (paper 61.3)", "unfinished"),
        *("70.5 ± 0.7, 2 of 3 seeds", "failed"),
        *("83.2", "\N{EN DASH}"),
        *("94.5 ± 0.5 (paper 88.6)", "94.5 ± 0.5 (paper 88.6)"),
        *("43.5", "43.5"),
    ]
    _, entries = next(row_entries(ERROR))
    assert entries[1].line == "11.25 ± 0.25 (paper 3.36)"


def test_means_and_sample_deviations_are_over_the_seeds_that_have_a_number() -> None:
    cell = Cell.of((60.0, None, 63.0, 66.0))
    assert (cell.value, cell.spread, cell.seeds) == (63.0, 3.0, 3)
    assert Cell.of((60.0,)).spread is None


def test_plain_text_shows_every_row_verdict_note_and_setting() -> None:
    text = plain(TABLE)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    assert "\x1b" not in text

    def line(start: str) -> list[str]:
        (found,) = [one for one in lines if one.strip().startswith(start)]
        return re.split(r"\s{2,}", found.strip())

    assert line("hidden ") == ["hidden", "61.3 ± 1.5 (paper 60.1)", "not run (paper 64.5)"]
    assert line("softmax") == ["softmax alone (control)", "70.5 ± 0.7, 2 of 3 seeds", "failed"]
    assert line("tau^2") == ["tau^2 (extra)", "83.2", "\N{EN DASH}"]
    assert line("teacher")[0] == "teacher"
    assert line("raw pixels") == ["raw pixels (floor)", "43.5", "43.5"]
    assert line("T1   soft")[1:] == [
        *("soft > hidden", "held", "+11.8 [+8.9, +14.7]", "3 of 3 seeds", "+1.2")
    ]
    assert line("T4")[2:] == [
        *("inconclusive", "+0.10 [-0.20, +0.40]", "1 of 1 seed, interval over items only", "+0.12")
    ]
    assert line("T5")[3:5] == ["+0.2 [-1.1, +1.4], margin ±2", "2 of 3 seeds"]
    assert line("T1   hidden")[2:] == ["not run", *"\N{EN DASH}" * 2, "+0.3"]
    assert "! uninformative: the teacher does not beat raw pixels" in lines
    assert "targets | from scratch: top1, %, higher is better" in lines
    assert "alignment: nrmse, %, lower is better" in lines
    assert "data: faces <846>" in lines


def test_a_terminal_gets_the_verdicts_in_colour_and_brackets_are_no_markup() -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, color_system="standard", width=140)
    named = dataclasses.replace(TABLE, notes=("see [red]this[/red]",))
    show(named, console)
    text = buffer.getvalue()
    assert re.search(r"\x1b\[1;32mheld", text)
    assert re.search(r"\x1b\[1;31mreversed", text)
    assert "see [red]this[/red]" in text


def test_markdown_tables_have_the_same_width_in_every_line() -> None:
    text = markdown(TABLE)
    grids = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(grids) == 3
    for grid in grids:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in grid.splitlines()}
        assert len(widths) == 1
    assert "### targets \\| from scratch: top1, %, higher is better" in text
    assert (
        "| hidden [mean over elements] | 61.3 ± 1.5 (paper 60.1) | not run (paper 64.5) |" in text
    )
    assert "diverged (paper 61.3) [loss NaN at 7]" in text
    assert "| T2 | full > control | **reversed** | -2.6 [-4.8, -0.4] | 0 of 3 seeds |" in text
    assert "![table1](table1.png)" in text


def test_csv_gives_back_every_cell_with_the_numbers_of_each_seed() -> None:
    lines = list(csv.DictReader(io.StringIO(cells_csv(TABLE))))
    assert len(lines) == 14
    head = "table,block,row,kind,column,metric,state,mean,spread,seeds,per_seed,paper,note\n"
    assert cells_csv(TABLE).startswith(head)
    places = [
        (block, row, column, cell)
        for block in TABLE.blocks
        for row in block.rows
        for column, cell in zip(block.columns, row.cells, strict=True)
    ]
    for line, (block, row, column, cell) in zip(lines, places, strict=True):
        assert (line["table"], line["block"], line["row"]) == ("table1", block.title, row.name)
        assert (line["kind"], line["column"], line["metric"]) == (row.kind, column, block.metric)
        assert (line["state"], line["note"]) == (cell.state, cell.note)
        assert int(line["seeds"]) == cell.seeds
        for name, value in (("mean", cell.value), ("spread", cell.spread), ("paper", cell.paper)):
            read = None if line[name] == "" else float(line[name])
            assert read == (None if value is None else pytest.approx(value, abs=1e-6))
        parts = line["per_seed"].split(";") if cell.per_seed else []
        assert tuple(float(part) if part else None for part in parts) == cell.per_seed


def test_csv_of_trends_gives_back_every_verdict() -> None:
    lines = list(csv.DictReader(io.StringIO(trends_csv(TABLE))))
    for line, trend in zip(lines, TRENDS, strict=True):
        assert (line["code"], line["claim"], line["note"]) == (trend.code, trend.claim, trend.note)
        numbers = {
            name: float(line[name]) if line[name] else None
            for name in ("difference", "low", "high", "margin")
        }
        counts = {name: int(line[name]) for name in ("seeds", "agreeing", "items")}
        assert Verdict(line["state"], **numbers, **counts) == trend.verdict  # pyright: ignore


class Page(HTMLParser):
    """Table rows cell by cell, chips with their colour, figures, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.chips: list[tuple[str, str]] = []
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag in ("img", "meta"):
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if values.get("class") == "chip":
            self.chips.append((values["style"] or "", ""))
        if tag == "small":
            self.rows[-1][-1] += " | "

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and self.chips and not self.chips[-1][1]:
            self.chips[-1] = (self.chips[-1][0], data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_the_page_is_well_formed_and_shows_every_cell_and_verdict() -> None:
    text = page([(TABLE, b"")], "Distillation transfer")
    found = Page(text)
    assert found.open == []
    rows = {row[0].split(" | ")[0]: row for row in found.rows}
    assert rows["hidden"] == [
        *("hidden | mean over elements", "61.3 ± 1.5 | paper 60.1", "not run | paper 64.5")
    ]
    assert rows["soft <eq. 2>"][1:] == ["diverged | paper 61.3 | loss NaN at 7", "unfinished"]
    assert rows["Pretrain"][1] == "11.25 ± 0.25 | paper 3.36"
    assert ["T5", "soft about neutral", "held"] in [row[:3] for row in found.rows]
    words = {word: style for style, word in found.chips}
    assert set(words) == {"held", "reversed", "inconclusive", "not run"}
    assert len(set(words.values())) == 4
    assert "uninformative" in text
    assert "faces &lt;846&gt;" in text
    assert not re.search(r"(src|href)=['\"](?!data:|#)", text)


def test_a_page_of_several_tables_starts_with_all_their_verdicts() -> None:
    other = dataclasses.replace(TABLE, name="table3", trends=TRENDS[:1], blocks=(ERROR,))
    text = page([(TABLE, b""), (other, b"")], "Distillation transfer")
    found = Page(text)
    assert len(found.images) == 2
    assert len(found.chips) == 2 * (len(TRENDS) + 1)
    assert text.index('href="#table3"') < text.index('id="table1"') < text.index('id="table3"')


def test_the_figure_is_as_wide_as_a_page_and_shows_states_paper_and_verdicts() -> None:
    first = draw(TABLE)
    assert draw(TABLE) == first  # the same table, the same bytes

    def pixels(table: Table) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(draw(table))).convert("RGB"))

    def has(image: np.ndarray, colour: str) -> bool:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return bool((np.abs(image.astype(int) - wanted).max(axis=-1) < 3).any())

    whole = pixels(TABLE)
    assert whole.shape[1] == 1650
    assert all(has(whole, colour) for colour in ("#059669", "#dc2626", "#b45309", "#e0f2fe"))
    bare = pixels(dataclasses.replace(TABLE, blocks=(ERROR,), trends=()))
    assert not any(has(bare, colour) for colour in ("#059669", "#dc2626", "#b45309"))
    assert bare.shape[0] < whole.shape[0] / 2
    row = ERROR.rows[0]
    moved = dataclasses.replace(row, cells=(dataclasses.replace(row.cells[0], paper=None),))
    alone = dataclasses.replace(ERROR, rows=(moved, ERROR.rows[1]))
    assert (pixels(dataclasses.replace(TABLE, blocks=(alone,), trends=())) != bare).any()


def test_a_table_of_which_nothing_was_run_is_drawn_too() -> None:
    empty = dataclasses.replace(
        ACCURACY,
        rows=(Row("hidden", "paper", (Cell(), Cell())), Row("raw", "floor", (Cell(), Cell()))),
    )
    table = Table("table1", "nothing yet", "a paper", (empty,), (TRENDS[-1],))
    assert Image.open(io.BytesIO(draw(table))).size[0] == 1650
    assert [floor.text for floor in _floors(empty)] == ["floor: raw not run"]
    assert "not run" in plain(table)
    assert Image.open(io.BytesIO(draw(Table("table1", "no block", "a paper", ())))).size[0] == 1650


def test_rows_get_a_lane_for_each_network_and_the_teacher_gets_one() -> None:
    lanes = {line.row.name: len(line.lanes) for line in _lines(ACCURACY)}
    assert lanes == {"hidden": 2, "soft <eq. 2>": 2, "softmax alone": 2, "tau^2": 1, "teacher": 1}


def test_far_floors_leave_the_scale_to_the_dots_and_near_ones_are_drawn() -> None:
    (far,) = _floors(ERROR)
    assert far.lines == []
    assert far.text == "floor: mean landmarks 37.00, off the scale"
    (near,) = _floors(ACCURACY)
    assert [value for _, value in near.lines] == [43.5]
    assert _span(ERROR) == (11.0, 11.5)


def test_both_panels_have_the_same_points_an_inch_where_that_fits() -> None:
    left, right, same = _limits((40.0, 90.0), (60.0, 75.0))
    ours, theirs = (high - low for low, high in (left, right))
    assert same
    assert ours / WIDTH_RATIOS[0] == pytest.approx(theirs / WIDTH_RATIOS[1], rel=1e-6)
    assert left[0] < 40 < 90 < left[1]
    assert right[0] < 60 < 75 < right[1]
    left, right, same = _limits((40.0, 90.0), (3.2, 3.6))
    assert not same
    assert right[1] - right[0] < 1


def test_files_are_replaced_whole_and_a_second_writing_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results" / "new"
    png = draw(TABLE)
    assert table_files.write(TABLE, folder, png, subject="Tests") == folder / "table1.html"
    endings = (".txt", ".md", ".csv", ".html", ".png", "-trends.csv")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {folder / f"table1{ending}" for ending in endings}
    assert before[folder / "table1.csv"].decode() == cells_csv(TABLE)
    assert before[folder / "table1.png"] == png
    table_files.write(TABLE, folder, png, subject="Tests")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint.os, "replace", fails)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be written: the disk is full"):
        table_files.write(dataclasses.replace(TABLE, title="another"), folder, png, subject="Tests")
    assert {path: path.read_bytes() for path in before} == before


def test_several_tables_get_their_files_and_one_page(tmp_path: Path) -> None:
    other = Table("table3", "alignment", "arXiv 1709.02929, table 3", (ERROR,))
    page = table_files.write_all(
        [(one, draw(one)) for one in (TABLE, other)], tmp_path, "Tests", 140
    )
    assert page == tmp_path / "tables.html"
    assert (tmp_path / "table3.md").read_text().startswith("## table3: alignment\n")
    assert len(Page(page.read_text()).images) == 2
    assert len(list(tmp_path.iterdir())) == 13
