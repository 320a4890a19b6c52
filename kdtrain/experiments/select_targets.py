"""Which of a teacher's targets help a student: each alone against none, over the same seeds.

    measure each target's individual influence, set to 0 what hurts, keep both where both help

(section 5.4 of "Model Distillation with Knowledge Transfer", arXiv 1709.02929.) The arms differ in
the targets' weights and in nothing else; they are stages of pipeline.py, so finished ones are
reused, a killed one continues, and several run side by side. Images held out of the training
split judge, unless data.validation_fraction is set to 0: to choose by the test split would be to
peek at it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.config import Config, ConfigError, TeacherConfig, named_runs, run_folder, settings
from kdtrain.config.program import INTERRUPTED
from kdtrain.experiments import pipeline, selection
from kdtrain.experiments.campaign import Order
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.selection import CANDIDATES, WIDTH, Arm, Selection
from kdtrain.training import checkpoint, keys
from kdtrain.training.input_runs import run_config, same_set
from kdtrain.training.journal import journal

VALIDATION = 0.2
"""data.validation_fraction of the arms, where neither the recipe nor the command line sets one."""


class SelectionError(RuntimeError):
    """A comparison that cannot be made; the message says which stage is to blame and what to do."""


@dataclass(frozen=True)
class Study:
    """What is to be compared, with what is not compared held fixed."""

    root: Path
    """Folder of the arms' runs; @NAME in the recipe is the run beside it."""
    config: Config
    """The recipe with every candidate's weight, as the arms train it (but for seed and weights)."""
    weights: Mapping[str, float]
    """The candidates: target -> weight."""
    seeds: Sequence[int]
    final_validation: float
    """data.validation_fraction of the recipe that is written."""

    def weighed(self, chosen: Sequence[str]) -> Config:
        """The config with the weights of `chosen` and 0 for the other candidates; without teacher
        where neither a target nor the head needs it any more.
        """
        fields = {CANDIDATES[n].key: w if n in chosen else 0.0 for n, w in self.weights.items()}
        target = dataclasses.replace(self.config.target, **fields)
        is_asked = target.needs_teacher or self.config.head.needs_teacher
        teacher = self.config.teacher if is_asked else TeacherConfig()
        return dataclasses.replace(self.config, target=target, teacher=teacher)

    def stages(self, arms: Sequence[Sequence[str]]) -> list[pipeline.Stage]:
        """A stage for each arm (a tuple of targets) and seed, seeds first."""
        return [
            pipeline.Stage(stage_name(arm, seed), dataclasses.replace(self.weighed(arm), seed=seed))
            for seed in self.seeds
            for arm in arms
        ]

    @property
    def split(self) -> str:
        """The images that judge: validation or test."""
        return "validation" if self.config.data.validation_fraction > 0 else "test"


def stage_name(arm: Sequence[str], seed: int) -> str:
    """none_s1, soft_s1, soft+hidden_s1."""
    return f"{'+'.join(arm) or 'none'}_s{seed}"


def plan(
    recipe: Path,
    overrides: Mapping[str, Any],
    root: Path,
    *,
    targets: str | None = None,
    seeds: int = 3,
) -> Study:
    """What a recipe and a command line ask for.

    targets: candidates with commas; by default those with a weight in the recipe, else soft and
    hidden. A candidate without weight gets its published weight; a target that is no
    candidate keeps the recipe's weight in every arm. Raises ConfigError for a recipe without
    teacher, an unknown target, an input run that is missing, and settings that do not fit together.
    """
    if "seed" in overrides:
        raise ConfigError("seed is each arm's own: --seeds N trains seeds 1 to N")
    if seeds < 1:
        raise ConfigError(f"--seeds: at least 1, got {seeds}")
    overrides = settings.in_full(overrides)
    flat = {**settings.read_recipe(recipe), **overrides}
    if flat.get("teacher.run") is None:
        raise ConfigError(
            f"{recipe.stem}: no teacher, so there is no target to choose: set --teacher to the "
            "teacher's run folder (@NAME is the run beside --run-dir)"
        )
    keys_of = {name: f"target.{row.key}" for name, row in CANDIDATES.items()}
    given = {name: _number(flat.get(key, 0.0), key) for name, key in keys_of.items()}
    names = [name for name, weight in given.items() if weight > 0] or ["soft", "hidden"]
    if targets is not None:
        names = [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in CANDIDATES:
            raise ConfigError(f"--targets: no {name!r}; {settings.nearest(name, CANDIDATES)}")
    weights = {name: given[name] or CANDIDATES[name].published for name in given if name in names}
    flat |= {keys_of[name]: weight for name, weight in weights.items()}
    key = "data.validation_fraction"
    final = settings.build(flat).data.validation_fraction
    held_out = final if key in overrides or final > 0 else VALIDATION
    config = settings.build({**flat, key: held_out})
    require_inputs(config, root, recipe, {**overrides, key: held_out})
    # folders for @NAME, as the arms lie one folder deeper than `root`
    flat = pipeline.rename_runs(settings.to_flat(config), lambda run: str(run_folder(run, root)))
    study = Study(root, settings.build(flat), weights, range(1, seeds + 1), final)
    try:
        study.weighed(())
    except ConfigError as error:
        raise ConfigError(
            f"without {', '.join(weights)} the recipe cannot train: {error}"
        ) from None
    return study


def require_inputs(config: Config, root: Path, recipe: Path, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the commands to run first, for a named run not finished."""
    for setting, folder in keys.input_folders(config, root).items():
        problem = _problem(folder)
        if problem is None:
            continue
        named = config.runs()[setting]
        if not named.startswith("@") or (folder / "diverged.json").exists():
            raise ConfigError(f"{setting}: {problem}")
        data = ((key, str(value)) for key, value in overrides.items() if key.startswith("data."))
        extra = " ".join(f"--{key} {shlex.quote(value)}" for key, value in data)
        commands = training_commands(named[1:], folder, recipe.parent, extra)
        raise ConfigError(
            f"{setting} {named}: no finished run in {folder}; train it first: "
            f"{'; then '.join(commands)}"
        )


def training_commands(name: str, folder: Path, recipes: Path, extra: str) -> list[str]:
    """The commands that bring run `folder` to its end, those of its own missing inputs first.

    recipes: the folder whose NAME.yaml trains it; extra: options for every new run.
    """
    if (folder / "config.yaml").is_file():
        return [f"python -m kdtrain train {folder} --resume"]
    # a recipe of PRESET/tables names runs of the preset too
    places = (recipes / f"{name}.yaml", recipes.parent / f"{name}.yaml")
    recipe = next((place for place in places if place.is_file()), None)
    if recipe is None:
        return [f"python -m kdtrain train RECIPE_OF_{name} --run-dir {folder}"]
    flat, commands = settings.read_recipe(recipe), []
    for value in named_runs(flat.get).values():
        if value.startswith("@") and _problem(folder.parent / value[1:]):
            before = training_commands(value[1:], folder.parent / value[1:], recipes, extra)
            commands += [command for command in before if command not in commands]
    packaged = recipe.is_relative_to(settings.RECIPES)
    shown = recipe.relative_to(settings.RECIPES).with_suffix("") if packaged else recipe
    return [*commands, f"python -m kdtrain train {shown} --run-dir {folder} {extra}".rstrip()]


def run(study: Study, out: Path, order: Order, *, keep_inconclusive: bool, overwrite: bool) -> int:
    """Train the arms, judge, and write table and recipe; 0 done, 1 a stage failed, 130 interrupted.

    overwrite: train finished runs anew. Raises SelectionError where no baseline is left,
    CheckpointError for run folders in use.
    """
    console = journal.console(file_width=WIDTH)

    def trained(arms: Sequence[Sequence[str]]) -> tuple[int, dict[str, Outcome]]:
        """pipeline.run, where a diverged run is a result and any other failure is named."""
        stages = study.stages(arms)
        status, outcomes = pipeline.run(stages, study.root, jobs=order.jobs, overwrite=overwrite)
        if status == INTERRUPTED:
            return status, outcomes
        ended = ("done", "reused", "diverged")
        failed = {name: one for name, one in outcomes.items() if one.state not in ended}
        for name, outcome in failed.items():
            console.print(f"error: {name} {outcome.state}: {outcome.note}", markup=False)
        return int(bool(failed)), outcomes

    singles = [(), *((name,) for name in study.weights)]
    console.print(
        f"{len(singles) * len(study.seeds)} runs: none, {', '.join(study.weights)}"
        f"; seeds 1 to {len(study.seeds)}; judged on the {study.split} split"
    )
    status, outcomes = trained(singles)
    if status:
        return status
    none, *arms = (read_arm(study, arm, outcomes) for arm in singles)
    if none.diverged:
        raise SelectionError(
            f"{stage_name((), none.diverged[0])} diverged: without targets the recipe does not "
            "train, so there is nothing to compare with; lower optim.phases' lr, or set "
            "optim.clip_norm"
        )
    metric = _results(study.root / stage_name((), study.seeds[0]))["metric"]
    higher = metric["higher_is_better"]
    judged = [selection.judge(arm, none, higher, keep_inconclusive) for arm in arms]
    kept = tuple(one.arm.name for one in judged if one.kept)
    checked = None
    if len(kept) > 1:
        console.print(f"a check of {' and '.join(kept)} together")
        status, more = trained([kept])
        if status:
            return status
        checked = selection.check(read_arm(study, kept, more), none, judged, higher)
    evidence = Selection(
        study.split, metric["name"], higher, none, judged, checked, leaks(study), order.command
    )
    final = study.weighed(kept)
    data = dataclasses.replace(final.data, validation_fraction=study.final_validation)
    selection.write(evidence, dataclasses.replace(final, data=data), study.root, out)
    console.print(selection.table(evidence))
    console.print()
    for line in evidence.remarks():
        console.print(line, markup=False)
    console.print(f"evidence: {study.root / 'select-targets.txt'}, .csv; recipe: {out}")
    return 0


def read_arm(study: Study, chosen: Sequence[str], outcomes: Mapping[str, Outcome]) -> Arm:
    """What one arm's runs measured, per seed and image.

    Raises SelectionError where a run has no per-image results, or runs saw different images.
    """
    scores: list[np.ndarray | None] = []
    images: list[int] = []
    for seed in study.seeds:
        name = stage_name(chosen, seed)
        if outcomes[name].state == "diverged":
            scores.append(None)
            continue
        items, metric = read_items(study.root / name, study.split)
        scores.append(items[metric].astype(np.float64))
        index = items["index"].tolist()
        if images and index != images:
            raise SelectionError(f"{study.root / name}: judged on other images than other seeds")
        images = index
    weights = {name: study.weights[name] for name in chosen}
    return Arm("+".join(chosen) or "none", weights, tuple(scores), tuple(study.seeds), images)


def read_items(folder: Path, split: str) -> tuple[dict[str, np.ndarray], str]:
    """The per-image results at the end of a run on a split, and the name of its metric."""
    results = _results(folder)
    name = results["metric"]["name"]
    told = results["metrics" if split == "test" else "validation"].get(name)
    if told is None:
        raise SelectionError(
            f"{folder}: {name} cannot be measured on the images of the {split} split; "
            "set a larger data.validation_fraction"
        )
    # the last phase that was begun: an early stop leaves none of those after it
    stem = "phase" if split == "test" else "validation_phase"
    files = (folder / "items").glob(f"{stem}*.npz")
    for path in sorted(files, key=lambda file: int(file.stem.removeprefix(stem)))[-1:]:
        items = checkpoint.read_arrays(path)
        if np.isclose(np.nanmean(items[name], dtype=np.float64), told, rtol=1e-5):  # of float32
            return items, name
    raise SelectionError(
        f"{folder}: items/ does not hold the images that {name} {told} of the {split} split is "
        "the mean of; pass --overwrite to train it anew"
    )


def _results(folder: Path) -> dict[str, Any]:
    return checkpoint.read_json(folder / "results.json") or {}


def leaks(study: Study) -> list[str]:
    """A note for every input run that was trained on images that judge here."""
    if study.split == "test":
        return [
            "the test split chose, so its results for the chosen recipe are no longer untouched "
            "evidence; --data.validation_fraction 0.2 leaves it alone"
        ]
    ours, notes = study.config.data, []
    cut = ("split", "test_fraction", "split_seed", "validation_fraction")
    for setting, folder in keys.input_folders(study.config, study.root).items():
        if setting == "gallery":  # which no arm learns from
            continue
        try:
            theirs = run_config(folder).data
        except checkpoint.CheckpointError:  # weights alone
            continue
        cut_alike = all(getattr(theirs, key) == getattr(ours, key) for key in cut)
        if same_set(theirs, ours) and not cut_alike:
            asked = setting.startswith("teacher")
            effect = "favours its targets" if asked else "lifts every arm"
            notes.append(
                f"{setting} ({folder.name}) was trained on images that judge here, which "
                f"{effect}; train it with --data.validation_fraction "
                f"{study.config.data.validation_fraction:g} to leave them out"
            )
    return notes


def _problem(folder: Path) -> str | None:
    """Why a run cannot be read as an input, or None where it can."""
    try:
        keys.input_key(folder)
    except checkpoint.CheckpointError as error:
        return str(error)
    return None


def _number(value: Any, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}: expected a number, got {value!r}") from None
