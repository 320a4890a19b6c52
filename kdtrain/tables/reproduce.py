"""`python -m kdtrain reproduce`: the tables of arXiv 1709.02929 on any pictures, at any scale.

Every cell's runs are stages of one pipeline (stages.py): shared, reused by their keys, continued
after a kill. The plan and its cost, from timed steps, are printed before anything is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from kdtrain import pipeline
from kdtrain.batches import split
from kdtrain.config import ConfigError
from kdtrain.data import build_source
from kdtrain.estimate import estimate, wall_time
from kdtrain.journal import duration
from kdtrain.scheduler import Outcome
from kdtrain.settings import nearest
from kdtrain.tables import files
from kdtrain.tables.collect import Collection, Result, table
from kdtrain.tables.paper import WIDTHS, TableSpec, table_specs
from kdtrain.tables.stages import Group, Request, RunOf, groups, schedules, stages, with_seconds
from kdtrain.tables.text import show

TABLES = tuple(table_specs())
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
    own = ("task", "seed", "init_from", "teacher.run", "model.divide")
    fixed = [key for keys in (common, *special.values()) for key in own if key in keys]
    if fixed:
        raise ConfigError(f"{fixed[0]} is each run's own in the tables; leave --{fixed[0]} out")
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


def main(
    request: Request,
    root: Path,
    *,
    jobs: int,
    budget_min: float | None,
    command: str,
    dry_run: bool = False,
) -> int:
    """The command: plan, print it, train, write the tables; exit status 0, 1 or 130."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    plan = make_plan(request, root, jobs=jobs, budget_min=budget_min, say=console.print)
    show_plan(plan, console)
    return 0 if dry_run else carry_out(plan, root, console, command=command)


def make_plan(
    request: Request, root: Path, *, jobs: int, budget_min: float | None, say: Callable[[str], None]
) -> Plan:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget (minutes on the clock; None: all).
    """
    specs = table_specs(request.widths, request.second is not None)
    ordered = tuple(groups(specs, request))
    runs = [run for group in ordered for run in group.runs]
    planned = dict(zip(runs, stages(runs, request), strict=True))
    keys = pipeline.stage_keys(list(planned.values()), root)
    states = {
        run: pipeline.stage_state(root / stage.name, keys[stage.name])
        for run, stage in planned.items()
    }
    open_runs = [run for run in runs if states[run] not in ("reused", "diverged")]
    say(f"{len(runs)} runs in all, {len(runs) - len(open_runs)} finished before; timing steps")
    seconds = _seconds(open_runs, planned, max(1, pipeline.cores() // jobs))
    taken: list[Group] = []
    clock = 0.0
    for group in ordered:
        chosen = [_open_stages(planned, seconds, g) for g in (*taken, group)]
        costs = {name: s for part in chosen for name, (s, _) in part.items()}
        inputs = {name: needs for part in chosen for name, (_, needs) in part.items()}
        needed = wall_time(costs, inputs, jobs) if costs else 0.0
        if budget_min is None or needed <= 60 * budget_min:
            taken.append(group)
            clock = needed
    # a group may start from runs of one that was left out
    have = {run for group in taken for run in group.runs}
    by_name = {stage.name: run for run, stage in planned.items()}
    finished = {run for run, state in states.items() if state == "reused"}
    taken = [
        group
        for group in taken
        if all(
            by_name[name] in have | finished for run in group.runs for name in planned[run].inputs
        )
    ]
    return Plan(
        request, specs, ordered, planned, keys, states, seconds, tuple(taken), clock, jobs
    )  # fmt: skip


def _open_stages(
    planned: Mapping[RunOf, pipeline.Stage], seconds: Mapping[str, float], group: Group
) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Seconds and inputs of the runs of a group that are still to be trained."""
    found = {}
    for run in group.runs:
        stage = planned[run]
        if stage.name in seconds:
            found[stage.name] = (seconds[stage.name], stage.inputs)
    return found


def _seconds(
    runs: Sequence[RunOf], planned: Mapping[RunOf, pipeline.Stage], threads: int
) -> dict[str, float]:
    """Estimated seconds of each run; a teacher's answers cost once a seed, as they are kept."""
    sizes: dict[object, tuple[int, int, int]] = {}
    networks = {stage.name: stage.config.model for stage in planned.values()}
    answered: set[tuple[str, int]] = set()
    found = {}
    for run in runs:
        config = planned[run].config
        if config.data not in sizes:
            source = build_source(config.data)
            train, test = split(source, config)
            sizes[config.data] = (source.num_classes, len(train), len(test))
        classes, pictures, tests = sizes[config.data]
        name = (config.teacher.run or "").removeprefix("@")
        kept = config.teacher.cache != "none" and (name, run.seed) in answered
        answered.add((name, run.seed))
        found[planned[run].name] = estimate(
            config, classes=classes, pictures=pictures, test_pictures=tests,
            teacher=networks[name] if name else None, answers_kept=kept,
            threads=config.train.threads or threads,
        ).total_s  # fmt: skip
    return found


def show_plan(plan: Plan, console: Console) -> None:
    """The groups in their order: runs, how many are finished, seconds of work, taken or not."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("group", "runs", "finished", "work", ""):
        grid.add_column(title, justify="left" if title in ("group", "") else "right")
    for group in plan.groups:
        finished = sum(plan.states[run] in ("reused", "diverged") for run in group.runs)
        work = sum(plan.seconds.get(plan.stages[run].name, 0.0) for run in group.runs)
        mark = "taken" if group in plan.taken else "over the budget: not run"
        mark = "finished" if finished == len(group.runs) else mark
        shown = duration(work) if work else ""
        grid.add_row(group.label, str(len(group.runs)), str(finished), shown, mark)
    console.print(grid)
    console.print(
        f"about {duration(plan.clock_s)} on the clock with {plan.jobs} jobs side by side "
        "(from timed steps; evaluations included, loading is not)"
    )


def carry_out(plan: Plan, root: Path, console: Console, *, command: str) -> int:
    """Train what was taken, then write and print the tables; the exit status of pipeline.run."""
    started = time.monotonic()
    runs = [run for group in plan.taken for run in group.runs]
    wanted = with_seconds([plan.stages[run] for run in runs], plan.seconds)
    finished = [
        stage for run, stage in plan.stages.items()
        if run not in set(runs) and plan.states[run] == "reused"
    ]  # fmt: skip
    order = pipeline.ordered({s.name: s for s in (*wanted, *finished)})
    status, outcomes = pipeline.run(
        order, root, jobs=plan.jobs, overview=lambda states: _overview(plan, states)
    )
    write_tables(plan, root, outcomes, command, console)
    console.print(f"{duration(time.monotonic() - started)} on the clock")
    return status


def write_tables(
    plan: Plan, root: Path, outcomes: Mapping[str, Outcome], command: str, console: Console
) -> None:
    """Read the run folders, print the requested tables, and write their files below root."""
    results = {}
    for run, stage in plan.stages.items():
        outcome = outcomes.get(stage.name)
        failure = outcome.note if outcome is not None and outcome.state == "failed" else ""
        results[run] = Result.read(root / stage.name, plan.keys[stage.name], failure)
    collection = Collection(plan.request, results)
    setting = _setting(plan, collection, command)
    tables = [table(plan.specs[name], collection, setting) for name in plan.request.tables]
    for found in tables:
        show(found, console)
    written = files.write_all(tables, root / "tables")
    console.print(f"tables: {written['html']}, and as text, CSV and PNG beside it")


def _setting(plan: Plan, collection: Collection, command: str) -> list[tuple[str, str]]:
    seeds = ", ".join(map(str, plan.request.seeds))
    teachers = " (teachers: the first alone)" if plan.request.shared_teachers else ""
    lines = [("command", command), ("scale", plan.request.scale), ("seeds", seeds + teachers)]
    done = collection.done
    names = {r.results["data"]["name"]: r.results["data"] for r in done}
    for name, data in names.items():
        text = f"{name}: {data['pictures']:,} pictures of {data['classes']:,} people"
        lines.append(("data", f"{text}, {data['train']:,} to train and {data['test']:,} to test"))
    if done:
        known = dict(done[0].results["environment"])
        lines.append(("machine", ", ".join(f"{k} {v}" for k, v in known.items())))
        total = sum(r.results["seconds"] for r in done)
        lines.append(("training", f"{duration(total)} of all runs together, {plan.jobs} jobs"))
    return lines


def _overview(plan: Plan, states: Mapping[str, str]) -> RenderableType:
    """Which runs are done, running and to come: a line a kind of run, a mark for each seed, the
    narrow students first.
    """
    lines: dict[str, dict[str, Text]] = {}
    last: dict[tuple[str, str], int] = {}
    for run in sorted(plan.stages, key=lambda run: (run.second, -run.width)):
        state = states.get(plan.stages[run].name)
        mark, style = MARKS.get(state or plan.states[run], (" ", "white"))
        task, _, kind = run.part.partition("_")
        name = f"{'second ' if run.second else ''}{kind}"
        text = lines.setdefault(task, {}).setdefault(name, Text())
        if last.setdefault((task, name), run.width) != run.width:
            text.append(" ")
        last[task, name] = run.width
        text.append(mark, style)
    grids = []
    for task, found in lines.items():
        grid = Grid.grid(padding=(0, 1))
        grid.add_row(Text(task, "bold"), "")
        for name, text in found.items():
            grid.add_row(name, text)
        grids.append(grid)
    return Columns(grids, padding=(0, 3))
