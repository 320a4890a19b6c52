"""Run directories as a report reads them: state, setting and numbers of each run, as text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import TARGETS, settings
from kdtrain.config.networks import network_title
from kdtrain.config.program import printable
from kdtrain.reports.writing import brief, count, lower_is_better
from kdtrain.training.checkpoint import read_arrays, read_json
from kdtrain.training.journal.journal import duration, read_lines

COLUMNS = (
    ("classification top-1", "classification", "top1"),
    ("alignment NRMSE", "alignment", "nrmse"),
    ("verification NN top-1", "verification", "nn_top1"),
    ("NN top-1, other videos", "verification", "nn_top1_other_video"),
    ("pair accuracy", "verification", "pair_accuracy"),
)
"""Of the result table: title, task, metric."""
METRICS = {"top1": "Top-1", "nrmse": "NRMSE", "nn_top1": "Nearest-neighbour top-1"}
"""The metric that judges a task, in words."""
TASKS = tuple(dict.fromkeys(task for _, task, _ in COLUMNS))
ROWS = (
    ("teacher", ("_teacher",)),
    ("scratch student", ("_student", "_scratch")),
    ("control student, no teacher", ("_control",)),
    ("distilled student", ("_distilled",)),
)
"""Of the result table: title, and the ends of the names of its stages."""
CHAIN = {
    f"{task}{ending}": title
    for task in ("cls", "ali", "ver")
    for title, endings in ROWS
    for ending in endings
}
"""The row of each stage of the chain; every other stage has its own row."""


@dataclass(frozen=True)
class Stage:
    """One run directory, finished or not."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    """Empty until the run is finished."""
    records: Sequence[Mapping[str, Any]]
    """Lines of its journal."""
    samples: Mapping[str, np.ndarray]

    @property
    def task(self) -> str:
        """The task that it trains; "" where that is not known."""
        return self.results.get("task") or self.config.get("task", "")

    @property
    def role(self) -> str:
        """teacher | scratch | control | distilled of a run of the chain, else the name."""
        return CHAIN[self.name].split()[0] if self.name in CHAIN else self.name

    @property
    def title(self) -> str:
        """Its role in words, such as distilled student; the name of a run outside the chain."""
        return CHAIN.get(self.name, self.name)

    @property
    def teachers(self) -> list[str]:
        """The teacher runs of its config, as written there."""
        section = self.config.get("teacher", {})
        named = [section.get("run"), *(section.get("more") or [])]
        return [printable(run) for run in named] if section.get("run") else []

    @property
    def state(self) -> str:
        """finished, diverged, not finished or not run."""
        if self.results:
            return "finished"
        if (self.directory / "diverged.json").is_file():
            return "diverged"
        return "not finished" if self.records else "not run"

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        """The train or eval lines of the journal."""
        return [record for record in self.records if record["kind"] == kind]

    def metric(self, name: str) -> float | None:
        """A metric at the end of training."""
        return self.results.get("metrics", {}).get(name)

    def items(self, metric: str) -> np.ndarray | None:
        """The metric of every test item at the end of training; None where it is not stored."""
        last = len(phase_ends(self)) - 1
        return read_arrays(self.directory / "items" / f"phase{last}.npz").get(metric)

    def beats_floor(self, metric: str) -> bool | None:
        """Whether a metric at the end is better than the run's floor; None without either."""
        value, floor = self.metric(metric), self.results.get("floors", {}).get(metric)
        if value is None or floor is None:
            return None
        return value < floor if lower_is_better(metric) else value > floor


def read_stages(root: Path) -> list[Stage]:
    """Every run below root, planned ones included, by task and role."""
    if (root / "config.yaml").is_file():
        return [read_stage(root)]
    planned = [path.stem for path in root.glob("recipes/*.yaml")]
    begun = [path.parent.name for path in root.glob("*/config.yaml")]
    found = [read_stage(root / name) for name in dict.fromkeys([*planned, *begun])]
    roles = [title.split()[0] for title, _ in ROWS]

    def place(stage: Stage) -> tuple[int, int, str]:
        task = TASKS.index(stage.task) if stage.task in TASKS else len(TASKS)
        return task, roles.index(stage.role) if stage.role in roles else len(roles), stage.name

    return sorted(found, key=place)


def read_stage(directory: Path) -> Stage:
    """A run from its directory, or from the recipe beside it that plans it."""
    recipes = directory / "config.yaml", directory.parent / "recipes" / f"{directory.name}.yaml"
    recipe = next((path for path in recipes if path.is_file()), None)
    return Stage(
        printable(directory.name),
        directory,
        {} if recipe is None else settings.nested(settings.read_recipe(recipe)),
        read_json(directory / "results.json") or {},
        read_lines(directory / "metrics.jsonl"),
        read_arrays(directory / "samples.npz"),
    )


def images_text(stage: Stage) -> str:
    """The images of training and testing: counts, split and size."""
    data, source = stage.config.get("data", {}), stage.results.get("data", {})
    parts = [f"{source.get('name') or data.get('kind', 'unknown')}"]
    if source:
        parts += [
            f"{source['images']:,} images of {source['classes']:,} identities",
            f"{source['train']:,} for training and {source['test']:,} for testing",
        ]
        parts += [f"{source['validation']:,} for validation"] if source.get("validation") else []
        parts += [f"{source['skipped']} skipped"] if source.get("skipped") else []
    crops = f" of crops of {data['crop_size']}" if data.get("crop_size") else ""
    size = f"{data.get('input_size')} pixels{crops}"
    return f"{', '.join(parts)}; split {data.get('split')}; {size}"


def machine_text(stage: Stage) -> str:
    """The device, threads and versions of a run."""
    known = dict(stage.results.get("environment", {}))
    device, threads = known.pop("device", "unknown"), known.pop("threads", "?")
    known.pop("workers", None)
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"{device}, {threads} thread{'s' * (threads != 1)} per run; {versions}"


def network_text(stages: Sequence[Stage]) -> str:
    """'ResNet-14/8, 0.3 M parameters, 7 M multiply-adds' of the first finished run."""
    stage = next((s for s in stages if s.results and s.config.get("model")), None)
    if stage is None:
        return ""
    parts = [network_title(stage.config["model"])]
    for key, words in (("parameters", "parameters"), ("multiply_adds", "multiply-adds")):
        found = stage.results.get(key, {})
        size = found.get("network", found.get("student"))
        parts += [f"{count(size)} {words}"] if size else []
    return ", ".join(parts)


def protocol_text(stages: Sequence[Stage]) -> str:
    """The choices of measurement in which protocols of the field differ."""
    parts = ["center crops"]
    for normalizer in {s.config["eval"]["normalizer"] for s in stages if s.task == "alignment"}:
        parts.append(f"NRMSE by {normalizer}, in original pixels")
    verified = [stage for stage in stages if stage.task == "verification"]
    if verified:
        parts.append("nearest neighbour leave-one-out by Euclidean distance")
    lone = next((stage.metric("nn_lone") for stage in verified if stage.results), None)
    if lone is not None:
        parts.append(f"{lone:.0f} queries without another image of their identity left out")
    if any(stage.metric("pair_accuracy") is not None for stage in stages):
        parts.append("pairs by cosine, threshold from the other folds")
    return "; ".join(parts)


def loss_text(stage: Stage) -> str:
    """'points + 0.5 hidden (mean)': the terms with their weights and forms."""
    target, parts = stage.config.get("target", {}), []
    if stage.task == "alignment":
        parts.append("points")
    if stage.task == "verification":
        triplet = stage.config.get("triplet", {})
        if weight := triplet.get("weight", 1):
            named = f"triplet ({triplet.get('mining')}, margin {triplet.get('margin')})"
            parts.append(named if weight == 1 else f"{weight:g} {named}")

    def tau(form: str) -> str:
        value = target.get(form) or target.get("temperature")
        squared = ", tau\N{SUPERSCRIPT TWO}" if target.get("tau_squared") else ""
        return (f"tau {value:g}" if value else "") + squared

    terms = [(row.key, row.words, row.form) for row in TARGETS.values()]
    for key, words, form in [("gamma", "softmax", ""), *terms]:
        if weight := target.get(key):
            prefix = "" if weight == 1 else f"{weight:g} "
            note = tau(form) if form.endswith("temperature") else target.get(form)
            parts.append(prefix + words.format_map(target) + (f" ({note})" if note else ""))
    return "; ".join([" + ".join(parts), *_teacher_text(stage)])


def _teacher_text(stage: Stage) -> list[str]:
    """['teachers a, b (weights 2, 1) on 32 pixels'], or [] without a teacher."""
    if not stage.teachers:
        return []
    teacher, several = stage.config["teacher"], len(stage.teachers) > 1
    names = ", ".join(run.removeprefix("@") for run in stage.teachers)
    text = f"teacher{'s' * several} {names}"
    if several and teacher.get("weights"):
        text += f" (weights {', '.join(f'{weight:g}' for weight in teacher['weights'])})"
    return [text + (f" on {teacher['input_size']} pixels" if teacher.get("input_size") else "")]


def phases_text(stage: Stage) -> str:
    """'16 at 0.1, 6 at 0.01': epochs and learning rate of each phase."""
    phases = stage.config.get("optim", {}).get("phases", [])
    return ", ".join(f"{phase['epochs']} at {phase['lr']:g}" for phase in phases)


def after_phases_text(stage: Stage) -> str:
    """'35.8 -> 65.8': the judging metric at the end of each phase."""
    name = judge(stage)
    ends = [record for record in stage.lines("eval") if record.get("phase_ends")]
    return " \N{RIGHTWARDS ARROW} ".join(brief(name, record.get(name)) for record in ends)


def best_text(stage: Stage) -> str:
    """The best evaluation by the judging metric, and its epoch."""
    best, name = stage.results.get("best"), judge(stage)
    if not best:
        return ""
    split = f", {best['split']}" if "split" in best else ""
    return f"{brief(name, best['metrics'].get(name))} (epoch {epochs_done(stage, best)}{split})"


def time_text(stage: Stage) -> str:
    """The training time, or the state of an unfinished run."""
    seconds = stage.results.get("seconds")
    return duration(seconds) if seconds else stage.state


def phase_ends(stage: Stage) -> list[int]:
    """The epochs done at the end of each phase."""
    phases = stage.config.get("optim", {}).get("phases", [])
    return list(itertools.accumulate(phase["epochs"] for phase in phases))


def epochs_done(stage: Stage, record: Mapping[str, Any]) -> int:
    """Epochs done over all phases at a line of the journal."""
    return [0, *phase_ends(stage)][record["phase"]] + record["epoch"] + 1


def judge(stage: Stage) -> str:
    """The metric that judges the run: its task's, or the hint's error."""
    if stage.config.get("target", {}).get("hint"):
        return "hint"
    return next((metric for _, task, metric in COLUMNS if task == stage.task), "")


def baseline(stages: Sequence[Stage], section: str, task: str, metric: str) -> float | None:
    """A metric of a network that learned nothing, from the first finished run of a task (a student
    where there is one, if section is untrained); None where no run has it. section: floors, or
    untrained: the run's own network before its first step.
    """
    last = "teacher" if section == "untrained" else "-"
    ordered = sorted(stages, key=lambda stage: stage.name.endswith(last))
    found = [stage.results.get(section, {}).get(metric) for stage in ordered if stage.task == task]
    return next((value for value in found if value is not None), None)
