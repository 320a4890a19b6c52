"""The runs of studies within a budget: groups of runs, their cost, and their training.

The cost of the groups is estimated from timed steps. Groups are taken in order while they fit;
finished runs are reused and unfinished ones resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from kdtrain.config import ConfigError, DataConfig
from kdtrain.config.program import threads_of
from kdtrain.data import FaceSource
from kdtrain.experiments import dryrun, pipeline
from kdtrain.experiments.estimate import estimate
from kdtrain.experiments.scheduler import Outcome, Overview, wall_time
from kdtrain.experiments.study import Rank, Run, Study
from kdtrain.training.journal import journal
from kdtrain.training.journal.journal import duration

START_S = 4.0  # of a run's process: start, imports, images; counted beside the timed steps
ENDED = ("reused", "diverged")
"""The states of a run that has ended before."""


@dataclass(frozen=True)
class Order:
    """Directory, jobs, budget and output of a command."""

    root: Path
    jobs: int
    budget_min: float | None = None
    """Minutes on the clock; None: no limit."""
    command: str = ""
    dry_run: bool = False
    """Print the runs of the first seed, their cost and the plan; write nothing."""
    overwrite: bool = False
    """Train finished runs anew."""
    console: Console = field(default_factory=lambda: journal.console(file_width=120))


class BudgetError(RuntimeError):
    """A budget that no group fits; the message states the minutes of the smallest."""


@dataclass(frozen=True)
class Group:
    """Runs that a budget takes or leaves together."""

    label: str
    runs: tuple[Run, ...]


def groups_of(studies: Sequence[Study]) -> list[Group]:
    """The runs of several studies with their inputs, by rank and then in the order of the studies;
    each run in the first group that has it.
    """
    ranked: dict[tuple[Rank, int, str], list[Run]] = {}
    for number, study in enumerate(studies):
        for second in study.sources:
            for rank, label, at in study.places(second):
                runs = ranked.setdefault((rank, number, label), [])
                runs += [one for run in study.of(at, second) for one in study.chain(run)]
    taken: set[Run] = set()
    groups = []
    for key in sorted(ranked, key=lambda one: one[:2]):
        fresh = tuple(run for run in dict.fromkeys(ranked[key]) if run not in taken)
        taken.update(fresh)
        if fresh:
            groups.append(Group(key[2], fresh))
    return groups


def stages_of(studies: Sequence[Study], runs: Iterable[Run]) -> dict[Run, pipeline.Stage]:
    """Runs as stages, of the first study that has their arm. Raises ConfigError where two studies
    have different arms of one name.
    """
    for one in studies[1:]:
        for name in one.flat.keys() & studies[0].flat.keys():
            if one.flat[name] != studies[0].flat[name]:
                raise ConfigError(
                    f"{studies[0].name} and {one.name} have different arms {name}; run one alone"
                )
    return {run: next(s for s in studies if run.arm in s.flat).stage(run) for run in runs}


@dataclass(frozen=True)
class Campaign:
    """Groups of runs with their states and seconds, and the groups that are trained."""

    order: Order
    groups: tuple[Group, ...]
    stages: Mapping[Run, pipeline.Stage]
    """Of every run that is shown."""
    keys: Mapping[str, str]
    states: Mapping[Run, str]
    """reused, resume, diverged, changed or new (pipeline.stage_state)."""
    seconds: Mapping[str, float]
    """Estimated, of the runs that are not finished, while `jobs` run side by side."""
    taken: tuple[Group, ...]
    clock_s: float
    """Estimated time of the groups that are taken."""
    least: tuple[str, float] | None = None
    """The group over the budget that needs least: label, and seconds on the clock together with the
    groups that are taken."""

    def finished(self, group: Group) -> int:
        """Number of runs of a group that ended before."""
        return sum(self.states[run] in ENDED for run in group.runs)


def make_campaign(
    groups: Sequence[Group], stages: Mapping[Run, pipeline.Stage], order: Order
) -> Campaign:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget.

    stages: of the groups' runs and of all others that are shown, inputs first. Raises ConfigError
    for runs that need landmarks of images that have none.
    """
    sources: dict[DataConfig, FaceSource] = {}
    ours = [run for group in groups for run in group.runs]
    if lost := pipeline.without_landmarks([stages[run] for run in ours], sources):
        raise ConfigError(f"{', '.join(lost)}: {pipeline.NO_LANDMARKS}; leave these out")
    keys = pipeline.stage_keys(list(stages.values()), order.root, sources)
    states = {
        run: "new"
        if order.overwrite
        else pipeline.stage_state(order.root / stage.name, keys[stage.name])
        for run, stage in stages.items()
    }
    open_runs = [run for run in ours if states[run] not in ENDED]
    finished = len(ours) - len(open_runs)
    if not order.dry_run:
        order.console.print(f"{len(ours)} runs in all, {finished} finished before; timing steps")
    seconds = seconds_of(open_runs, stages, threads_of(order.jobs), sources)
    named = {stage.name for stage in stages.values()}
    have = {stages[run].name for run, state in states.items() if state == "reused"}
    first = controls(stages.values())
    taken: list[Group] = []
    left: list[tuple[str, float]] = []
    clock = 0.0
    for group in groups:
        found = [stages[run] for one in (*taken, group) for run in one.runs]
        inputs = {name for run in group.runs for name in stages[run].inputs} & named
        if not inputs <= have.union(stage.name for stage in found):
            continue  # it reads runs of a group that was left out
        costs = {stage.name: seconds[stage.name] for stage in found if stage.name in seconds}
        needed = wall_time(costs, {stage.name: stage.inputs for stage in found}, order.jobs, first)
        if order.budget_min is None or needed <= 60 * order.budget_min:
            taken.append(group)
            clock = needed
        else:
            left.append((group.label, needed))
    least = min(left, key=lambda one: one[1], default=None)
    return Campaign(order, tuple(groups), stages, keys, states, seconds, tuple(taken), clock, least)


def controls(stages: Iterable[pipeline.Stage]) -> set[str]:
    """The stages without a teacher whose inputs have none either, and that are no teacher. They are
    trained first, as the other arms are compared with them. stages: inputs first.
    """
    stages, found = list(stages), set()
    taught = ("teacher", "gallery")
    runs = [item for stage in stages for item in stage.config.runs().items()]
    teachers = {run.removeprefix("@") for key, run in runs if key.startswith(taught)}
    for stage in stages:
        learns = any(key.startswith("teacher") for key in stage.config.runs())
        if not learns and stage.name not in teachers and found.issuperset(stage.inputs):
            found.add(stage.name)
    return found


def seconds_of(
    runs: Sequence[Run],
    stages: Mapping[Run, pipeline.Stage],
    threads: int,
    sources: dict[DataConfig, FaceSource],
) -> dict[str, float]:
    """Estimated seconds of each run; a teacher's outputs cost once per seed, as they are cached."""
    count = dryrun.counter(sources)
    configs = {stage.name: stage.config for stage in stages.values()}
    cached: set[tuple[str, int]] = set()
    found = {}
    for run in runs:
        config = stages[run].config
        teachers, _ = dryrun.teachers_of(config, Path(), configs)
        read = (config.teacher.run or "", config.seed)
        cost = estimate(
            config, count(config), teachers, threads=threads, outputs_cached=read in cached
        )
        cached.add(read)
        found[stages[run].name] = START_S + cost.total_s
    return found


def show_campaign(campaign: Campaign, console: Console) -> None:
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


def budget_problem(campaign: Campaign) -> BudgetError | None:
    """The error of a budget that takes no group that is not finished, if it does."""
    if campaign.least is None or any(campaign.finished(g) < len(g.runs) for g in campaign.taken):
        return None
    label, needed_s = campaign.least
    return BudgetError(
        f"--budget takes none of the groups: the smallest, {label}, needs about "
        f"{math.ceil(needed_s / 6) / 10:g} minutes"
    )


def carry_out(
    campaign: Campaign, overview: Overview | None = None
) -> tuple[int, dict[str, Outcome]]:
    """Train the groups that are taken; the status of pipeline.run, and how each run ended. Runs
    that were finished before are among them.
    """
    runs = {run for group in campaign.taken for run in group.runs}
    wanted = {
        stage.name: replace(stage, seconds=campaign.seconds.get(stage.name, 0.0))
        for run, stage in campaign.stages.items()
        if run in runs or campaign.states[run] == "reused"
    }
    order = campaign.order
    return pipeline.run(
        pipeline.ordered(wanted, controls(campaign.stages.values())),
        order.root,
        jobs=order.jobs,
        overwrite=order.overwrite,
        overview=overview,
    )
