"""The parts of a result table, finished or not: cells, rows, blocks, trends.

Plain values: kdtrain/experiments fills them from run directories,
verdicts.py judges the trends, files.py writes them down. Numbers are in
percent, differences in points (hundredths), as the paper prints them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

CellState = Literal[
    "done", "not run", "unfinished", "diverged", "failed", "not measured", "no difference", "none"
]
RowKind = Literal["paper", "control", "extra", "floor", "teacher"]
ONE_SEED: Final = "one seed: no verdict"
VerdictState = Literal[
    "held", "reversed", "inconclusive", "one seed: no verdict", "diverged", "not run"
]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim about two rows was seen, and by how much (verdicts.py)."""

    state: VerdictState
    difference: float | None = None
    """Mean over seeds and items, in points; positive as claimed. None: not run."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval, in points."""
    seeds: int = 0
    """Seeds that both arms have; with 1 the interval is over test items alone, and no verdict."""
    agreeing: int = 0
    """Seeds whose own mean difference is as claimed."""
    items: int = 0
    margin: float | None = None
    """Points, where the claim is "about neutral": no difference larger than this. Else None."""
    one_sided: bool = False
    """The claim is "not worse": by more than the margin."""


@dataclass(frozen=True)
class Cell:
    """One number of a table: mean over seeds in percent, or why there is none.

    state: done | not run | unfinished (interrupted) | diverged | failed | not measured (the data
    have not what the metric needs) | no difference (a speed-up within the quartiles), or none where
    the table has no such cell (printed as a dash).
    Only a done cell has a value; one that is done with fewer seeds than per_seed has places for
    shows that.
    """

    value: float | None = None
    spread: float | None = None
    """Sample standard deviation over seeds (n - 1); None with one seed."""
    per_seed: tuple[float | None, ...] = ()
    """One place per seed; None where that seed has no number. Also of cells that are not done."""
    paper: float | None = None
    """The paper's number for this cell, on its own data."""
    state: CellState = "not run"
    note: str = ""
    shown: str = ""
    """The printed form of a value that is no percentage, such as "77.3 k"; "" for percentages."""

    def __post_init__(self) -> None:
        assert (self.state == "done") == (self.value is not None), (self.state, self.value)

    @property
    def seeds(self) -> int:
        """Seeds that have a number."""
        return sum(value is not None for value in self.per_seed)

    @classmethod
    def of(
        cls, per_seed: Sequence[float | None], *, paper: float | None = None, note: str = ""
    ) -> Cell:
        """A done cell from its numbers in percent, one per seed, None where a seed has none; one
        has a number.
        """
        known = [value for value in per_seed if value is not None]
        spread = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), spread, tuple(per_seed), paper, "done", note)


@dataclass(frozen=True)
class Row:
    """One line of a block, a cell for each of its columns."""

    name: str
    kind: RowKind
    """paper: a row of the paper's table; control: same schedule, no teacher, or as long; extra:
    not in the paper; floor: learns nothing; teacher."""
    cells: tuple[Cell, ...]
    note: str = ""
    """Small print below the name, such as the network."""


@dataclass(frozen=True)
class Block:
    """Rows that share columns and one metric."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    metric: str
    """As results.json names it: top1, nrmse, nn_top1, pair_accuracy."""
    higher_is_better: bool = True
    unit: str = "%"
    """"" where columns have units of their own."""
    digits: int = 1
    """Decimals that are printed: 1 for accuracies, 2 for errors of a few percent."""


@dataclass(frozen=True)
class Trend:
    """A claim of the paper and what became of it here."""

    code: str
    """T1 to T5, as design and docs number them."""
    claim: str
    """Such as "soft > hidden, from scratch"."""
    verdict: Verdict
    paper: float | None = None
    """The difference in the paper, in points, positive as claimed."""
    note: str = ""
    digits: int = 1


@dataclass(frozen=True)
class Table:
    """One table of the paper with ours beside it, the trends it shows, and how it was made."""

    name: str
    """table1 to table5: the name of its files."""
    title: str
    source: str
    blocks: tuple[Block, ...]
    trends: tuple[Trend, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines for the reader, such as "uninformative: the teacher does not beat raw pixels"."""
    setting: tuple[tuple[str, str], ...] = ()
    """(word, text): data, seeds, machine, time, command."""
