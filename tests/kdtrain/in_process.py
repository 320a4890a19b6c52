"""The scheduler's run_all without child processes, which take seconds each to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_runs import quiet

from kdtrain.experiments.scheduler import Outcome, Stage
from kdtrain.training import engine
from kdtrain.training.preparation import TrainingError


def in_process(stop: Callable[[], bool] = lambda: False) -> Callable[..., Any]:
    """A run_all that trains in this process, with the same outcomes. stop: interrupts a run."""

    def run_all(
        works: Sequence[Stage],
        root: Path,
        jobs: int,
        console: Any,
        before: Mapping[str, Outcome] | None = None,
        overview: Any = None,
    ) -> tuple[int, dict[str, Outcome]]:
        outcomes = dict(before or {})
        waiting = list(works)
        while waiting:
            work = next(w for w in waiting if all(name in outcomes for name in w.inputs))
            waiting.remove(work)
            if any(outcomes[name].state not in ("done", "reused") for name in work.inputs):
                outcomes[work.name] = Outcome("skipped", "needs a run that is not there", 0.0)
                continue
            config, folder = work.config, root / work.name
            try:
                engine.train(config, folder, resume=work.resume, stop=stop, screen=quiet())
                outcomes[work.name] = Outcome("done", "", 0.0)
            except engine.Interrupted:
                outcomes[work.name] = Outcome("stopped", "checkpoint saved", 0.0)
                return 130, {**{w.name: Outcome("stopped", "", 0.0) for w in works}, **outcomes}
            except TrainingError as error:
                state = "diverged" if str(error).startswith("diverged") else "failed"
                outcomes[work.name] = Outcome(state, str(error), 0.0)
        states = {outcome.state for outcome in outcomes.values()}
        return int(bool(states & {"failed", "diverged"})), outcomes

    return run_all
