"""`python -m kdtrain compare`: several methods trained over seeds, one table and one figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.config import Config
from kdtrain.experiments import campaign
from kdtrain.experiments.campaign import LEGEND, Campaign, Order, make_campaign
from kdtrain.experiments.comparison import cost
from kdtrain.experiments.comparison.collect import Comparison, per_second, table
from kdtrain.experiments.comparison.figure import draw
from kdtrain.experiments.comparison.request import Request, RunOf, groups, stages
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.study import about, pixels, read_all, where
from kdtrain.reports.tables import files
from kdtrain.reports.tables.text import plain
from kdtrain.reports.writing import count

WIDTH = 200  # characters of a line: ten metrics beside a name
NAME = "comparison"


def main(request: Request, order: Order) -> int:
    """The command: plan, print, train, measure speeds, write the table; exit status 0, 1 or 130."""
    first = replace(request, seeds=request.seeds[:1])
    return campaign.run_study(
        lambda: list(stages(first).values()),
        lambda: _plan(request, order),
        _overview,
        lambda plan, outcomes, done: write(request, plan, outcomes, timed=done),
        order,
    )


def _plan(request: Request, order: Order) -> Campaign[RunOf]:
    """The plan, after the methods' lengths, which are printed."""
    found = stages(request)
    lengths = cost.lengths(request, {run: stage.config for run, stage in found.items()})
    for second in request.sources:
        order.console.print(_lengths_grid(request, lengths, second))
    return make_campaign(groups(request), found, order, order.console.print)


def _lengths_grid(
    request: Request, lengths: Mapping[RunOf, cost.Length], second: bool
) -> RenderableType:
    """How long each method is trained, and what it needs."""
    title = f"training of each run{where(second)}"
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("method", "epochs", "images", "epochs of its start", "needs"):
        grid.add_column(name, justify="left" if name in ("method", "needs") else "right")
    shown = {run: one for run, one in lengths.items() if run.second == second}
    students = {run.method: one for run, one in shown.items() if run.method in request.students}
    notes = cost.other_lengths(students)
    for run, one in shown.items():
        if run.method in request.methods + request.teachers:
            note = notes.get(run.method, "")
            needs = ", ".join(one.needs) + (f"  [yellow]{note}[/]" if note else "")
            cells = (str(one.epochs), count(one.images), str(one.start_epochs or ""), needs)
            grid.add_row(f"{run.method}{pixels(run.side)}", *cells)
    return grid


def write(
    request: Request, plan: Campaign[RunOf], outcomes: Mapping[str, Outcome], *, timed: bool
) -> None:
    """Read the run folders, print the table, and write its files below root. timed: also measure
    the networks' speed, where it is not known.
    """
    order, results = plan.order, read_all(plan, outcomes)
    configs = {run: stage.config for run, stage in plan.stages.items()}
    comparison = Comparison(request, results, configs, cost.lengths(request, configs))
    networks: dict[str, tuple[Path, Config]] = {}  # a finished run of each that is compared
    for second in request.sources:
        places = request.places(second)
        for run in (r for p in places for m in comparison.methods for r in comparison.runs(m, p)):
            if results[run].state == "done":
                key = cost.network_key(configs[run])
                networks.setdefault(key, (results[run].folder, configs[run]))
    sizes = {key: cost.size_of(*one) for key, one in networks.items()}
    speeds, how = cost.speeds(order.root, networks, order.console.print) if timed else ({}, "")
    comparison = replace(comparison, sizes=sizes, speeds=speeds)
    seeds = ", ".join(map(str, request.seeds))
    setting = [("command", order.command), ("recipes", request.folder), ("seeds", seeds)]
    setting += about(results.values(), order.jobs)
    if how:
        setting.append(("speed", how))
    for key, by_batch in speeds.items():
        size = sizes[key]
        words = (
            f"{per_second(one.median)} [{per_second(one.low)}, {per_second(one.high)}] images/s, "
            f"{batch} at a time"
            for batch, one in by_batch.items()
        )
        setting.append((f"{size.name}, {size.side} px", "; ".join(words)))
    found = table(comparison, setting, NAME)
    order.console.print(plain(found, WIDTH), markup=False)
    drawn = draw(comparison, found)
    written = files.write(found, order.root / "tables", drawn, subject="Methods", width=WIDTH)
    order.console.print(f"table: {written['html']}, and as text, Markdown, CSV and PNG beside it")


def _overview(plan: Campaign[RunOf], states: Mapping[str, str]) -> RenderableType:
    """Which runs are done, running and to come: a line a method, a mark for each seed."""
    lines: dict[str, Text] = {}
    for run in plan.stages:
        size = "" if run.side is None else f" {run.side} px"
        name = f"{'second ' if run.second else ''}{run.method}{size}"
        lines.setdefault(name, Text()).append(*plan.mark(run, states))
    grid = Grid.grid(padding=(0, 1))
    for name, text in lines.items():
        grid.add_row(name, text)
    return RichGroup(grid, Text(LEGEND, "dim"))
