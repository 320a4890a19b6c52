"""Run folders of a reproduction read into the tables' cells, floors and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdtrain.experiments import verdicts
from kdtrain.experiments.campaign import Campaign, Run
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.tables.paper import FULL, SOURCE, At, BlockSpec, Claim, TableSpec
from kdtrain.experiments.tables.stages import Request, RunOf, run_of
from kdtrain.objectives.tasks import TASKS
from kdtrain.reports.tables.data import Block, Cell, CellState, Row, Table, Trend, Verdict
from kdtrain.training.checkpoint import read_arrays, read_json
from kdtrain.training.journal.journal import duration

LOWER_IS_BETTER = frozenset(name for name, sign in (t.metric for t in TASKS.values()) if sign < 0)
NEUTRAL_POINTS = 2.0  # "about neutral": no difference larger than this

State = Literal["done", "not run", "unfinished", "diverged", "failed"]


@dataclass(frozen=True)
class Result:
    """One run folder, as far as it got."""

    folder: Path
    state: State = "not run"
    note: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, key: str, failure: str = "") -> Result:
        """What is in a run folder under this key; failure: why it failed now, if it did."""
        results = read_json(folder / "results.json")
        if results is not None and results.get("key") == key:
            return cls(folder, "done", "", results)
        diverged = read_json(folder / "diverged.json")
        if diverged is not None and diverged.get("key") == key:
            return cls(folder, "diverged", diverged.get("message", ""))
        if failure:
            return cls(folder, "failed", failure)
        begun = read_json(folder / "run.json")
        if begun is not None and begun.get("key") == key:
            return cls(folder, "unfinished")
        return cls(folder)

    def metric(self, name: str, phase: int) -> float | None:
        """A test metric at the end of a phase, as a fraction."""
        phases = self.results.get("phases", [])
        if not phases:
            return None
        found = phases[phase]
        return found.get("test", found["metrics"]).get(name)

    def items(self, name: str, phase: int) -> np.ndarray | None:
        """The same for every test picture."""
        if self.state != "done":
            return None
        place = phase % len(self.results["phases"])
        return read_arrays(self.folder / "items" / f"phase{place}.npz").get(name)


def read_all(
    campaign: Campaign[Run], root: Path, outcomes: Mapping[str, Outcome]
) -> dict[Run, Result]:
    """What every run folder of a campaign holds after its training."""
    found = {}
    for run, stage in campaign.stages.items():
        outcome = outcomes.get(stage.name)
        failure = outcome.note if outcome is not None and outcome.state == "failed" else ""
        found[run] = Result.read(root / stage.name, campaign.keys[stage.name], failure)
    return found


def cell_of(
    found: Sequence[Result], metric: str, phase: int = -1, paper: float | None = None
) -> Cell:
    """The mean and spread in percent of one run a seed, or why there is none: the worst of them."""
    values = [r.metric(metric, phase) if r.state == "done" else None for r in found]
    percent = [None if v is None else 100 * v for v in values]
    if any(v is not None for v in percent):
        missing = [r.state for r, v in zip(found, percent, strict=True) if v is None]
        return Cell.of(percent, paper=paper, note=", ".join(sorted(set(missing))))
    state: CellState = "not run"
    for wanted in ("unfinished", "failed", "diverged"):
        if any(r.state == wanted for r in found):
            state = wanted
    note = next((r.note for r in found if r.note), "")
    if all(r.state == "done" for r in found):
        state, note = "not measured", "these pictures have not what it needs"
    return Cell(paper=paper, state=state, note=note, per_seed=tuple(percent))


def mean_floor(found: Iterable[Result], kind: str, metric: str) -> float | None:
    """The mean of a metric's floor over the finished runs, in percent; None without any. kind:
    floors or untrained.
    """
    values = [r.results.get(kind, {}).get(metric) for r in found if r.state == "done"]
    known = [v for v in values if v is not None]
    return 100 * float(np.mean(known)) if known else None


def floor_rows(values: Iterable[tuple[str, Sequence[float | None]]]) -> list[Row]:
    """The rows, by name, that have any floor."""
    return [
        Row(
            name,
            "floor",
            tuple(Cell(state="none") if v is None else Cell(v, state="done") for v in row),
        )
        for name, row in values
        if any(v is not None for v in row)
    ]


def about(found: Iterable[Result], jobs: int) -> list[tuple[str, str]]:
    """Pictures, machine and training time of the finished runs, as lines below a table."""
    lines = []
    done = [result for result in found if result.state == "done"]
    for data in {tuple(r.results["data"].items()): r.results["data"] for r in done}.values():
        text = f"{data['name']}: {data['images']:,} pictures of {data['classes']:,} people"
        lines.append(("data", f"{text}, {data['train']:,} to train and {data['test']:,} to test"))
    if done:
        known = dict(done[0].results["environment"])
        lines.append(("machine", ", ".join(f"{k} {v}" for k, v in known.items())))
        total = sum(r.results["seconds"] for r in done)
        lines.append(("training", f"{duration(total)} of all runs together, {jobs} jobs"))
    return lines


@dataclass(frozen=True)
class Collection:
    """Every run that the tables speak of, by what it is."""

    request: Request
    results: Mapping[RunOf, Result]

    def of(self, at: At, second: bool) -> list[Result]:
        """The runs behind a cell, one a seed."""
        runs = [run_of(at, seed, second, self.request) for seed in self.request.seeds]
        if at.width == FULL:
            runs = list(dict.fromkeys(runs))  # a shared teacher is one run
        return [self.results.get(run, Result(Path())) for run in runs]

    def cell(self, at: At | None, metric: str, second: bool) -> Cell:
        """A cell's mean and spread in percent, or why it has none: the worst of its seeds."""
        if at is None:
            return Cell(state="none")
        return cell_of(self.of(at, second), metric, at.phase, at.paper)

    def trend(self, claim: Claim) -> Trend:
        """The claim's fate over the seeds that both arms have, of the pairs that are there."""
        arms: list[tuple[list[Any], list[Any]]] = []
        kept: list[tuple[At, At]] = []
        diverged = False
        for pair in zip(claim.better, claim.worse, strict=True):
            found = [self.of(at, claim.second) for at in pair]
            diverged |= any(r.state == "diverged" for arm in found for r in arm)
            ours, theirs = (
                [r.items(claim.metric, at.phase) for r in arm]
                for at, arm in zip(pair, found, strict=True)
            )
            if any(a is not None and b is not None for a, b in zip(ours, theirs, strict=True)):
                arms.append((ours, theirs))
                kept.append(pair)
        notes = ["about neutral: within 2 points"] if claim.neutral else []
        if kept and len(kept) < len(claim.better):
            notes.append(f"over {len(kept)} of {len(claim.better)} pairs")
        if diverged:
            notes.append("an arm diverged" if not kept else "seeds that diverged are left out")
        verdict = self._verdict(claim, arms) if arms else Verdict("not run")
        if not arms and diverged:
            verdict = Verdict("diverged")
        paper = _paper_difference(kept or list(zip(claim.better, claim.worse, strict=True)), claim)
        digits = _digits(claim.metric)
        return Trend(claim.code, claim.text, verdict, paper, "; ".join(notes), digits)

    def _verdict(self, claim: Claim, arms: Sequence[tuple[list[Any], list[Any]]]) -> Verdict:
        better, worse = (verdicts.pooled([arm[i] for arm in arms]) for i in (0, 1))
        higher = claim.metric not in LOWER_IS_BETTER
        if claim.neutral:
            return verdicts.neutral(better, worse, margin_points=NEUTRAL_POINTS)
        return verdicts.compare(better, worse, higher_is_better=higher)


def table(spec: TableSpec, collection: Collection, setting: Sequence[tuple[str, str]]) -> Table:
    """A table of the paper with the numbers that are there."""
    blocks = tuple(_block(block, collection) for block in spec.blocks)
    trends = tuple(collection.trend(claim) for claim in spec.claims)
    notes = [note for block in blocks for note in _uninformative(block)]
    return Table(
        spec.name, spec.title, f"{SOURCE}, table {spec.name.removeprefix('table')}", blocks,
        trends, tuple(dict.fromkeys(notes)), tuple(setting),
    )  # fmt: skip


def _block(spec: BlockSpec, collection: Collection) -> Block:
    rows = [
        Row(
            line.name,
            line.kind,
            tuple(collection.cell(at, spec.metric, spec.second) for at in line.places),
        )
        for line in spec.lines
    ]
    rows += _floors(spec, collection)
    return Block(
        spec.title,
        spec.columns,
        tuple(rows),
        spec.metric,
        spec.metric not in LOWER_IS_BETTER,
        digits=_digits(spec.metric),
    )


def _digits(metric: str) -> int:
    """Decimals of a percentage: errors of a few percent need two."""
    return 2 if metric == "nrmse" else 1


def _floors(spec: BlockSpec, collection: Collection) -> list[Row]:
    """What learns nothing, read off the block's own runs: raw pixels, and an untrained network,
    which is another one for each width.
    """
    columns = list(zip(*(line.places for line in spec.lines), strict=True))
    students = [[at for at in column if at is not None and at.width != FULL] for column in columns]
    every = [at for line in spec.lines for at in line.places if at is not None]
    one_width = len({at.width for column in students for at in column}) == 1
    if one_width:
        students = [[at for column in students for at in column]]
    raw = "mean shape" if spec.metric == "nrmse" else "raw pixels"
    rows = []
    for name, kind, groups in (
        (raw, "floors", [every]),
        ("untrained network", "untrained", students),
    ):
        values = []
        for group in groups:
            found = {r.folder.name: r for at in group for r in collection.of(at, spec.second)}
            values.append(mean_floor(found.values(), kind, spec.metric))
        rows.append((name, values + [None] * (len(columns) - len(values))))
    return floor_rows(rows)


def _uninformative(block: Block) -> list[str]:
    """The label of a block whose teacher does not beat the floor that learns nothing."""
    teacher = [row.cells[0].value for row in block.rows if row.kind == "teacher"]
    floors = [row.cells[0].value for row in block.rows if row.kind == "floor"]
    sign = 1 if block.higher_is_better else -1
    return [
        f"uninformative: {block.title}: the teacher ({a:.1f}) does not beat the floor ({b:.1f})"
        for a in teacher
        for b in floors[:1]
        if a is not None and b is not None and sign * (a - b) <= 0
    ]


def _paper_difference(pairs: Sequence[tuple[At, At]], claim: Claim) -> float | None:
    """What these pairs of cells differ by in the paper, in points."""
    sign = -1 if claim.metric in LOWER_IS_BETTER else 1
    found = []
    for better, worse in pairs:
        if better.paper is None or worse.paper is None:
            return None
        found.append(sign * (better.paper - worse.paper))
    return float(np.mean(found))
