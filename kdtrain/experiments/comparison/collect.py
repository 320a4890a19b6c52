"""Run folders of a comparison read into one table: a row a method, accuracy and cost as columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from kdtrain.config import Config
from kdtrain.experiments import study
from kdtrain.experiments.comparison import cost
from kdtrain.experiments.comparison.cost import Length, Quartiles, Size, Speeds
from kdtrain.experiments.comparison.request import Place, Request, RunOf
from kdtrain.experiments.study import Result, where
from kdtrain.reports.tables import verdicts
from kdtrain.reports.tables.data import Block, Cell, Row, RowKind, Table, Trend
from kdtrain.reports.writing import count
from kdtrain.training.checkpoint import read_arrays

METRICS = {
    "nn_top1": "NN top-1",
    "nn_top1_other_video": "NN, other videos",
    "pair_accuracy": "pairs",
    "tar_at_far_0.01_all": "TAR@1e-2",
    "tar_at_far_0.001_all": "TAR@1e-3",
    "tar_at_far_0.0001_all": "TAR@1e-4",
    "asym_nn_top1": "asym. NN",
    "asym_nn_top1_other_video": "asym. NN, other videos",
    "asym_pair_accuracy": "asym. pairs",
    "asym_tar_at_far_0.001_all": "asym. TAR@1e-3",
}
"""Columns, where any run has them."""
HEADLINE = ("nn_top1", "nn_top1_other_video", "pair_accuracy", "tar_at_far_0.001_all")
"""Those that stand side by side for every resolution."""
COSTS = (
    *("network", "backbone", "head, dropped", "multiply-adds", "images/s, 1"),
    *("images/s, 64", "speed-up, 1", "speed-up, 64", "epochs", "images", "start epochs"),
)
TITLE = "methods under one budget"


class Claim(NamedTuple):
    """One method does better than another, or at least as well."""

    code: str
    """The system that it is about, as design and docs number them."""
    better: str
    worse: str
    at_least: bool = False
    """Claimed is no more than "not worse": held within verdicts.MARGIN_POINTS."""

    @property
    def text(self) -> str:
        """'th_kd > soft'."""
        return f"{self.better} {'≥' if self.at_least else '>'} {self.worse}"


CLAIMS = (
    Claim("B1", "th_kd", "soft"),
    Claim("B2", "sh_kd", "soft"),
    Claim("E", "soft", "student"),
    Claim("D", "proxyless", "student"),
    Claim("F", "adadistill", "student"),
    Claim("C", "kt", "scratch"),
    Claim("C", "kd", "scratch"),
    Claim("C", "kt_kd", "kt", at_least=True),
    Claim("C", "kt_kd", "kd", at_least=True),
)

ITEMS = ("nn_top1", "nn_top1_other_video", "pair_accuracy")
"""Metrics by which a claim is judged: right or wrong for each image, and for each pair."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and its figure are made of."""

    request: Request
    results: Mapping[RunOf, Result]
    configs: Mapping[RunOf, Config]
    lengths: Mapping[RunOf, Length] = field(default_factory=dict)
    """Of the first seed."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """By network_key."""
    speeds: Mapping[str, Speeds] = field(default_factory=dict)
    """By network_key."""

    def runs(self, method: str, place: Place) -> list[RunOf]:
        """The runs of a method, one a seed; a teacher has its own size at every resolution."""
        return [self.request.run_of(method, seed, place) for seed in self.request.seeds]

    def of(self, method: str, place: Place) -> list[Result]:
        """What these runs gave."""
        return [self.results[run] for run in self.runs(method, place)]

    def network(self, method: str, place: Place) -> str:
        """The key of a method's network."""
        return cost.network_key(self.configs[self.runs(method, place)[0]])

    @property
    def methods(self) -> tuple[str, ...]:
        """The rows: the students' methods, then whom they learn from."""
        return (*self.request.students, *self.request.teachers)

    def metrics(self, second: bool) -> list[str]:
        """The metrics that a finished run of a data source has."""
        found = [r for run, r in self.results.items() if run.second == second]
        return [m for m in METRICS if any(r.metric(m) is not None for r in found)]

    def kind(self, method: str) -> RowKind:
        """teacher; control: takes nothing from another run; paper: a method of one."""
        if method in self.request.teachers:
            return "teacher"
        return "control" if self.request.is_control(method) else "paper"


def table(comparison: Comparison, setting: Sequence[tuple[str, str]], name: str) -> Table:
    """The table with the numbers that are there."""
    request = comparison.request
    asked = [one for one in CLAIMS if {one.better, one.worse} <= set(request.students)]
    blocks: list[Block] = []
    trends: list[Trend] = []
    notes: list[str] = []
    for second in request.sources:
        places, metrics = request.places(second), comparison.metrics(second)
        with_items = [metric for metric in ITEMS if metric in metrics] or ITEMS[:1]
        if len(places) > 1:
            known = [metric for metric in HEADLINE if metric in metrics]
            cells = [(place, metric) for place in places for metric in known]
            columns = [f"{place.side} pixels: {METRICS[metric]}" for place, metric in cells]
            title = f"resolutions side by side{where(second)}"
            blocks.append(_block(comparison, cells, columns, title))
        for place in places:
            cells = [(place, metric) for metric in metrics]
            columns = [METRICS[metric] for metric in metrics]
            block = _block(comparison, cells, columns, f"accuracy{place.title}")
            blocks += [block, _cost(comparison, place)]
            trends += [trend(comparison, claim, m, place) for claim in asked for m in with_items]
            notes += _uninformative(block)
        runs = {m: comparison.runs(m, places[0])[0] for m in request.students}
        known = {m: comparison.lengths.get(run) for m, run in runs.items()}
        own = {method: length for method, length in known.items() if length is not None}
        notes += [f"{method}: {note}" for method, note in cost.other_lengths(own).items()]
    return Table(
        name, TITLE, f"kdtrain compare, {request.folder}", tuple(blocks), tuple(trends),
        tuple(dict.fromkeys(notes)), tuple(setting),
    )  # fmt: skip


def _block(
    comparison: Comparison, cells: Sequence[tuple[Place, str]], columns: Sequence[str], title: str
) -> Block:
    """A row a method with these metrics at these places; below it the floors."""
    rows = []
    for method in comparison.methods:
        found = (study.cell_of(comparison.of(method, place), metric) for place, metric in cells)
        # asymmetric evaluation is some recipes' alone
        shown = tuple(study.NOT_THERE if cell.state == "not measured" else cell for cell in found)
        rows.append(Row(method, comparison.kind(method), shown))
    rows += study.floor_rows(
        (name, [floor(comparison, kind, metric, place) for place, metric in cells])
        for name, kind in (("raw pixels", "floors"), ("untrained network", "untrained"))
    )
    return Block(title, tuple(columns), tuple(rows), "test split")


def floor(comparison: Comparison, kind: str, metric: str, place: Place) -> float | None:
    """The mean of a floor over the finished runs of the methods, in percent; None without any."""
    found = (r for m in comparison.request.students for r in comparison.of(m, place))
    return study.mean_floor(found, kind, metric)


def _uninformative(block: Block) -> list[str]:
    """A note for each metric in which no teacher beats raw pixels."""
    floors = [row.cells for row in block.rows if row.name == "raw pixels"]
    teachers = [row.cells for row in block.rows if row.kind == "teacher"]
    notes = []
    for low, column, *cells in (
        zip(*floors, block.columns, *teachers, strict=True) if floors else ()
    ):
        best = [cell.value for cell in cells if cell.value is not None]
        if low.value is not None and best and max(best) <= low.value:
            notes.append(f"uninformative: {block.title}, {column}: no teacher beats raw pixels")
    return notes


def _cost(comparison: Comparison, place: Place) -> Block:
    def speeds_of(method: str) -> Speeds:
        return comparison.speeds.get(comparison.network(method, place), {})

    base = speeds_of(comparison.request.teachers[0]) if comparison.request.teachers else {}
    rows = []
    for method in comparison.methods:
        size = comparison.sizes.get(comparison.network(method, place))
        network: tuple[Cell, ...] = (study.NOT_THERE,) * 4
        if size is not None:
            network = (
                _shown(size.side, lambda side, name=size.name: f"{name}, {side} px"),
                _shown(size.backbone, count),
                _shown(_head(comparison.of(method, place), size), count),
                _shown(size.multiply_adds, count),
            )
        speed = speeds_of(method)
        length = comparison.lengths.get(comparison.runs(method, place)[0])
        training: tuple[Cell, ...] = (study.NOT_THERE,) * 3
        needs = ""
        if length is not None:
            training = (
                _shown(length.epochs),
                _shown(length.images, count),
                _shown(length.start_epochs),
            )
            needs = f"needs {', '.join(length.needs)}" if length.needs else ""
        cells = (
            *network,
            *(_speed(speed.get(batch)) for batch in (1, 64)),
            *(_speed_up(speed.get(batch), base.get(batch)) for batch in (1, 64)),
            *training,
        )
        rows.append(Row(method, comparison.kind(method), cells, needs))
    return Block(f"cost{place.title}", COSTS, tuple(rows), "cost", unit="", digits=0)


def _head(found: Sequence[Result], size: Size) -> int | None:
    """Parameters of a method's heads: networks of one backbone may have different ones."""
    for result in found:
        if result.state == "done":
            parameters = result.results["parameters"]
            total = parameters.get("student", parameters.get("network"))
            return None if total is None else total - size.backbone
    return None


def _shown(value: float | None, form: Callable[[float], str] = str) -> Cell:
    """A number that is no percentage."""
    return study.NOT_THERE if value is None else Cell(float(value), state="done", shown=form(value))


def _speed(one: Quartiles | None) -> Cell:
    if one is None:
        return study.NOT_THERE
    quartiles = f"[{per_second(one.low)}, {per_second(one.high)}]"
    return Cell(one.median, state="done", shown=per_second(one.median), note=quartiles)


def _speed_up(one: Quartiles | None, base: Quartiles | None) -> Cell:
    if one is None or base is None:
        return study.NOT_THERE
    ratio = one.median / base.median
    return _shown(ratio, lambda _: f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x")


def per_second(value: float) -> str:
    """'1,234', '12.3'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def trend(comparison: Comparison, claim: Claim, metric: str, place: Place) -> Trend:
    """One claim by one metric, over the seeds that both methods have."""
    rule = partial(verdicts.compare, higher_is_better=True)
    pair = [(comparison.of(method, place), -1) for method in (claim.better, claim.worse)]
    verdict, kept, diverged = study.judged(
        [pair], metric, verdicts.at_least if claim.at_least else rule
    )
    notes = []
    if kept and claim.at_least:
        notes.append(f"held: worse by less than {verdicts.MARGIN_POINTS:g} points")
    if diverged:
        notes.append("seeds that diverged are left out" if kept else "a method diverged")
    text = f"{claim.text}, {METRICS[metric]}{place.title}"
    return Trend(claim.code, text, verdict, None, "; ".join(notes))


def curves(
    comparison: Comparison, method: str, place: Place
) -> tuple[np.ndarray, np.ndarray] | None:
    """A method's TAR over FAR: the rates (n,) and a row a seed (S, n); None where there is none."""
    found = []
    for result in comparison.of(method, place):
        arrays = read_arrays(result.folder / "samples.npz") if result.state == "done" else {}
        if "all_far" in arrays:
            found.append((arrays["all_far"], arrays["all_tar"]))
    if not found:
        return None
    far = found[0][0]  # of the labels alone, so the same for every seed
    return far, np.stack([tar for rates, tar in found if np.array_equal(rates, far)])
