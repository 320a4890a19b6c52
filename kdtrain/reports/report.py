"""`report(run_root)`: one self-contained HTML page about a chain of runs, or about a single run.

Read from the run folders alone (config.yaml, results.json, metrics.jsonl, samples.npz); what is not
there is said to be not run or not finished, so a page can be written at any moment.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import run_folder
from kdtrain.reports import plots
from kdtrain.reports.chain_table import CHAIN, UNTRAINED, floor_title, table_columns, table_rows
from kdtrain.reports.plots import Curve, Panel
from kdtrain.reports.runs import (
    TASKS,
    Stage,
    after_phases_text,
    best_text,
    better,
    epochs_done,
    floor_of,
    judge,
    loss_text,
    lower_is_better,
    machine_text,
    network_text,
    percent,
    phases_text,
    pictures_text,
    plotted,
    protocol_text,
    read_stages,
    shown,
    start_text,
    untrained_of,
)
from kdtrain.training.checkpoint import write_text
from kdtrain.training.journal.journal import duration, unit

PLACE = ("kind", "step", "phase", "epoch", "lr", "skipped_steps")
NOT_TERMS = (*PLACE, "loss", "top1", "gradient_norm", "teacher_entropy")
CHAIN_TEACHERS = [name for name, title in CHAIN.items() if title == "teacher"]
FLOORS = {
    "classification": "the label of the nearest training picture in raw pixels",
    "alignment": "the mean landmarks",
    "verification": "the nearest test picture in raw pixels, the cosine of raw pixels",
}


def report(run_root: str | Path, *, command: str | None = None) -> Path:
    """Write run_root/report.html and return its path.

    run_root: a folder of run folders, or one run folder. command: what made the runs; by default
    the present command line when that is kdtrain's own. Raises ValueError when there is no run.
    """
    root = Path(run_root)
    stages = read_stages(root)
    if not stages:
        raise ValueError(
            f"report: no run folder (config.yaml) in {root}; train something there first"
        )
    body = [
        _header(root, stages, command if command is not None else _own_command()),
        _result_section(root, stages),
        _stage_section(stages),
    ]
    for task in TASKS:
        members = [stage for stage in stages if stage.task == task]
        if members:
            body.append(_task_section(task, members))
    page = PAGE.format(
        title=escape(f"{root.name}: distillation report"), style=STYLE, body="".join(body)
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


def _header(root: Path, stages: Sequence[Stage], command: str | None) -> str:
    done = [stage for stage in stages if stage.results]
    seconds = sum(stage.results.get("seconds") or 0.0 for stage in done)
    rows = [("command", f"<code>{escape(command)}</code>")] if command else []
    for text in dict.fromkeys(pictures_text(stage) for stage in done or stages):
        rows.append(("pictures", escape(text)))
    for text in dict.fromkeys(machine_text(stage) for stage in done):
        rows.append(("machine", escape(text)))
    rows.append(("protocol", escape(protocol_text(stages))))
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    rows.append(("training", f"{duration(seconds)} in {len(done)} of {len(stages)} runs"))
    rows.append(("written", now))
    table = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows)
    return f"<header><h1>{escape(root.name)}: distillation report</h1><dl>{table}</dl></header>"


def _result_section(root: Path, stages: Sequence[Stage]) -> str:
    """The table of the pipeline, with what each number must beat."""
    head = ""
    columns = table_columns([s.task for s in stages], [s.results for s in stages])
    for title, _, metric in columns:
        way = "lower" if lower_is_better(metric) else "higher"
        head += f"<th>{escape(title)}<small>%, {way} is better</small></th>"
    by_name, lines = {stage.name: stage for stage in stages}, []
    for title, names in table_rows(by_name):
        mine = [by_name[name] for name in names]
        cells = "".join(_cell(mine, task, metric) for _, task, metric in columns)
        name = f"{escape(title)}<small>{escape(network_text(mine))}</small>"
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    floors = [floor_of(stages, task, metric) for _, task, metric in columns]
    fresh = [untrained_of(stages, task, metric) for _, task, metric in columns]
    for title, values in ((floor_title(columns), floors), (UNTRAINED, fresh)):
        cells = "".join(f"<td>{percent(value)}</td>" for value in values)
        lines.append(f'<tr class="floor"><th scope="row">{escape(title)}</th>{cells}</tr>')
    of_floor = ", ".join(dict.fromkeys(FLOORS[task] for _, task, _ in columns))
    notes = [
        f"On the test split, at the end of training. The floor learns nothing: {of_floor}. "
        "The untrained network is the student before its first step."
    ]
    notes += _doubts(root, stages, columns)
    rows, said = "".join(lines), "".join(f"<p class=note>{note}</p>" for note in notes)
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<section class=results><h2>Results</h2>{table}{said}</section>"


def _doubts(
    root: Path, stages: Sequence[Stage], columns: Sequence[tuple[str, str, str]]
) -> list[str]:
    """The columns whose teachers learned less than nothing; beside a teacher that beats the floor,
    only the students of one that does not.
    """
    taught = _taught(root, stages)
    notes = []
    for title, task, metric in columns:
        beats = {}
        for teacher in (stage for stage in stages if stage.name in taught and stage.task == task):
            value, floor = teacher.metric(metric), teacher.results.get("floors", {}).get(metric)
            if value is not None and floor is not None:
                beats[teacher.name] = better(metric, value, floor)
        if beats and not any(beats.values()):
            notes.append(_doubt(title, "its teacher does not beat the floor"))
            continue
        for name in (name for name, is_better in beats.items() if not is_better and taught[name]):
            students = ", ".join(taught[name])
            notes.append(
                _doubt(f"{title} of {students}", f"the teacher {name} does not beat the floor")
            )
    return notes


def _doubt(what: str, why: str) -> str:
    return f"<strong>{escape(what)} is uninformative:</strong> {escape(why)}."


def _taught(root: Path, stages: Sequence[Stage]) -> dict[str, list[str]]:
    """The names of the students of each teacher: of every run here that a config names as one, and
    of the chain's teachers.
    """
    taught: dict[str, list[str]] = {s.name: [] for s in stages if s.name in CHAIN_TEACHERS}
    folders = {(root / stage.name).resolve(): stage.name for stage in stages}
    for student in stages:
        for named in student.teachers:
            teacher = folders.get(run_folder(named, root / student.name).resolve())
            if teacher is not None:
                taught.setdefault(teacher, []).append(student.name)
    return taught


def _cell(stages: Sequence[Stage], task: str, metric: str) -> str:
    mine = [stage for stage in stages if stage.task == task]
    if not mine:
        return "<td class='none'>&ndash;</td>"
    value = mine[0].metric(metric)
    if value is None:
        return f"<td class='none'>{'not measured' if mine[0].results else mine[0].state}</td>"
    spread = mine[0].metric(f"{metric}_std")
    extra = "" if spread is None else f"<small>&plusmn; {100 * spread:.1f} over folds</small>"
    floor = mine[0].results.get("floors", {}).get(metric)
    worse = floor is not None and not better(metric, value, floor)
    mark = "<small>does not beat the floor</small>" if worse else ""
    return f"<td{' class=poor' if worse else ''}>{percent(value)}{extra}{mark}</td>"


def _stage_section(stages: Sequence[Stage]) -> str:
    head = "".join(
        f"<th>{title}</th>"
        for title in ("run", "starts from", "loss", "phases", "after each phase", "best", "time")
    )
    lines = []
    for stage in stages:
        cells = [
            escape(start_text(stage)),
            escape(loss_text(stage)),
            escape(phases_text(stage)),
            escape(after_phases_text(stage)),
            escape(best_text(stage)),
            duration(stage.results["seconds"]) if stage.results.get("seconds") else stage.state,
        ]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(stage.name)}</th>{columns}</tr>')
    rows = "".join(lines)
    table = f"<table class=runs><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<section><h2>Runs</h2><div class='scroll'>{table}</div></section>"


def _task_section(task: str, stages: Sequence[Stage]) -> str:
    parts = [f"<section><h2>{task.capitalize()}</h2>"]
    drawn = [panel for panel in (_metric_panel(task, stages), _second_panel(task, stages)) if panel]
    if drawn:
        parts.append(
            _figure(drawn, 2, f"{task}: metric over epochs, and a second view of each run")
        )
    terms = [panel for stage in stages if (panel := _term_panel(stage)) is not None]
    if terms:
        parts.append("<h3>Loss terms in training, without their weights</h3>")
        parts.append("<p class=note>Dotted: the learning rate changes.</p>")
        columns = 4 if len(terms) in (4, 7, 8) else 3
        parts.append(_figure(terms, columns, f"{task}: loss terms of each run"))
    parts.append(_faces(stages))
    parts.append(_all_metrics(stages))
    return "".join([*parts, "</section>"])


def _metric_panel(task: str, stages: Sequence[Stage]) -> Panel | None:
    name = judge(stages[0])
    curves = []
    for number, stage in enumerate(stages):
        evals = stage.lines("eval")
        if evals and judge(stage) == name:  # a hint is no accuracy
            x = [epochs_done(stage, record) for record in evals]
            y = [plotted(name, record.get(name)) for record in evals]
            curves.append(Curve(stage.name, x, y, _colour(stage, number)))
    if not curves:
        return None
    floor = floor_of(stages, task, name)
    splits = {r.get("split", "test") for stage in stages for r in stage.lines("eval")}
    return Panel(
        f"{name}, {' or '.join(sorted(splits))} split",
        "epoch",
        "%" if unit(name) == "fraction" else unit(name),
        curves,
        floor=None if floor is None else plotted(name, floor),
        dots=True,
    )


def _second_panel(task: str, stages: Sequence[Stage]) -> Panel | None:
    """Training accuracy of classification, cumulative errors of alignment, ROC of verification."""
    if task == "classification":
        panel = Panel("top1, training batches", "epoch", "%", _training_top1(stages))
    elif task == "alignment":
        curves = _sample_curves(stages, "ced_threshold", "ced_share", 100)
        panel = Panel("cumulative errors, test split", "NRMSE at most, %", "% of pictures", curves)
    else:
        curves = _sample_curves(stages, "roc_far", "roc_tar", 1)
        title = "ROC of pairs, test split"
        panel = Panel(title, "false accepts (share)", "true accepts, %", curves, log_x=True)
    return panel if panel.curves else None


def _training_top1(stages: Sequence[Stage]) -> list[Curve]:
    curves = []
    for number, stage in enumerate(stages):
        records = stage.lines("train")
        if records and "top1" in records[-1]:
            steps = _steps_per_epoch(stage, records[-1])
            (curve,) = plots.term_curves(records, ["top1"], steps)
            y = [100 * value for value in curve.y]
            curves.append(Curve(stage.name, curve.x, y, _colour(stage, number)))
    return curves


def _sample_curves(stages: Sequence[Stage], across: str, up: str, scale: float) -> list[Curve]:
    curves = []
    for number, stage in enumerate(stages):
        if across in stage.samples and up in stage.samples:
            x, y = scale * stage.samples[across], 100 * stage.samples[up]
            drawn = x > 0  # as the axis may be logarithmic
            curves.append(
                Curve(stage.name, x[drawn].tolist(), y[drawn].tolist(), _colour(stage, number))
            )
    return curves


def _term_panel(stage: Stage) -> Panel | None:
    records = stage.lines("train")
    names = [n for n in (records[-1] if records else {}) if n not in NOT_TERMS]
    if not names:
        return None
    curves = plots.term_curves(records, names, _steps_per_epoch(stage, records[-1]))
    phases = stage.config.get("optim", {}).get("phases", [])
    breaks = np.cumsum([phase["epochs"] for phase in phases])[:-1].tolist()
    positive = all(value > 0 or np.isnan(value) for curve in curves for value in curve.y)
    return Panel(stage.name, "epoch", "", curves, breaks=breaks, log_y=positive)


def _steps_per_epoch(stage: Stage, record: Mapping[str, Any]) -> float:
    return record["step"] / max(1, epochs_done(stage, record))


def _faces(stages: Sequence[Stage]) -> str:
    """Sample pictures of every run; neighbours of all but teacher and distilled are folded."""
    landmarks = [_landmark_strip(stage) for stage in stages if "true" in stage.samples]
    if landmarks:
        return (
            "<h3>Landmarks: ring true, dot predicted, NRMSE below</h3>"
            f"<p class=note>Evenly spaced test pictures, not chosen.</p>{''.join(landmarks)}"
        )
    asked = [stage for stage in stages if "queries" in stage.samples]
    if not asked:
        return ""
    front = [stage for stage in asked if stage.role in ("teacher", "distilled")] or asked
    rest = [stage for stage in asked if stage not in front]
    folded = "".join(map(_neighbour_strip, rest))
    return (
        "<h3>Nearest neighbours: left the query, right the test picture nearest to it</h3>"
        "<p class=note>Evenly spaced test pictures that have another one of their person, not "
        f"chosen; looked up among {int(front[0].samples['gallery']):,} test pictures.</p>"
        + "".join(map(_neighbour_strip, front))
        + (f"<details><summary>The other runs</summary>{folded}</details>" if folded else "")
    )


def _landmark_strip(stage: Stage) -> str:
    columns = [stage.samples[name] for name in ("images", "true", "predicted", "errors")]
    cells = [
        f"<figure>{plots.marked_face(picture, true, predicted)}"
        f"<figcaption>{100 * float(error):.1f} %</figcaption></figure>"
        for picture, true, predicted, error in zip(*columns, strict=True)
    ]
    return _strip(stage.name, cells, "faces")


def _neighbour_strip(stage: Stage) -> str:
    samples = stage.samples
    right = samples["query_labels"] == samples["neighbour_labels"]
    pairs = zip(samples["queries"], samples["neighbours"], right.tolist(), strict=True)
    title = f"{stage.name}: {int(right.sum())} of {len(right)} right"
    return _strip(title, [_pair(*pair) for pair in pairs], "pairs")


def _strip(title: str, cells: Sequence[str], kind: str) -> str:
    return f"<h4>{escape(title)}</h4><div class='strip {kind}'>{''.join(cells)}</div>"


def _pair(query: np.ndarray, neighbour: np.ndarray, right: bool) -> str:
    state, mark = (
        ("right", "\N{CHECK MARK} same") if right else ("wrong", "\N{MULTIPLICATION SIGN} other")
    )
    return (
        f"<figure class='{state}'><div><img src='{plots.face(query)}' alt='query'>"
        f"<img src='{plots.face(neighbour)}' alt='nearest, {state}'></div>"
        f"<figcaption>{mark}</figcaption></figure>"
    )


def _all_metrics(stages: Sequence[Stage]) -> str:
    done = [stage for stage in stages if stage.results]
    names = list(dict.fromkeys(name for stage in done for name in stage.results["metrics"]))
    if not names:
        return ""
    head = "".join(f"<th>{escape(stage.name)}</th>" for stage in done)
    head += "<th>floor</th><th>untrained</th>"
    lines = []
    for name in names:
        values = [stage.metric(name) for stage in done]
        values += [of(done, done[0].task, name) for of in (floor_of, untrained_of)]
        cells = "".join(f"<td>{shown(name, value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<details><summary>Every metric</summary><div class='scroll'>{table}</div></details>"


def _figure(drawn: Sequence[Panel], columns: int, text: str) -> str:
    source = plots.panels(drawn, columns)
    return f"<img class=plot src='{source}' alt='{escape(text)}'>"


def _colour(stage: Stage, number: int) -> str:
    return plots.ROLE_COLOURS.get(
        stage.role, plots.OTHER_COLOURS[number % len(plots.OTHER_COLOURS)]
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>
"""

STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --good: #059669; --bad: #dc2626; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 14px; }
h2 { font-size: 19px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 24px 0 4px; }
h4 { font-size: 13px; margin: 12px 0 6px; color: var(--soft); font-weight: 600; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 22px; margin: 18px 0; }
dl { display: grid; grid-template-columns: 90px 1fr; gap: 2px 14px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom;
  border-bottom: 2px solid var(--line); }
small { display: block; color: var(--soft); font-weight: 400; font-size: 12px; }
.results table { width: 100%; }
.results td { font-size: 17px; }
.results td.none { color: var(--soft); font-size: 13px; }
.results td.poor, .results td.poor small { color: var(--bad); }
.results .floor th, .results .floor td { color: var(--soft); border-bottom: 0; }
.runs th, .runs td { text-align: left; white-space: nowrap; }
.runs td:nth-child(3) { white-space: normal; min-width: 220px; }
.scroll { overflow-x: auto; }
.scroll table { font-size: 13px; min-width: 100%; }
.note { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
h3 + .note { margin: 0 0 8px; }
.plot { display: block; width: 100%; height: auto; margin: 6px 0; }
.strip { display: grid; gap: 8px; }
.faces { grid-template-columns: repeat(12, 1fr); }
.pairs { grid-template-columns: repeat(6, 1fr); }
figure { margin: 0; }
figcaption { font-size: 12px; color: var(--soft); text-align: center; }
.faces svg { display: block; width: 100%; border-radius: 4px; }
.pairs figure > div { display: flex; gap: 2px; border: 3px solid; border-radius: 5px; }
.pairs img { width: calc(50% - 1px); display: block; }
.pairs .right > div { border-color: var(--good); background: var(--good); }
.right figcaption { color: var(--good); }
.pairs .wrong > div { border-color: var(--bad); background: var(--bad); }
.wrong figcaption { color: var(--bad); }
details { margin-top: 18px; font-size: 14px; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 760px) { .faces { grid-template-columns: repeat(6, 1fr); }
  .pairs { grid-template-columns: repeat(3, 1fr); } }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
