"""What a reproduction will do: the command's request, the runs that it needs, what they cost, and
what a budget takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from kdtrain import dryrun, pipeline
from kdtrain.config import ConfigError, DataConfig
from kdtrain.config_target import TEACHER_WEIGHTS
from kdtrain.data import FaceSource
from kdtrain.estimate import estimate
from kdtrain.journal import duration
from kdtrain.order import wall_time
from kdtrain.settings import nearest
from kdtrain.tables.paper import NARROWEST, WIDTHS, TableSpec, table_specs
from kdtrain.tables.stages import Group, Request, RunOf, groups, schedules, stages

TABLES = tuple(table_specs())
START_S = 4.0  # of a run's process: start, imports, pictures; counted beside the timed steps
# What makes the cells of a table what they are.
OWN = (
    *("task", "seed", "init_from", "teacher.run", "model.divide", "optim.phases", "target.gamma"),
    *("target.tau_squared", *(f"target.{name}" for name in TEACHER_WEIGHTS)),
)


@dataclass(frozen=True)
class Plan:
    """What is to be done: groups of runs with their states and seconds, and which are taken."""

    request: Request
    specs: Mapping[str, TableSpec]
    groups: tuple[Group, ...]
    stages: Mapping[RunOf, pipeline.Stage]
    """Of every run of the tables."""
    keys: Mapping[str, str]
    states: Mapping[RunOf, str]
    """reused, resume, diverged, changed or new, as pipeline.stage_state says."""
    seconds: Mapping[str, float]
    """Estimated, of the runs that are not finished, while `jobs` run side by side."""
    taken: tuple[Group, ...]
    clock_s: float
    """Estimated time of what is taken."""
    jobs: int


def request_from(
    options: Mapping[str, Any],
    common: Mapping[str, Any],
    special: Mapping[str, Mapping[str, Any]],
) -> Request:
    """The request that a command line makes; raises ConfigError.

    special: keys of the runs of one task, by its name, and of those on the "second" data source.
    """
    names = list(dict.fromkeys(options["tables"]))
    if "all" in names:
        names = sorted(TABLES)
    for name in names:
        if name not in TABLES:
            raise ConfigError(f"no table {name!r}; {nearest(name, [*TABLES, 'all'])}")
    fixed = [key for keys in (common, *special.values()) for key in OWN if key in keys]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} is each run's own in the tables; leave --{fixed[0]} out (schedules: a "
            "--scale folder of your own)"
        )
    if "second" in special and "table2" not in names:
        raise ConfigError("--second.KEY: only table2 has a second data source; ask for it too")
    count, first = (
        default if options.get(name) is None else options[name]
        for name, default in (("seeds", 3), ("first_seed", 1))
    )
    if count < 1 or first < 0:
        raise ConfigError(f"--seeds, --first-seed: at least 1 and 0, got {count} and {first}")
    text = options.get("widths") or "2,4,8"
    widths = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not widths or not set(widths) <= set(WIDTHS) or len(widths) != text.count(",") + 1:
        raise ConfigError(f"--widths: expected some of 2,4,8, as --widths 8,4; got {text!r}")
    narrow = [name for name in names if name in ("table1", "table3")]
    if narrow and NARROWEST not in widths:
        raise ConfigError(f"--widths: {narrow[0]} is of the student of 1/{NARROWEST}; add it")
    teachers = options.get("teachers") or "each"
    if teachers not in ("each", "one"):
        raise ConfigError(f"--teachers: expected each or one, got {teachers!r}")
    scale = options.get("scale") or "two-cores"
    schedules(scale)  # known, before anything is timed
    budget = options.get("budget")
    if budget is not None and budget <= 0:
        raise ConfigError(f"--budget: expected minutes, more than 0, got {budget}")
    return Request(
        tables=tuple(names),
        scale=scale,
        seeds=tuple(range(first, first + count)),
        widths=tuple(sorted(set(widths))),
        common=dict(common),
        second=special.get("second"),
        tasks={name: keys for name, keys in special.items() if name != "second"},
        shared_teachers=teachers == "one",
        cache=options.get("cache") or "float32",
    )


def make_plan(
    request: Request, root: Path, *, jobs: int, budget_min: float | None, say: Callable[[str], None]
) -> Plan:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget (minutes on the clock; None: all).
    """
    specs = table_specs(request.second is not None)
    asked = groups(specs, request)
    runs = _known([run for group in asked for run in group.runs], specs, request, root)
    planned = dict(zip(runs, stages(runs, request), strict=True))
    sources: dict[DataConfig, FaceSource] = {}
    keys = pipeline.stage_keys(list(planned.values()), root, sources)
    states = {
        run: pipeline.stage_state(root / stage.name, keys[stage.name])
        for run, stage in planned.items()
    }
    ours = [run for group in asked for run in group.runs]
    open_runs = [run for run in ours if states[run] not in ("reused", "diverged")]
    say(f"{len(ours)} runs in all, {len(ours) - len(open_runs)} finished before; timing steps")
    seconds = _seconds(open_runs, planned, max(1, pipeline.cores() // jobs), sources)
    by_name = {stage.name: run for run, stage in planned.items()}
    have = {run for run, state in states.items() if state == "reused"}
    taken: list[Group] = []
    clock = 0.0
    for group in asked:
        inputs = {by_name[name] for run in group.runs for name in planned[run].inputs}
        if not inputs <= have | set(group.runs):
            continue  # it starts from runs of a group that was left out
        needed = _clock([*taken, group], planned, seconds, jobs)
        if budget_min is None or needed <= 60 * budget_min:
            taken.append(group)
            have |= set(group.runs)
            clock = needed
    return Plan(
        request, specs, tuple(asked), planned, keys, states, seconds, tuple(taken), clock, jobs
    )


def _known(
    asked: Sequence[RunOf], specs: Mapping[str, TableSpec], request: Request, root: Path
) -> list[RunOf]:
    """The runs that were asked for, and those of any table whose folders are there, with their
    inputs, in an order that can be run: what is finished is shown whatever was asked.
    """
    everything = replace(request, tables=TABLES, widths=WIDTHS)
    ordered = [run for group in groups(specs, everything) for run in group.runs]
    ordered = list(dict.fromkeys([*asked, *ordered]))
    kept = set(asked) | {run for run in ordered if (root / run.name).is_dir()}
    by_name = {run.name: run for run in ordered}
    for stage in reversed(stages([run for run in ordered if run in kept], request)):
        kept |= {by_name[name] for name in stage.inputs}
    return [run for run in ordered if run in kept]


def _clock(
    chosen: Sequence[Group],
    planned: Mapping[RunOf, pipeline.Stage],
    seconds: Mapping[str, float],
    jobs: int,
) -> float:
    """Seconds on the clock until the open runs of these groups are done."""
    found = [planned[run] for group in chosen for run in group.runs]
    costs = {stage.name: seconds[stage.name] for stage in found if stage.name in seconds}
    inputs = {stage.name: stage.inputs for stage in found}
    return wall_time(costs, inputs, jobs) if costs else 0.0


def _seconds(
    runs: Sequence[RunOf],
    planned: Mapping[RunOf, pipeline.Stage],
    threads: int,
    sources: dict[DataConfig, FaceSource],
) -> dict[str, float]:
    """Estimated seconds of each run; a teacher's answers cost once a seed, as they are kept."""
    counts: dict[object, dryrun.Counts] = {}
    networks = {stage.name: stage.config.model for stage in planned.values()}
    answered: set[tuple[str, int]] = set()
    found = {}
    for run in runs:
        config = planned[run].config
        seen = (config.data, config.task)
        if seen not in counts:
            counts[seen] = dryrun.counted(config, sources)
        name = (config.teacher.run or "").removeprefix("@")
        kept = config.teacher.cache != "none" and (name, run.seed) in answered
        answered.add((name, run.seed))
        found[planned[run].name] = (
            START_S
            + estimate(
                config,
                classes=counts[seen].classes,
                pictures=counts[seen].train,
                test_pictures=counts[seen].test,
                validation_pictures=counts[seen].validation,
                teacher=networks[name] if name else None,
                answers_kept=kept,
                threads=config.train.threads or threads,
                epoch_batches=counts[seen].epoch_batches,
            ).total_s
        )
    return found


def show_plan(plan: Plan, console: Console) -> None:
    """The groups in their order: runs, how many are finished, seconds of work, taken or not."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("group", "runs", "finished", "work", ""):
        grid.add_column(title, justify="left" if title in ("group", "") else "right")
    for group in plan.groups:
        finished = sum(plan.states[run] in ("reused", "diverged") for run in group.runs)
        work = sum(plan.seconds.get(plan.stages[run].name, 0.0) for run in group.runs)
        mark = "taken" if group in plan.taken else "not run: over the budget, or its inputs are"
        mark = "finished" if finished == len(group.runs) else mark
        shown = duration(work) if work else ""
        grid.add_row(group.label, str(len(group.runs)), str(finished), shown, mark)
    console.print(grid)
    console.print(
        f"about {duration(plan.clock_s)} on the clock with {plan.jobs} jobs side by side "
        f"(from timed steps, with {START_S:g} s a run to start)"
    )
