"""Output of a run while it trains: metrics.jsonl, timing.jsonl, TensorBoard, and the screen.

metrics.jsonl does not depend on the clock, so that a resumed run ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from kdtrain.config import Config, ConfigError
from kdtrain.config.program import printable
from kdtrain.training.checkpoint import CheckpointError, run_file, writing

TENSORBOARD = run_file("tensorboard")
PLACE = ("kind", "step", "phase", "epoch", "phase_ends", "split")
LINES = {name: run_file(f"{name}.jsonl") for name in ("metrics", "timing")}


class NonFinite(NamedTuple):
    """The first loss term that is NaN or infinite."""

    step: int
    term: str
    value: float


class Terms:
    """Loss terms of the steps since the last line; on the device until `read`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._waiting: list[tuple[int, Tensor]] = []
        self._values: list[list[float]] = []

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Adds the 0-d tensors of one step without synchronisation."""
        self._names = list(terms)
        self._waiting.append((step, torch.stack([t.detach().float() for t in terms.values()])))

    def read(self) -> NonFinite | None:
        """Transfers new values in one copy; returns the first that is not finite, if any."""
        if not self._waiting:
            return None
        rows = torch.stack([row for _, row in self._waiting]).tolist()
        found = None
        for (step, _), row in zip(self._waiting, rows, strict=True):
            self._values.append(row)
            bad = {n: v for n, v in zip(self._names, row, strict=True) if not math.isfinite(v)}
            if bad and found is None:
                # `loss` is the sum of the others
                term = next((name for name in bad if name != "loss"), "loss")
                found = NonFinite(step, term, bad[term])
        self._waiting.clear()
        return found

    def take(self) -> dict[str, float]:
        """Returns each term's mean over the steps read since the last call; {} without a step."""
        values, self._values = self._values, []
        columns = zip(*values, strict=True)
        return {n: math.fsum(c) / len(values) for n, c in zip(self._names, columns, strict=False)}

    def state(self) -> dict[str, Any]:
        """Returns the state of the present window for a checkpoint (call `read` first)."""
        return {"names": self._names, "values": self._values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state`."""
        self._names, self._values = state["names"], state["values"]


class Lines:
    """An append-only file of JSON lines, truncated to the length that a checkpoint records."""

    def __init__(self, path: Path, length: int | None = None) -> None:
        """length: bytes to keep; None: all. Raises CheckpointError for a shorter file."""
        if length and (not path.exists() or path.stat().st_size < length):
            raise CheckpointError(
                f"{path}: shorter than its checkpoint records; start again with --overwrite"
            )
        self._path = path
        # unbuffered: a write that a full disk rejects must not be repeated at close
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        if length is not None:
            self._file.truncate(length)
            self._file.seek(length)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; a number that is not finite becomes null."""
        content = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
        with writing(self._path, len(content)):
            while content:
                content = content[self._file.write(content) :]

    def sync(self) -> int:
        """Forces the lines to disk; returns the file's length in bytes."""
        with writing(self._path, 0):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def check_board(config: Config) -> None:
    """Raises ConfigError if train.tensorboard is set and its package is missing."""
    if not config.train.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'train.tensorboard needs the tensorboard extra: pip install ".[tensorboard]" '
            f"({error}); or set train.tensorboard to false (metrics.jsonl has the same numbers)"
        ) from None


class Journal:
    """metrics.jsonl and timing.jsonl of a run directory and, by train.tensorboard, tensorboard/."""

    def __init__(self, folder: Path, lengths: Mapping[str, int], board: bool) -> None:
        """lengths: of `sync` at the checkpoint to resume from; empty for a new run."""
        paths = {name: folder / file for name, file in LINES.items()}
        self._lines = {name: Lines(path, lengths.get(name, 0)) for name, path in paths.items()}
        self._folder, self._board = folder / TENSORBOARD, None
        if board:
            from torch.utils.tensorboard import SummaryWriter

            # written again from the journal: SummaryWriter's purge_step would show an evaluation at
            # the checkpoint's step twice, or drop a line there
            shutil.rmtree(self._folder, ignore_errors=True)
            self._board = SummaryWriter(str(self._folder))
            for record in (r for path in paths.values() for r in read_lines(path)):
                self._show(record)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Appends a record to metrics or timing."""
        self._lines[name].write(record)
        self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        """Writes a record's numbers to TensorBoard, if used, under KIND/NAME at its step."""
        for name, value in record.items():
            if self._board and name not in PLACE and isinstance(value, (int, float)):
                with writing(self._folder, 100):
                    tag = f"{record.get('kind', 'timing')}/{name}"
                    self._board.add_scalar(tag, value, record["step"])

    def sync(self) -> dict[str, int]:
        """Forces the lines to disk; returns the length of each file in bytes."""
        return {name: lines.sync() for name, lines in self._lines.items()}

    def close(self) -> None:
        for lines in self._lines.values():
            lines.close()
        if self._board is not None:
            self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file, without an incomplete last line."""
    records = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with contextlib.suppress(ValueError):
        for line in text.splitlines():
            records.append(json.loads(line))
    return records


def plain(value: Any) -> Any:
    """Returns a value with NaN and infinity as None at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def unit(metric: str) -> str:
    """Returns a metric's unit: fraction (0.85 is 85 %), count, nats or squared error."""
    if metric.startswith(("pairs", "nn_queries", "nn_lone")):
        return "count"
    return {"cross_entropy": "nats", "hint": "squared error"}.get(metric, "fraction")


def number(metric: str, value: float | None, digits: int = 2) -> str:
    """Returns '85.31 %', '1.2034 nats', '300', or '-' for None. digits: of a percentage."""
    if value is None:
        return "-"
    if unit(metric) == "fraction":
        return f"{100 * value:.{digits}f} %"
    return f"{value:.0f}" if unit(metric) == "count" else f"{value:.4f} {unit(metric)}"


def duration(seconds: float) -> str:
    """Returns '1:15' for 75, '1:06:40' for 4000."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Clock:
    """Images per second, share of time spent on data, time left; without evaluations."""

    def __init__(self, steps_total: int, steps_done: int, spent: Mapping[str, float]) -> None:
        """spent: of `spent` at the checkpoint to resume from; empty for a new run."""
        self.started = time.perf_counter()
        self.total, self.first, self.done = steps_total, steps_done, steps_done
        self.data_s, self._apart_s, self._samples = 0.0, 0.0, 0
        self._window = (self.started, 0.0, 0)
        self._before = spent

    def step(self, images: int, data_s: float) -> None:
        self.done += 1
        self._samples += images
        self.data_s += data_s

    def apart(self, seconds: float) -> None:
        """Subtracts seconds that were not training."""
        self._apart_s += seconds
        then, data_s, images = self._window
        self._window = (then + seconds, data_s, images)

    def pace(self) -> dict[str, float]:
        """Returns images per second and the share spent on data since the last call."""
        now, (then, data_s, images) = time.perf_counter(), self._window
        self._window = (now, self.data_s, self._samples)
        return _rates(now - then, self._samples - images, self.data_s - data_s)

    def spent(self) -> dict[str, float]:
        """Returns totals over all interruptions: seconds, those apart or on data, and samples."""
        here = {
            "seconds": self.elapsed_s(),
            "apart_s": self._apart_s,
            "data_s": self.data_s,
            "samples": self._samples,
        }
        return {name: value + self._before.get(name, 0) for name, value in here.items()}

    def summary(self) -> dict[str, float]:
        """Returns the run's seconds and the rates of its training."""
        spent = self.spent()
        rates = _rates(spent["seconds"] - spent["apart_s"], spent["samples"], spent["data_s"])
        return {"seconds": round(spent["seconds"], 2), **rates}

    def left_s(self) -> float:
        """Returns the seconds to the last step at the rate so far; 0 before the first step."""
        taken = self.done - self.first
        return (self.total - self.done) * self.elapsed_s() / taken if taken else 0.0

    def elapsed_s(self) -> float:
        """Returns the seconds since this process began to train."""
        return time.perf_counter() - self.started


def _rates(span_s: float, samples: float, data_s: float) -> dict[str, float]:
    span_s = max(span_s, 1e-9)
    return {
        "samples_per_s": round(samples / span_s, 1),
        "wait_share": round(min(1.0, data_s / span_s), 4),
    }


def console(file_width: int | None = None, stream: Any = None) -> Console:
    """Returns a console without line breaks. file_width: of tables outside a terminal."""
    result = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
    if file_width is not None and not result.is_terminal:
        result.width = file_width
    return result


class Screen:
    """Progress: a live line in a terminal, and a plain line per epoch."""

    def __init__(self, title: str, stream: Any = None) -> None:
        self._console = console(stream=stream)
        self._title = printable(title)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=1.0, note="")
            self._bar.start()

    def update(self, share: float, note: str) -> None:
        """Moves the bar of a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, note=note)

    def say(self, text: str) -> None:
        self._console.print(f"{self._title}: {printable(text)}", markup=False)

    def close(self) -> None:
        """Removes the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
