"""Runs stages as child processes, several side by side, shows one progress, and stops them
cleanly; in which order stages that wait for each other run, and how long that takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import kdtrain
from kdtrain.config import Config, ConfigError
from kdtrain.config.program import INTERRUPTED, PARENT, printable, threads_of
from kdtrain.training.checkpoint import read_json
from kdtrain.training.journal.journal import duration, number

POLL_S = 0.25
RECIPES = "recipes"  # below the root, of the stages that are trained
# Draws the states of all works by name: those of an Outcome, running or waiting.
Overview = Callable[[Mapping[str, str]], RenderableType]


@dataclass(frozen=True)
class Stage:
    """One run of the chain."""

    name: str
    config: Config
    resume: bool = False
    seconds: float = 0.0  # estimated training time; 0 where there is none

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stages beside it whose networks it reads."""
        named = [run[1:] for run in self.config.runs().values() if run.startswith("@")]
        return tuple(dict.fromkeys(named))

    @property
    def cost(self) -> float:
        """A weight for the order of stages and the time left: seconds, or a rough guess."""
        if self.seconds:
            return self.seconds
        epochs = sum(phase.epochs for phase in self.config.optim.phases)
        model = self.config.model
        kernels = (model.width if model.name == "resnet" else 64) / model.divide
        # a small network's time per image is half overhead: measured 5.2, 1.2 and 0.9 ms at 32,
        # 8 and 4 kernels
        return epochs * (1 + (kernels / 14) ** 2) * (self.config.data.input_size / 32) ** 2


@dataclass(frozen=True)
class Outcome:
    """How a stage ended (reused, done, diverged, failed, skipped, stopped), why, its seconds."""

    state: str
    note: str
    seconds: float


@dataclass
class _Child:
    folder: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begin: int  # bytes of the log that earlier sessions wrote
    progress: Mapping[str, Any] = field(default_factory=dict)
    shown: int = 0


def longest_chain_first(
    seconds: Mapping[str, float],
    inputs: Mapping[str, Iterable[str]],
    first: Collection[str] = (),
) -> list[str]:
    """Stages by the time from their start to the end of the longest chain that follows, longest
    first; inputs come before what reads them, and several jobs end together.

    seconds: of each stage, more than 0. first: stages that come before all others, their inputs
    among them. Raises ConfigError for stages that wait for each other.
    """
    needs = {name: [n for n in inputs.get(name, ()) if n in seconds] for name in seconds}
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = ", ".join(sorted(set(error.args[1])))
        raise ConfigError(f"stages wait for each other: {names}") from None
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
    alone). Raises ConfigError for stages that wait for each other.
    """
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
    works: Sequence[Stage],
    root: Path,
    jobs: int,
    console: Console,
    before: Mapping[str, Outcome],
    overview: Overview | None = None,
) -> tuple[int, dict[str, Outcome]]:
    """Train every work after its inputs, at most `jobs` at once.

    before: how other stages have ended already; works whose input is a lost one of them are
    skipped. overview: what a terminal shows in place of a line for each work. Returns 0, 1 (a
    stage failed or diverged; those that need it are skipped, others run on) or 130 (interrupted),
    and the outcomes, `before` among them.
    """
    runs = _Runs(works, console, overview, dict(before))
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
        with runs.live or contextlib.nullcontext():
            while (waiting and not asked_to_stop) or running:
                for name, child in list(running.items()):
                    code = child.process.poll()
                    if code is not None:
                        child.log.close()
                        outcomes[name] = _outcome(child, code)
                        del running[name]
                        runs.ended(name)
                for name, work in list(waiting.items()):
                    ended = {n: outcomes[n].state for n in work.inputs if n in outcomes}
                    lost = [n for n, state in ended.items() if state not in ("done", "reused")]
                    waits = len(ended) < len(work.inputs)
                    if lost:
                        state = ended[lost[0]]
                        verb = state if state in ("failed", "diverged") else f"was {state}"
                        outcomes[name] = Outcome("skipped", f"needs {lost[0]}, which {verb}", 0.0)
                        del waiting[name]
                    elif len(running) < jobs and not (waits or asked_to_stop):
                        running[name] = _start(work, root, threads_of(jobs))
                        del waiting[name]
                runs.update()
                if running:
                    time.sleep(POLL_S)
    except KeyboardInterrupt:
        asked_to_stop = True  # the children are ended below; what they saved is resumed
    finally:
        for child in running.values():
            child.process.kill()
            child.process.wait()
        for number, handler in earlier.items():
            signal.signal(number, handler)
    outcomes |= dict.fromkeys(waiting, Outcome("stopped", "not begun", 0.0))
    outcomes |= dict.fromkeys(running, Outcome("stopped", "ended at once", 0.0))
    states = {outcome.state for outcome in outcomes.values()}
    if asked_to_stop or "stopped" in states:
        return INTERRUPTED, outcomes
    return int(bool(states & {"failed", "diverged"})), outcomes


def _start(stage: Stage, root: Path, threads: int) -> _Child:
    folder, recipe = root / stage.name, root / RECIPES / f"{stage.name}.yaml"
    command = [sys.executable, "-m", "kdtrain", "train", str(recipe), "--run-dir", str(folder)]
    if stage.resume:
        command.append("--resume")
    package = str(Path(kdtrain.__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), package])),
        "OMP_NUM_THREADS": str(threads),
        PARENT: str(os.getpid()),
    }
    log = open(root / "logs" / f"{stage.name}.txt", "ab")  # noqa: SIM115 - closed with the child
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
    return _Child(folder, process, log, begin)


def _outcome(child: _Child, code: int) -> Outcome:
    if code == 0:
        results = read_json(child.folder / "results.json") or {}
        seconds = results.get("seconds", 0.0)
        return Outcome("done", f"{result_text(results)} in {duration(seconds)}", seconds)
    if code == INTERRUPTED:
        return Outcome("stopped", "checkpoint saved", 0.0)
    if diverged := read_json(child.folder / "diverged.json"):
        return Outcome("diverged", diverged["message"], diverged["seconds"])
    said = Path(child.log.name).read_bytes()[child.begin :]
    lines = said.decode(errors="replace").splitlines() or [f"exit status {code}"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    note = [*lines, *errors][-1]
    if code < 0:
        note = f"ended by signal {-code} ({signal.Signals(-code).name})"
    return Outcome("failed", note, 0.0)


def result_text(results: Mapping[str, Any]) -> str:
    """'top1 93.1 %' from results.json."""
    name = results.get("metric", {}).get("name", "")
    return f"{name} {number(name, results.get('metrics', {}).get(name), 1)}"


@dataclass
class _Runs:
    """The works of run_all, as a live table in a terminal, else as a line per event."""

    works: Sequence[Stage]
    console: Console
    overview: Overview | None
    outcomes: dict[str, Outcome]

    def __post_init__(self) -> None:
        self.waiting = {work.name: work for work in self.works}
        self.running: dict[str, _Child] = {}
        self.left, self.ended_here = "", 0
        self.started = time.monotonic()
        self.live: Live | None = None
        if self.console.is_terminal and self.works:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False)

    def ended(self, name: str) -> None:
        outcome = self.outcomes[name]
        note = f": {outcome.note}" if outcome.note else ""
        self.ended_here += 1
        if self.overview is not None:
            note += f" ({self.ended_here} of {len(self.works)}{self.left})"
        self.say(f"{name}: {outcome.state}{note}")

    def update(self) -> None:
        for child in self.running.values():
            child.progress = read_json(child.folder / "progress.json") or {}
        left_s = self._left_s()
        self.left = f", about {duration(left_s)} left" if left_s else ""
        if self.live is not None:
            self.live.update(self._drawn())
            return
        for name, child in self.running.items():
            epoch = child.progress.get("epoch", 0)
            if epoch > child.shown:
                child.shown = epoch
                self.say(f"{name}: {_note(child.progress)}")

    def _drawn(self) -> RenderableType:
        states = {name: outcome.state for name, outcome in self.outcomes.items()}
        states |= dict.fromkeys(self.running, "running") | dict.fromkeys(self.waiting, "waiting")
        table = Table.grid(padding=(0, 2))
        for work in self.works:
            if work.name in self.running:
                progress = self.running[work.name].progress
                bar = ProgressBar(1.0, progress.get("share", 0.0), width=20)
                table.add_row(work.name, bar, _note(progress))
            elif self.overview is None:
                table.add_row(work.name, "", states[work.name])
        table.add_row("", "", f"{duration(time.monotonic() - self.started)} gone{self.left}")
        return table if self.overview is None else Group(self.overview(states), table)

    def _left_s(self) -> float:
        """Time left from the cost of what is done; 0 before the first result."""
        shares = {name: child.progress.get("share", 0.0) for name, child in self.running.items()}
        shares |= {name: 1.0 for name, one in self.outcomes.items() if one.state == "done"}
        works = [work for work in self.works if work.name in {*shares, *self.waiting}]
        done = sum(work.cost * shares.get(work.name, 0.0) for work in works)
        left = sum(work.cost for work in works) - done
        return left * (time.monotonic() - self.started) / done if done else 0.0


def _note(progress: Mapping[str, Any]) -> str:
    if not progress:
        return "starting"
    note = f"epoch {progress['epoch']}/{progress['epochs']}"
    if progress.get("value") is not None:
        note += f"  {progress['metric']} {number(progress['metric'], progress['value'], 1)}"
    return f"{note}  {duration(progress['left_s'])} left"
