"""Run folders of a comparison read into one table: a row a method, accuracy and cost as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kdtrain.config import Config
from kdtrain.experiments import verdicts
from kdtrain.experiments.comparison.cost import Length, Size, Speeds, network_key, other_lengths
from kdtrain.experiments.comparison.request import Request, RunOf
from kdtrain.experiments.tables.collect import Result, cell_of, floor_rows, mean_floor
from kdtrain.reports import writing
from kdtrain.reports.tables.data import Block, Cell, Row, RowKind, Table, Trend, Verdict
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
"""Metrics by which a claim is judged: right or wrong for each picture, and for each pair."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and its picture are made of."""

    request: Request
    results: Mapping[RunOf, Result]
    configs: Mapping[RunOf, Config]
    lengths: Mapping[bool, Mapping[RunOf, Length]] = field(default_factory=dict)
    """By data source (whether it is the second)."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """By network_key."""
    speeds: Mapping[str, Speeds] = field(default_factory=dict)
    """By network_key."""

    def runs(self, method: str, side: int | None, second: bool) -> list[RunOf]:
        """The runs of a method, one a seed; a teacher has its own size at every resolution."""
        side = None if method in self.request.teachers else side
        seeds = self.request.seeds
        return [self.request.run_of(method, seed, side, second) for seed in seeds]

    def of(self, method: str, side: int | None, second: bool) -> list[Result]:
        """What these runs gave."""
        return [self.results[run] for run in self.runs(method, side, second)]

    def network(self, method: str, side: int | None, second: bool) -> str:
        """The key of a method's network."""
        return network_key(self.configs[self.runs(method, side, second)[0]])

    @property
    def methods(self) -> tuple[str, ...]:
        """The rows: the students' methods, then whom they learn from."""
        return (*self.request.students, *self.request.teachers)

    def metrics(self, second: bool) -> list[str]:
        """The metrics that a finished run of a data source has."""
        found = [r for run, r in self.results.items() if run.second == second]
        return [m for m in METRICS if any(r.metric(m, -1) is not None for r in found)]

    def kind(self, method: str) -> RowKind:
        """teacher; control: takes nothing from another run; paper: a method of one."""
        if method in self.request.teachers:
            return "teacher"
        return "control" if self.request.is_control(method) else "paper"


class Place(NamedTuple):
    """A column block: one resolution on one data source."""

    side: int | None
    second: bool


def table(comparison: Comparison, setting: Sequence[tuple[str, str]], name: str) -> Table:
    """The table with the numbers that are there."""
    request = comparison.request
    blocks: list[Block] = []
    trends: list[Trend] = []
    notes: list[str] = []
    for second in request.sources:
        where = ", second data source" if second else ""
        if len(request.sides) > 1:
            blocks.append(_side_by_side(comparison, second, where))
        for side in request.sides:
            place = Place(side, second)
            size = f", {side} pixels" if side is not None else ""
            block = _accuracy(comparison, place, f"accuracy{size}{where}")
            blocks += [block, _cost(comparison, place, f"cost{size}{where}")]
            trends += _trends(comparison, place, f"{size}{where}")
            notes += _uninformative(block)
        own = _own_lengths(comparison, second)
        notes += [f"{method}: {note}" for method, note in other_lengths(own).items()]
    return Table(
        name, TITLE, f"kdtrain compare, {request.folder}", tuple(blocks), tuple(trends),
        tuple(dict.fromkeys(notes)), tuple(setting),
    )  # fmt: skip


def _own_lengths(comparison: Comparison, second: bool) -> dict[str, Length]:
    """Of the students' methods, at the first resolution."""
    known, side = comparison.lengths.get(second, {}), comparison.request.sides[0]
    runs = {m: comparison.runs(m, side, second)[0] for m in comparison.request.students}
    return {method: known[run] for method, run in runs.items() if run in known}


def _accuracy(comparison: Comparison, place: Place, title: str) -> Block:
    metrics = comparison.metrics(place.second)
    cells = [(place, metric) for metric in metrics]
    return _block(comparison, cells, [METRICS[metric] for metric in metrics], title)


def _side_by_side(comparison: Comparison, second: bool, where: str) -> Block:
    """A column block for each resolution."""
    known = [m for m in HEADLINE if m in comparison.metrics(second)]
    cells = [(Place(side, second), m) for side in comparison.request.sides for m in known]
    columns = [f"{place.side} pixels: {METRICS[metric]}" for place, metric in cells]
    return _block(comparison, cells, columns, f"resolutions side by side{where}")


def _block(
    comparison: Comparison,
    cells: Sequence[tuple[Place, str]],
    columns: Sequence[str],
    title: str,
) -> Block:
    """A row a method with these metrics at these places; below it raw pixels, and the methods'
    networks before their first step.
    """
    rows = [
        Row(
            method,
            comparison.kind(method),
            tuple(_cell(comparison, method, metric, place) for place, metric in cells),
        )
        for method in comparison.methods
    ]
    rows += floor_rows(
        (name, [floor(comparison, kind, metric, place) for place, metric in cells])
        for name, kind in (("raw pixels", "floors"), ("untrained network", "untrained"))
    )
    return Block(title, tuple(columns), tuple(rows), "test split")


def _cell(comparison: Comparison, method: str, metric: str, place: Place) -> Cell:
    cell = cell_of(comparison.of(method, place.side, place.second), metric)
    # asymmetric evaluation is some recipes' alone
    return Cell(state="none") if cell.state == "not measured" else cell


def floor(comparison: Comparison, kind: str, metric: str, place: Place) -> float | None:
    """The mean of a floor over the finished runs of the methods, in percent; None without any."""
    found = (r for m in comparison.request.students for r in comparison.of(m, *place))
    return mean_floor(found, kind, metric)


def _uninformative(block: Block) -> list[str]:
    """A note for each metric in which no teacher beats raw pixels."""
    floors = next((row for row in block.rows if row.name == "raw pixels"), None)
    teachers = [row for row in block.rows if row.kind == "teacher"]
    notes = []
    for number, column in enumerate(block.columns if floors is not None else ()):
        assert floors is not None
        low = floors.cells[number].value
        best = [row.cells[number].value for row in teachers if row.cells[number].value is not None]
        if low is not None and best and max(value for value in best if value is not None) <= low:
            notes.append(f"uninformative: {block.title}, {column}: no teacher beats raw pixels")
    return notes


def _cost(comparison: Comparison, place: Place, title: str) -> Block:
    teacher = next(iter(comparison.request.teachers), None)
    base = None
    if teacher is not None:
        base = comparison.speeds.get(comparison.network(teacher, *place))
    columns = (
        *("network", "backbone", "head, dropped", "multiply-adds", "images/s, 1"),
        *("images/s, 64", "speed-up, 1", "speed-up, 64", "epochs", "images", "start epochs"),
    )
    rows = []
    for method in comparison.methods:
        key = comparison.network(method, *place)
        size, speed = comparison.sizes.get(key), comparison.speeds.get(key)
        head = None if size is None else _own_head(comparison, method, place)
        length = comparison.lengths.get(place.second, {}).get(comparison.runs(method, *place)[0])
        needs = "" if length is None or not length.needs else f"needs {', '.join(length.needs)}"
        cells = (
            _shown(size and size.side, size and f"{size.name}, {size.side} px"),
            _shown(size and size.backbone, size and writing.count(size.backbone)),
            _shown(head, head is not None and writing.count(head)),
            _shown(size and size.multiply_adds, size and writing.count(size.multiply_adds)),
            *(_speed(speed, batch) for batch in (1, 64)),
            *(_speed_up(speed, base, batch) for batch in (1, 64)),
            _shown(length and length.epochs, length and str(length.epochs)),
            _shown(length and length.pictures, length and writing.count(length.pictures)),
            _shown(length and length.start_epochs, length and str(length.start_epochs)),
        )
        rows.append(Row(method, comparison.kind(method), cells, needs))
    return Block(title, columns, tuple(rows), "cost", unit="", digits=0)


def _own_head(comparison: Comparison, method: str, place: Place) -> int | None:
    """Parameters of a method's heads: networks of one backbone may have different ones."""
    found = [r for r in comparison.of(method, *place) if r.state == "done"]
    if not found:
        return None
    parameters = found[0].results["parameters"]
    total = parameters.get("student", parameters.get("network"))
    size = comparison.sizes[comparison.network(method, *place)]
    return None if total is None else total - size.backbone


def _shown(value: Any, text: Any) -> Cell:
    """A number that is no percentage."""
    if value is None or not text:
        return Cell(state="none")
    return Cell(float(value), state="done", shown=str(text))


def _speed(speed: Speeds | None, batch: int) -> Cell:
    if speed is None or batch not in speed:
        return Cell(state="none")
    one = speed[batch]
    quartiles = f"[{per_second(one.low)}, {per_second(one.high)}]"
    return Cell(one.median, state="done", shown=per_second(one.median), note=quartiles)


def _speed_up(speed: Speeds | None, base: Speeds | None, batch: int) -> Cell:
    if speed is None or base is None or batch not in speed or batch not in base:
        return Cell(state="none")
    ratio = speed[batch].median / base[batch].median
    return Cell(ratio, state="done", shown=f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x")


def per_second(value: float) -> str:
    """'1,234', '12.3'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _trends(comparison: Comparison, place: Place, where: str) -> list[Trend]:
    """The fate of each claim whose methods were asked for, by each metric with items."""
    students = comparison.request.students
    asked = [claim for claim in CLAIMS if claim.better in students and claim.worse in students]
    metrics = [m for m in ITEMS if m in comparison.metrics(place.second)] or list(ITEMS[:1])
    return [trend(comparison, claim, metric, place, where) for claim in asked for metric in metrics]


def trend(
    comparison: Comparison, claim: Claim, metric: str, place: Place, where: str = ""
) -> Trend:
    """One claim by one metric, over the seeds that both methods have."""
    arms = [comparison.of(method, *place) for method in (claim.better, claim.worse)]
    ours, theirs = ([result.items(metric, -1) for result in arm] for arm in arms)
    both = [a is not None and b is not None for a, b in zip(ours, theirs, strict=True)]
    diverged = any(result.state == "diverged" for arm in arms for result in arm)
    note = ""
    if not any(both):
        verdict = Verdict("diverged" if diverged else "not run")
        note = "a method diverged" if diverged else ""
    elif claim.at_least:
        verdict = verdicts.at_least(ours, theirs)
        note = f"held: worse by less than {verdicts.MARGIN_POINTS:g} points"
    else:
        verdict = verdicts.compare(ours, theirs, higher_is_better=True)
    if any(both) and diverged:
        note = "; ".join(filter(None, (note, "seeds that diverged are left out")))
    return Trend(claim.code, f"{claim.text}, {METRICS[metric]}{where}", verdict, None, note)


def curves(
    comparison: Comparison, method: str, place: Place
) -> tuple[np.ndarray, np.ndarray] | None:
    """A method's TAR over FAR: the rates (n,) and a row a seed (S, n); None where there is none."""
    found = []
    for result in comparison.of(method, *place):
        arrays = read_arrays(result.folder / "samples.npz") if result.state == "done" else {}
        if "all_far" in arrays:
            found.append((arrays["all_far"], arrays["all_tar"]))
    if not found:
        return None
    far = found[0][0]  # of the labels alone, so the same for every seed
    return far, np.stack([tar for rates, tar in found if np.array_equal(rates, far)])
