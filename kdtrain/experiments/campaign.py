"""Many runs for one question, within a budget: groups of runs, what they cost, and their training.

`reproduce` and `compare` say which runs belong together; here their cost is estimated from timed
steps, groups are taken in order while they fit, finished runs are reused and unfinished ones
continued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as Grid

from kdtrain.config import ConfigError, DataConfig
from kdtrain.config.program import INTERRUPTED, threads_of
from kdtrain.data import FaceSource
from kdtrain.experiments import dryrun, pipeline
from kdtrain.experiments.estimate import estimate
from kdtrain.experiments.scheduler import Outcome, Overview, wall_time
from kdtrain.training.journal import journal
from kdtrain.training.journal.journal import duration

START_S = 4.0  # of a run's process: start, imports, images; counted beside the timed steps
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
ENDED = ("reused", "diverged")
"""The states of a run that has ended before."""
Run = TypeVar("Run", bound=Hashable)
"""Names a run of a campaign."""


@dataclass(frozen=True)
class Order:
    """Where and how the runs of a command are trained."""

    root: Path
    jobs: int
    budget_min: float | None = None
    """Minutes on the clock; None: all that it takes."""
    command: str = ""
    """As it was given."""
    dry_run: bool = False
    """Print the runs of the first seed, their cost and the plan; write nothing."""
    console: Console = field(default_factory=lambda: journal.console(file_width=120))


class BudgetError(RuntimeError):
    """A budget in which nothing can be done; the message says how much is needed."""


@dataclass(frozen=True)
class Group(Generic[Run]):
    """Runs that a budget takes or leaves together."""

    label: str
    runs: tuple[Run, ...]


def grouped(found: Iterable[tuple[str, Iterable[Run]]]) -> list[Group[Run]]:
    """Groups of labelled runs, each run in the first that has it; none that is empty."""
    taken: set[Run] = set()
    groups = []
    for label, runs in found:
        fresh = tuple(run for run in dict.fromkeys(runs) if run not in taken)
        taken.update(fresh)
        if fresh:
            groups.append(Group(label, fresh))
    return groups


@dataclass(frozen=True)
class Campaign(Generic[Run]):
    """What is to be done: groups of runs with their states and seconds, and which are taken."""

    order: Order
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
    least: tuple[str, float] | None = None
    """Of the groups that the budget leaves the one that needs least: label, seconds on the clock
    with what is taken."""

    def finished(self, group: Group[Run]) -> int:
        """How many of a group's runs have ended before."""
        return sum(self.states[run] in ENDED for run in group.runs)

    def mark(self, run: Run, states: Mapping[str, str]) -> tuple[str, str]:
        """What stands for a run in an overview, and its style."""
        return MARKS.get(states.get(self.stages[run].name) or self.states[run], (" ", "white"))


def make_campaign(
    groups: Sequence[Group[Run]],
    stages: Mapping[Run, pipeline.Stage],
    order: Order,
    say: Callable[[str], None],
) -> Campaign[Run]:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget.

    stages: of the groups' runs and of whatever else is shown, inputs first. Raises ConfigError for
    runs that need landmarks of images that have none.
    """
    sources: dict[DataConfig, FaceSource] = {}
    ours = [run for group in groups for run in group.runs]
    if lost := pipeline.without_landmarks([stages[run] for run in ours], sources):
        raise ConfigError(f"{', '.join(lost)}: {pipeline.NO_LANDMARKS}; leave these out")
    keys = pipeline.stage_keys(list(stages.values()), order.root, sources)
    states = {
        run: pipeline.stage_state(order.root / stage.name, keys[stage.name])
        for run, stage in stages.items()
    }
    open_runs = [run for run in ours if states[run] not in ENDED]
    say(f"{len(ours)} runs in all, {len(ours) - len(open_runs)} finished before; timing steps")
    seconds = seconds_of(open_runs, stages, threads_of(order.jobs), sources)
    by_name = {stage.name: run for run, stage in stages.items()}
    have = {run for run, state in states.items() if state == "reused"}
    taken: list[Group[Run]] = []
    left: list[tuple[str, float]] = []
    clock = 0.0
    for group in groups:
        inputs = {by_name[name] for run in group.runs for name in stages[run].inputs}
        if not inputs <= have | set(group.runs):
            continue  # it starts from runs of a group that was left out
        found = [stages[run] for one in (*taken, group) for run in one.runs]
        costs = {stage.name: seconds[stage.name] for stage in found if stage.name in seconds}
        needed = wall_time(costs, {stage.name: stage.inputs for stage in found}, order.jobs)
        if order.budget_min is None or needed <= 60 * order.budget_min:
            taken.append(group)
            have |= set(group.runs)
            clock = needed
        else:
            left.append((group.label, needed))
    least = min(left, key=lambda one: one[1], default=None)
    return Campaign(order, tuple(groups), stages, keys, states, seconds, tuple(taken), clock, least)


def seconds_of(
    runs: Sequence[Run],
    stages: Mapping[Run, pipeline.Stage],
    threads: int,
    sources: dict[DataConfig, FaceSource],
) -> dict[str, float]:
    """Estimated seconds of each run; a teacher's answers cost once a seed, as they are kept."""
    count = dryrun.counter(sources)
    configs = {stage.name: stage.config for stage in stages.values()}
    answered: set[tuple[str, int]] = set()
    found = {}
    for run in runs:
        config = stages[run].config
        planned = dryrun.planned(stages[run].name, config, Path(), configs)
        asked = (config.teacher.run or "", config.seed)
        cost = estimate(
            config, count(config), planned.teachers, threads=threads, answers_kept=asked in answered
        )
        answered.add(asked)
        found[planned.name] = START_S + cost.total_s
    return found


def show_campaign(campaign: Campaign[Run], console: Console) -> None:
    """Print the groups: runs, how many are finished, seconds of work, taken or not."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("group", "runs", "finished", "work", ""):
        grid.add_column(title, justify="left" if title in ("group", "") else "right")
    for group in campaign.groups:
        finished = campaign.finished(group)
        work = sum(campaign.seconds.get(campaign.stages[run].name, 0.0) for run in group.runs)
        mark = "taken" if group in campaign.taken else "not run: over the budget, or its inputs are"
        mark = "finished" if finished == len(group.runs) else mark
        shown = duration(work) if work else ""
        grid.add_row(group.label, str(len(group.runs)), str(finished), shown, mark)
    console.print(grid)
    console.print(
        f"about {duration(campaign.clock_s)} on the clock with {campaign.order.jobs} jobs side by "
        f"side (from timed steps, with {START_S:g} s a run to start)"
    )


def budget_problem(campaign: Campaign[Run]) -> BudgetError | None:
    """The error of a budget that takes no group that is not finished, if it does."""
    if campaign.least is None or any(campaign.finished(g) < len(g.runs) for g in campaign.taken):
        return None
    label, needed_s = campaign.least
    return BudgetError(
        f"--budget takes none of the groups: the smallest, {label}, needs about "
        f"{math.ceil(needed_s / 6) / 10:g} minutes"
    )


def run_study(
    first: Callable[[], Sequence[pipeline.Stage]],
    plan: Callable[[], Campaign[Run]],
    overview: Callable[[Campaign[Run], Mapping[str, str]], RenderableType],
    write: Callable[[Campaign[Run], Mapping[str, Outcome], bool], None],
    order: Order,
) -> int:
    """A command of many runs: plan, print it, train what was taken, write tables; exit status 0, 1
    (a run failed) or 130 (interrupted). A run that diverged is a result.

    first: the runs of the first seed, which a dry run prints as YAML with their cost, and the plan
    where the images are there. overview: draws the states of the runs in a terminal. write: reads
    the outcomes into tables, told whether all is done. Raises BudgetError where the budget takes no
    group that is not finished, after the tables of what is.
    """
    console, status, shown = order.console, 0, []
    if order.dry_run:
        shown = first()
        status = dryrun.show_stages(shown, order.root, order.jobs, {})
    else:
        order.root.mkdir(parents=True, exist_ok=True)
    try:
        campaign = plan()
    except ValueError as error:
        if not order.dry_run or all(pipeline.is_there(stage.config.data) for stage in shown):
            raise
        console.print(f"# no plan of all seeds without the images: {error}", markup=False)
        return status
    show_campaign(campaign, console)
    problem = budget_problem(campaign)
    if problem is not None and (order.dry_run or "reused" not in campaign.states.values()):
        raise problem
    if order.dry_run:
        return status
    started = time.monotonic()
    status, outcomes = carry_out(campaign, lambda states: overview(campaign, states))
    write(campaign, outcomes, status != INTERRUPTED)
    console.print(f"{duration(time.monotonic() - started)} on the clock")
    if problem is not None:
        raise problem
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    for name in failed:
        console.print(f"error: {name} failed: {outcomes[name].note}", markup=False)
    return status if status == INTERRUPTED else int(bool(failed))


def carry_out(
    campaign: Campaign[Run], overview: Overview | None = None
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
    order = campaign.order
    return pipeline.run(pipeline.ordered(wanted), order.root, jobs=order.jobs, overview=overview)
