"""`python -m kdtrain reproduce`: the tables of arXiv 1709.02929 on any pictures, at any scale.

Every cell's runs are stages of one pipeline (stages.py): shared, reused by their keys, continued
after a kill. The plan and its cost, from timed steps, are printed before anything is trained.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.console import Group as RichGroup
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.experiments import campaign, dryrun
from kdtrain.experiments.campaign import LEGEND, MARKS
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.tables.collect import Collection, Result, about, table
from kdtrain.experiments.tables.paper import table_specs
from kdtrain.experiments.tables.plan import TABLES, Plan, make_plan
from kdtrain.experiments.tables.stages import Request, groups, stages
from kdtrain.reports.tables import files
from kdtrain.reports.tables.text import show
from kdtrain.training.journal import journal
from kdtrain.training.journal.journal import duration


def main(
    request: Request,
    root: Path,
    *,
    jobs: int,
    budget_min: float | None,
    command: str,
    dry_run: bool = False,
) -> int:
    """The command: plan, print it, train, write the tables; exit status 0, 1 or 130. dry_run: print
    the first seed's runs, their cost and the plan, and write nothing.
    """
    console = journal.console(file_width=120)
    if dry_run:
        return _dry_run(request, root, jobs, budget_min, console)
    root.mkdir(parents=True, exist_ok=True)
    plan = make_plan(request, root, jobs=jobs, budget_min=budget_min, say=console.print)
    campaign.show_campaign(plan, console)
    return carry_out(plan, root, console, command=command)


def _dry_run(
    request: Request, root: Path, jobs: int, budget_min: float | None, console: Console
) -> int:
    """Print the runs of the first seed as YAML with their cost, and the plan where the pictures
    are there; write nothing.
    """
    specs = table_specs(request.second is not None)
    seed = replace(request, seeds=request.seeds[:1])
    runs = [run for group in groups(specs, seed) for run in group.runs]
    dryrun.show_stages(stages(runs, seed), root, jobs, {})
    try:
        plan = make_plan(request, root, jobs=jobs, budget_min=budget_min, say=lambda _: None)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"# no plan of all seeds without the pictures: {error}", markup=False)
        return 0
    campaign.show_campaign(plan, console)
    return 0


def carry_out(plan: Plan, root: Path, console: Console, *, command: str) -> int:
    """Train what was taken, then write and print the tables; exit status 0, 1 (a run failed) or 130
    (interrupted). A run that diverged is a result.
    """
    started = time.monotonic()
    status, outcomes = campaign.carry_out(plan, root, lambda states: _overview(plan, states))
    write_tables(plan, root, outcomes, command, console)
    console.print(f"{duration(time.monotonic() - started)} on the clock")
    return campaign.exit_status(status, outcomes, console)


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
    folder = root / "tables"
    earlier = [n for n in TABLES if n not in plan.request.tables and (folder / f"{n}.csv").exists()]
    tables = {
        name: table(plan.specs[name], collection, setting)
        for name in sorted((*plan.request.tables, *earlier))
    }
    for name in plan.request.tables:
        show(tables[name], console)
    written = files.write_all(list(tables.values()), folder)
    console.print(f"tables: {written['html']}, and as text, CSV and PNG beside it")


def _setting(plan: Plan, collection: Collection, command: str) -> list[tuple[str, str]]:
    seeds = ", ".join(map(str, plan.request.seeds))
    teachers = " (teachers: the first alone)" if plan.request.shared_teachers else ""
    lines = [("command", command), ("scale", plan.request.scale), ("seeds", seeds + teachers)]
    return lines + about(collection.done, plan.jobs)


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
    return RichGroup(Columns(grids, padding=(0, 3)), Text(LEGEND, "dim"))
