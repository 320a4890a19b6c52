"""Many runs for one question, within a budget: groups of runs, what they cost, and their training.

`reproduce` and `compare` say which runs belong together; here their cost is estimated from timed
steps, groups are taken in order while they fit, finished runs are reused and unfinished ones
continued.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from kdtrain.config import DataConfig
from kdtrain.config.program import INTERRUPTED
from kdtrain.data import FaceSource
from kdtrain.experiments import dryrun, pipeline
from kdtrain.experiments.estimate import estimate
from kdtrain.experiments.order import wall_time
from kdtrain.experiments.scheduler import Outcome, Overview
from kdtrain.training.journal.journal import duration

START_S = 4.0  # of a run's process: start, imports, pictures; counted beside the timed steps
MARKS = {
    "reused": ("■", "green"),
    "done": ("■", "green"),
    "running": ("▶", "yellow"),
    "waiting": ("·", "white"),
    "diverged": ("✗", "red"),
    "failed": ("✗", "red"),
    "skipped": ("-", "red"),
    "stopped": ("‖", "yellow"),
}
LEGEND = "■ done  ▶ running  · waiting  ✗ diverged or failed  - skipped  blank: not planned"


class OneRun(Hashable, Protocol):
    """What names a run of a campaign."""

    @property
    def name(self) -> str:
        """Its stage and folder."""
        ...

    @property
    def seed(self) -> int:
        """Its seed."""
        ...


Run = TypeVar("Run", bound=OneRun)


@dataclass(frozen=True)
class Group(Generic[Run]):
    """Runs that a budget takes or leaves together."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Campaign(Generic[Run]):
    """What is to be done: groups of runs with their states and seconds, and which are taken."""

    groups: tuple[Group[Run], ...]
    stages: Mapping[Run, pipeline.Stage]
    """Of every run that is shown."""
    keys: Mapping[str, str]
    states: Mapping[Run, str]
    """reused, resume, diverged, changed or new, as pipeline.stage_state says."""
    seconds: Mapping[str, float]
    """Estimated, of the runs that are not finished, while `jobs` run side by side."""
    taken: tuple[Group[Run], ...]
    clock_s: float
    """Estimated time of what is taken."""
    jobs: int


def make_campaign(
    groups: Sequence[Group[Run]],
    stages: Mapping[Run, pipeline.Stage],
    root: Path,
    *,
    jobs: int,
    budget_min: float | None,
    say: Callable[[str], None],
) -> Campaign[Run]:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget (minutes on the clock; None: all).

    stages: of the groups' runs and of whatever else is shown, inputs first.
    """
    sources: dict[DataConfig, FaceSource] = {}
    keys = pipeline.stage_keys(list(stages.values()), root, sources)
    states = {
        run: pipeline.stage_state(root / stage.name, keys[stage.name])
        for run, stage in stages.items()
    }
    ours = [run for group in groups for run in group.runs]
    open_runs = [run for run in ours if states[run] not in ("reused", "diverged")]
    say(f"{len(ours)} runs in all, {len(ours) - len(open_runs)} finished before; timing steps")
    seconds = seconds_of(open_runs, stages, max(1, pipeline.cores() // jobs), sources)
    by_name = {stage.name: run for run, stage in stages.items()}
    have = {run for run, state in states.items() if state == "reused"}
    taken: list[Group[Run]] = []
    clock = 0.0
    for group in groups:
        inputs = {by_name[name] for run in group.runs for name in stages[run].inputs}
        if not inputs <= have | set(group.runs):
            continue  # it starts from runs of a group that was left out
        needed = _clock([*taken, group], stages, seconds, jobs)
        if budget_min is None or needed <= 60 * budget_min:
            taken.append(group)
            have |= set(group.runs)
            clock = needed
    return Campaign(tuple(groups), stages, keys, states, seconds, tuple(taken), clock, jobs)


def _clock(
    chosen: Sequence[Group[Run]],
    stages: Mapping[Run, pipeline.Stage],
    seconds: Mapping[str, float],
    jobs: int,
) -> float:
    """Seconds on the clock until the open runs of these groups are done."""
    found = [stages[run] for group in chosen for run in group.runs]
    costs = {stage.name: seconds[stage.name] for stage in found if stage.name in seconds}
    inputs = {stage.name: stage.inputs for stage in found}
    return wall_time(costs, inputs, jobs) if costs else 0.0


def seconds_of(
    runs: Sequence[Run],
    stages: Mapping[Run, pipeline.Stage],
    threads: int,
    sources: dict[DataConfig, FaceSource],
) -> dict[str, float]:
    """Estimated seconds of each run; a teacher's answers cost once a seed, as they are kept."""
    counts: dict[object, dryrun.Counts] = {}
    configs = {stage.name: stage.config for stage in stages.values()}
    answered: set[tuple[str, int]] = set()
    found = {}
    for run in runs:
        config = stages[run].config
        seen = (config.data, config.task, config.balanced)
        if seen not in counts:
            counts[seen] = dryrun.counted(config, sources)
        name = config.teacher.run or ""
        planned = dryrun.planned(stages[run].name, config, Path(), configs)
        kept = config.teacher.cache != "none" and (name, run.seed) in answered
        answered.add((name, run.seed))
        found[stages[run].name] = (
            START_S
            + estimate(
                config,
                classes=counts[seen].classes,
                pictures=counts[seen].train,
                test_pictures=counts[seen].test,
                validation_pictures=counts[seen].validation,
                teacher=planned.teacher,
                more_teachers=planned.more_teachers,
                answers_kept=kept,
                threads=config.train.threads or threads,
                epoch_batches=counts[seen].epoch_batches,
            ).total_s
        )
    return found


def show_campaign(campaign: Campaign[Run], console: Console) -> None:
    """The groups in their order: runs, how many are finished, seconds of work, taken or not."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("group", "runs", "finished", "work", ""):
        grid.add_column(title, justify="left" if title in ("group", "") else "right")
    for group in campaign.groups:
        finished = sum(campaign.states[run] in ("reused", "diverged") for run in group.runs)
        work = sum(campaign.seconds.get(campaign.stages[run].name, 0.0) for run in group.runs)
        mark = "taken" if group in campaign.taken else "not run: over the budget, or its inputs are"
        mark = "finished" if finished == len(group.runs) else mark
        shown = duration(work) if work else ""
        grid.add_row(group.label, str(len(group.runs)), str(finished), shown, mark)
    console.print(grid)
    console.print(
        f"about {duration(campaign.clock_s)} on the clock with {campaign.jobs} jobs side by side "
        f"(from timed steps, with {START_S:g} s a run to start)"
    )


def carry_out(
    campaign: Campaign[Run], root: Path, overview: Overview | None = None
) -> tuple[int, dict[str, Outcome]]:
    """Train what was taken: status as pipeline.run has it, and how each run ended. What was
    finished before and is only shown counts among them.
    """
    runs = {run for group in campaign.taken for run in group.runs}
    wanted = {
        stage.name: replace(stage, seconds=campaign.seconds.get(stage.name, 0.0))
        for run, stage in campaign.stages.items()
        if run in runs or campaign.states[run] == "reused"
    }
    return pipeline.run(pipeline.ordered(wanted), root, jobs=campaign.jobs, overview=overview)


def exit_status(status: int, outcomes: Mapping[str, Outcome], console: Console) -> int:
    """Name the runs that failed: 0, 1 (one did) or 130 (interrupted). A run that diverged is a
    result.
    """
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    for name in failed:
        console.print(f"error: {name} failed: {outcomes[name].note}", markup=False)
    return status if status == INTERRUPTED else int(bool(failed))
