"""The result table of a directory of runs, and whether distillation helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kdtrain.config.program import printable
from kdtrain.reports import runs
from kdtrain.reports.runs import CHAIN, COLUMNS, METRICS, Stage, baseline, judge
from kdtrain.reports.tables.verdicts import compare
from kdtrain.reports.writing import DASH, decimal, direction, lower_is_better, percent

FLOOR, UNTRAINED = "floor (no training)", "untrained network"
QUESTION = "Did distillation help?"
ONE_SEED = (
    "One seed: no verdict. Intervals are over the test images; another seed can differ by more."
)


def columns(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """Title, task and metric of each column, for the tasks of the runs, or for all where no task is
    known. The nearest neighbour in other videos is left out where images have no videos.
    """
    trained = {s.task for s in stages} & set(runs.TASKS)
    videos = any("nn_top1_other_video" in s.results.get("metrics", {}) for s in stages)
    return [
        (title, task, metric)
        for title, task, metric in COLUMNS
        if task in trained or not trained
        if videos or metric != "nn_top1_other_video"
    ]


def rows(stages: Sequence[Stage]) -> list[tuple[str, list[Stage], list[tuple[Stage | None, str]]]]:
    """Title, runs, and the run and metric of each column. First the rows of the chain, with a run
    per task, then every other run. The run of a column is None where the row has none of its task.
    """
    grouped = [(title, [s for s in stages if CHAIN.get(s.name) == title]) for title, _ in runs.ROWS]
    grouped += [(stage.name, [stage]) for stage in stages if stage.name not in CHAIN]
    places = [(task, metric) for _, task, metric in columns(stages)]
    return [
        (title, mine, [(_run_of(mine, task, metric), metric) for task, metric in places])
        for title, mine in grouped
        if mine
    ]


def _run_of(stages: Sequence[Stage], task: str, metric: str) -> Stage | None:
    """The first of a task's runs that has the metric, else the first."""
    mine = [stage for stage in stages if stage.task == task]
    return next((s for s in mine if s.metric(metric) is not None), next(iter(mine), None))


def foot(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """The rows of networks that learned nothing: title, and a text per column."""
    places = [(task, metric) for _, task, metric in columns(stages)]
    return [
        (title, [percent(baseline(stages, section, *place)) for place in places])
        for title, section in ((FLOOR, "floors"), (UNTRAINED, "untrained"))
    ]


def answers(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """The task, the result and the numbers, for each task of the chain with a distilled student.

    The student is compared with the control, or with the scratch student where no control has a
    result, by the task's metric and verdicts.compare over the test images. The result is better or
    worse (one seed), no clear difference, or not known.
    """
    chains = ({s.role: s for s in stages if s.task == t and s.name in CHAIN} for t in runs.TASKS)
    return [(roles["distilled"].task, *_answer(roles)) for roles in chains if "distilled" in roles]


def _answer(roles: Mapping[str, Stage]) -> tuple[str, str]:
    ours, metric = roles["distilled"], judge(roles["distilled"])
    others = [roles[role] for role in ("control", "scratch") if role in roles]
    other = next((stage for stage in others if stage.metric(metric) is not None), None)
    value, base = ours.metric(metric), other and other.metric(metric)
    if value is None:
        return "not known", f"{ours.name} is {ours.state}."
    if other is None or base is None:
        return "not known", "No student without a teacher has a result."
    without = "for the student trained from scratch (no control has a result)"
    if other.role == "control":
        same = all(other.config.get(part) == ours.config.get(part) for part in ("model", "optim"))
        words = "the same student trained without a teacher"
        without = "for " + (words if same else "a control of another network or schedule")
    lower = lower_is_better(metric)
    index, others_index = (np.asarray(run.items("index")) for run in (ours, other))
    shared = np.array_equal(index, others_index)
    better, worse = ([run.items(metric) if shared else None] for run in (ours, other))
    found = compare(better, worse, higher_is_better=not lower)
    result, tail = "not known", " points, without an interval, as the runs share no test items"
    if found.low is not None and found.high is not None:
        word = "better" if found.low > 0 else "worse" if found.high < 0 else ""
        result = f"{word} (one seed)" if word else "no clear difference"
        low, high = (-found.high, -found.low) if lower else (found.low, found.high)
        tail = f" [{decimal(low, sign=True)}, {decimal(high, sign=True)}] points"
    return result, (
        f"{METRICS[metric]} ({direction(lower)}): {percent(value)} % with distillation, "
        f"{percent(base)} % {without}; {decimal(100 * (value - base), sign=True)}{tail}."
    )


def result_table(root: Path, states: Mapping[str, str]) -> Group:
    """The table for a terminal, '-' where a stage has no result, with `answers` below. states: the
    outcome of each stage, by its name.
    """
    stages = [runs.read_stage(root / name) for name in states]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="test split, end of training, %")
    table.add_column("")
    for title, _, _ in columns(stages):
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for title, _, places in rows(stages):
        cells = [_cell(run, metric, states) for run, metric in places]
        if set(cells) != {"-"}:
            table.add_row(Text(printable(title)), *cells)
    for title, texts in foot(stages):
        table.add_row(title, *(text.replace(DASH, "-") for text in texts))
    lines = [f"  {task}: {result}. {detail}" for task, result, detail in answers(stages)]
    return Group(table, *map(Text, [f"{QUESTION} {ONE_SEED}", *lines] if lines else []))


def _cell(run: Stage | None, metric: str, states: Mapping[str, str]) -> str:
    value = None if run is None else run.metric(metric)
    if run is not None and value is None and states[run.name] in ("failed", "diverged"):
        return states[run.name]
    return percent(value).replace(DASH, "-")
