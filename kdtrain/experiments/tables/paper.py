"""Tables 1 to 5 of arXiv 1709.02929 as printed, from recipes/studies/_paper_tables.yaml, which says
how it is written: kinds of runs, cells with the paper's numbers, and the paper's claims.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kdtrain.config import settings
from kdtrain.reports.tables.data import RowKind

WIDTHS = (2, 4, 8)
FULL = 1  # the width of teachers
LAST = -1  # the end of a run; 0 is the end of its first phase
SOURCE = "arXiv 1709.02929"
FILE = settings.RECIPES / "studies" / "_paper_tables.yaml"
_CELL = re.compile(r"(\w+)(?:/(\d))?(?:@(\d))?(?: \(([\d.]+)\))?")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of run: a recipe of the preset, its schedule, where it starts, and what is added."""

    name: str
    recipe: str
    schedule: str | None = None
    """Names phases in the preset's _tables.yaml, as classification.scratch; None: the recipe's."""
    start: str | None = None
    """Part whose last weights start the network; None: from scratch."""
    teacher: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    full_width: bool = False
    """A teacher: never divided, one a seed for all widths."""


@dataclass(frozen=True)
class At:
    """Where a number comes from: a kind of run, its width, the end of which phase."""

    part: str
    width: int
    paper: float | None = None
    """In percent."""
    phase: int = LAST


@dataclass(frozen=True)
class Line:
    """A row: one place for each column of its block."""

    name: str
    kind: RowKind
    places: tuple[At | None, ...]
    """None: the table has no such cell."""


@dataclass(frozen=True)
class BlockSpec:
    """Rows that share columns and a metric."""

    title: str
    columns: tuple[str, ...]
    metric: str
    lines: tuple[Line, ...]
    second: bool = False
    """On the second data source."""


@dataclass(frozen=True)
class Claim:
    """A trend as a comparison: `better` should beat `worse`, or equal it where `neutral`.

    Of several pairs, each one of `better` beside one of `worse`, the mean counts.
    """

    code: str
    text: str
    better: tuple[At, ...]
    worse: tuple[At, ...]
    metric: str
    neutral: bool = False
    second: bool = False


@dataclass(frozen=True)
class TableSpec:
    """One table of the paper."""

    name: str
    title: str
    blocks: tuple[BlockSpec, ...]
    claims: tuple[Claim, ...]


@cache
def _tree() -> Mapping[str, Any]:
    return settings.read_yaml(FILE)


def table_specs(second: bool = False) -> dict[str, TableSpec]:
    """Every table, by name; second: there is a second data source."""
    found = {}
    for name, tree in _tree()["tables"].items():
        blocks = tuple(map(_block, tree["blocks"]))
        claims = [claim for group in tree["claims"] for claim in _claims(group)]
        claims.sort(key=lambda claim: len(claim.better) == 1)  # those over several pairs first
        found[name] = TableSpec(
            name,
            tree["title"],
            tuple(block for block in blocks if second or not block.second),
            tuple(claim for claim in claims if second or not claim.second),
        )
    return found


def _block(tree: Mapping[str, Any]) -> BlockSpec:
    lines = tuple(
        Line(name, kind, tuple(None if text is None else _at(text) for text in cells))
        for name, kind, *cells in tree["lines"]
    )
    return BlockSpec(**{**tree, "columns": tuple(tree["columns"]), "lines": lines})


def _claims(tree: Mapping[str, Any]) -> list[Claim]:
    """The claims of a group and, where it says so, the claim over all of them."""
    shared = {key: tree[key] for key in ("metric", "neutral", "second") if key in tree}
    claims = [
        Claim(code, text, (_at(better),), (_at(worse),), **shared)
        for code, text, better, worse in tree["rows"]
    ]
    if "over_all" in tree:
        better, worse = (tuple(getattr(c, arm)[0] for c in claims) for arm in ("better", "worse"))
        text = f"over all: {tree['over_all']}"
        claims.append(Claim(claims[0].code, text, better, worse, **shared))
    return claims


def _at(text: str) -> At:
    match = _CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"{FILE}: no cell PART/WIDTH@PHASE (NUMBER): {text!r}")
    part, width, phase, paper = match.groups()
    return At(
        part, int(width or FULL), float(paper) if paper else None, int(phase) if phase else LAST
    )


def _part(name: str, tree: Mapping[str, Any]) -> Part:
    own = {key: value for key, value in tree.items() if "." in key}
    return Part(name=name, settings=own, **{k: v for k, v in tree.items() if k not in own})


PARTS: Mapping[str, Part] = {name: _part(name, tree) for name, tree in _tree()["parts"].items()}
