"""The self-contained HTML page about a chain of runs, or about one run, at any time of training."""

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
from kdtrain.reports import chain_table, charts, plots, runs, writing
from kdtrain.reports.charts import Curve, Panel
from kdtrain.reports.runs import CHAIN, TASKS, Stage, baseline, epochs_done, judge
from kdtrain.reports.writing import plotted, render
from kdtrain.training.checkpoint import write_text
from kdtrain.training.journal.journal import duration, unit

PLACE = ("kind", "step", "phase", "epoch", "lr", "skipped_steps")
NOT_TERMS = (*PLACE, "loss", "top1", "gradient_norm", "teacher_entropy")
Points = Sequence[tuple[float, float | None]]


def report(run_root: str | Path, *, command: str | None = None) -> Path:
    """Write run_root/report.html and return its path.

    run_root: a directory of run directories, or one run directory. command: the command that made
    the runs, by default kdtrain's present command line. Raises ValueError without any run.
    """
    root = Path(run_root)
    stages = runs.read_stages(root)
    if not stages:
        raise ValueError(
            f"report: no run directory (config.yaml) in {root}; train a run there first"
        )
    columns = chain_table.columns(stages)
    page = render(
        "report.html.j2",
        title=f"{root.name}: distillation report",
        answers=chain_table.answers(stages),
        question=(chain_table.QUESTION, chain_table.ONE_SEED),
        columns=columns,
        rows=chain_table.rows(stages),
        foot=chain_table.foot(stages),
        doubts=_doubts(root, stages, columns),
        runs=stages,
        tasks=[
            _task_section(task, mine)
            for task in TASKS
            if (mine := [stage for stage in stages if stage.task == task])
        ],
        span=f"{charts.SPAN:g}",
        text=runs,
        writing=writing,
        facts=_facts(stages, command if command is not None else _own_command()),
    )
    path = root / "report.html"
    write_text(path, page)
    return path


def _own_command() -> str | None:
    """The command line of a kdtrain command that trains; None for any other."""
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
    """The columns and students whose teacher does not beat the floor, and that teacher."""
    names = {(root / stage.name).resolve(): stage.name for stage in stages}
    taught: dict[str, list[str]] = {s.name: [] for s in stages if CHAIN.get(s.name) == "teacher"}
    for student in stages:
        for named in student.teachers:
            teacher = names.get(run_folder(named, root / student.name).resolve())
            if teacher is not None:
                taught.setdefault(teacher, []).append(student.name)
    return [
        (" of ".join(filter(None, [title, ", ".join(taught[stage.name])])), stage.name)
        for title, task, metric in columns
        for stage in stages
        if stage.task == task and stage.name in taught and stage.beats_floor(metric) is False
    ]


def _task_section(task: str, stages: Sequence[Stage]) -> dict[str, Any]:
    panels = [_metric_panel(task, stages), _second_panel(task, stages)]
    done = [stage for stage in stages if stage.results]
    return {
        "name": task,
        "legend": [(stage, color) for stage, color in _colors(stages) if stage.records],
        "curves": [charts.drawn(panel) for panel in panels if panel.curves],
        "terms": [charts.drawn(panel) for panel in _term_panels(stages)],
        "landmarks": [(s, _landmarks(s.samples)) for s in stages if "true" in s.samples],
        "neighbours": _neighbours([stage for stage in stages if "queries" in stage.samples]),
        "done": done,
        "metrics": list(dict.fromkeys(name for run in done for name in run.results["metrics"])),
    }


def _colors(stages: Sequence[Stage]) -> list[tuple[Stage, str]]:
    """Each run with its role's color, or one of the others."""
    others = itertools.cycle(charts.OTHER_COLORS)
    return [(stage, charts.ROLE_COLORS.get(stage.role) or next(others)) for stage in stages]


def _curves(
    stages: Sequence[Stage], points: Callable[[Stage], Points], *, by_epoch: bool = True
) -> list[Curve]:
    """The curve of each run that has points, with rings where the learning rate changes."""
    found = []
    # the control's is dashed and last, because it may cover the distilled student's
    for stage, color in sorted(_colors(stages), key=lambda both: both[0].role == "control"):
        if drawn := [(x, y) for x, y in points(stage) if y is not None]:
            x, y = map(charts.thinned, zip(*drawn, strict=True))
            turns = [end for end in runs.phase_ends(stage)[:-1] if by_epoch and end < x[-1]]
            found.append(Curve(stage.title, x, y, color, stage.role == "control", turns))
    return found


def _metric_panel(task: str, stages: Sequence[Stage]) -> Panel:
    name = judge(stages[0])

    def points(stage: Stage) -> Points:
        if judge(stage) != name:  # a hint is no accuracy
            return []
        return [(epochs_done(stage, r), plotted(name, r.get(name))) for r in stage.lines("eval")]

    floor = baseline(stages, "floors", task, name)
    splits = {r.get("split", "test") for stage in stages for r in stage.lines("eval")}
    return Panel(
        f"{runs.METRICS.get(name, name)} on the {' or '.join(sorted(splits))} split",
        "epoch",
        "%" if unit(name) == "fraction" else unit(name),
        _curves(stages, points),
        floor=plotted(name, floor),
        dots=True,
    )


def _second_panel(task: str, stages: Sequence[Stage]) -> Panel:
    """Training accuracy of classification, cumulative errors of alignment, ROC of verification."""

    if task == "classification":
        curves = _curves(stages, lambda stage: _logged(stage, "top1", 100))
        return Panel("Top-1 on the training batches", "epoch", "%", curves)
    roc = task == "verification"
    across, up = ("roc_far", "roc_tar") if roc else ("ced_threshold", "ced_share")

    def points(stage: Stage) -> Points:
        if across not in stage.samples or up not in stage.samples:
            return []
        x, y = stage.samples[across] * (1 if roc else 100), 100 * stage.samples[up]
        positive = x > 0  # as the axis may be logarithmic
        return list(zip(x[positive].tolist(), y[positive].tolist(), strict=True))

    curves = _curves(stages, points, by_epoch=False)
    if roc:
        labels = "false accepts (share)", "true accepts, %"
        return Panel("ROC of the test pairs", *labels, curves, log_x=True)
    return Panel("Cumulative test errors", "NRMSE at most, %", "% of images", curves)


def _term_panels(stages: Sequence[Stage]) -> list[Panel]:
    """A panel per loss term, with the curve of every run that has it."""
    last = [lines[-1] for stage in stages if (lines := stage.lines("train"))]
    names = dict.fromkeys(name for line in last for name in line if name not in NOT_TERMS)
    panels = []
    for name in names:
        curves = _curves(stages, lambda stage, name=name: _logged(stage, name))
        panels.append(Panel(name, "epoch", "", curves, log_y=True))
    return [panel for panel in panels if panel.curves]


def _logged(stage: Stage, name: str, scale: float = 1) -> Points:
    """A logged quantity over the epochs of training, None where a line lacks it."""
    records = stage.lines("train")
    if not records:
        return []
    steps_per_epoch = records[-1]["step"] / max(1, epochs_done(stage, records[-1]))
    least = "teacher_entropy" if name == "soft" else ""  # which leaves the KL divergence
    return [
        (
            record["step"] / steps_per_epoch,
            None if (y := record.get(name)) is None else scale * y - (record.get(least) or 0.0),
        )
        for record in records
    ]


def _landmarks(samples: Mapping[str, np.ndarray]) -> list[dict[str, object]]:
    """Each image with its points (x, y, predicted x, predicted y) in pixels, and its error."""
    points = np.concatenate([samples["true"], samples["predicted"]], axis=2).tolist()
    return [
        {"source": plots.face(image), "size": image.shape[1:], "points": marks, "error": error}
        for image, marks, error in zip(samples["images"], points, samples["errors"], strict=True)
    ]


def _neighbours(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Each set of queries, and whether the neighbours of each run have the query's identity."""
    groups: dict[bytes, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(stage.samples["queries"].tobytes(), []).append(stage)
    found = []
    for mine in groups.values():
        rows = []
        for stage in mine:
            right = stage.samples["query_labels"] == stage.samples["neighbour_labels"]
            faces = map(plots.face, stage.samples["neighbours"])
            rows.append((stage, list(zip(faces, right.tolist(), strict=True))))
        queries, gallery = (mine[0].samples[name] for name in ("queries", "gallery"))
        faces = map(plots.face, queries)
        found.append({"gallery": int(gallery), "queries": faces, "rows": rows})
    return found
