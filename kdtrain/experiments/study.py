"""What the commands of many runs share: run folders read into cells, floors and verdicts, and how
data sources and sizes are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdtrain.experiments.campaign import Campaign, Run
from kdtrain.experiments.pipeline import stage_state
from kdtrain.experiments.scheduler import Outcome
from kdtrain.reports.tables import verdicts
from kdtrain.reports.tables.data import Cell, CellState, Row, Verdict
from kdtrain.training.checkpoint import read_arrays, read_json
from kdtrain.training.journal.journal import duration

State = Literal["done", "not run", "unfinished", "diverged", "failed"]
STATES: Mapping[str, State] = {"reused": "done", "diverged": "diverged", "resume": "unfinished"}
"""Of what pipeline.stage_state says of a run folder after the training."""
NOT_THERE = Cell(state="none")
Rule = Callable[[verdicts.Scores, verdicts.Scores], Verdict]


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
        state = STATES.get(stage_state(folder, key), "not run")
        if state == "done":
            return cls(folder, state, "", read_json(folder / "results.json") or {})
        if state == "diverged":
            record = read_json(folder / "diverged.json") or {}
            return cls(folder, state, record.get("message", ""))
        return cls(folder, "failed", failure) if failure else cls(folder, state)

    def metric(self, name: str, phase: int = -1) -> float | None:
        """A test metric at the end of a phase, as a fraction."""
        phases = self.results.get("phases", [])
        if not phases:
            return None
        found = phases[phase]
        return found.get("test", found["metrics"]).get(name)

    def items(self, name: str, phase: int = -1) -> np.ndarray | None:
        """The same for every test image."""
        if self.state != "done":
            return None
        place = phase % len(self.results["phases"])
        return read_arrays(self.folder / "items" / f"phase{place}.npz").get(name)


def read_all(campaign: Campaign[Run], outcomes: Mapping[str, Outcome]) -> dict[Run, Result]:
    """What every run folder of a campaign holds after its training."""
    failures = {name: one.note for name, one in outcomes.items() if one.state == "failed"}
    return {
        run: Result.read(
            campaign.order.root / stage.name,
            campaign.keys[stage.name],
            failures.get(stage.name, ""),
        )
        for run, stage in campaign.stages.items()
    }


def cell_of(
    found: Sequence[Result], metric: str, phase: int = -1, paper: float | None = None
) -> Cell:
    """The mean and spread in percent of one run a seed, or why there is none: the worst of them."""
    values = [r.metric(metric, phase) if r.state == "done" else None for r in found]
    percent = [None if v is None else 100 * v for v in values]
    if any(v is not None for v in percent):
        missing = {r.state for r, v in zip(found, percent, strict=True) if v is None}
        return Cell.of(percent, paper=paper, note=", ".join(sorted(missing)))
    states = {r.state for r in found}
    worst: tuple[CellState, ...] = ("diverged", "failed", "unfinished")
    state: CellState = "not run"
    for wanted in reversed(worst):
        state = wanted if wanted in states else state
    note = next((r.note for r in found if r.note), "")
    if states <= {"done"}:
        state, note = "not measured", "these images have not what it needs"
    return Cell(paper=paper, state=state, note=note, per_seed=tuple(percent))


def mean_floor(found: Iterable[Result], kind: str, metric: str) -> float | None:
    """The mean floor (kind: floors or untrained) of finished runs, in percent, if any."""
    values = [r.results.get(kind, {}).get(metric) for r in found if r.state == "done"]
    known = [v for v in values if v is not None]
    return 100 * float(np.mean(known)) if known else None


def floor_rows(values: Iterable[tuple[str, Sequence[float | None]]]) -> list[Row]:
    """The rows, by name, that have any floor."""
    return [
        Row(name, "floor", tuple(NOT_THERE if v is None else Cell(v, state="done") for v in row))
        for name, row in values
        if any(v is not None for v in row)
    ]


def judged(
    pairs: Sequence[Sequence[tuple[Sequence[Result], int]]], metric: str, rule: Rule
) -> tuple[Verdict, list[int], bool]:
    """The verdict on pairs of arms over the seeds that both have, which pairs are there, and
    whether a run diverged.

    pairs: of each arm its runs, one a seed, and the phase that counts. Of several pairs the mean
    counts. rule: of verdicts.py.
    """
    diverged = any(r.state == "diverged" for pair in pairs for found, _ in pair for r in found)
    arms = [[[r.items(metric, phase) for r in found] for found, phase in pair] for pair in pairs]
    kept = [
        place
        for place, (ours, theirs) in enumerate(arms)
        if any(a is not None and b is not None for a, b in zip(ours, theirs, strict=True))
    ]
    if not kept:
        return Verdict("diverged" if diverged else "not run"), kept, diverged
    better, worse = (verdicts.pooled([arms[place][side] for place in kept]) for side in (0, 1))
    return rule(better, worse), kept, diverged


def about(found: Iterable[Result], jobs: int) -> list[tuple[str, str]]:
    """Images, machine and training time of the finished runs, as lines below a table."""
    lines = []
    done = [result for result in found if result.state == "done"]
    for data in {tuple(r.results["data"].items()): r.results["data"] for r in done}.values():
        text = f"{data['name']}: {data['images']:,} images of {data['classes']:,} identities"
        lines.append(("data", f"{text}, {data['train']:,} to train and {data['test']:,} to test"))
    if done:
        known = done[0].results["environment"]
        lines.append(("machine", ", ".join(f"{k} {v}" for k, v in known.items())))
        total = sum(r.results["seconds"] for r in done)
        lines.append(("training", f"{duration(total)} of all runs together, {jobs} jobs"))
    return lines


def where(second: bool) -> str:
    """Names the second data source, behind a title."""
    return ", second data source" if second else ""


def pixels(side: int | None) -> str:
    """Names a resolution, behind a title; nothing for the recipes' own."""
    return "" if side is None else f", {side} pixels"
