"""The choice of targets from measured arms: the rule, the evidence as a table, and the recipe that
says why.

Plain values in, text out; select_targets.py trains the arms.
"""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from kdtrain.config import TARGETS, Config, settings
from kdtrain.reports.tables.data import Verdict, VerdictState
from kdtrain.reports.tables.verdicts import Scores, compare
from kdtrain.reports.writing import direction
from kdtrain.training import checkpoint

CANDIDATES = {row.name: row for row in TARGETS.values() if not row.alone}
"""The targets by name; a hint is a stage of its own."""
RULE = (
    "Rule: a target is judged by the paired bootstrap of its arm against none over seeds and "
    "images (95 %). held: its weight stays; reversed (it hurts): 0; inconclusive: 0 too, as a "
    "target without a gain still costs a pass of the teacher (--keep-inconclusive keeps it); "
    "diverged in any seed: 0."
)
WIDTH = 200  # of what is no terminal: the table takes what it needs


@dataclass(frozen=True)
class Arm:
    """What the runs of one combination of targets measured."""

    name: str
    """none, a target's name, or names with +."""
    weights: Mapping[str, float]
    """Target -> weight; empty for none."""
    scores: Scores
    """Per seed the metric of every image, as shares; None where the run diverged."""
    seeds: Sequence[int]
    """The seeds, in the order of scores."""
    images: Sequence[int]
    """Which images were measured, as places in the source; empty where every run diverged."""

    @property
    def per_seed(self) -> list[float | None]:
        """Mean over the measured images, in percent, None where the run diverged."""
        return [None if s is None else 100 * float(np.nanmean(s)) for s in self.scores]

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run diverged."""
        return [n for n, s in zip(self.seeds, self.scores, strict=True) if s is None]

    @property
    def average(self) -> str:
        """'20.4 ±0.3': mean and sample standard deviation over seeds, percent."""
        known = [value for value in self.per_seed if value is not None]
        if not known:
            return "-"
        spread = f" ±{statistics.stdev(known):.1f}" if len(known) > 1 else ""
        return f"{statistics.fmean(known):.1f}{spread}"


@dataclass(frozen=True)
class Judged:
    """An arm against none, and what follows."""

    arm: Arm
    verdict: Verdict
    """The difference is positive where the target helps, whichever way the metric points."""
    kept: bool

    @property
    def state(self) -> VerdictState:
        """The verdict's, or diverged where any seed did."""
        return "diverged" if self.arm.diverged else self.verdict.state

    @property
    def weight(self) -> float:
        """The weight that the chosen recipe gives the arm's one target."""
        return self.arm.weights[self.arm.name] if self.kept else 0.0


def judge(arm: Arm, none: Arm, higher_is_better: bool, keep_inconclusive: bool = False) -> Judged:
    """The verdict on one target and the decision by RULE.

    Raises ValueError when the arms measured different images, or none in common.
    """
    if arm.images and list(arm.images) != list(none.images):
        raise ValueError(f"judge: {arm.name} and {none.name} were measured on different images")
    verdict = compare(arm.scores, none.scores, higher_is_better=higher_is_better)
    if verdict.state == "not run" and not arm.diverged:
        raise ValueError(f"judge: no image was measured in both {arm.name} and none")
    wanted = ("held", "inconclusive") if keep_inconclusive else ("held",)
    return Judged(arm, verdict, not arm.diverged and verdict.state in wanted)


@dataclass(frozen=True)
class Check:
    """All kept targets in one run: reported, and overrides nothing."""

    judged: Judged
    """Against none."""
    best: str
    """The kept target with the largest gain alone."""
    against: Verdict
    """Against that one alone."""


def check(together: Arm, none: Arm, judged: Sequence[Judged], higher_is_better: bool) -> Check:
    """The arm with all kept targets, against none and against the best of them alone."""
    kept = [one for one in judged if one.kept]
    best = max(kept, key=lambda one: one.verdict.difference or 0.0).arm
    against = compare(together.scores, best.scores, higher_is_better=higher_is_better)
    return Check(judge(together, none, higher_is_better), best.name, against)


@dataclass(frozen=True)
class Selection:
    """Everything that a choice rests on."""

    split: str
    """The images that judged: validation or test."""
    metric: str
    higher_is_better: bool
    none: Arm
    judged: Sequence[Judged]
    check: Check | None
    """Where at least two targets are kept."""
    notes: Sequence[str]
    """What a reader must know about the evidence."""
    command: str

    @property
    def lines(self) -> list[tuple[Arm, Judged | None, str]]:
        """Each arm, its verdict and its weight: none, each target, all that are kept."""
        alone = [(one.arm, one, f"{one.weight:g}") for one in self.judged]
        together = [self.check.judged] if self.check is not None else []
        return [(self.none, None, ""), *alone, *((one.arm, one, "") for one in together)]

    def remarks(self) -> list[str]:
        """Sentences below the table: the outcome, the check, notes, the rule."""
        chosen = (f"target.{CANDIDATES[one.arm.name].key} {one.weight:g}" for one in self.judged)
        lines = [f"Chosen: {', '.join(chosen)}."]
        if self.check is not None:
            arm, best, against = self.check.judged.arm, self.check.best, self.check.against
            if arm.diverged:
                told = f"diverged with seed {' and '.join(map(str, arm.diverged))}"
            else:
                told = f"{_difference(against)} points, {_interval(against)}: {against.state}"
            lines.append(f"Check: {arm.name} better than {best} alone: {told}.")
            if arm.diverged or against.state == "reversed":
                lines.append(
                    f"Warning: together they do worse than {best} alone. They stay together, as "
                    f"in the paper; to keep {best} alone, set the other weights to 0."
                )
        if len(self.none.seeds) == 1:
            lines.append("Note: one seed, so the interval does not know how seeds differ.")
        return [*lines, *(f"Note: {note}." for note in self.notes), RULE]


HEADS = ("target", "weight", "per seed", "mean", "points", "95 %", "agree", "verdict", "then")


def rows(selection: Selection) -> list[tuple[str, ...]]:
    """The evidence as text: a row for none, each target, and all that are kept together."""
    found = []
    for arm, judged, then in selection.lines:
        name, weight = arm.name, " + ".join(f"{w:g}" for w in arm.weights.values())
        if selection.check is not None and judged is selection.check.judged:
            name, weight = "together", ""
        per_seed = " ".join("diverged" if v is None else f"{v:.1f}" for v in arm.per_seed)
        told = ("",) * 4
        if judged is not None:
            v = judged.verdict
            agreeing = f"{v.agreeing}/{v.seeds}" if v.seeds else "-"
            told = _difference(v), _interval(v), agreeing, judged.state
        found.append((name, weight, per_seed, arm.average, *told, then))
    return found


def table(selection: Selection) -> Table:
    """The evidence as a rich table."""
    first, last = selection.none.seeds[0], selection.none.seeds[-1]
    seeds = f"seeds {first} to {last}" if first != last else f"seed {first}"
    title = f"{selection.metric} % ({direction(not selection.higher_is_better)}), "
    title += f"{len(selection.none.images)} images of the {selection.split} split, {seeds}; "
    title += "points: gain over none"
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title)
    shown.padding = (0, 1, 0, 0)
    wraps = {"per seed": 4, "95 %": 6}  # in a narrow terminal: to one number a line
    for head in HEADS:
        side = "left" if head in ("target", "verdict") else "right"
        shown.add_column(head, justify=side, no_wrap=head not in wraps, min_width=wraps.get(head))
    for row in rows(selection):
        shown.add_row(*row)
    return shown


def text(selection: Selection) -> str:
    """Table and remarks as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, highlight=False, soft_wrap=True)
    console.print(table(selection))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    lines.append("")
    for remark in selection.remarks():
        lines += textwrap.wrap(remark, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, f"Command: {selection.command}"]) + "\n"


def csv_text(selection: Selection) -> str:
    """One line an arm: numbers in percent and points, unrounded; empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    seeds = [f"seed_{seed}" for seed in selection.none.seeds]
    heads = ("points", "low", "high", "agreeing", "seeds", "images", "verdict", "weight")
    writer.writerow(["arm", "split", "metric", *seeds, *heads])
    for arm, judged, weight in selection.lines:
        numbers, counts = arm.per_seed, ("",) * 8
        if judged is not None:
            v = judged.verdict
            numbers = [*numbers, v.difference, v.low, v.high]
            counts = (v.agreeing, v.seeds, v.items, judged.state, weight)
        values = ("" if value is None else f"{value:.6f}" for value in numbers)
        writer.writerow([arm.name, selection.split, selection.metric, *values, *counts])
    return stream.getvalue()


def recipe_text(selection: Selection, config: Config) -> str:
    """The chosen recipe: a head comment with the evidence, then every setting."""
    head = "Targets chosen by their individual influence (arXiv 1709.02929, section 5.4)."
    comment = "\n".join(f"# {line}".rstrip() for line in [head, *text(selection).splitlines()])
    return f"{comment}\n{settings.to_yaml(config)}"


def write(selection: Selection, config: Config, root: Path, out: Path) -> None:
    """Write ROOT/select-targets.txt and .csv, and the recipe to `out`."""
    checkpoint.write_text(root / "select-targets.txt", text(selection))
    checkpoint.write_text(root / "select-targets.csv", csv_text(selection))
    checkpoint.write_text(out, recipe_text(selection, config))


def _difference(verdict: Verdict) -> str:
    return "-" if verdict.difference is None else f"{verdict.difference:+.2f}"


def _interval(verdict: Verdict) -> str:
    if verdict.low is None or verdict.high is None:
        return "-"
    return f"{verdict.low:.2f} to {verdict.high:.2f}"
