"""Run directories of a study read into its table: cells, floors, costs and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdtrain.experiments import cost
from kdtrain.experiments.campaign import Campaign
from kdtrain.experiments.cost import Length, Quartiles, Size, Speeds
from kdtrain.experiments.pipeline import Stage, stage_state
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.study import (
    ITEMS,
    METRICS,
    At,
    BlockSpec,
    Claim,
    Line,
    Run,
    Study,
    pixels,
    where,
)
from kdtrain.objectives.tasks import TASKS
from kdtrain.reports.tables import verdicts
from kdtrain.reports.tables.data import Block, Cell, CellState, Row, Table, Trend, Verdict
from kdtrain.reports.writing import count, lower_is_better
from kdtrain.training.checkpoint import read_arrays, read_json
from kdtrain.training.journal.journal import duration

State = Literal["done", "not run", "unfinished", "diverged", "failed"]
STATES: Mapping[str, State] = {"reused": "done", "diverged": "diverged", "resume": "unfinished"}
"""By the value of pipeline.stage_state after the training."""
NOT_THERE = Cell(state="none")
HEADLINE = ("top1", "nn_top1", "nn_top1_other_video", "pair_accuracy", "tar_at_far_0.001_all")
"""Those that stand side by side for every resolution."""
COSTS = (
    *("network", "backbone", "head, dropped", "multiply-adds", "images/s, 1"),
    *("images/s, 64", "speed-up, 1", "speed-up, 64", "epochs", "images", "start epochs"),
)


@dataclass(frozen=True)
class Result:
    """One run directory, as far as it got."""

    folder: Path
    state: State = "not run"
    note: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, key: str, failure: str = "") -> Result:
        """The contents of a run directory under this key; failure: why it failed now, if it did."""
        state = STATES.get(stage_state(folder, key), "not run")
        if state == "done":
            return cls(folder, state, results=read_json(folder / "results.json") or {})
        if state == "diverged":
            record = read_json(folder / "diverged.json") or {}
            return cls(folder, state, record.get("message", ""))
        return cls(folder, "failed", failure) if failure else cls(folder, state)

    def metric(self, name: str, phase: int = -1, split: str = "test") -> float | None:
        """A metric at the end of a phase, as a fraction; on the validation split of the run."""
        if split == "validation":
            return (self.results.get("validation") or {}).get(name)
        if not self.results.get("phases"):
            return None
        found = self.results["phases"][phase]
        return found.get("test", found["metrics"]).get(name)

    def items(self, name: str, phase: int = -1, split: str = "test") -> np.ndarray | None:
        """The same metric per image, or None where it was not measured."""
        if self.state != "done":
            return None
        stem = "phase" if split == "test" else "validation_phase"
        if split == "test":
            place = phase % len(self.results["phases"])
        else:  # the last phase that was begun: an early stop leaves none of those after it
            files = (self.folder / "items").glob(f"{stem}*.npz")
            place = max((int(f.stem.removeprefix(stem)) for f in files), default=0)
        return read_arrays(self.folder / "items" / f"{stem}{place}.npz").get(name)


def read_all(campaign: Campaign, outcomes: Mapping[str, Outcome]) -> dict[Run, Result]:
    """The contents of every run directory of a campaign after its training."""
    root, keys = campaign.order.root, campaign.keys
    failures = {name: one.note for name, one in outcomes.items() if one.state == "failed"}
    return {
        run: Result.read(root / stage.name, keys[stage.name], failures.get(stage.name, ""))
        for run, stage in campaign.stages.items()
    }


def about(found: Iterable[Result], jobs: int) -> list[tuple[str, str]]:
    """Images, machine and training time of the finished runs, as lines below a table."""
    lines = []
    done = [result for result in found if result.state == "done"]
    for data in {str(r.results["data"]): r.results["data"] for r in done}.values():
        text = f"{data['name']}: {data['images']:,} images of {data['classes']:,} identities"
        lines.append(("data", f"{text}, {data['train']:,} to train and {data['test']:,} to test"))
    if done:
        known = done[0].results["environment"]
        lines.append(("machine", ", ".join(f"{k} {v}" for k, v in known.items())))
        total = sum(r.results["seconds"] for r in done)
        lines.append(("training", f"{duration(total)} of all runs together, {jobs} jobs"))
    return lines


@dataclass(frozen=True)
class Collection:
    """The results and costs from which the table and figure of a study are made."""

    study: Study
    results: Mapping[Run, Result]
    stages: Mapping[Run, Stage] = field(default_factory=dict)
    lengths: Mapping[Run, Length] = field(default_factory=dict)
    """Of the first seed."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    speeds: Mapping[str, Speeds] = field(default_factory=dict)
    """By network_key."""

    def of(self, at: At, second: bool) -> list[Result]:
        """The results behind a place, one per seed; a shared teacher is one run."""
        return [self.results.get(run, Result(Path())) for run in self.study.of(at, second)]

    def network(self, at: At, second: bool) -> str:
        """The key of an arm's network."""
        return cost.network_key(self.stages[self.study.of(at, second)[0]].config)

    def cell(self, at: At | None, metric: str, second: bool) -> Cell:
        """The mean and spread in percent over the seeds, or the worst state of their runs."""
        if at is None:
            return NOT_THERE
        found = self.of(at, second)
        values = [result.metric(metric, at.phase, self.study.split) for result in found]
        percent = [None if v is None else 100 * v for v in values]
        states = {r.state for r in found}
        if any(v is not None for v in percent):
            missing = {r.state for r, v in zip(found, percent, strict=True) if v is None}
            return Cell.of(percent, paper=at.paper, note=", ".join(sorted(missing)))
        state: CellState = "not run"
        for worse in ("unfinished", "failed", "diverged"):
            state = worse if worse in states else state
        note = next((r.note for r in found if r.note), "")
        if states <= {"done"}:
            state, note = "not measured", "these images lack what the metric needs"
        return Cell(paper=at.paper, state=state, note=note, per_seed=tuple(percent))

    def metrics(self, second: bool) -> list[str]:
        """The study's metrics; without them those that a finished run of a data source has, and
        without any the metric of the first arm's task.
        """
        if self.study.metrics:
            return list(self.study.metrics)
        found = [r for run, r in self.results.items() if run.second == second]
        split = self.study.split
        measured = [m for m in METRICS if any(r.metric(m, -1, split) is not None for r in found)]
        first = self.study.of(At(self.study.rows[0]), second)[0]
        return measured or [TASKS[self.stages[first].config.task].metric[0]]

    def floor(self, places: Iterable[At], kind: str, metric: str, second: bool) -> float | None:
        """The mean floor (kind: floors or untrained) of finished runs, in percent, if any."""
        runs = dict.fromkeys(run for at in places for run in self.study.of(at, second))
        done = (self.results[run].results for run in runs if run in self.results)
        known = [v for one in done if (v := one.get(kind, {}).get(metric)) is not None]
        return 100 * float(np.mean(known)) if known else None

    def trend(self, claim: Claim, metric: str, side: int | None = None) -> Trend:
        """The verdict on a claim, over the seeds that both arms have and the trained pairs.
        side: the resolution of the arms.
        """
        ours, theirs = ([replace(a, side=side) for a in arm] for arm in (claim.better, claim.worse))
        if claim.kind == "worse":
            ours, theirs = theirs, ours
        pairs = list(zip(ours, theirs, strict=True))
        found = {at: self.of(at, claim.second) for at in (*ours, *theirs)}
        diverged = any(r.state == "diverged" for results in found.values() for r in results)
        split = self.study.split
        items = {at: [r.items(metric, at.phase, split) for r in rs] for at, rs in found.items()}
        kept = [
            (a, b)
            for a, b in pairs
            if any(x is not None and y is not None for x, y in zip(items[a], items[b], strict=True))
        ]
        higher = not lower_is_better(metric)
        rule: Callable[..., Verdict] = {
            "neutral": verdicts.neutral,
            "at_least": partial(verdicts.at_least, higher_is_better=higher),
        }.get(claim.kind, partial(verdicts.compare, higher_is_better=higher))
        verdict = Verdict("diverged" if diverged else "not run")
        if kept:
            arms = zip(*kept, strict=True)
            verdict = rule(*(verdicts.pooled([items[at] for at in arm]) for arm in arms))
        margin = f"{verdicts.MARGIN_POINTS:g} points"
        notes = [f"about neutral: within {margin}"] if claim.kind == "neutral" else []
        if kept and claim.kind == "at_least":
            notes.append(f"held: worse by less than {margin}")
        if kept and len(kept) < len(pairs):
            notes.append(f"over {len(kept)} of {len(pairs)} pairs")
        if diverged:
            notes.append("an arm diverged" if not kept else "seeds that diverged are left out")
        counted = kept or pairs
        known = [
            (1 if higher else -1) * (a.paper - b.paper)
            for a, b in counted
            if a.paper is not None and b.paper is not None
        ]
        paper = float(np.mean(known)) if len(known) == len(counted) else None
        return Trend(claim.code, claim.text, verdict, paper, "; ".join(notes), _digits(metric))


def table(collection: Collection, setting: Sequence[tuple[str, str]]) -> Table:
    """The table of a study; cells without a number state why."""
    study = collection.study
    blocks = [_block(spec, collection) for spec in study.blocks]
    trends: list[Trend] = []
    lengths: list[str] = []
    for claim in study.claims if study.blocks else ():
        trends.append(collection.trend(claim, claim.metric or study.blocks[0].metric))
    for second in () if study.blocks else study.sources:
        metrics = collection.metrics(second)
        judged = [metric for metric in ITEMS if metric in metrics]
        sides = list(study.resolutions) or [None]
        if len(sides) > 1:
            cells = [(side, m) for side in sides for m in metrics if m in HEADLINE]
            title = f"resolutions side by side{where(second)}"
            blocks += _arms(collection, title, cells, second)
        for side in sides:
            title = f"{pixels(side)}{where(second)}"
            for word, lower in (("accuracy", False), ("error", True)):
                cells = [(side, m) for m in metrics if lower_is_better(m) == lower]
                blocks += _arms(collection, f"{word}{title}", cells, second)
            if study.costs:
                blocks.append(_cost(collection, side, second))
            for claim in study.claims:
                for metric in [claim.metric] if claim.metric else judged:
                    text = f"{claim.text}, {METRICS.get(metric, metric)}{title}"
                    found = replace(claim, text=text, second=second)
                    trends.append(collection.trend(found, metric, side))
        runs = {
            a: study.run_of(At(a, side=sides[0]), study.seeds[0], second) for a in study.students
        }
        own = {a: collection.lengths[run] for a, run in runs.items() if run in collection.lengths}
        lengths += [f"{arm}: {note}" for arm, note in cost.other_lengths(own).items()]
    notes = [*(note for block in blocks for note in _uninformative(block)), *lengths]
    return Table(
        study.name, study.title, study.source or f"kdtrain study, {study.name}", tuple(blocks),
        tuple(trends), tuple(dict.fromkeys(notes)), tuple(setting),
    )  # fmt: skip


def _arms(
    collection: Collection, title: str, cells: Sequence[tuple[int | None, str]], second: bool
) -> list[Block]:
    """A block with a row per arm and these metrics at these resolutions; none without metrics."""
    if not cells:
        return []
    study, several = collection.study, len({side for side, _ in cells}) > 1
    lines = [
        Line(arm, study.kind(arm), tuple(At(arm, side=side) for side, _ in cells))
        for arm in study.rows
    ]
    sides = [f"{side} pixels: " if several else "" for side, _ in cells]
    metrics = tuple(metric for _, metric in cells)
    columns = tuple(f"{s}{METRICS.get(m, m)}" for s, m in zip(sides, metrics, strict=True))
    split = f"{study.split} split"
    return [_block(BlockSpec(title, columns, split, tuple(lines), second, metrics), collection)]


def _block(spec: BlockSpec, collection: Collection) -> Block:
    """A row per line, and below it the floors: raw pixels and an untrained network."""
    metrics = spec.metrics or (spec.metric,) * len(spec.columns)
    rows = []
    for line in spec.lines:
        cells = [
            collection.cell(at, metric, spec.second)
            for at, metric in zip(line.places, metrics, strict=True)
        ]
        if spec.metrics:  # asymmetric evaluation is some recipes' alone
            cells = [NOT_THERE if cell.state == "not measured" else cell for cell in cells]
        rows.append(Row(line.name, line.kind, tuple(cells)))
    numbers = range(len(spec.columns))
    taught = [line.places for line in spec.lines if line.kind != "teacher"]
    students = [[at for places in taught if (at := places[k])] for k in numbers]
    raw = students
    if not spec.metrics:  # one metric: one floor
        raw = [[at for k in numbers for line in spec.lines if (at := line.places[k])]]
        joined = [at for column in students for at in column]
        students = [joined] if len({at.width for at in joined}) == 1 else students
    name = "mean shape" if metrics[0] == "nrmse" else "raw pixels"
    for title, kind, places in (
        (name, "floors", raw),
        ("untrained network", "untrained", students),
    ):
        values = [
            collection.floor(column, kind, metric, spec.second)
            for column, metric in zip(places, metrics, strict=False)
        ]
        if any(value is not None for value in values):
            cells = [NOT_THERE if v is None else Cell(v, state="done") for v in values]
            cells += [NOT_THERE] * (len(numbers) - len(cells))
            rows.append(Row(title, "floor", tuple(cells)))
    higher, digits = not lower_is_better(metrics[0]), _digits(metrics[0])
    return Block(spec.title, spec.columns, tuple(rows), spec.metric, higher, digits=digits)


def _digits(metric: str) -> int:
    """Decimals of a percentage: errors of a few percent need two."""
    return 2 if metric == "nrmse" else 1


def _uninformative(block: Block) -> list[str]:
    """A note for each column in which no teacher beats the floor that learns nothing."""
    floors = [row.cells for row in block.rows if row.kind == "floor"][:1]
    teachers = [row.cells for row in block.rows if row.kind == "teacher"]
    sign = 1 if block.higher_is_better else -1
    notes = []
    for low, column, *cells in (
        zip(*floors, block.columns, *teachers, strict=True) if floors else ()
    ):
        known = [sign * cell.value for cell in cells if cell.value is not None]
        if low.value is not None and known and max(known) <= sign * low.value:
            column = f", {column}" if block.metric.endswith(" split") else ""
            notes.append(
                f"uninformative: {block.title}{column}: the teacher ({sign * max(known):.1f}) does "
                f"not beat the floor ({low.value:.1f})"
            )
    return notes


def _cost(collection: Collection, side: int | None, second: bool) -> Block:
    """The cost of each arm: network, speed, training."""
    study = collection.study

    def speeds_of(arm: str) -> Speeds:
        return collection.speeds.get(collection.network(At(arm, side=side), second), {})

    base = speeds_of(study.teachers[0]) if study.teachers else {}
    rows = []
    for arm in study.rows:
        at, speed = At(arm, side=side), speeds_of(arm)
        size = collection.sizes.get(collection.network(at, second))
        length = collection.lengths.get(study.run_of(at, study.seeds[0], second))
        cells = [NOT_THERE] * 4
        if size is not None:
            cells = [
                _shown(size.side, lambda side, name=size.name: f"{name}, {side} px"),
                _shown(size.backbone, count),
                _shown(_head(collection.of(at, second), size), count),
                _shown(size.multiply_adds, count),
            ]
        cells += [_speed(speed.get(batch)) for batch in cost.BATCHES]
        cells += [_speed_up(speed.get(batch), base.get(batch)) for batch in cost.BATCHES]
        needs = ""
        if length is None:
            cells += [NOT_THERE] * 3
        else:
            cells += [_shown(length.epochs), _shown(length.images, count)]
            cells.append(_shown(length.start_epochs))
            needs = f"needs {', '.join(length.needs)}" if length.needs else ""
        rows.append(Row(arm, study.kind(arm), tuple(cells), needs))
    title = f"cost{pixels(side)}{where(second)}"
    return Block(title, COSTS, tuple(rows), "cost", unit="", digits=0)


def _head(found: Sequence[Result], size: Size) -> int | None:
    """Parameters of an arm's heads: networks of one backbone may have different ones."""
    known = next((r.results["parameters"] for r in found if r.state == "done"), {})
    total = known.get("student", known.get("network"))
    return None if total is None else total - size.backbone


def _shown(value: float | None, form: Callable[[float], str] = str) -> Cell:
    """A cell with a number that is no percentage."""
    return NOT_THERE if value is None else Cell(float(value), state="done", shown=form(value))


def _speed(one: Quartiles | None) -> Cell:
    if one is None:
        return NOT_THERE
    quartiles = f"[{per_second(one.low)}, {per_second(one.high)}]"
    return Cell(one.median, state="done", shown=per_second(one.median), note=quartiles)


def _speed_up(one: Quartiles | None, base: Quartiles | None) -> Cell:
    """The ratio of the medians; no number where the quartiles overlap, but that of the base."""
    if one is None or base is None:
        return NOT_THERE
    if one is not base and one.low <= base.high and base.low <= one.high:
        return Cell(state="no difference")
    ratio = one.median / base.median
    return _shown(ratio, lambda _: f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x")


def per_second(value: float) -> str:
    """'1,234', '12.3'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def curves(collection: Collection, at: At, second: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """An arm's TAR over FAR: the rates (n,) and a row per seed (S, n); None where there is none."""
    found = []
    for result in collection.of(at, second):
        arrays = read_arrays(result.folder / "samples.npz") if result.state == "done" else {}
        if "all_far" in arrays:
            found.append((arrays["all_far"], arrays["all_tar"]))
    if not found:
        return None
    far = found[0][0]  # of the labels alone, so the same for every seed
    return far, np.stack([tar for rates, tar in found if np.array_equal(rates, far)])
