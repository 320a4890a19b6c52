"""Rows of bench/results: one a contender and incoming gradient, with where it comes from."""

import csv
import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import OWN
from bench.targets import FASTER, FLOOR, MEMORY, SLOWER, Target
from bench.timing import quartiles, ratio_of_medians

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUSY = 0.5  # rows measured while others took more than this share of the cores are marked

COLUMNS: tuple[str, ...] = (
    "date", "machine", "cores", "threads", "device", "torch", "kdkernels", "commit", "isa",
    "op", "case", "contender", "gradient", "rounds", "median_ms", "q25_ms", "q75_ms", "ratio",
    "ratio_low", "ratio_high", "floor_ms", "over_floor", "peak_mb", "target", "met", "load",
)  # fmt: skip
Row = dict[str, str]


def stamp(device: Any) -> Row:
    """What all rows of a run share: date, machine, cores, device, versions, commit."""
    import torch

    import kdkernels

    return {
        "date": datetime.date.today().isoformat(),
        "machine": device.describe(),
        "cores": str(os.cpu_count()),
        "device": device.name,
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The short commit of the checkout, "+dirty" where files other than results differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "none"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs/benchmarks*")
    return head + ("+dirty" if changed else "")


def results_file(shared: Row) -> Path:
    """bench/results/<date>-<processor>.csv"""
    slug = re.sub(r"[^a-z0-9]+", "-", shared["machine"].lower()).strip("-")
    return RESULTS / f"{shared['date']}-{slug}.csv"


def number(value: float | None) -> str:
    """Four significant digits; empty for None."""
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def gradient_text(gradient: float | None) -> str:
    """1, 0.37, or empty where there is none."""
    return "" if gradient is None else f"{gradient:g}"


def build_rows(
    shared: Row,
    op: str,
    case: str,
    floor_name: str,
    timed: dict,
    peaks: dict[str, float | None],
    targets: list[Target],
) -> list[Row]:
    """The rows of one case from a worker's answer; ratio: how many times faster native is.

    Targets of another instruction-set level than the one measured are left out.
    """
    times = {(name, gradient): np.array(ms) for name, gradient, ms in timed["times"]}
    targets = [t for t in targets if t.isa == timed["isa"]]
    floor_ms = float(np.median(times[floor_name, None]))
    own_first = next((v for (name, _), v in times.items() if name == OWN), None)
    rows = []
    for (name, gradient), ms in times.items():
        median, q25, q75 = quartiles(ms)
        ratio = low = high = None
        under = times.get((OWN, gradient), own_first)
        if name != OWN and under is not None:
            ratio, low, high = ratio_of_medians(ms, under)
        over_floor = median / floor_ms
        mine = targets_for_row(targets, name)
        met = [verdict(t, ratio, over_floor, peaks.get(name)) for t in mine]
        rows.append(
            {
                **shared,
                "threads": str(timed["threads"]),
                "isa": timed["isa"],
                "op": op,
                "case": case,
                "contender": name,
                "gradient": gradient_text(gradient),
                "rounds": str(len(ms)),
                "median_ms": number(median),
                "q25_ms": number(q25),
                "q75_ms": number(q75),
                "ratio": number(ratio),
                "ratio_low": number(low),
                "ratio_high": number(high),
                "floor_ms": number(floor_ms),
                "over_floor": number(over_floor),
                "peak_mb": number(peaks.get(name)),
                "target": "; ".join(t.text() for t in mine),
                "met": "; ".join(met),
                "load": number(timed["load"]),
            }
        )
    return rows


def targets_for_row(targets: list[Target], contender: str) -> list[Target]:
    """A promise stands beside the contender it names, else beside the op's own kernel."""
    return [t for t in targets if (t.against or OWN) == contender]


def verdict(target: Target, ratio: float | None, over_floor: float, peak_mb: float | None) -> str:
    """ "met", "missed", or "unknown" where memory could not be measured."""
    if target.kind == FASTER:
        kept = ratio is not None and ratio >= target.value
    elif target.kind == SLOWER:
        kept = ratio is not None and 1 / ratio <= target.value
    elif target.kind == FLOOR:
        kept = over_floor <= target.value
    else:
        assert target.kind == MEMORY
        if peak_mb is None:
            return "unknown"
        kept = peak_mb <= target.value
    return "met" if kept else "missed"


def group_key(row: Row) -> tuple[str, ...]:
    """What is replaced together: a case on a machine, at a level, with a number of threads."""
    return tuple(row[k] for k in ("machine", "device", "op", "case", "isa", "threads"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; ValueError where its columns are not ours."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"bench: {path} must have the columns {','.join(COLUMNS)}")
        return list(reader)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Puts rows into a results file, in place of the ones it has of the same cases."""
    replaced = {group_key(row) for row in rows}
    old = read_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if group_key(row) not in replaced] + rows)
