"""The result table of a folder of runs: a row a role of the chain, a column a task and metric, with
the floors below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from kdtrain.config.program import printable
from kdtrain.reports.runs import CHAIN, COLUMNS, ROWS, Stage, floor_of, read_stage, untrained_of
from kdtrain.reports.writing import DASH, percent

UNTRAINED = "untrained network"


class Results(NamedTuple):
    """What the result table shows of some runs."""

    columns: Sequence[tuple[str, str, str]]
    """As COLUMNS: title, task, metric."""
    rows: Sequence[tuple[str, Sequence[Stage], Sequence[tuple[Stage | None, str]]]]
    """Title, runs, and for each column the run in it (None without one of its task) and the
    metric."""
    foot: Sequence[tuple[str, Sequence[float | None]]]
    """The floor and an untrained network: title, and a value for each column."""


def results(stages: Sequence[Stage]) -> Results:
    """The table of these runs: the chain's rows, which hold a run of each task, then every other
    run under its own name. Columns are of the tasks that the runs have (all where none is known),
    without the nearest neighbour outside the query's own video where images have none.
    """
    trained = {s.task for s in stages} & {task for _, task, _ in COLUMNS}
    videos = any("nn_top1_other_video" in s.results.get("metrics", {}) for s in stages)
    columns = [
        (title, task, metric)
        for title, task, metric in COLUMNS
        if task in trained or not trained
        if videos or metric != "nn_top1_other_video"
    ]
    rows = [(title, [s for s in stages if CHAIN.get(s.name) == title]) for title, _ in ROWS]
    rows += [(stage.name, [stage]) for stage in stages if stage.name not in CHAIN]
    filled = [
        (title, mine, [(_run_of(mine, task, metric), metric) for _, task, metric in columns])
        for title, mine in rows
        if mine
    ]
    foot = [
        (title, [of(stages, task, metric) for _, task, metric in columns])
        for title, of in ((floor_title(columns), floor_of), (UNTRAINED, untrained_of))
    ]
    return Results(columns, filled, foot)


def _run_of(stages: Sequence[Stage], task: str, metric: str) -> Stage | None:
    """The first of a task's runs that has the metric, else the first."""
    mine = [stage for stage in stages if stage.task == task]
    return next((s for s in mine if s.metric(metric) is not None), next(iter(mine), None))


def floor_title(columns: Sequence[tuple[str, str, str]]) -> str:
    """'floor (raw pixels, mean shape)', without what none of these columns compares with."""
    aligned = [task == "alignment" for _, task, _ in columns]
    parts = ["raw pixels"] * (not all(aligned)) + ["mean shape"] * any(aligned)
    return f"floor ({', '.join(parts)})"


def result_table(root: Path, states: Mapping[str, str]) -> Table:
    """Teacher, scratch, control and distilled student of the chain, every other stage by its name,
    the floor and an untrained network, by task; '-' where a stage has no result. states: how each
    stage ended, by its name.
    """
    shown = results([read_stage(root / name) for name in states])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="test split, end of training, %")
    table.add_column("")
    for title, _, _ in shown.columns:
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for title, _, places in shown.rows:
        cells = [_cell(run, metric, states) for run, metric in places]
        if set(cells) != {"-"}:
            table.add_row(Text(printable(title)), *cells)
    for title, values in shown.foot:
        table.add_row(title, *(percent(value).replace(DASH, "-") for value in values))
    return table


def _cell(run: Stage | None, metric: str, states: Mapping[str, str]) -> str:
    value = None if run is None else run.metric(metric)
    if run is not None and value is None and states[run.name] in ("failed", "diverged"):
        return states[run.name]
    return percent(value).replace(DASH, "-")
