"""The results of a directory of runs: a row per role of the chain, a column per task and metric,
the floors below, and whether distillation helped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kdtrain.config.program import printable
from kdtrain.reports.runs import (
    CHAIN,
    COLUMNS,
    METRICS,
    ROWS,
    Stage,
    floor_of,
    read_stage,
    untrained_of,
)
from kdtrain.reports.tables.verdicts import compare
from kdtrain.reports.writing import DASH, decimal, direction, lower_is_better, percent

UNTRAINED = "untrained network"
QUESTION = "Did distillation help?"
ONE_SEED = (
    "One seed: no verdict. Intervals are over the test images alone; another seed can differ by "
    "more."
)


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


class Answer(NamedTuple):
    """Whether distillation helped in one task of a chain."""

    task: str
    result: str
    """better or worse (one seed), no clear difference, or not known."""
    detail: str
    """The numbers in one sentence."""


def answers(stages: Sequence[Stage]) -> list[Answer]:
    """For each task of the chain with a distilled student: its difference to the control student
    (the scratch student where no control has a result) by the task's first metric, with the 95 %
    interval of verdicts.compare over the test images.
    """
    found = []
    for task in dict.fromkeys(task for _, task, _ in COLUMNS):
        roles = {s.role: s for s in stages if s.task == task and s.name in CHAIN}
        if "distilled" in roles:
            found.append(_answer(task, roles))
    return found


def _answer(task: str, roles: Mapping[str, Stage]) -> Answer:
    metric = next(metric for _, of, metric in COLUMNS if of == task)
    ours = roles["distilled"]
    others = [roles[role] for role in ("control", "scratch") if role in roles]
    other = next((stage for stage in others if stage.metric(metric) is not None), None)
    value, base = ours.metric(metric), other and other.metric(metric)
    if value is None:
        return Answer(task, "not known", f"{ours.name} is {ours.state}.")
    if other is None or base is None:
        return Answer(task, "not known", "No student without a teacher has a result.")
    lower = lower_is_better(metric)
    found = compare([ours.items(metric)], [other.items(metric)], higher_is_better=not lower)
    result, difference = "not known", decimal(100 * (value - base), sign=True)
    tail = " points, without an interval, as the runs store no test items"
    if found.low is not None and found.high is not None:
        result = "no clear difference"
        if found.low > 0 or found.high < 0:
            result = f"{'better' if found.low > 0 else 'worse'} (one seed)"
        low, high = (-found.high, -found.low) if lower else (found.low, found.high)
        tail = f" [{decimal(low, sign=True)}, {decimal(high, sign=True)}] points"
    name = f"{METRICS[metric]} ({direction(lower)})"
    numbers = f"{percent(value)} % with distillation, {percent(base)} % {_without(ours, other)}"
    return Answer(task, result, f"{name}: {numbers}; {difference}{tail}.")


def _without(distilled: Stage, other: Stage) -> str:
    """The student beside which a distilled one stands, in words."""
    if other.role == "scratch":
        return "for the student trained from scratch (no control has a result)"
    if all(other.config.get(part) == distilled.config.get(part) for part in ("model", "optim")):
        return "for the same student trained without a teacher"
    return "for a control of another network or schedule"


def result_table(root: Path, states: Mapping[str, str]) -> Group:
    """Teacher, scratch, control and distilled student of the chain, every other stage by its name,
    the floor and an untrained network, by task; '-' where a stage has no result. Below: `answers`.
    states: the outcome of each stage, by its name.
    """
    stages = [read_stage(root / name) for name in states]
    shown = results(stages)
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
    lines = [f"  {task}: {result}. {detail}" for task, result, detail in answers(stages)]
    return Group(table, *map(Text, [f"{QUESTION} {ONE_SEED}", *lines] if lines else []))


def _cell(run: Stage | None, metric: str, states: Mapping[str, str]) -> str:
    value = None if run is None else run.metric(metric)
    if run is not None and value is None and states[run.name] in ("failed", "diverged"):
        return states[run.name]
    return percent(value).replace(DASH, "-")
