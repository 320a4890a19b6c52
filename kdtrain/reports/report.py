"""`report(run_root)`: one self-contained HTML page about a chain of runs, or about a single run.

Read from the run folders alone (config.yaml, results.json, metrics.jsonl, samples.npz); what is not
there is said to be not run or not finished, so a page can be written at any moment.
"""

from __future__ import annotations

import datetime
import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import run_folder
from kdtrain.reports import plots, runs
from kdtrain.reports.chain_table import results
from kdtrain.reports.plots import Curve, Panel
from kdtrain.reports.runs import CHAIN, TASKS, Stage, epochs_done, judge
from kdtrain.reports.writing import (
    decimal,
    direction,
    full,
    lower_is_better,
    percent,
    plotted,
    render,
)
from kdtrain.training.checkpoint import write_text
from kdtrain.training.journal.journal import duration, unit

PLACE = ("kind", "step", "phase", "epoch", "lr", "skipped_steps")
NOT_TERMS = (*PLACE, "loss", "top1", "gradient_norm", "teacher_entropy")
RUN_COLUMNS: dict[str, Callable[[Stage], str]] = {
    "run": lambda stage: stage.name,
    "starts from": runs.start_text,
    "loss": runs.loss_text,
    "phases": runs.phases_text,
    "after each phase": runs.after_phases_text,
    "best": runs.best_text,
    "time": runs.time_text,
}
FLOORS = {
    "classification": "the label of the nearest training image in raw pixels",
    "alignment": "the mean landmarks",
    "verification": "the nearest test image in raw pixels, the cosine of raw pixels",
}
Points = tuple[Sequence[float], Sequence[float]]


def report(run_root: str | Path, *, command: str | None = None) -> Path:
    """Write run_root/report.html and return its path.

    run_root: a folder of run folders, or one run folder. command: what made the runs; by default
    the present command line when that is kdtrain's own. Raises ValueError when there is no run.
    """
    root = Path(run_root)
    stages = runs.read_stages(root)
    if not stages:
        raise ValueError(
            f"report: no run folder (config.yaml) in {root}; train something there first"
        )
    table = results(stages)
    page = render(
        "report.html.j2",
        title=f"{root.name}: distillation report",
        facts=_facts(stages, command if command is not None else _own_command()),
        columns=[(name, direction(lower_is_better(metric))) for name, _, metric in table.columns],
        rows=[(name, runs.network_text(mine), map(_cell, row)) for name, mine, row in table.rows],
        foot=[(title, map(percent, values)) for title, values in table.foot],
        of_floor=", ".join(dict.fromkeys(FLOORS[task] for _, task, _ in table.columns)),
        doubts=_doubts(root, stages, table.columns),
        run_titles=RUN_COLUMNS,
        runs=[[text(stage) for text in RUN_COLUMNS.values()] for stage in stages],
        tasks=[_task_section(task, mine) for task in TASKS if (mine := _of_task(stages, task))],
    )
    path = root / "report.html"
    write_text(path, page)
    return path


def _own_command() -> str | None:
    """The command line, where it is one of kdtrain's that trains."""
    program = Path(sys.argv[0])
    if program.parent.name != "kdtrain" or sys.argv[1:2] == ["report"]:
        return None
    return shlex.join(["python", "-m", "kdtrain", *sys.argv[1:]])


def _facts(stages: Sequence[Stage], command: str | None) -> list[tuple[str, str]]:
    done = [stage for stage in stages if stage.results]
    seconds = sum(stage.results.get("seconds") or 0.0 for stage in done)
    return [
        *([("command", command)] if command else []),
        *(("images", text) for text in dict.fromkeys(map(runs.images_text, done or stages))),
        *(("machine", text) for text in dict.fromkeys(map(runs.machine_text, done))),
        ("protocol", runs.protocol_text(stages)),
        ("training", f"{duration(seconds)} in {len(done)} of {len(stages)} runs"),
        ("written", f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"),
    ]


def _doubts(
    root: Path, stages: Sequence[Stage], columns: Sequence[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    """The columns whose teachers learned less than nothing; beside a teacher that beats the floor,
    only the students of one that does not.
    """
    taught = _taught(root, stages)
    notes = []
    for title, task, metric in columns:
        teachers = [s for s in _of_task(stages, task) if s.name in taught]
        beats = {s.name: good for s in teachers if (good := s.beats_floor(metric)) is not None}
        if beats and not any(beats.values()):
            notes.append((title, "its teacher does not beat the floor"))
            continue
        for name in (name for name, good in beats.items() if not good and taught[name]):
            students = ", ".join(taught[name])
            notes.append((f"{title} of {students}", f"the teacher {name} does not beat the floor"))
    return notes


def _taught(root: Path, stages: Sequence[Stage]) -> dict[str, list[str]]:
    """The names of the students of each teacher: of every run here that a config names as one, and
    of the chain's teachers.
    """
    taught: dict[str, list[str]] = {s.name: [] for s in stages if CHAIN.get(s.name) == "teacher"}
    folders = {(root / stage.name).resolve(): stage.name for stage in stages}
    for student in stages:
        for named in student.teachers:
            teacher = folders.get(run_folder(named, root / student.name).resolve())
            if teacher is not None:
                taught.setdefault(teacher, []).append(student.name)
    return taught


def _cell(place: tuple[Stage | None, str]) -> dict[str, str]:
    """A number with its spread over folds, or why there is none; kind: "poor" below the floor."""
    run, metric = place
    if run is None or run.metric(metric) is None:
        state = "" if run is None else "not measured" if run.results else run.state
        return {"kind": "none", "text": state}
    spread = run.metric(f"{metric}_std")
    return {
        "kind": "poor" if run.beats_floor(metric) is False else "",
        "text": percent(run.metric(metric)),
        "spread": "" if spread is None else percent(spread),
    }


def _of_task(stages: Sequence[Stage], task: str) -> list[Stage]:
    return [stage for stage in stages if stage.task == task]


def _task_section(task: str, stages: Sequence[Stage]) -> dict[str, Any]:
    drawn = [p for p in (_metric_panel(task, stages), _second_panel(task, stages)) if p.curves]
    terms = [panel for stage in stages if (panel := _term_panel(stage)) is not None]
    done = [stage for stage in stages if stage.results]
    asked = [stage for stage in stages if "queries" in stage.samples]
    front = [stage for stage in asked if stage.role in ("teacher", "distilled")] or asked
    return {
        "name": task,
        "curves": plots.panels(drawn, 2) if drawn else "",
        "terms": plots.panels(terms, 4 if len(terms) in (4, 7, 8) else 3) if terms else "",
        "landmarks": [_landmark_strip(stage) for stage in stages if "true" in stage.samples],
        "gallery": f"{int(front[0].samples['gallery']):,}" if front else "",
        "neighbours": [_neighbour_strip(stage) for stage in front],
        "others": [_neighbour_strip(stage) for stage in asked if stage not in front],
        "done": [stage.name for stage in done],
        "metrics": {
            name: [
                *(full(name, stage.metric(name)) for stage in done),
                *(full(name, of(done, task, name)) for of in (runs.floor_of, runs.untrained_of)),
            ]
            for name in dict.fromkeys(name for stage in done for name in stage.results["metrics"])
        },
    }


def _curves(stages: Sequence[Stage], points: Callable[[Stage], Points | None]) -> list[Curve]:
    """The points of each run that has some, in the run's colour."""
    found = []
    for stage, other in zip(stages, itertools.cycle(plots.OTHER_COLOURS), strict=False):
        if (drawn := points(stage)) is not None:
            found.append(Curve(stage.name, *drawn, plots.ROLE_COLOURS.get(stage.role, other)))
    return found


def _metric_panel(task: str, stages: Sequence[Stage]) -> Panel:
    name = judge(stages[0])

    def points(stage: Stage) -> Points | None:
        evals = stage.lines("eval")
        if not evals or judge(stage) != name:  # a hint is no accuracy
            return None
        x = [epochs_done(stage, record) for record in evals]
        return x, [plotted(name, record.get(name)) for record in evals]

    floor = runs.floor_of(stages, task, name)
    splits = {r.get("split", "test") for stage in stages for r in stage.lines("eval")}
    return Panel(
        f"{name}, {' or '.join(sorted(splits))} split",
        "epoch",
        "%" if unit(name) == "fraction" else unit(name),
        _curves(stages, points),
        floor=None if floor is None else plotted(name, floor),
        dots=True,
    )


def _second_panel(task: str, stages: Sequence[Stage]) -> Panel:
    """Training accuracy of classification, cumulative errors of alignment, ROC of verification."""

    def training(stage: Stage) -> Points | None:
        records = stage.lines("train")
        if not records or "top1" not in records[-1]:
            return None
        return _epochs(stage, records), [plotted("top1", r.get("top1")) for r in records]

    def samples(across: str, up: str, scale: float) -> list[Curve]:
        def points(stage: Stage) -> Points | None:
            if across not in stage.samples or up not in stage.samples:
                return None
            x, y = scale * stage.samples[across], 100 * stage.samples[up]
            drawn = x > 0  # as the axis may be logarithmic
            return x[drawn].tolist(), y[drawn].tolist()

        return _curves(stages, points)

    if task == "classification":
        return Panel("top1, training batches", "epoch", "%", _curves(stages, training))
    if task == "alignment":
        curves = samples("ced_threshold", "ced_share", 100)
        return Panel("cumulative errors, test split", "NRMSE at most, %", "% of images", curves)
    curves, title = samples("roc_far", "roc_tar", 1), "ROC of pairs, test split"
    return Panel(title, "false accepts (share)", "true accepts, %", curves, log_x=True)


def _term_panel(stage: Stage) -> Panel | None:
    records = stage.lines("train")
    names = [n for n in (records[-1] if records else {}) if n not in NOT_TERMS]
    if not names:
        return None
    x, nan, others = _epochs(stage, records), float("nan"), itertools.cycle(plots.OTHER_COLOURS)
    curves = []
    for name, other in zip(names, others, strict=False):
        y = [nan if record.get(name) is None else record[name] for record in records]
        curves.append(Curve(name, x, y, plots.TERM_COLOURS.get(name, other)))
    phases = stage.config.get("optim", {}).get("phases", [])
    breaks = np.cumsum([phase["epochs"] for phase in phases])[:-1].tolist()
    positive = all(value > 0 or np.isnan(value) for curve in curves for value in curve.y)
    return Panel(stage.name, "epoch", "", curves, breaks=breaks, log_y=positive)


def _epochs(stage: Stage, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The epochs done at each train line."""
    steps_per_epoch = records[-1]["step"] / max(1, epochs_done(stage, records[-1]))
    return [record["step"] / steps_per_epoch for record in records]


def _landmark_strip(stage: Stage) -> dict[str, Any]:
    columns = [stage.samples[name] for name in ("images", "true", "predicted", "errors")]
    faces = [
        (plots.marked_face(image, true, predicted), decimal(100 * float(error)))
        for image, true, predicted, error in zip(*columns, strict=True)
    ]
    return {"title": stage.name, "faces": faces}


def _neighbour_strip(stage: Stage) -> dict[str, Any]:
    samples = stage.samples
    right = (samples["query_labels"] == samples["neighbour_labels"]).tolist()
    pairs = [map(plots.face, samples[name]) for name in ("queries", "neighbours")]
    title = f"{stage.name}: {sum(right)} of {len(right)} right"
    return {"title": title, "faces": list(zip(*pairs, right, strict=True))}
