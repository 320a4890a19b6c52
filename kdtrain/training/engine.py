"""One training loop for every task, with exact resume: `train` creates or resumes a run directory,
`evaluate` measures one.

A run is a function of its config: batches and crops follow from (seed, phase, epoch, step), so a
checkpoint holds weights, optimiser state, random state and position only. On one machine, thread
count and torch version a resumed run ends bitwise identical to an uninterrupted one in last/,
metrics.jsonl and the metrics of results.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdtrain.config import Config, program, settings
from kdtrain.data.run_data import RunData
from kdtrain.models.network import count_parameters, inherit, multiply_adds, network_from_state
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, keys, outcome
from kdtrain.training.checkpoint import BEST, LAST, run_file
from kdtrain.training.environment import (
    check_device,
    computing,
    environment,
    random_state,
    restore_random,
)
from kdtrain.training.input_runs import Gallery, check_gallery, seen_in_training
from kdtrain.training.journal.journal import (
    Clock,
    Journal,
    Screen,
    Terms,
    duration,
    number,
    plain,
    unit,
)
from kdtrain.training.optimization import Optimisation, learning_rate
from kdtrain.training.outcome import History
from kdtrain.training.preparation import (
    TrainingError,
    check_data,
    check_inputs,
    prepare_cache,
    prepare_task,
    without_teacher,
)
from kdtrain.training.run_directory import CONFIG, opened

RUN, RESULTS, PROGRESS = map(run_file, ("run.json", "results.json", "progress.json"))
SAMPLES, ITEMS, DIVERGED = map(run_file, ("samples.npz", "items", "diverged.json"))
PROGRESS_EVERY_S = 0.5
CLASSIFIER_METRICS = ("top1", "cross_entropy")


class Interrupted(KeyboardInterrupt):
    """The run was stopped; its checkpoint is saved."""


class Position(NamedTuple):
    """Epoch counted over all phases, its next batch, and the optimiser's steps so far."""

    epoch: int = 0
    batch: int = 0
    steps: int = 0


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = program.told_to_stop,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Trains in `run_dir`, or resumes there; returns the content of results.json, with "status"
    "reused" for a run that had finished before.

    resume: continue an unfinished run. overwrite: remove it. stop: called after every step; True
    saves a checkpoint and raises Interrupted. screen: shows progress. Raises TrainingError (bad
    data; a loss or weight that is not finite, recorded in diverged.json), CheckpointError (run
    directories), ValueError (config, or a folder with other content).
    """
    screen = screen or Screen(run_dir.name)
    with opened(config, run_dir, resume=resume, overwrite=overwrite) as finished, computing(config):
        if finished is not None:
            return {**finished, "status": "reused"}
        run = Run(config, run_dir, stop, screen)
        if not (resume and run.resume()):
            run.begin()
        try:
            run.loop()
            return run.finish()
        finally:
            run.close()


def evaluate(config: Config, run: Path) -> dict[str, Any]:
    """Returns metrics of a run's network on the test split of `config`, with floors and the metrics
    of an untrained network.

    run: a run directory (its last weights) or a checkpoint (RUN/best). On another number of
    identities the classifier's own metrics are omitted.
    """
    check_device(config)
    with computing(config):
        weights = checkpoint.load_weights(checkpoint.run_weights(run))
        trained = network_from_state(
            config.model, weights, head=config.head, input_size=config.data.input_size
        )
        gallery = keys.input_folders(config, checkpoint.run_of(run)).get("gallery")
        if gallery is not None:
            check_gallery(gallery, trained.width)
        data = RunData(config)
        task = build_task(without_teacher(config), data.source.num_classes)
        check_data(task, data)
        inherit(task.network, trained.state_dict())
        task.to(data.device)
        if gallery is not None:
            task.gallery = Gallery(gallery, data)
        metrics = task.evaluate(data.evaluation(data.test))
        floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
        if trained.num_classes != data.source.num_classes:
            metrics = {k: v for k, v in metrics.items() if k not in CLASSIFIER_METRICS}
        return {
            "task": config.task,
            "metrics": metrics,
            "floors": floors,
            "untrained": task.untrained(data.evaluation(data.test)),
            "data": data.summary(),
            "warning": seen_in_training(run, data),
            "trained_classes": trained.num_classes,
        }


class Run:
    """A run in progress: network, optimiser, position and journal."""

    def __init__(
        self, config: Config, folder: Path, stop: Callable[[], bool], screen: Screen
    ) -> None:
        self.config, self.folder, self.stop, self.screen = config, folder, stop, screen
        self.data = data = RunData(config)
        self.task = task = prepare_task(config, data, folder, screen)
        self.key = keys.run_key(config, check_inputs(config, folder), data.key)
        self.scaled = config.train.precision == "float16"
        device, phases = data.device.type, config.optim.phases
        self.optimisation = Optimisation(
            task.network, task.extra, config.optim, device=device, scaled=self.scaled
        )
        self.schedule = [(i, epoch) for i, p in enumerate(phases) for epoch in range(p.epochs)]
        torch.manual_seed(config.seed)
        self.at = Position()
        self.terms = Terms()
        self.history = History(*task.metric, config.train.early_stop)
        self.journal: Journal  # opened by begin or resume
        self.cache = prepare_cache(config, data, task, folder, screen)
        self._batches = data.epoch(0)
        self._start_clock({})
        self._shown = 0.0

    def begin(self) -> None:
        """Writes the run directory's first files."""
        environs = environment(self.config)
        checkpoint.write_text(self.folder / CONFIG, settings.to_yaml(self.config))
        checkpoint.write_json(self.folder / RUN, {"key": self.key, "environment": environs})
        self.journal = Journal(self.folder, {}, self.config.train.tensorboard)

    def loop(self) -> None:
        """Trains every epoch from the present position; saves and evaluates at its end."""
        config, task = self.config, self.task
        for count in range(self.at.epoch, len(self.schedule)):
            phase, epoch = self.schedule[count]
            self._batches = self.data.epoch(count)
            if self.cache:
                self.cache.open(phase, epoch, self._batches)
            task.network.train()
            task.extra.train()
            with program.polled():
                while self.at.batch < len(self._batches):
                    rate = self._step(count)
                    epoch_ends = self.at.batch == len(self._batches)
                    if self.at.steps % config.train.log_every == 0 or epoch_ends:
                        self._log(phase, epoch, rate)
                    if self.stop():
                        self.save()
                        raise Interrupted
                    if self.at.steps % config.train.save_every == 0 and not epoch_ends:
                        self.save()
                self.save()  # a kill during the evaluation then repeats only the evaluation
            ends = epoch + 1 == config.optim.phases[phase].epochs
            if ends or (epoch + 1) % config.train.eval_every == 0:
                self._evaluate(phase, epoch, ends)
                if self.history.is_stale():
                    return
            self.at = Position(count + 1, 0, self.at.steps)

    def _step(self, count: int) -> float:
        """Takes one optimiser step with its batches' mean gradient; returns the learning rate."""
        (phase, epoch), first = self.schedule[count], self.at.batch
        end = min(first + self.config.optim.accumulate, len(self._batches))
        done, here = first / len(self._batches), (end - first) / len(self._batches)
        rate = learning_rate(self.config.optim, phase, epoch, done, here)
        self.optimisation.begin(rate)
        images = sum(len(indices) for indices in self._batches[first:end])
        terms: dict[str, Tensor] = {}
        waited_s = 0.0
        for place in range(first, end):
            following = self._batches[place + 1] if place + 1 < len(self._batches) else None
            batch = self.data.batch(self._batches[place], phase, epoch, following)
            guide = None
            if self.cache is not None:
                compute = partial(self.task.guide, batch.teacher_input)
                guide = self.cache.guide(place, compute, batch.flipped)
            inputs = batch.images, batch.labels, batch.points
            result = self.task.step(*inputs, guide, batch.teacher_images)
            found = {"loss": result.loss, **result.terms}
            if end - first > 1:
                share = len(batch.labels) / images
                found = {name: term * share for name, term in found.items()}
            self.optimisation.backward(found["loss"])
            for name, term in found.items():
                terms[name] = terms[name] + term.detach() if name in terms else term.detach()
            waited_s += batch.waited_s
        self.at = Position(count, end, self.at.steps + 1)
        self.clock.step(images, waited_s)
        more = self.optimisation.step(self.at.steps)
        if more is not None:
            self.terms.add(self.at.steps, {**terms, **more})
        elif self.optimisation.skipped_in_a_row >= outcome.MAX_SKIPPED:
            raise self._diverged(
                self.at.steps,
                f"the gradients of {outcome.MAX_SKIPPED} steps in a row overflowed float16 at "
                "every loss scale",
                "Set train.precision to bfloat16 or float32, or lower optim.phases' lr.",
            )
        return rate

    def save(self) -> None:
        """Writes last/, if every loss since the last line and every weight is finite."""
        self._check_terms()
        network, extra = self.task.network.state_dict(), self.task.extra.state_dict()
        name = outcome.not_finite({**network, **extra, **self.optimisation.momenta()})
        if name is not None:
            cause = (
                f"{name} is no longer finite though the loss was; the batch was {self._names(0)}"
            )
            advice = "Lower optim.phases' lr, or set optim.clip_norm."
            raise self._diverged(self.at.steps, cause, advice)
        state = {
            "at": self.at._asdict(),
            **self.optimisation.state(),
            "extra": dict(extra),
            "random": random_state(self.data.device),
            "terms": self.terms.state(),
            "evaluations": self.history.records,
            "lengths": self.journal.sync(),
            "spent": self.clock.spent(),
            "key": self.key,
            "environment": environment(self.config),
        }
        checkpoint.save(self.folder / LAST, self.optimisation.weights(), state)

    def resume(self) -> bool:
        """Restores the last checkpoint; False if there is none."""
        checkpoint.recover(self.folder / BEST)
        checkpoint.recover(self.folder / LAST)
        if not (self.folder / LAST).exists():
            return False
        state = checkpoint.load_state(self.folder / LAST)
        if state["key"] != self.key:
            self.screen.say(
                "warning: the sources, the images or an input run changed since this run began; "
                "the results will differ from those of an uninterrupted run"
            )
        for name, value in environment(self.config).items():
            was = state["environment"].get(name)
            if was != value:
                self.screen.say(
                    f"warning: {name} was {was}, is {value}; the last bits of the result may differ"
                )
        self.optimisation.restore(checkpoint.load_weights(self.folder / LAST), state)
        self.task.extra.load_state_dict(state["extra"])
        restore_random(state["random"], self.data.device)
        self.at = Position(**state["at"])
        self.terms.restore(state["terms"])
        self.history.records = state["evaluations"]
        self.journal = Journal(self.folder, state["lengths"], self.config.train.tensorboard)
        self._start_clock(state["spent"])
        self.screen.say(
            f"resumed in epoch {self.at.epoch + 1} of {len(self.schedule)}, step {self.at.steps}"
        )
        return True

    def finish(self) -> dict[str, Any]:
        """Writes samples.npz and results.json, which mark the run as finished."""
        config, task, data = self.config, self.task, self.data
        name, sign = task.metric
        last = self.history.records[-1]
        metrics = last["metrics"]
        if len(data.validation):
            # a run that stopped early in a phase was not tested there yet
            metrics = last["test"] if "test" in last else self._test(last["phase"])
        ended = self.history.ended(self._epoch(), len(self.schedule))
        floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
        own = task.network, config.data.input_size
        networks = {"network": own}
        if task.teacher is not None:
            networks = {"student": own, "teacher": (task.teacher, config.teacher_side)}
        results = {
            "status": "finished",
            "task": config.task,
            "metric": {"name": name, "higher_is_better": sign > 0},
            "metrics": metrics,
            "validation": self.history.latest if len(data.validation) else None,
            "best": self.history.best(),
            "phases": [r for r in self.history.records if r["phase_ends"]],
            "ended": ended,
            "floors": floors,
            "untrained": task.untrained(data.evaluation(data.test)),
            "units": {n: unit(n) for n in (*metrics, *floors)},
            "steps": self.at.steps,
            "skipped_steps": self.optimisation.skipped,
            "parameters": {k: count_parameters(n) for k, (n, _) in networks.items()},
            "multiply_adds": {k: multiply_adds(n, side) for k, (n, side) in networks.items()},
            "data": data.summary(),
            "key": self.key,
            **self.clock.summary(),
            "environment": environment(config),
        }
        checkpoint.write_arrays(self.folder / SAMPLES, task.samples)
        checkpoint.write_json(self.folder / RESULTS, plain(results))
        if self.cache is not None:
            self.screen.say(self.cache.summary())
        self.show(1.0)
        self.screen.say(
            f"{ended['why']}; {duration(results['seconds'])}, "
            f"{results['samples_per_s']:.0f} samples/s, "
            f"{100 * results['wait_share']:.1f} % of the training time waiting for data"
        )
        return plain(results)

    def show(self, share: float) -> None:
        """Shows the progress on the screen and in progress.json, for a pipeline."""
        name, left_s = self.history.metric, self.clock.left_s()
        latest = self.history.latest.get(name)
        epochs = {"epoch": self._epoch(), "epochs": len(self.schedule)}
        progress = {"share": share, **epochs, "metric": name, "value": latest, "left_s": left_s}
        # not forced to disk, as only a running pipeline reads it
        content = json.dumps(plain(progress)).encode()
        checkpoint.write_bytes(self.folder / PROGRESS, content, sync=False)
        note = f"epoch {epochs['epoch']}/{epochs['epochs']}, {duration(left_s)} left"
        if latest is not None:
            note += f", {name} {number(name, latest)}"
        self.screen.update(share, note)

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()
        self.journal.close()

    def _start_clock(self, spent: Mapping[str, float]) -> None:
        steps = -(-len(self._batches) // self.config.optim.accumulate)
        self.clock = Clock(len(self.schedule) * steps, self.at.steps, spent)

    def _log(self, phase: int, epoch: int, lr: float) -> None:
        self._check_terms()
        place = {"step": self.at.steps, "phase": phase, "epoch": epoch}
        record = {"kind": "train", **place, "lr": lr, **self.terms.take()}
        if self.scaled:
            record["skipped_steps"] = self.optimisation.skipped
        self.journal.write("metrics", record)
        self.journal.write("timing", {**place, **self.clock.pace()})
        if time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            self.show(self.at.steps / self.clock.total)

    def _evaluate(self, phase: int, epoch: int, ends: bool) -> None:
        name, validates = self.history.metric, len(self.data.validation) > 0
        metrics = self._measure(self.data.held_out)
        place = {"step": self.at.steps, "phase": phase, "epoch": epoch, "phase_ends": ends}
        if validates:
            place["split"] = "validation"
        record = {**place, "metrics": metrics}
        if self.history.add(record):
            checkpoint.save(self.folder / BEST, self.optimisation.weights())
        self.journal.write("metrics", {"kind": "eval", **place, **metrics})
        self.screen.say(
            f"epoch {self.at.epoch + 1}/{len(self.schedule)}  "
            f"{name} {number(name, metrics.get(name))}  {duration(self.clock.left_s())} left"
        )
        # before a checkpoint records this evaluation
        if validates and (ends or self.history.is_stale()):
            self._write_items(f"validation_phase{phase}")
        if ends and validates:
            record["test"] = self._test(phase)
        elif ends:
            self._write_items(f"phase{phase}")

    def _test(self, phase: int) -> dict[str, Any]:
        """Metrics on the test split, which choose nothing."""
        name = self.history.metric
        metrics = self._measure(self.data.test)
        self._write_items(f"phase{phase}")
        self.journal.write("metrics", {"kind": "test", "step": self.at.steps, **metrics})
        self.screen.say(f"test split: {name} {number(name, metrics.get(name))}")
        return metrics

    def _write_items(self, name: str) -> None:
        checkpoint.write_arrays(self.folder / ITEMS / f"{name}.npz", self.task.items())

    def _epoch(self) -> int:
        return min(self.at.epoch + 1, len(self.schedule))  # from 1

    def _measure(self, indices: Tensor) -> dict[str, Any]:
        """Metrics of the saved weights on the images `indices`."""
        started = time.perf_counter()
        with self.optimisation.measured():
            metrics = self.task.evaluate(self.data.evaluation(indices))
        self.clock.apart(time.perf_counter() - started)
        return plain(metrics)

    def _check_terms(self) -> None:
        found = self.terms.read()
        if found is not None:
            names = self._names(self.at.steps - found.step)
            cause = f"loss term '{found.term}' is {found.value}; the batch was {names}"
            advice = "Lower optim.phases' lr, set optim.clip_norm, or give that term less weight."
            raise self._diverged(found.step, cause, advice)

    def _names(self, back: int) -> str:
        """Names of the images `back` steps before this epoch's last step."""
        size = self.config.optim.accumulate
        first = (-(-self.at.batch // size) - 1 - back) * size
        return self.data.names(torch.cat(self._batches[first : first + size]))

    def _diverged(self, step: int, cause: str, advice: str) -> TrainingError:
        """Writes diverged.json, which ends the run for good; returns the error to raise."""
        phase, epoch = self.schedule[self.at.epoch]
        place = {"step": step, "key": self.key, "phase": phase, "epoch": epoch}
        standing = "No checkpoint had been saved yet."
        if (self.folder / LAST).exists():
            standing = f"{self.folder / LAST} holds the finite weights of an earlier step."
        message = f"diverged at step {step}: {cause}. {standing} {advice}"
        record = {**place, **self.clock.summary(), "message": message}
        checkpoint.write_json(self.folder / DIVERGED, record)
        return TrainingError(message)
