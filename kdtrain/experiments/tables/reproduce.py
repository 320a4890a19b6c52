"""`python -m kdtrain reproduce`: the tables of arXiv 1709.02929 on any pictures, at any scale.

Every cell's runs are stages of one pipeline (stages.py): shared, reused by their keys, continued
after a kill. The plan and its cost, from timed steps, are printed before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.console import Group as RichGroup
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.experiments import campaign
from kdtrain.experiments.campaign import LEGEND, MARKS, Campaign, make_campaign
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.tables.collect import Collection, about, read_all, table
from kdtrain.experiments.tables.paper import WIDTHS, TableSpec, table_specs
from kdtrain.experiments.tables.stages import TABLES, Request, RunOf, groups, stages
from kdtrain.reports.tables import files
from kdtrain.reports.tables.text import show
from kdtrain.training.journal import journal


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
    say = (lambda _: None) if dry_run else console.print
    seed = replace(request, seeds=request.seeds[:1])
    asked = groups(table_specs(request.second is not None), seed)
    return campaign.run_study(
        stages((run for group in asked for run in group.runs), seed) if dry_run else [],
        lambda: make_plan(request, root, jobs=jobs, budget_min=budget_min, say=say),
        _overview,
        lambda plan, outcomes, _: write_tables(request, plan, root, outcomes, command, console),
        root,
        jobs=jobs,
        console=console,
        dry_run=dry_run,
    )


def make_plan(
    request: Request, root: Path, *, jobs: int, budget_min: float | None, say: Callable[[str], None]
) -> Campaign[RunOf]:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget (minutes on the clock; None: all).
    """
    specs = table_specs(request.second is not None)
    asked = groups(specs, request)
    runs = _known([run for group in asked for run in group.runs], specs, request, root)
    planned = dict(zip(runs, stages(runs, request), strict=True))
    return make_campaign(asked, planned, root, jobs=jobs, budget_min=budget_min, say=say)


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


def write_tables(
    request: Request,
    plan: Campaign[RunOf],
    root: Path,
    outcomes: Mapping[str, Outcome],
    command: str,
    console: Console,
) -> None:
    """Read the run folders, print the requested tables, and write their files below root."""
    results = read_all(plan, root, outcomes)
    collection = Collection(request, results)
    seeds = ", ".join(map(str, request.seeds))
    teachers = " (teachers: the first alone)" if request.shared_teachers else ""
    setting = [("command", command), ("scale", request.scale), ("seeds", seeds + teachers)]
    setting += about(results.values(), plan.jobs)
    folder = root / "tables"
    earlier = [n for n in TABLES if n not in request.tables and (folder / f"{n}.csv").exists()]
    specs = table_specs(request.second is not None)
    tables = {
        name: table(specs[name], collection, setting)
        for name in sorted((*request.tables, *earlier))
    }
    for name in request.tables:
        show(tables[name], console)
    written = files.write_all(list(tables.values()), folder)
    console.print(f"tables: {written['html']}, and as text, CSV and PNG beside it")


def _overview(plan: Campaign[RunOf], states: Mapping[str, str]) -> RenderableType:
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
