"""Runs stages as child processes, several side by side, shows one progress, and stops them
cleanly; in which order stages that wait for each other run, and how long that takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import kdtrain
from kdtrain.config.program import INTERRUPTED, PARENT, printable
from kdtrain.training.checkpoint import read_json
from kdtrain.training.journal.journal import duration, number

POLL_S = 0.25
# Draws the states of all works by name: those of an Outcome, running or waiting.
Overview = Callable[[Mapping[str, str]], RenderableType]


@dataclass(frozen=True)
class Work:
    """A stage to be trained: recipe, run directory, inputs, and a rough weight."""

    name: str
    recipe: Path
    folder: Path
    inputs: tuple[str, ...]
    resume: bool
    threads: int
    cost: float


@dataclass(frozen=True)
class Outcome:
    """How a stage ended (reused, done, diverged, failed, skipped, stopped), why, its seconds."""

    state: str
    note: str
    seconds: float


@dataclass
class _Child:
    work: Work
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begin: int
    """Bytes of the log that earlier sessions wrote."""
    started: float
    shown: int = 0


def longest_chain_first(
    seconds: Mapping[str, float],
    inputs: Mapping[str, Iterable[str]],
    first: Collection[str] = (),
) -> list[str]:
    """Stages by the time from their start to the end of the longest chain that follows, longest
    first; inputs come before what reads them, and several jobs end together.

    seconds: of each stage, more than 0. first: stages that come before all others, their inputs
    among them. Raises ValueError for stages that wait for each other.
    """
    needs = {name: [n for n in inputs.get(name, ()) if n in seconds] for name in seconds}
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = ", ".join(sorted(set(error.args[1])))
        raise ValueError(f"stages wait for each other: {names}") from None
    chains = dict(seconds)
    for name in reversed(order):  # what reads a stage comes before it here
        for needed in needs[name]:
            chains[needed] = max(chains[needed], seconds[needed] + chains[name])
    return sorted(seconds, key=lambda name: (name not in first, -chains[name], name))


def wall_time(
    seconds: Mapping[str, float],
    inputs: Mapping[str, Sequence[str]],
    jobs: int,
    first: Collection[str] = (),
) -> float:
    """Seconds on the clock until every stage is done, `jobs` of them side by side.

    As run_all runs them: the stages of `first`, then the one with the longest chain of followers,
    as soon as its inputs are done; an input that is no stage here is done already. seconds: of each
    stage while others run beside it (two jobs that share caches and memory are each slower than
    alone). Raises ValueError for jobs below 1 or stages that wait for each other.
    """
    if jobs < 1:
        raise ValueError(f"wall_time: jobs must be at least 1, got {jobs}")
    waiting = longest_chain_first(seconds, inputs, first)
    running: dict[str, float] = {}
    now = 0.0
    while waiting or running:
        open_ones = {*waiting, *running}
        for name in list(waiting):
            if len(running) < jobs and open_ones.isdisjoint(inputs.get(name, ())):
                waiting.remove(name)
                running[name] = now + seconds[name]
        now = min(running.values())
        running = {name: end for name, end in running.items() if end > now}
    return now


def run_all(
    works: Sequence[Work],
    root: Path,
    jobs: int,
    console: Console,
    before: Mapping[str, Outcome] | None = None,
    overview: Overview | None = None,
) -> tuple[int, dict[str, Outcome]]:
    """Train every work after its inputs, at most `jobs` at once.

    before: how other stages have ended already; works whose input is a lost one of them are
    skipped. overview: what a terminal shows in place of a line for each work. Returns 0, 1 (a
    stage failed or diverged; those that need it are skipped, others run on) or 130 (interrupted),
    and the outcomes, `before` among them.
    """
    runs = _Runs(works, console, overview, before or {})
    waiting, running, outcomes = runs.waiting, runs.running, runs.outcomes
    (root / "logs").mkdir(exist_ok=True)
    asked_to_stop = False

    def on_signal(*_: Any) -> None:
        nonlocal asked_to_stop
        if asked_to_stop:
            raise KeyboardInterrupt
        asked_to_stop = True
        for child in running.values():
            child.process.send_signal(signal.SIGINT)
        runs.say("stopping: each stage saves its checkpoint (press again to stop at once)")

    earlier = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or running:
            for name, child in list(running.items()):
                code = child.process.poll()
                if code is not None:
                    child.log.close()
                    outcomes[name] = _outcome(child, code)
                    del running[name]
                    runs.ended(child.work)
            runs.skip()
            for work in list(waiting.values()):
                if asked_to_stop or len(running) >= jobs:
                    break
                if all(n in outcomes for n in work.inputs):
                    running[work.name] = _start(work, root)
                    del waiting[work.name]
            if asked_to_stop and not running:
                break
            runs.update()
            if running:
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        asked_to_stop = True  # the children are ended below; what they saved is resumed
    finally:
        for child in running.values():
            child.process.kill()
            child.process.wait()
        runs.close()
        for number, handler in earlier.items():
            signal.signal(number, handler)
    outcomes |= dict.fromkeys(waiting, Outcome("stopped", "not begun", 0.0))
    outcomes |= dict.fromkeys(running, Outcome("stopped", "ended at once", 0.0))
    states = {outcome.state for outcome in outcomes.values()}
    if asked_to_stop or "stopped" in states:
        return INTERRUPTED, outcomes
    return int(bool(states & {"failed", "diverged"})), outcomes


def _start(work: Work, root: Path) -> _Child:
    command = [sys.executable, "-m", "kdtrain", "train", str(work.recipe)]
    command += ["--run-dir", str(work.folder)]
    if work.resume:
        command.append("--resume")
    package = str(Path(kdtrain.__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), package])),
        "OMP_NUM_THREADS": str(work.threads),
        PARENT: str(os.getpid()),
    }
    log = open(root / "logs" / f"{work.name}.txt", "ab")  # noqa: SIM115 - closed with the child
    begin = log.tell()
    # a session of its own: Ctrl-C in the terminal reaches the parent alone, which passes it on once
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return _Child(work, process, log, begin, time.monotonic())


def _outcome(child: _Child, code: int) -> Outcome:
    results = read_json(child.work.folder / "results.json") or {}
    if code == 0:
        return Outcome("done", "", results.get("seconds", time.monotonic() - child.started))
    if code == INTERRUPTED:
        return Outcome("stopped", "checkpoint saved", 0.0)
    if diverged := read_json(child.work.folder / "diverged.json"):
        return Outcome("diverged", diverged["message"], diverged["seconds"])
    said = Path(child.log.name).read_bytes()[child.begin :]
    lines = said.decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if code < 0:
        note = f"ended by signal {-code} ({signal.Signals(-code).name})"
    elif errors:
        note = errors[-1].removeprefix("error: ")
    else:
        note = lines[-1] if lines else f"exit status {code}"
    return Outcome("failed", note, 0.0)


class _Runs:
    """The works of run_all, as a live table in a terminal, else as a line per event."""

    def __init__(
        self,
        works: Sequence[Work],
        console: Console,
        overview: Overview | None,
        before: Mapping[str, Outcome],
    ) -> None:
        self._works, self._console, self._overview = works, console, overview
        self.waiting = {work.name: work for work in works}
        self.running: dict[str, _Child] = {}
        self.outcomes = dict(before)
        self._progress: dict[str, Mapping[str, Any]] = {}
        self._ended = 0
        self._left = ""
        self._started = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal and works:
            self._live = Live(console=console, refresh_per_second=4, transient=True)
            self._live.start()

    def skip(self) -> None:
        """Drop the works whose inputs will never be there."""
        for name, work in list(self.waiting.items()):
            ended = ((n, self.outcomes[n].state) for n in work.inputs if n in self.outcomes)
            lost = next((one for one in ended if one[1] not in ("done", "reused")), None)
            if lost is not None:
                verb = lost[1] if lost[1] in ("failed", "diverged") else f"was {lost[1]}"
                note = f"needs {lost[0]}, which {verb}"
                self.outcomes[name] = Outcome("skipped", note, 0.0)
                del self.waiting[name]

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def ended(self, work: Work) -> None:
        outcome = self.outcomes[work.name]
        note = f": {outcome.note}" if outcome.note else ""
        if outcome.state == "done":
            results = read_json(work.folder / "results.json") or {}
            name = results.get("metric", {}).get("name", "")
            shown = number(name, results.get("metrics", {}).get(name), 1)
            note = f": {name} {shown} in {duration(outcome.seconds)}"
        self._ended += 1
        if self._overview is not None:
            note += f" ({self._ended} of {len(self._works)}{self._left})"
        self.say(f"{work.name}: {outcome.state}{note}")

    def update(self) -> None:
        self._progress = {
            name: read_json(child.work.folder / "progress.json") or {}
            for name, child in self.running.items()
        }
        left_s = self._left_s()
        self._left = f", about {duration(left_s)} left" if left_s else ""
        if self._live is not None:
            self._live.update(self._drawn())
            return
        for name, child in self.running.items():
            epoch = self._progress[name].get("epoch", 0)
            if epoch > child.shown:
                child.shown = epoch
                self.say(f"{name}: {_note(self._progress[name])}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _drawn(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for work in self._works:
            if work.name in self.running:
                progress = self._progress[work.name]
                bar = ProgressBar(1.0, progress.get("share", 0.0), width=20)
                table.add_row(work.name, bar, _note(progress))
            elif self._overview is None:
                ended = self.outcomes.get(work.name)
                table.add_row(work.name, "", "waiting" if ended is None else ended.state)
        table.add_row("", "", f"{duration(time.monotonic() - self._started)} gone{self._left}")
        if self._overview is None:
            return table
        states = {name: outcome.state for name, outcome in self.outcomes.items()}
        states |= dict.fromkeys(self.running, "running") | dict.fromkeys(self.waiting, "waiting")
        return Group(self._overview(states), table)

    def _left_s(self) -> float:
        """Time left from the cost of what is done; 0 before the first result."""
        costs = {work.name: work.cost for work in self._works}
        shares = {name: p.get("share", 0.0) for name, p in self._progress.items()}
        under_way = sum(costs[n] * share for n, share in shares.items())
        done = under_way + sum(costs[n] for n, o in self.outcomes.items() if o.state == "done")
        if done <= 0:
            return 0.0
        rest = sum(costs[n] for n in (*self.waiting, *shares)) - under_way
        return rest * (time.monotonic() - self._started) / done


def _note(progress: Mapping[str, Any]) -> str:
    if not progress:
        return "starting"
    note = f"epoch {progress['epoch']}/{progress['epochs']}"
    if progress.get("value") is not None:
        note += f"  {progress['metric']} {number(progress['metric'], progress['value'], 1)}"
    return f"{note}  {duration(progress['left_s'])} left"
