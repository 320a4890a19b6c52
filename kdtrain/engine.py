"""One training loop for every task, with exact resume: `train` makes or continues a run folder,
`evaluate` measures one.

A run is a function of its config: batches and crops follow from (seed, phase, epoch, step), so
weights, optimiser state, random state and position are all that a checkpoint holds. On one
machine, thread count and torch version an interrupted and resumed run ends with the same bits in
last/, metrics.jsonl and the metrics of results.json as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kdtrain import checkpoint, keys, settings
from kdtrain.batches import RunData
from kdtrain.config import Config
from kdtrain.environment import (
    check_device,
    computing,
    environment,
    random_state,
    restore_random,
)
from kdtrain.journal import Clock, Lines, NonFinite, Screen, Terms, duration, number, plain, unit
from kdtrain.models import count_parameters, inherit, multiply_adds, network_from_state
from kdtrain.preparation import TrainingError, check_data, prepare_task, without_teacher
from kdtrain.tasks import Task, build_task

PROGRESS_EVERY_S = 0.5
CLASSIFIER_METRICS = ("top1", "cross_entropy")


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is saved."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: the epoch counted over all phases, the next batch in it, and the steps
    taken so far.
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Train in `run_dir`, or continue there, and return what results.json says.

    stop: asked after every step; true saves a checkpoint and raises Interrupted. screen: where
    progress is shown. Raises TrainingError (bad data; a loss or weight that is not finite, which
    diverged.json then records), CheckpointError (run folders), ValueError (config).
    """
    screen = screen or Screen(run_dir.name)
    check_device(config)
    with computing(config), checkpoint.lock(run_dir):
        data = RunData(config)
        task = prepare_task(config, data, run_dir, screen)
        key = keys.run_key(config, _input_keys(config, run_dir), data.key)
        (run_dir / "diverged.json").unlink(missing_ok=True)
        run = Run(config, run_dir, data, task, key, stop, screen)
        if not (resume and run.resume()):
            run.begin()
        try:
            run.loop()
            return run.finish()
        finally:
            run.close()


def evaluate(config: Config, run: Path) -> dict[str, Any]:
    """Metrics and floors of a run folder's network on the test split of `config`.

    run: a run folder (its last weights) or one of its checkpoints (RUN/best). On pictures of
    another number of people the classifier's own metrics are left out; features and landmarks are
    measured all the same.
    """
    check_device(config)
    with computing(config):
        data = RunData(config)
        weights = checkpoint.load_weights(checkpoint.run_weights(run))
        task = build_task(without_teacher(config), data.source.num_classes)
        check_data(task, data)
        trained = network_from_state(config.model, weights)
        inherit(task.network, trained.state_dict())
        task.to(data.device)
        metrics = task.evaluate(data.evaluation(data.test))
        floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
        if trained.num_classes != data.source.num_classes:
            metrics = {k: v for k, v in metrics.items() if k not in CLASSIFIER_METRICS}
        return {
            "task": config.task,
            "metrics": metrics,
            "floors": floors,
            "data": data.summary(),
            "trained_classes": trained.num_classes,
        }


class Run:
    """A run under way: network, optimiser, position and journal. `loop` is the training."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: RunData,
        task: Task,
        key: str,
        stop: Callable[[], bool],
        screen: Screen,
    ) -> None:
        self.config, self.folder, self.data, self.task = config, folder, data, task
        self.key, self.stop, self.screen = key, stop, screen
        self.parameters = [*task.network.parameters(), *task.extra.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=config.optim.phases[0].lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            nesterov=True,
        )
        self.schedule = [
            (place, epoch, phase.lr, epoch + 1 == phase.epochs)
            for place, phase in enumerate(config.optim.phases)
            for epoch in range(phase.epochs)
        ]
        torch.manual_seed(config.seed)
        self.at = Position()
        self.terms = Terms()
        self.evaluations: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.lines: dict[str, Lines] = {}
        self._batches = data.epoch(0, task.needs_balanced_batches)
        self._start_clock()
        self._shown = 0.0

    def begin(self) -> None:
        """Make the run folder's first files."""
        environs = environment(self.config)
        checkpoint.write_text(self.folder / "config.yaml", settings.to_yaml(self.config))
        checkpoint.write_json(self.folder / "run.json", {"key": self.key, "environment": environs})
        self._open_lines({})

    def loop(self) -> None:
        """Every epoch from the present position: batch, loss, gradient, step; save and evaluate at
        its end.
        """
        config, task, optimizer = self.config, self.task, self.optimizer
        for count in range(self.at.epoch, len(self.schedule)):
            phase, epoch, lr, phase_ends = self.schedule[count]
            for group in optimizer.param_groups:
                group["lr"] = lr
            self._batches = batches = self.data.epoch(count, task.needs_balanced_batches)
            task.network.train()
            task.extra.train()
            for index in range(self.at.batch, len(batches)):
                following = batches[index + 1] if index + 1 < len(batches) else None
                batch = self.data.batch(batches[index], phase, epoch, following)
                result = task.step(batch.pictures, batch.labels, batch.points)
                optimizer.zero_grad(set_to_none=True)
                result.loss.backward()
                terms = {"loss": result.loss, **result.terms}
                if config.optim.clip_norm is not None:
                    terms["gradient_norm"] = clip_grad_norm_(
                        self.parameters, config.optim.clip_norm
                    )
                optimizer.step()
                self.at = Position(count, index + 1, self.at.steps + 1)
                self.terms.add(self.at.steps, terms)
                self.clock.step(len(batch.labels), batch.waited_s)
                if self.at.steps % config.train.log_every == 0 or index + 1 == len(batches):
                    self._log(phase, epoch, lr)
                if self.stop():
                    self.save()
                    raise Interrupted
                if self.at.steps % config.train.save_every == 0 and index + 1 < len(batches):
                    self.save()
            self.save()  # before the evaluation, so that a kill during it repeats only it
            if phase_ends or (epoch + 1) % config.train.eval_every == 0:
                self._evaluate(phase, epoch)
            self.at = Position(count + 1, 0, self.at.steps)

    def save(self) -> None:
        """Write last/ after checking that every loss since the last line and every weight is
        finite.
        """
        self._check(self.terms.read())
        weights, extra = self.task.network.state_dict(), self.task.extra.state_dict()
        self._check_finite({**weights, **extra})
        state = {
            "at": dataclasses.asdict(self.at),
            "optimizer": self.optimizer.state_dict(),
            "extra": dict(extra),
            "random": random_state(self.data.device),
            "terms": self.terms.state(),
            "evaluations": self.evaluations,
            "lengths": {name: lines.sync() for name, lines in self.lines.items()},
            "seconds": self.seconds,
            "key": self.key,
            "environment": environment(self.config),
        }
        checkpoint.save(self.folder / "last", weights, state)

    def resume(self) -> bool:
        """Take up the run at its last checkpoint; false if it has none yet."""
        checkpoint.recover(self.folder / "last")
        if not (self.folder / "last").exists():
            return False
        state = checkpoint.load_state(self.folder / "last")
        if state["key"] != self.key:
            self.screen.say(
                "warning: the sources, the pictures or an input run changed since this run began; "
                "it continues, but not as it would have ended"
            )
        for name, value in environment(self.config).items():
            if state["environment"].get(name) != value:
                was = state["environment"].get(name)
                self.screen.say(
                    f"warning: {name} was {was}, is {value}; the last bits of the result may differ"
                )
        self.task.network.load_state_dict(checkpoint.load_weights(self.folder / "last"))
        self.task.extra.load_state_dict(state["extra"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random(state["random"], self.data.device)
        self.at = Position(**state["at"])
        self.terms.restore(state["terms"])
        self.evaluations = state["evaluations"]
        self.seconds_before = state["seconds"]
        self._open_lines(state["lengths"])
        self._start_clock()
        self.screen.say(
            f"resumed in epoch {self.at.epoch + 1} of {len(self.schedule)}, step {self.at.steps}"
        )
        return True

    def finish(self) -> dict[str, Any]:
        """Write samples.npz and results.json, which mark the run as finished."""
        config, task, data = self.config, self.task, self.data
        name, sign = task.metric
        floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
        networks = {"student" if task.teacher is not None else "network": task.network}
        if task.teacher is not None:
            networks["teacher"] = task.teacher
        results = {
            "status": "finished",
            "task": config.task,
            "metric": {"name": name, "higher_is_better": sign > 0},
            "metrics": self.evaluations[-1]["metrics"],
            "best": self._best(),
            "phases": [e for e in self.evaluations if e["phase_ends"]],
            "floors": floors,
            "units": {n: unit(n) for n in (*self.evaluations[-1]["metrics"], *floors)},
            "steps": self.at.steps,
            "parameters": {k: count_parameters(n) for k, n in networks.items()},
            "multiply_adds": {
                k: multiply_adds(n, config.data.input_size) for k, n in networks.items()
            },
            "data": data.summary(),
            "key": self.key,
            "seconds": round(self.seconds, 2),
            "environment": environment(config),
        }
        checkpoint.write_arrays(self.folder / "samples.npz", task.artifacts())
        checkpoint.write_json(self.folder / "results.json", plain(results))
        self.show(1.0)
        return plain(results)

    @property
    def seconds(self) -> float:
        """Training time so far, over every interruption."""
        return self.seconds_before + self.clock.elapsed_s()

    def show(self, share: float) -> None:
        """Tell people and a watching pipeline how far the run is."""
        name, _ = self.task.metric
        latest = self.evaluations[-1]["metrics"].get(name) if self.evaluations else None
        progress = {
            "share": share,
            "epoch": min(self.at.epoch + 1, len(self.schedule)),
            "epochs": len(self.schedule),
            "metric": name,
            "value": latest,
            "left_s": self.clock.left_s(),
        }
        checkpoint.write_progress(self.folder / "progress.json", plain(progress))
        note = (
            f"epoch {progress['epoch']}/{progress['epochs']}, {duration(progress['left_s'])} left"
        )
        if latest is not None:
            note += f", {name} {number(name, latest)}"
        self.screen.update(share, note)

    def close(self) -> None:
        """Close the journal."""
        for lines in self.lines.values():
            lines.close()

    def _open_lines(self, lengths: Mapping[str, int]) -> None:
        names = ("metrics", "timing")
        self.lines = {n: Lines(self.folder / f"{n}.jsonl", lengths.get(n, 0)) for n in names}

    def _start_clock(self) -> None:
        self.clock = Clock(len(self.schedule) * len(self._batches), self.at.steps)

    def _log(self, phase: int, epoch: int, lr: float) -> None:
        self._check(self.terms.read())
        place = {"step": self.at.steps, "phase": phase, "epoch": epoch}
        self.lines["metrics"].write({"kind": "train", **place, "lr": lr, **self.terms.take()})
        self.lines["timing"].write({**place, **self.clock.pace()})
        now = time.monotonic()
        if now - self._shown > PROGRESS_EVERY_S:
            self._shown = now
            self.show(self.at.steps / self.clock.total)

    def _evaluate(self, phase: int, epoch: int) -> None:
        name, _ = self.task.metric
        metrics = plain(self.task.evaluate(self._asking(self.data.evaluation(self.data.test))))
        ends = epoch + 1 == self.config.optim.phases[phase].epochs
        if ends:  # before a checkpoint tells of this evaluation
            checkpoint.write_arrays(self.folder / "items" / f"phase{phase}.npz", self.task.items())
        record = {"step": self.at.steps, "phase": phase, "epoch": epoch, "phase_ends": ends}
        earlier = self._best()
        self.evaluations.append({**record, "metrics": metrics})
        if self._best() is not earlier:
            checkpoint.save(self.folder / "best", self.task.network.state_dict())
        self.lines["metrics"].write({"kind": "eval", **record, **metrics})
        self.screen.say(
            f"epoch {self.at.epoch + 1}/{len(self.schedule)}  "
            f"{name} {number(name, metrics.get(name))}  {duration(self.clock.left_s())} left"
        )

    def _asking(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an evaluation, asking between them whether to stop: the checkpoint before
        it stands.
        """
        for batch in batches:
            if self.stop():
                raise Interrupted
            yield batch

    def _best(self) -> dict[str, Any] | None:
        """The evaluation with the best metric so far, the earliest of equals."""
        name, sign = self.task.metric
        rated = [e for e in self.evaluations if e["metrics"].get(name) is not None]
        return max(rated, key=lambda e: sign * e["metrics"][name], default=None)

    def _check(self, found: NonFinite | None) -> None:
        if found is None:
            return
        back = self.at.steps - found.step
        indices = self._batches[self.at.batch - 1 - back]
        raise self._diverged(
            found.step,
            f"diverged at step {found.step}: loss term '{found.term}' is {found.value}; "
            f"the batch was {self.data.names(indices)}. {self._standing()} "
            "Lower optim.phases' lr, set optim.clip_norm, or give that term less weight.",
        )

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        named = {**tensors}
        for place, values in self.optimizer.state_dict()["state"].items():
            if values.get("momentum_buffer") is not None:
                named[f"momentum of parameter {place}"] = values["momentum_buffer"]
        finite = torch.stack([t.isfinite().all() for t in named.values()]).tolist()
        bad = [name for name, good in zip(named, finite, strict=True) if not good]
        if bad:
            indices = self._batches[self.at.batch - 1]
            raise self._diverged(
                self.at.steps,
                f"diverged at step {self.at.steps}: {bad[0]} is no longer finite though the loss "
                f"was; the batch was {self.data.names(indices)}. {self._standing()} "
                "Lower optim.phases' lr, or set optim.clip_norm.",
            )

    def _diverged(self, step: int, message: str) -> TrainingError:
        """Writes diverged.json, which marks the run as ended: the same run would diverge again."""
        phase, epoch, *_ = self.schedule[self.at.epoch]
        record = {"key": self.key, "step": step, "phase": phase, "epoch": epoch}
        record |= {"message": message, "seconds": round(self.seconds, 2)}
        checkpoint.write_json(self.folder / "diverged.json", record)
        return TrainingError(message)

    def _standing(self) -> str:
        if (self.folder / "last").exists():
            return f"{self.folder / 'last'} holds the finite weights of an earlier step."
        return "No checkpoint had been saved yet."


def _input_keys(config: Config, run_dir: Path) -> dict[str, str]:
    return {k: keys.input_key(folder) for k, folder in keys.input_folders(config, run_dir).items()}
