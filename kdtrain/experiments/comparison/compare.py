"""`python -m kdtrain compare`: several methods trained over seeds, one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as RichGroup
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.config import Config
from kdtrain.experiments import campaign
from kdtrain.experiments.campaign import LEGEND, MARKS, Campaign, make_campaign
from kdtrain.experiments.comparison import cost
from kdtrain.experiments.comparison.collect import Comparison, per_second, table
from kdtrain.experiments.comparison.picture import picture
from kdtrain.experiments.comparison.request import Request, RunOf, groups, stages
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.tables.collect import about, read_all
from kdtrain.reports.tables import files
from kdtrain.reports.tables.text import plain
from kdtrain.reports.writing import count
from kdtrain.training.journal import journal

WIDTH = 200  # characters of a line: ten metrics beside a name
NAME = "comparison"


def main(
    request: Request,
    root: Path,
    *,
    jobs: int,
    budget_min: float | None,
    command: str,
    dry_run: bool = False,
) -> int:
    """The command: plan, print it, train, measure speeds, write the table; exit status 0, 1 or 130.
    dry_run: print the first seed's runs, their cost and the plan, and write nothing.
    """
    console = journal.console(file_width=120)
    first = replace(request, seeds=request.seeds[:1])
    return campaign.run_study(
        list(stages(first).values()) if dry_run else [],
        lambda: _plan(request, root, jobs, budget_min, console),
        _overview,
        lambda plan, outcomes, done: write(
            request, plan, root, outcomes, command, console, timed=done
        ),
        root,
        jobs=jobs,
        console=console,
        dry_run=dry_run,
    )


def _plan(
    request: Request, root: Path, jobs: int, budget_min: float | None, console: Console
) -> Campaign[RunOf]:
    """The plan, after the methods' lengths, which are printed."""
    found = stages(request)
    for second in request.sources:
        lengths = cost.lengths(request, {run: s.config for run, s in found.items()}, second)
        console.print(_lengths_grid(request, lengths, second))
    return make_campaign(
        groups(request), found, root, jobs=jobs, budget_min=budget_min, say=console.print
    )


def _lengths_grid(
    request: Request, lengths: Mapping[RunOf, cost.Length], second: bool
) -> RenderableType:
    """How long each method is trained, and what it needs."""
    title = f"training of each run{', second data source' if second else ''}"
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("method", "epochs", "images", "epochs of its start", "needs"):
        grid.add_column(name, justify="left" if name in ("method", "needs") else "right")
    students = {run.method: one for run, one in lengths.items() if run.method in request.students}
    notes = cost.other_lengths(students)
    for run, one in lengths.items():
        if run.method in (*request.students, *request.teachers):
            size = "" if run.side is None else f", {run.side} pixels"
            note = notes.get(run.method, "")
            needs = ", ".join(one.needs) + (f"  [yellow]{note}[/]" if note else "")
            cells = (str(one.epochs), count(one.pictures), str(one.start_epochs or ""), needs)
            grid.add_row(f"{run.method}{size}", *cells)
    return grid


def write(
    request: Request,
    plan: Campaign[RunOf],
    root: Path,
    outcomes: Mapping[str, Outcome],
    command: str,
    console: Console,
    *,
    timed: bool,
) -> None:
    """Read the run folders, print the table, and write its files below root. timed: also measure
    the networks' speed, where it is not known.
    """
    results = read_all(plan, root, outcomes)
    configs = {run: stage.config for run, stage in plan.stages.items()}
    lengths = {second: cost.lengths(request, configs, second) for second in request.sources}
    comparison = Comparison(request, results, configs, lengths)
    networks = _networks(comparison)
    sizes = {key: cost.size_of(*where) for key, where in networks.items()}
    speeds, how = cost.speeds(root, networks, console.print) if timed else ({}, "")
    comparison = replace(comparison, sizes=sizes, speeds=speeds)
    seeds = ", ".join(map(str, request.seeds))
    setting = [("command", command), ("recipes", request.folder), ("seeds", seeds)]
    setting += about(results.values(), plan.jobs)
    if how:
        setting.append(("speed", how))
    for key, by_batch in speeds.items():
        size = sizes[key]
        words = (
            f"{per_second(one.median)} [{per_second(one.low)}, {per_second(one.high)}] pictures/s, "
            f"{batch} at a time"
            for batch, one in by_batch.items()
        )
        setting.append((f"{size.name}, {size.side} px", "; ".join(words)))
    found = table(comparison, setting, NAME)
    console.print(plain(found, WIDTH), markup=False)
    drawn = picture(comparison, found)
    written = files.write(found, root / "tables", drawn, subject="Methods", width=WIDTH)
    console.print(f"table: {written['html']}, and as text, Markdown, CSV and PNG beside it")


def _networks(comparison: Comparison) -> dict[str, tuple[Path, Config]]:
    """A finished run of each network that is compared."""
    found: dict[str, tuple[Path, Config]] = {}
    for second in comparison.request.sources:
        for side in comparison.request.sides:
            for method in comparison.methods:
                for run in comparison.runs(method, side, second):
                    result, config = comparison.results[run], comparison.configs[run]
                    if result.state == "done":
                        found.setdefault(cost.network_key(config), (result.folder, config))
    return found


def _overview(plan: Campaign[RunOf], states: Mapping[str, str]) -> RenderableType:
    """Which runs are done, running and to come: a line a method, a mark for each seed."""
    lines: dict[str, Text] = {}
    for run, stage in plan.stages.items():
        mark, style = MARKS.get(states.get(stage.name) or plan.states[run], (" ", "white"))
        size = "" if run.side is None else f" {run.side} px"
        name = f"{'second ' if run.second else ''}{run.method}{size}"
        lines.setdefault(name, Text()).append(mark, style)
    grid = Grid.grid(padding=(0, 1))
    for name, text in lines.items():
        grid.add_row(name, text)
    return RichGroup(grid, Text(LEGEND, "dim"))
