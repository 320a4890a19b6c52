"""Run folders as a report reads them: how far each got, what it was, and its numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdtrain.config import TARGETS, settings
from kdtrain.config.networks import network_title
from kdtrain.reports.chain_table import CHAIN, COLUMNS, ROWS, floor, untrained
from kdtrain.training.checkpoint import read_json
from kdtrain.training.journal.journal import read_lines, unit

TASKS = ("classification", "alignment", "verification")
LOWER_IS_BETTER = ("nrmse", "nme", "failure_rate", "cross_entropy", "hint")
COUNTS = ("pairs", "queries", "lone")


@dataclass(frozen=True)
class Stage:
    """One run folder, as far as it got."""

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    """Empty until the run is finished."""
    records: Sequence[Mapping[str, Any]]
    """Lines of its journal."""
    samples: Mapping[str, np.ndarray]
    diverged: bool = False
    """It ended on a loss or weight that was not finite."""

    @property
    def task(self) -> str:
        """What it trains; "" when that is not known."""
        return self.results.get("task") or self.config.get("task", "")

    @property
    def role(self) -> str:
        """teacher | scratch | control | distilled of a run of the chain, else the name."""
        return CHAIN[self.name].split()[0] if self.name in CHAIN else self.name

    @property
    def teachers(self) -> list[str]:
        """The runs that its config names as teachers, as written there."""
        section = self.config.get("teacher")
        if not isinstance(section, Mapping):  # a string is short for its run
            return [str(section)] if section else []
        named = [section.get("run"), *(section.get("more") or [])]
        return [str(run) for run in named] if section.get("run") else []

    @property
    def state(self) -> str:
        """finished, diverged, not finished or not run."""
        if self.results:
            return "finished"
        if self.diverged:
            return "diverged"
        return "not finished" if self.records else "not run"

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        """The train or eval lines of the journal."""
        return [record for record in self.records if record["kind"] == kind]

    def metric(self, name: str) -> float | None:
        """A metric at the end of training."""
        return self.results.get("metrics", {}).get(name)


def read_stages(root: Path) -> list[Stage]:
    """Every run below root, by task and role; runs that a pipeline plans there but has not begun
    too.
    """
    if (root / "config.yaml").is_file():
        return [_stage(root, root / "config.yaml")]
    recipes = {path.parent.name: path for path in root.glob("*/config.yaml")}
    planned = {path.stem: path for path in root.glob("recipes/*.yaml")}
    found = [_stage(root / name, recipe) for name, recipe in {**planned, **recipes}.items()]
    roles = [title.split()[0] for title, _ in ROWS]

    def place(stage: Stage) -> tuple[int, int, str]:
        task = TASKS.index(stage.task) if stage.task in TASKS else len(TASKS)
        return task, roles.index(stage.role) if stage.role in roles else len(roles), stage.name

    return sorted(found, key=place)


def _stage(folder: Path, recipe: Path) -> Stage:
    config = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    settings.check_version(settings.flatten(config), recipe)
    samples: dict[str, np.ndarray] = {}
    if (folder / "samples.npz").is_file():
        with np.load(folder / "samples.npz") as arrays:
            samples = dict(arrays)
    results = read_json(folder / "results.json") or {}
    records = read_lines(folder / "metrics.jsonl")
    diverged = (folder / "diverged.json").is_file()
    return Stage(folder.name, config, results, records, samples, diverged)


def pictures_text(stage: Stage) -> str:
    """Which pictures a run was trained and tested on."""
    data, source = stage.config.get("data", {}), stage.results.get("data", {})
    text = f"{source.get('name') or data.get('kind', 'unknown')}"
    if source:
        text += (
            f", {source['images']:,} pictures of {source['classes']:,} people, "
            f"{source['train']:,} to train and {source['test']:,} to test"
        )
        if source.get("validation"):
            text += f", {source['validation']:,} for validation"
        if source.get("skipped"):
            text += f", {source['skipped']} skipped"
    text += f"; split {data.get('split')}; {data.get('input_size')} pixels"
    crop = data.get("crop_size")
    return text + (f" of crops of {crop}" if crop else "")


def machine_text(stage: Stage) -> str:
    """Where a run was computed, and by which versions."""
    known = dict(stage.results.get("environment", {}))
    device, threads = known.pop("device", "unknown"), known.pop("threads", "?")
    known.pop("workers", None)
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"{device}, {threads} thread{'s' * (threads != 1)} a run; {versions}"


def network_text(stages: Sequence[Stage]) -> str:
    """'ResNet-14, 16 kernels, 0.3 M parameters, 7 M multiply-adds' of the first finished run."""
    for stage in stages:
        model = stage.config.get("model", {})
        if not stage.results or not model:
            continue
        name = "network" if "network" in stage.results.get("parameters", {}) else "student"
        size = stage.results.get("parameters", {}).get(name)
        work = stage.results.get("multiply_adds", {}).get(name)
        parts = [network_title(model)]
        if model.get("name", "resnet") == "resnet":
            # the kernels tell the division
            parts = [f"ResNet-{model['depth']}", f"{model['width'] // model['divide']} kernels"]
        parts += [f"{count_text(size)} parameters"] if size else []
        parts += [f"{count_text(work)} multiply-adds"] if work else []
        return ", ".join(parts)
    return ""


def protocol_text(stages: Sequence[Stage]) -> str:
    """How the numbers were measured, where protocols of the field differ."""
    parts = ["centre crops"]
    for normalizer in {s.config["eval"]["normalizer"] for s in stages if s.task == "alignment"}:
        parts.append(f"NRMSE by {normalizer}, in original pixels")
    verified = [stage for stage in stages if stage.task == "verification"]
    if verified:
        parts.append("nearest neighbour leave-one-out by Euclidean distance")
    lone = next((stage.metric("nn_lone") for stage in verified if stage.results), None)
    if lone is not None:
        parts.append(f"{lone:.0f} queries without another picture of their person left out")
    if any(stage.metric("pair_accuracy") is not None for stage in stages):
        parts.append("pairs by cosine, threshold from the other folds")
    return "; ".join(parts)


def start_text(stage: Stage) -> str:
    """The run whose weights the network started with, or scratch."""
    source = stage.config.get("init_from")
    return "scratch" if not source else str(source).removeprefix("@")


def loss_text(stage: Stage) -> str:
    """'points + 1 hidden (mean)' with the weights and forms that the run was given."""
    target, parts = stage.config.get("target", {}), []
    if stage.task == "alignment":
        parts.append("points")
    if stage.task == "verification":
        triplet = stage.config.get("triplet", {})
        weight = triplet.get("weight", 1)
        named = f"triplet ({triplet.get('mining')}, margin {triplet.get('margin')})"
        if weight:
            parts.append(named if weight == 1 else f"{weight:g} {named}")

    def tau(form: str) -> str:
        value = target.get(form) or target.get("temperature")
        squared = ", tau\N{SUPERSCRIPT TWO}" if target.get("tau_squared") else ""
        return (f"tau {value:g}" if value else "") + squared

    words = [("gamma", "softmax", "")]
    words += [
        (row.key, row.words.format_map(target), row.form)
        for row in TARGETS.values()
        if target.get(row.key)
    ]
    for key, name, form in words:
        weight = target.get(key)
        if weight:
            prefix = "" if weight == 1 else f"{weight:g} "
            note = tau(form) if form.endswith("temperature") else target.get(form)
            parts.append(f"{prefix}{name}" + (f" ({note})" if note else ""))
    return "; ".join([" + ".join(parts), *_teacher_text(stage)])


def _teacher_text(stage: Stage) -> list[str]:
    """'teachers a, b (weights 2, 1) on 32 pixels' in a list, which is empty without a teacher."""
    if not stage.teachers:
        return []
    section, several = stage.config["teacher"], len(stage.teachers) > 1
    teacher = section if isinstance(section, Mapping) else {}
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
    best = stage.results.get("best")
    if not best:
        return ""
    name = judge(stage)
    value = brief(name, best["metrics"].get(name))
    split = f", {best['split']}" if "split" in best else ""
    return f"{value} (epoch {epochs_done(stage, best)}{split})"


def epochs_done(stage: Stage, record: Mapping[str, Any]) -> int:
    """Epochs done, over all phases, when a line was written."""
    phases = stage.config.get("optim", {}).get("phases", [])
    return sum(phase["epochs"] for phase in phases[: record["phase"]]) + record["epoch"] + 1


def judge(stage: Stage) -> str:
    """The metric that the run is judged by: its task's, or the hint's error."""
    if stage.config.get("target", {}).get("hint"):
        return "hint"
    return next((metric for _, task, metric in COLUMNS if task == stage.task), "")


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith(LOWER_IS_BETTER)


def better(metric: str, value: float, floor: float) -> bool:
    """Whether a value beats the floor."""
    return value < floor if lower_is_better(metric) else value > floor


def plotted(name: str, value: float | None) -> float:
    """A metric as curves show it: a fraction in %, nan for none."""
    if value is None:
        return float("nan")
    return 100 * value if unit(name) == "fraction" else value


def brief(name: str, value: float | None) -> str:
    """A metric without its unit: '93.1' of 0.931, '0.0123' of a squared error; a dash for none."""
    if value is None or unit(name) == "fraction":
        return percent(value)
    return f"{value:.4f}"


def percent(value: float | None) -> str:
    """'93.1' of 0.931; a dash for none."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"


def shown(name: str, value: float | None) -> str:
    """A metric with its unit: a count, nats, a squared error, or %."""
    if value is None:
        return "\N{EN DASH}"
    if unit(name) in ("nats", "squared error"):
        return f"{value:.3f}" if unit(name) == "nats" else f"{value:.4f}"
    if any(part in COUNTS for part in name.split("_")):
        return f"{value:,.0f}"
    return f"{100 * value:.1f} %"


def count_text(number: float) -> str:
    """'4.11 G' of 4.11e9."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def floor_of(stages: Sequence[Stage], task: str, metric: str) -> float | None:
    """The floor that the first finished run of a task measured; None where there is none."""
    return floor({stage.name: stage.results for stage in stages}, task, metric)


def untrained_of(stages: Sequence[Stage], task: str, metric: str) -> float | None:
    """A metric of a task's student before its first step; None where there is none."""
    return untrained({stage.name: stage.results for stage in stages}, task, metric)
