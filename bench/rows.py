"""Rows of bench/results: one per contender, incoming gradient and timing, with their origin.

timing: "call" on a CPU, the time of a call. On a GPU "replay", of a CUDA graph: the device's work
alone; "events", the device's time around an eager call, for contenders that no graph can hold;
"wall", the host's time, launch and dispatch included.
"""

import csv
import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bench.case import Case
from bench.targets import (
    FASTER,
    FLOOR,
    MEMORY,
    MICROSECONDS,
    SHARE,
    SLOWER,
    WALL,
    Target,
)
from bench.timing import quartiles, ratio_of_medians

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUSY = 0.5  # rows measured while others took more than this share of the cores are marked

COLUMNS: tuple[str, ...] = (
    "date", "machine", "cores", "threads", "device", "driver", "torch", "triton", "kdkernels",
    "commit", "isa", "op", "case", "contender", "gradient", "timing", "rounds", "median_ms",
    "q25_ms", "q75_ms", "ratio", "ratio_low", "ratio_high", "floor_ms", "over_floor", "rate",
    "peak_mb", "target", "met", "load",
)  # fmt: skip
Row = dict[str, str]


def stamp(device: Any) -> Row:
    """The columns that all rows of a run share: date, machine, cores, device, versions, commit."""
    import torch

    import kdkernels

    return {
        "date": datetime.date.today().isoformat(),
        "machine": device.describe(),
        "cores": str(os.cpu_count()),
        "device": device.name,
        **device.versions(),
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The short commit of the checkout, "+dirty" where files other than results differ from it.

    A copy without history takes it from the environment variable BENCH_COMMIT.
    """

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
        return os.environ.get("BENCH_COMMIT", "none")
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs/benchmarks*")
    return head + ("+dirty" if changed else "")


def results_file(shared: Row, folder: Path = RESULTS) -> Path:
    """<folder>/<date>-<processor or GPU>.csv"""
    slug = re.sub(r"[^a-z0-9]+", "-", shared["machine"].lower()).strip("-")
    return folder / f"{shared['date']}-{slug}.csv"


def number(value: float | None) -> str:
    """Four significant digits; empty for None."""
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def gradient_text(gradient: float | None) -> str:
    """1, 0.37, or empty where there is none."""
    return "" if gradient is None else f"{gradient:g}"


def rate_text(work: tuple[float, str] | None, ms: float) -> str:
    """The work over the time, as in "3310 GB/s"; empty without work."""
    if work is None:
        return ""
    amount, unit = work
    return f"{number(amount / ms / (1e6 if unit == 'GB/s' else 1e9))} {unit}"


def build_rows(
    shared: Row,
    case: Case,
    timed: dict,
    peaks: dict[str, float | None],
    targets: list[Target],
) -> list[Row]:
    """The rows of one case from a worker's result. ratio: the speed-up of kdkernels' own in the
    same timing.

    Targets of another instruction-set level than the one measured are left out.
    """
    times = {(name, g, timing): np.array(ms) for name, g, timing, ms in timed["times"]}
    targets = [t for t in targets if t.isa == timed["isa"]]
    floors = [floor.name for floor in case.floors]
    floor_ms = min(float(np.median(ms)) for (name, _, _), ms in times.items() if name in floors)
    own_first = next((v for (name, _, _), v in times.items() if name == case.own), None)
    rows = []
    for (name, gradient, timing), ms in times.items():
        median, q25, q75 = quartiles(ms)
        ratio = low = high = None
        under = times.get((case.own, gradient, timing), own_first)
        if name != case.own and under is not None:
            ratio, low, high = ratio_of_medians(ms, under)
        over_floor = None if timing == WALL else median / floor_ms
        mine = [t for t in targets if (t.against or case.own) == name]
        # An eager call of a contender that a graph holds as well is for comparison, not judged.
        twice = timing == "events" and (name, gradient, "replay") in times
        mine = [] if twice else [t for t in mine if t.is_about(timing, gradient)]
        met = [verdict(t, median, ratio, over_floor, peaks.get(name)) for t in mine]
        rows.append(
            {
                **shared,
                "threads": number(timed["threads"]),
                "isa": timed["isa"],
                "op": case.op,
                "case": case.name,
                "contender": name,
                "gradient": gradient_text(gradient),
                "timing": timing,
                "rounds": str(len(ms)),
                "median_ms": number(median),
                "q25_ms": number(q25),
                "q75_ms": number(q75),
                "ratio": number(ratio),
                "ratio_low": number(low),
                "ratio_high": number(high),
                "floor_ms": number(floor_ms),
                "over_floor": number(over_floor),
                "rate": "" if timing == WALL else rate_text(timed.get("work"), median),
                "peak_mb": number(peaks.get(name)),
                "target": "; ".join(t.text() for t in mine),
                "met": "; ".join(met),
                "load": number(timed["load"]),
            }
        )
    return rows


def verdict(
    target: Target,
    median_ms: float,
    ratio: float | None,
    over_floor: float | None,
    peak_mb: float | None,
) -> str:
    """ "met", "missed", or "unknown" where memory could not be measured."""
    if target.kind == FASTER:
        kept = ratio is not None and ratio >= target.value
    elif target.kind == SLOWER:
        kept = ratio is not None and 1 / ratio <= target.value
    elif target.kind == FLOOR:
        kept = over_floor is not None and over_floor <= target.value
    elif target.kind == SHARE:
        kept = over_floor is not None and 1 / over_floor >= target.value
    elif target.kind == MICROSECONDS:
        kept = median_ms * 1e3 <= target.value
    else:
        assert target.kind == MEMORY
        if peak_mb is None:
            return "unknown"
        kept = peak_mb <= target.value
    return "met" if kept else "missed"


def group_key(row: Row) -> tuple[str, ...]:
    """The key of rows that are replaced together: case, machine, level and number of threads."""
    return tuple(row[k] for k in ("machine", "device", "op", "case", "isa", "threads"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file. Raises ValueError for other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"bench: {path} must have the columns {','.join(COLUMNS)}")
        return list(reader)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows into a results file, in place of its rows of the same cases."""
    replaced = {group_key(row) for row in rows}
    old = read_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if group_key(row) not in replaced] + rows)
