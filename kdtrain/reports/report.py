"""`report(run_root)`: one self-contained HTML page about a chain of runs, or about a single run.

Read from the run directories alone (config.yaml, results.json, metrics.jsonl, samples.npz, items).
A run without results is shown as not run or not finished, so a page can be written at any moment.
"""

from __future__ import annotations

import datetime
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import run_folder
from kdtrain.reports import charts, plots, runs
from kdtrain.reports.chain_table import ONE_SEED, QUESTION, answers, results
from kdtrain.reports.charts import Curve, Panel
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
    "task": lambda stage: stage.task,
    "network": lambda stage: runs.network_text([stage]),
    "initialised from": runs.start_text,
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
TERMS = {
    "hard": "Cross-entropy with the labels",
    "soft": "KL divergence from the teacher's prediction",
    "triplet": "Triplet loss",
    "points": "Landmark loss",
    "hidden": "Distance to the teacher's feature",
}
"""Titles of the panels of the loss terms; any other term has its own name."""
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
        count=len(stages),
        question=QUESTION,
        one_seed=ONE_SEED,
        answers=answers(stages),
        columns=[(name, direction(lower_is_better(metric))) for name, _, metric in table.columns],
        rows=[(name, runs.network_text(mine), map(_cell, row)) for name, mine, row in table.rows],
        foot=[(title, map(percent, values)) for title, values in table.foot],
        of_floor=", ".join(dict.fromkeys(FLOORS[task] for _, task, _ in table.columns)),
        doubts=_doubts(root, stages, table.columns),
        run_titles=RUN_COLUMNS,
        runs=[(stage, [text(stage) for text in RUN_COLUMNS.values()]) for stage in stages],
        span=f"{charts.SPAN:g}",
        tasks=[_task_section(task, mine) for task in TASKS if (mine := _of_task(stages, task))],
        facts=_facts(stages, command if command is not None else _own_command()),
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
    panels = [_metric_panel(task, stages), _second_panel(task, stages)]
    done = [stage for stage in stages if stage.results]
    return {
        "name": task,
        "legend": [(stage, color) for stage, color in _colors(stages) if stage.records],
        "curves": [charts.drawn(panel) for panel in panels if panel.curves],
        "terms": [charts.drawn(panel) for panel in _term_panels(stages)],
        "landmarks": [_landmarks(stage) for stage in stages if "true" in stage.samples],
        "neighbours": _neighbours([stage for stage in stages if "queries" in stage.samples]),
        "done": done,
        "metrics": {
            name: [
                *(full(name, stage.metric(name)) for stage in done),
                *(full(name, of(done, task, name)) for of in (runs.floor_of, runs.untrained_of)),
            ]
            for name in dict.fromkeys(name for stage in done for name in stage.results["metrics"])
        },
    }


def _colors(stages: Sequence[Stage]) -> list[tuple[Stage, str]]:
    """Each run with its role's color, or one of the others."""
    others = itertools.cycle(charts.OTHER_COLORS)
    return [(stage, charts.ROLE_COLORS.get(stage.role) or next(others)) for stage in stages]


def _curves(
    stages: Sequence[Stage], points: Callable[[Stage], Points | None], *, by_epoch: bool = True
) -> list[Curve]:
    """The points of each run that has some; the control's line is dashed and above the others."""
    found = []
    for stage, color in sorted(_colors(stages), key=lambda both: both[0].dashed):
        if (drawn := points(stage)) is not None:
            phases = stage.config.get("optim", {}).get("phases", [])
            ends = np.cumsum([phase["epochs"] for phase in phases])[:-1] if by_epoch else []
            turns = [float(end) for end in ends if end < drawn[0][-1]]
            found.append(Curve(stage.title, *drawn, color, stage.dashed, turns))
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
        f"{runs.METRICS.get(name, name)} on the {' or '.join(sorted(splits))} split",
        "epoch",
        "%" if unit(name) == "fraction" else unit(name),
        _curves(stages, points),
        floor=None if floor is None else plotted(name, floor),
        dots=True,
    )


def _second_panel(task: str, stages: Sequence[Stage]) -> Panel:
    """Training accuracy of classification, cumulative errors of alignment, ROC of verification."""

    def samples(across: str, up: str, scale: float) -> list[Curve]:
        def points(stage: Stage) -> Points | None:
            if across not in stage.samples or up not in stage.samples:
                return None
            x, y = scale * stage.samples[across], 100 * stage.samples[up]
            positive = x > 0  # as the axis may be logarithmic
            return x[positive].tolist(), y[positive].tolist()

        return _curves(stages, points, by_epoch=False)

    if task == "classification":
        curves = _curves(stages, lambda stage: _logged(stage, "top1", 100))
        return Panel("Top-1 on the training batches", "epoch", "%", curves)
    if task == "alignment":
        curves = samples("ced_threshold", "ced_share", 100)
        return Panel(
            "cumulative errors on the test split", "NRMSE at most, %", "% of images", curves
        )
    curves = samples("roc_far", "roc_tar", 1)
    return Panel(
        "ROC of the test pairs", "false accepts (share)", "true accepts, %", curves, log_x=True
    )


def _term_panels(stages: Sequence[Stage]) -> list[Panel]:
    """A panel per loss term, with the line of every run that has it."""
    last = [lines[-1] for stage in stages if (lines := stage.lines("train"))]
    names = dict.fromkeys(name for line in last for name in line if name not in NOT_TERMS)
    return [
        Panel(
            TERMS.get(name, name.replace("_", " ")),
            "epoch",
            "",
            _curves(stages, lambda stage, name=name: _logged(stage, name)),
            log_y=True,
        )
        for name in names
    ]


def _logged(stage: Stage, name: str, scale: float = 1) -> Points | None:
    """A quantity over the epochs of training, thinned, None where the run does not log it. The
    teacher's entropy, the least value of the soft term, is subtracted from it.
    """
    records = stage.lines("train")
    if not records or name not in records[-1]:
        return None
    values = [scale * value if (value := r.get(name)) is not None else math.nan for r in records]
    if name == "soft":
        values = [
            value - (record.get("teacher_entropy") or 0.0)
            for value, record in zip(values, records, strict=True)
        ]
    return charts.thinned(_epochs(stage, records)), charts.thinned(values)


def _epochs(stage: Stage, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The epochs done at each train line."""
    steps_per_epoch = records[-1]["step"] / max(1, epochs_done(stage, records[-1]))
    return [record["step"] / steps_per_epoch for record in records]


def _landmarks(stage: Stage) -> dict[str, Any]:
    columns = [stage.samples[name] for name in ("images", "true", "predicted", "errors")]
    faces = [
        (plots.marked_face(image, true, predicted), decimal(100 * float(error)))
        for image, true, predicted, error in zip(*columns, strict=True)
    ]
    return {"run": stage, "faces": faces}


def _neighbours(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Runs with the same queries under each other: the queries once, then what each run found."""
    groups: dict[bytes, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(stage.samples["queries"].tobytes(), []).append(stage)
    return [
        {
            "gallery": f"{int(mine[0].samples['gallery']):,}",
            "queries": map(plots.face, mine[0].samples["queries"]),
            "rows": [{"run": stage, "faces": _found(stage)} for stage in mine],
        }
        for mine in groups.values()
    ]


def _found(stage: Stage) -> list[tuple[str, bool]]:
    """The nearest neighbours, and whether each is of the query's identity."""
    right = stage.samples["query_labels"] == stage.samples["neighbour_labels"]
    return list(zip(map(plots.face, stage.samples["neighbours"]), right.tolist(), strict=True))
