"""Runs studies: plan, budget, training, and the tables from the run directories."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.config import Config
from kdtrain.config.program import INTERRUPTED
from kdtrain.experiments import cost, dryrun, pipeline
from kdtrain.experiments.campaign import (
    Campaign,
    Order,
    budget_problem,
    carry_out,
    groups_of,
    make_campaign,
    show_campaign,
    stages_of,
)
from kdtrain.experiments.collect import Collection, about, per_second, read_all, table
from kdtrain.experiments.figure import draw as draw_arms
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.study import Run, Study, pixels, where
from kdtrain.reports.tables import files
from kdtrain.reports.tables.plot import draw as draw_cells
from kdtrain.reports.tables.text import TEXT_WIDTH, plain, show
from kdtrain.reports.writing import count
from kdtrain.training.journal.journal import duration

WIDTH = 200  # characters of a line with a row per arm: ten metrics beside a name
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


def run(
    studies: Sequence[Study],
    order: Order,
    beside: Sequence[Study] = (),
    write: Callable[..., None] | None = None,
) -> int:
    """Print the plan, train the runs that fit the budget and write the tables. Returns the exit
    status: 0, 1 (a run failed) or 130 (interrupted). A run that diverged is a result.

    beside: other studies of the run directory, whose tables are written again where they have been
    written before. write: called in the place of `write_tables`. Raises BudgetError where the
    budget takes no group that is not finished, after the tables of what is; ConfigError for a run
    that does not fit, before anything is timed.
    """
    console, status, shown = order.console, 0, []
    if order.dry_run:
        first = [replace(study, seeds=study.seeds[:1]) for study in studies]
        shown = list(stages_of(first, (r for g in groups_of(first) for r in g.runs)).values())
        status = dryrun.show_stages(shown, order.root, order.jobs, {})
    beside = [s for s in beside if (order.root / "tables" / f"{s.name}.csv").exists()]
    try:
        plan = make_plan(studies, order, beside)
    except ValueError as error:
        if not order.dry_run or all(pipeline.is_there(stage.config.data) for stage in shown):
            raise
        console.print(f"# no plan of all seeds without the images: {error}", markup=False)
        return status
    show_campaign(plan, console)
    problem = budget_problem(plan)
    if problem is not None and (order.dry_run or "reused" not in plan.states.values()):
        raise problem
    if order.dry_run:
        return status
    order.root.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status, outcomes = carry_out(plan, lambda states: overview(plan, states))
    (write or write_tables)(studies, plan, outcomes, beside, timed=status != INTERRUPTED)
    console.print(f"{duration(time.monotonic() - started)} on the clock")
    if problem is not None:
        raise problem
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    for name in failed:
        console.print(f"error: {name} failed: {outcomes[name].note}", markup=False)
    return status if status == INTERRUPTED else int(bool(failed))


def make_plan(studies: Sequence[Study], order: Order, beside: Sequence[Study] = ()) -> Campaign:
    """The plan; where a study shows costs, the lengths of training are printed first. Existing run
    directories of the studies are part of it, even where the command does not train them.
    """
    groups = groups_of(studies)
    everything = []
    for study in (*studies, *beside):
        named = (at.width for at, _ in study.cells() if at.width)
        everything.append(replace(study, widths=tuple(dict.fromkeys([*study.widths, *named]))))
    both = (*groups, *groups_of(everything))
    ordered = list(dict.fromkeys(run for group in both for run in group.runs))
    shown = {run.name for group in groups for run in group.runs}
    shown |= {run.name for run in ordered if (order.root / run.name).is_dir()}
    stages: dict[Run, pipeline.Stage] = {}
    for run in reversed(ordered):  # a run comes before the runs that read it
        if run.name in shown:
            stages |= stages_of(everything, [run])
            shown |= set(stages[run].inputs)
    stages = {run: stages[run] for run in ordered if run in stages}
    for study in studies:
        if study.costs:
            lengths = cost.lengths(study, stages)
            for second in study.sources:
                order.console.print(lengths_grid(study, lengths, second))
    return make_campaign(groups, stages, order)


def lengths_grid(study: Study, lengths: Mapping[Run, cost.Length], second: bool) -> RenderableType:
    """The length of training of each arm, and the runs that it needs."""
    title = f"training of each run{where(second)}"
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("method", "epochs", "images", "epochs of its start", "needs"):
        grid.add_column(name, justify="left" if name in ("method", "needs") else "right")
    shown = {run: one for run, one in lengths.items() if run.second == second}
    students = {run.arm: one for run, one in shown.items() if run.arm in study.students}
    notes = cost.other_lengths(students)
    for run, one in shown.items():
        if run.arm in (*study.arms, *study.teachers):
            note = notes.get(run.arm, "")
            needs = ", ".join(one.needs) + (f"  [yellow]{note}[/]" if note else "")
            cells = (str(one.epochs), count(one.images), str(one.start_epochs or ""), needs)
            grid.add_row(f"{run.arm}{pixels(run.side)}", *cells)
    return grid


def collected(
    study: Study, plan: Campaign, outcomes: Mapping[str, Outcome], *, timed: bool
) -> tuple[Collection, list[tuple[str, str]]]:
    """The results and costs of a study, and the lines below its table. timed: where the study shows
    costs, also measure the speed of networks without a measurement.
    """
    order, found = plan.order, Collection(study, read_all(plan, outcomes), plan.stages)
    seeds = ", ".join(map(str, study.seeds))
    teachers = " (teachers: the first alone)" if study.one_teacher else ""
    setting = [("command", order.command), ("recipes", study.recipes), ("seeds", seeds + teachers)]
    setting += about(found.results.values(), order.jobs)
    if not study.costs:
        return found, setting
    networks: dict[str, tuple[Path, Config]] = {}  # a finished run of each that is compared
    places = [(at, second) for second in study.sources for _, _, at in study.places(second)]
    for run in (run for place in places for run in study.of(*place)):
        if found.results[run].state == "done":
            config = plan.stages[run].config
            networks.setdefault(cost.network_key(config), (found.results[run].folder, config))
    sizes = {key: cost.size_of(*one) for key, one in networks.items()}
    speeds, how = cost.speeds(order.root, networks, order.console.print) if timed else ({}, "")
    lengths = cost.lengths(study, plan.stages)
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
    return replace(found, lengths=lengths, sizes=sizes, speeds=speeds), setting


def write_tables(
    studies: Sequence[Study],
    plan: Campaign,
    outcomes: Mapping[str, Outcome],
    beside: Sequence[Study] = (),
    *,
    timed: bool,
) -> None:
    """Read the run directories, print the studies' tables, and write all files below root."""
    made = []
    for study in sorted((*studies, *beside), key=lambda one: one.name):
        found, setting = collected(study, plan, outcomes, timed=timed)
        one = table(found, setting)
        drawn = draw_cells(one) if study.blocks else draw_arms(found, one)
        made.append((one, drawn))
        if study.blocks and study in studies:
            show(one, plan.order.console)
        elif study in studies:
            plan.order.console.print(plain(one, WIDTH), markup=False)
    width = TEXT_WIDTH if all(study.blocks for study in studies) else WIDTH
    page = files.write_all(made, plan.order.root / "tables", studies[0].subject, width)
    plan.order.console.print(f"tables: {page}, and as text, Markdown, CSV and PNG beside it")


def overview(plan: Campaign, states: Mapping[str, str]) -> RenderableType:
    """A line per arm with a mark for each seed, the sizes of its runs side by side; a column per
    task.
    """
    lines: dict[str, dict[str, dict[tuple[int, int], Text]]] = {}
    for run, stage in sorted(plan.stages.items(), key=lambda one: one[0].second):
        name = f"{'second ' if run.second else ''}{run.arm}"
        sizes = lines.setdefault(stage.config.task, {}).setdefault(name, {})
        mark = MARKS.get(states.get(stage.name) or plan.states[run], (" ", "white"))
        sizes.setdefault((-(run.width or 0), run.side or 0), Text()).append(*mark)
    grids = []
    for task, found in lines.items():
        grid = Grid.grid(padding=(0, 1))
        grid.add_row(Text(task, "bold"), "")
        for name, sizes in found.items():
            grid.add_row(name, Text(" ").join(sizes[size] for size in sorted(sizes)))
        grids.append(grid)
    return RichGroup(Columns(grids, padding=(0, 3)), Text(LEGEND, "dim"))
