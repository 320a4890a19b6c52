"""The chain's result table: a row a role, a column a task and metric, with the floors below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdtrain.config import settings
from kdtrain.training import checkpoint

# The result table: columns by task and metric, rows by the end of the chain's names.
COLUMNS = (
    ("classification top-1", "classification", "top1"),
    ("alignment NRMSE", "alignment", "nrmse"),
    ("verification NN top-1", "verification", "nn_top1"),
    ("NN top-1, other videos", "verification", "nn_top1_other_video"),
    ("pair accuracy", "verification", "pair_accuracy"),
)
ROWS = (
    ("teacher", ("_teacher",)),
    ("scratch student", ("_student", "_scratch")),
    ("control student, no teacher", ("_control",)),
    ("distilled student", ("_distilled",)),
)
CHAIN = {
    f"{task}{ending}": title
    for task in ("cls", "ali", "ver")
    for title, endings in ROWS
    for ending in endings
}
"""The row of each stage of the chain over the three tasks; any other stage has a row of its own."""
UNTRAINED = "untrained network"


def result_table(root: Path, states: Mapping[str, str]) -> Table:
    """Teacher, scratch, control and distilled student of the chain, every other stage by its name,
    the floor and an untrained network, by task; '-' where a stage has no result. states: how each
    stage ended, by its name.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="test split, end of training, %")
    table.add_column("")
    found = {name: checkpoint.read_json(root / name / "results.json") or {} for name in states}
    tasks = {name: _task(name, root, found) for name in states}
    columns = table_columns(tasks.values(), found.values())
    for title, _, _ in columns:
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row, names in table_rows(states):
        cells = []
        for _, task, metric in columns:
            stages = [name for name in names if tasks[name] == task]
            cells.append(_cell(stages, found, states, metric))
        if any(cell != "-" for cell in cells):
            table.add_row(row, *cells)
    for title, of in ((floor_title(columns), floor), (UNTRAINED, untrained)):
        values = [of(found, task, metric) for _, task, metric in columns]
        table.add_row(title, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def table_rows(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The table's rows as (title, runs in it): the chain's, which hold a run of each task, then
    every other run under its own name.
    """
    names = list(names)
    rows: list[tuple[str, list[str]]] = [
        (title, [name for name in names if CHAIN.get(name) == title]) for title, _ in ROWS
    ]
    rows += [(name, [name]) for name in names if name not in CHAIN]
    return [row for row in rows if row[1]]


def table_columns(
    tasks: Iterable[str], results: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """COLUMNS for these runs: of the tasks that they have (all where none is known), and without
    the nearest neighbour outside the query's own video where pictures have none.
    """
    trained = set(tasks) & {task for _, task, _ in COLUMNS} or {task for _, task, _ in COLUMNS}
    videos = any("nn_top1_other_video" in r.get("metrics", {}) for r in results)
    return [c for c in COLUMNS if c[1] in trained and (videos or c[2] != "nn_top1_other_video")]


def floor_title(columns: Iterable[tuple[str, str, str]]) -> str:
    """'floor (raw pixels, mean shape)', without what none of these columns compares with."""
    aligned = [task == "alignment" for _, task, _ in columns]
    parts = ["raw pixels"] * (not all(aligned)) + ["mean shape"] * any(aligned)
    return f"floor ({', '.join(parts)})"


def floor(runs: Mapping[str, Mapping[str, Any]], task: str, metric: str) -> float | None:
    """The floor that the first finished run of a task measured; None where there is none.

    runs: results.json by the run's name.
    """
    values = [r["floors"].get(metric) for r in runs.values() if r.get("task") == task]
    return next((value for value in values if value is not None), None)


def untrained(runs: Mapping[str, Mapping[str, Any]], task: str, metric: str) -> float | None:
    """A metric of the network before its first step, of the first finished student of a task (of
    its teacher, where it has no other); see `floor`.
    """
    order = sorted(runs, key=lambda name: name.split("_")[-1] == "teacher")
    mine = [runs[name].get("untrained", {}) for name in order if runs[name].get("task") == task]
    return next((values[metric] for values in mine if values.get(metric) is not None), None)


def _task(name: str, root: Path, found: Mapping[str, Mapping[str, Any]]) -> str:
    known = found[name].get("task")
    if known is None:
        known = settings.read_recipe(root / "recipes" / f"{name}.yaml").get("task", "")
    return known


def _cell(
    stages: Sequence[str],
    found: Mapping[str, Mapping[str, Any]],
    states: Mapping[str, str],
    metric: str,
) -> str:
    for name in stages:
        value = found[name].get("metrics", {}).get(metric)
        if value is not None:
            return f"{100 * value:.1f}"
        if states[name] in ("failed", "diverged"):
            return states[name]
    return "-"
