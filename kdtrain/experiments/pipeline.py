"""The stages of a preset: recipes with inputs, their keys, and the stages that are reused.

A preset is a folder of recipes. A recipe that names a run (config.RUN_SETTINGS) as @NAME takes
stage NAME as an input; stages run in an order that respects this. Stages run as processes of their
own (scheduler.py), each in its own run directory below the root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kdtrain.config import RUN_SETTINGS, ConfigError, DataConfig, settings
from kdtrain.config.program import threads_of
from kdtrain.data import FaceSource
from kdtrain.data.run_data import data_key, parts, shared_source
from kdtrain.experiments.scheduler import (
    RECIPES,
    Outcome,
    Overview,
    Stage,
    longest_chain_first,
    result_text,
    run_all,
)
from kdtrain.objectives.tasks import TASKS
from kdtrain.reports.chain_table import result_table
from kdtrain.training import checkpoint, keys
from kdtrain.training.journal import journal
from kdtrain.training.journal.journal import duration

NO_LANDMARKS = "the images have no landmarks (data.landmark_file names a list of them)"


def plan(
    preset: str,
    common: Mapping[str, Any],
    special: Mapping[str, Mapping[str, Any]],
    divide: int | None = None,
) -> list[Stage]:
    """The stages of a preset in an order that can be run.

    preset: a packaged one or a folder of recipes. common: dotted keys for every stage; special: by
    stage name, on top. divide: the students' division of kernels. Raises ConfigError for an unknown
    preset or key, an input that is not there, or a circle.
    """
    common = settings.in_full(common)
    for key in ("task", *RUN_SETTINGS.values()):
        if key in common:
            raise ConfigError(f"{key} is each stage's own; set it for one stage: --STAGE.{key}")
    recipes = {f.stem: settings.read_recipe(f) for f in stage_files(preset)}
    stages = {}
    for name, recipe in recipes.items():
        flat = {**recipe, **common, **settings.in_full(special.get(name, {}))}
        if divide is not None and flat.get("model.divide", 1) != 1:
            flat["model.divide"] = divide
        stages[name] = make_stage(name, flat, f"stage {name}")
        for needed in stages[name].inputs:
            if needed not in recipes:
                raise ConfigError(f"stage {name}: no stage {needed!r} to take weights from")
    return ordered(stages)


def make_stage(name: str, flat: Mapping[str, Any], title: str) -> Stage:
    """The stage of dotted keys. With data.split identity, classification is split by image among
    the training identities (identity:random), as an identity without a class cannot be classified.
    Raises ConfigError, which begins with the title.
    """
    if flat.get("task") == "classification" and flat.get("data.split") == "identity":
        flat = {**flat, "data.split": "identity:random"}
    try:
        return Stage(name, settings.build(flat))
    except ConfigError as error:
        raise ConfigError(f"{title}: {error}") from None


def rename_runs(flat: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Dotted keys with another name for every run that they name (config.RUN_SETTINGS)."""
    found = {key: flat[key] for key in RUN_SETTINGS.values() if flat.get(key) is not None}
    for key, named in found.items():
        found[key] = [rename(run) for run in named] if isinstance(named, list) else rename(named)
    return {**flat, **found}


def stage_files(preset: str) -> list[Path]:
    """The recipes of a preset; files that begin with _ are only bases of others."""
    packaged = settings.RECIPES / preset
    folder = packaged if packaged.is_dir() else Path(preset)
    files = sorted(f for f in folder.glob("*.yaml") if not f.name.startswith("_"))
    if not files:
        raise ConfigError(
            f"no preset {preset!r}; {settings.nearest(preset, settings.preset_names())}"
        )
    return files


def is_there(data: DataConfig) -> bool:
    """Whether the images can be read on this machine, or are synthetic."""
    return data.kind == "synthetic" or Path(data.root or "").is_dir()


def without_landmarks(
    stages: Sequence[Stage], sources: dict[DataConfig, FaceSource]
) -> tuple[str, ...]:
    """The stages that cannot be trained as their images have no landmarks, and those that read
    such a stage. Images that cannot be read here are taken to have what is needed.

    stages: inputs first. sources: as in stage_keys.
    """
    lost: list[str] = []
    for stage in stages:
        lacking = False
        if TASKS[stage.config.task].needs_landmarks and is_there(stage.config.data):
            with contextlib.suppress(ValueError):  # training raises it with more detail
                lacking = shared_source(stage.config.data, sources).landmarks is None
        if lacking or set(stage.inputs) & set(lost):
            lost.append(stage.name)
    return tuple(lost)


def stage_keys(
    stages: Sequence[Stage], root: Path, sources: dict[DataConfig, FaceSource] | None = None
) -> dict[str, str]:
    """The key that each stage's run will have, worked out from the configs, the images and the
    inputs' keys. sources: those read before, and afterwards those read here
    (data.run_data.shared_source).
    """
    sources = {} if sources is None else sources
    found: dict[str, str] = {}
    for stage in stages:
        source = shared_source(stage.config.data, sources)
        train, _, test = parts(source, stage.config)
        images = data_key(source.fingerprint(), train, test)
        inputs = {}
        for setting, folder in keys.input_folders(stage.config, root / stage.name).items():
            own = folder.parent == root and folder.name in found
            inputs[setting] = found[folder.name] if own else keys.input_key(folder)
        found[stage.name] = keys.run_key(stage.config, inputs, images)
    return found


def run(
    stages: Sequence[Stage],
    root: Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    overview: Overview | None = None,
    sources: dict[DataConfig, FaceSource] | None = None,
) -> tuple[int, dict[str, Outcome]]:
    """Bring every stage below `root` to its end; exit status (0, 1 a stage failed or diverged, 130
    interrupted) and what happened.

    A finished stage whose key stands is reused, one that diverged under it stays so and those that
    need it are skipped, an unfinished one is resumed, one whose key changed is moved to
    root/previous and trained anew. overwrite: all are trained anew. jobs: stages side by side, each
    with its share of the processors, or OMP_NUM_THREADS where it is set. overview: draws what a
    terminal shows of many stages; with it, reused stages are counted, not listed. sources: as in
    stage_keys.
    """
    console = journal.console()
    threads = threads_of(jobs)
    with checkpoint.lock(root, wait_s=2.0):
        (root / RECIPES).mkdir(exist_ok=True)
        wanted = stage_keys(stages, root, sources)
        works: list[Stage] = []
        before: dict[str, Outcome] = {}
        for stage in stages:
            folder, key = root / stage.name, wanted[stage.name]
            state = "new" if overwrite else stage_state(folder, key)
            if state == "reused":
                results = checkpoint.read_json(folder / "results.json") or {}
                before[stage.name] = Outcome("reused", "", results.get("seconds", 0.0))
                if overview is None:
                    console.print(f"{stage.name}: reused, {headline(results)}")
            elif state == "diverged":
                record = checkpoint.read_json(folder / "diverged.json") or {}
                note = f"{record['message']} (--overwrite trains it anew)"
                before[stage.name] = Outcome("diverged", note, record.get("seconds", 0.0))
                console.print(f"{stage.name}: diverged before: {note}", markup=False)
            else:
                if state != "resume":
                    set_aside(folder, root / "previous" / stage.name, console)
                own = stage.config.train
                config = replace(stage.config, train=replace(own, threads=own.threads or threads))
                recipe = root / RECIPES / f"{stage.name}.yaml"
                checkpoint.write_text(recipe, settings.to_yaml(config))
                works.append(replace(stage, config=config, resume=state == "resume"))
        reused = sum(outcome.state == "reused" for outcome in before.values())
        if overview is not None and reused:
            console.print(f"{reused} of {len(stages)} runs were finished before")
        status, outcomes = run_all(works, root, jobs, console, before, overview)
    return status, {stage.name: outcomes[stage.name] for stage in stages}


def stage_state(folder: Path, key: str) -> str:
    """reused or diverged (ended under this key) | resume (begun under it) | changed | new."""
    for name, state in (("results", "reused"), ("diverged", "diverged"), ("run", "resume")):
        record = checkpoint.read_json(folder / f"{name}.json")
        if record is not None:
            return state if record.get("key") == key else "changed"
    return "new"


def set_aside(folder: Path, place: Path, console: Console) -> None:
    """Move a run directory that is to be trained anew to `place`, replacing an earlier one."""
    if not folder.exists() or all(f.name.startswith(".") for f in folder.iterdir()):
        return
    with checkpoint.lock(folder):  # a run that was begun by itself may be under way there
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(folder, place)
    console.print(
        f"{folder.name}: settings, images, sources or inputs changed; earlier run moved to {place}"
    )


def headline(results: Mapping[str, Any]) -> str:
    """'top1 93.1 % after 1:02 of training' from results.json."""
    return f"{result_text(results)} after {duration(results.get('seconds', 0.0))} of training"


def finish(root: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Print the result table and write report.html."""
    from kdtrain.reports.report import report

    console = journal.console(file_width=100)  # the table needs 86
    console.print(result_table(root, {n: outcome.state for n, outcome in outcomes.items()}))
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    console.print(f"training, all stages: {duration(seconds)}")
    if any(outcome.state in ("reused", "done") for outcome in outcomes.values()):
        console.print(f"report: {report(root)}")


def ordered(stages: Mapping[str, Stage], first: Collection[str] = ()) -> list[Stage]:
    """Inputs before what reads them, the stages of `first` and then the heaviest chain of followers
    first.
    """
    costs = {name: stage.cost for name, stage in stages.items()}
    inputs = {name: stage.inputs for name, stage in stages.items()}
    return [stages[name] for name in longest_chain_first(costs, inputs, first)]
