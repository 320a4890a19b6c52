"""`python -m kdtrain reproduce`: the tables of arXiv 1709.02929 on any images, at any scale.

Every cell's runs are stages of one pipeline (stages.py): shared, reused by their keys, continued
after a kill. The plan and its cost, from timed steps, are printed before anything is trained; the
run folders are read into the tables' cells, floors and verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.table import Table as Grid
from rich.text import Text

from kdtrain.experiments import campaign, study
from kdtrain.experiments.campaign import LEGEND, Campaign, Order, make_campaign
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.study import Result
from kdtrain.experiments.tables.paper import FULL, SOURCE, WIDTHS, At, BlockSpec, Claim, TableSpec
from kdtrain.experiments.tables.stages import TABLES, Request, RunOf, groups, stages
from kdtrain.reports.tables import files, verdicts
from kdtrain.reports.tables.data import Block, Cell, Row, Table, Trend
from kdtrain.reports.tables.text import show
from kdtrain.reports.writing import lower_is_better


def main(request: Request, order: Order) -> int:
    """The command: plan, print it, train, write the tables; exit status 0, 1 or 130."""
    seed = replace(request, seeds=request.seeds[:1])
    return campaign.run_study(
        lambda: stages((run for group in groups(seed) for run in group.runs), seed),
        lambda: make_plan(request, order),
        _overview,
        lambda plan, outcomes, _: write_tables(request, plan, outcomes),
        order,
    )


def make_plan(request: Request, order: Order) -> Campaign[RunOf]:
    """Times a few steps of each distinct kind of run and takes groups, in order, while they fit
    the budget.
    """
    asked = groups(request)
    runs = _known([run for group in asked for run in group.runs], request, order.root)
    planned = dict(zip(runs, stages(runs, request), strict=True))
    say = (lambda _: None) if order.dry_run else order.console.print
    return make_campaign(asked, planned, order, say)


def _known(asked: Sequence[RunOf], request: Request, root: Path) -> list[RunOf]:
    """The runs that were asked for, and those of any table whose folders are there, with their
    inputs, in an order that can be run: what is finished is shown whatever was asked.
    """
    everything = replace(request, tables=TABLES, widths=WIDTHS)
    others = (run for group in groups(everything) for run in group.runs)
    ordered = list(dict.fromkeys([*asked, *others]))
    kept = set(asked) | {run for run in ordered if (root / run.name).is_dir()}
    by_name = {run.name: run for run in ordered}
    for stage in reversed(stages([run for run in ordered if run in kept], request)):
        kept |= {by_name[name] for name in stage.inputs}
    return [run for run in ordered if run in kept]


def write_tables(request: Request, plan: Campaign[RunOf], outcomes: Mapping[str, Outcome]) -> None:
    """Read the run folders, print the requested tables, and write their files below root."""
    order, results = plan.order, study.read_all(plan, outcomes)
    collection = Collection(request, results)
    seeds = ", ".join(map(str, request.seeds))
    teachers = " (teachers: the first alone)" if request.shared_teachers else ""
    setting = [("command", order.command), ("scale", request.scale), ("seeds", seeds + teachers)]
    setting += study.about(results.values(), order.jobs)
    folder = order.root / "tables"
    earlier = [n for n in TABLES if n not in request.tables and (folder / f"{n}.csv").exists()]
    tables = {
        name: table(request.specs[name], collection, setting)
        for name in sorted((*request.tables, *earlier))
    }
    for name in request.tables:
        show(tables[name], order.console)
    written = files.write_all(list(tables.values()), folder)
    order.console.print(f"tables: {written['html']}, and as text, CSV and PNG beside it")


def _overview(plan: Campaign[RunOf], states: Mapping[str, str]) -> RenderableType:
    """A line a kind of run, a mark for each seed, the narrow students first."""
    lines: dict[str, dict[str, dict[int, Text]]] = {}
    for run in sorted(plan.stages, key=lambda run: (run.second, -run.width)):
        task, _, kind = run.part.partition("_")
        name = f"{'second ' if run.second else ''}{kind}"
        widths = lines.setdefault(task, {}).setdefault(name, {})
        widths.setdefault(run.width, Text()).append(*plan.mark(run, states))
    grids = []
    for task, found in lines.items():
        grid = Grid.grid(padding=(0, 1))
        grid.add_row(Text(task, "bold"), "")
        for name, widths in found.items():
            grid.add_row(name, Text(" ").join(widths.values()))
        grids.append(grid)
    return RichGroup(Columns(grids, padding=(0, 3)), Text(LEGEND, "dim"))


@dataclass(frozen=True)
class Collection:
    """Every run that the tables speak of, by what it is."""

    request: Request
    results: Mapping[RunOf, Result]

    def of(self, at: At, second: bool) -> list[Result]:
        """The runs behind a cell, one a seed; a shared teacher is one run."""
        runs = [self.request.run_of(at, seed, second) for seed in self.request.seeds]
        return [self.results.get(run, Result(Path())) for run in dict.fromkeys(runs)]

    def cell(self, at: At | None, metric: str, second: bool) -> Cell:
        """A cell's mean and spread in percent, or why it has none: the worst of its seeds."""
        if at is None:
            return study.NOT_THERE
        return study.cell_of(self.of(at, second), metric, at.phase, at.paper)

    def trend(self, claim: Claim) -> Trend:
        """The claim's fate over the seeds that both arms have, of the pairs that are there."""
        pairs = list(zip(claim.better, claim.worse, strict=True))
        arms = [[(self.of(at, claim.second), at.phase) for at in pair] for pair in pairs]
        higher = not lower_is_better(claim.metric)
        better = partial(verdicts.compare, higher_is_better=higher)
        rule = verdicts.neutral if claim.neutral else better
        verdict, kept, diverged = study.judged(arms, claim.metric, rule)
        notes = ["about neutral: within 2 points"] if claim.neutral else []
        if kept and len(kept) < len(pairs):
            notes.append(f"over {len(kept)} of {len(pairs)} pairs")
        if diverged:
            notes.append("an arm diverged" if not kept else "seeds that diverged are left out")
        counted = [pairs[place] for place in kept] or pairs
        known = [
            (1 if higher else -1) * (a.paper - b.paper)
            for a, b in counted
            if a.paper is not None and b.paper is not None
        ]
        paper = float(np.mean(known)) if len(known) == len(counted) else None
        digits = _digits(claim.metric)
        return Trend(claim.code, claim.text, verdict, paper, "; ".join(notes), digits)


def table(spec: TableSpec, collection: Collection, setting: Sequence[tuple[str, str]]) -> Table:
    """A table of the paper with the numbers that are there."""
    blocks = tuple(_block(block, collection) for block in spec.blocks)
    trends = tuple(collection.trend(claim) for claim in spec.claims)
    notes = [note for block in blocks for note in _uninformative(block)]
    return Table(
        spec.name, spec.title, f"{SOURCE}, table {spec.name.removeprefix('table')}", blocks,
        trends, tuple(dict.fromkeys(notes)), tuple(setting),
    )  # fmt: skip


def _block(spec: BlockSpec, collection: Collection) -> Block:
    rows = [
        Row(
            line.name,
            line.kind,
            tuple(collection.cell(at, spec.metric, spec.second) for at in line.places),
        )
        for line in spec.lines
    ]
    rows += _floors(spec, collection)
    higher, digits = not lower_is_better(spec.metric), _digits(spec.metric)
    return Block(spec.title, spec.columns, tuple(rows), spec.metric, higher, digits=digits)


def _digits(metric: str) -> int:
    """Decimals of a percentage: errors of a few percent need two."""
    return 2 if metric == "nrmse" else 1


def _floors(spec: BlockSpec, collection: Collection) -> list[Row]:
    """Raw pixels, and an untrained network for each width, of the block's own runs."""

    def floor(places: Sequence[At], kind: str) -> float | None:
        found = {r.folder.name: r for at in places for r in collection.of(at, spec.second)}
        return study.mean_floor(found.values(), kind, spec.metric)

    columns = [
        [at for at in column if at is not None]
        for column in zip(*(line.places for line in spec.lines), strict=True)
    ]
    every = [at for column in columns for at in column]
    students = [[at for at in column if at.width != FULL] for column in columns]
    if len({at.width for at in every} - {FULL}) == 1:
        students = [[at for at in every if at.width != FULL]]
    raw = "mean shape" if spec.metric == "nrmse" else "raw pixels"
    found = [
        (raw, [floor(every, "floors")]),
        ("untrained network", [floor(places, "untrained") for places in students]),
    ]
    return study.floor_rows(
        (name, [*values, *[None] * (len(columns) - len(values))]) for name, values in found
    )


def _uninformative(block: Block) -> list[str]:
    """The label of a block whose teacher does not beat the floor that learns nothing."""
    teacher = [row.cells[0].value for row in block.rows if row.kind == "teacher"]
    floors = [row.cells[0].value for row in block.rows if row.kind == "floor"]
    sign = 1 if block.higher_is_better else -1
    return [
        f"uninformative: {block.title}: the teacher ({a:.1f}) does not beat the floor ({b:.1f})"
        for a in teacher
        for b in floors[:1]
        if a is not None and b is not None and sign * (a - b) <= 0
    ]
