"""The output of `--dry-run` below the resolved config: network, steps, memory and time per stage.

Nothing is trained and nothing is written. The images are counted where they are; where they are
not, --classes and --images say how many there would be, or the published size of a data set does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdtrain.config import Config, ConfigError, DataConfig, ModelConfig, run_folder, settings
from kdtrain.config.networks import network_title
from kdtrain.config.program import threads_of
from kdtrain.data import DataError, FaceSource, balanced_batches
from kdtrain.data.run_data import parts, shared_source
from kdtrain.experiments.estimate import Counts, Estimate, batch_images, estimate, network_size
from kdtrain.experiments.pipeline import Stage, is_there
from kdtrain.experiments.scheduler import wall_time
from kdtrain.objectives.tasks import TASKS
from kdtrain.reports import writing
from kdtrain.training import checkpoint
from kdtrain.training.environment import check_device, environment
from kdtrain.training.journal.journal import duration

DAY_S = 86400.0
COLUMNS = ("stage", "after", "network", "input", "parameters", "MACs", "teacher", "batch")
COLUMNS += ("steps", "memory", "a step", "time")
WORDS = ("stage", "after", "network", "teacher")  # columns aligned to the left


class Published(NamedTuple):
    """A data set's size as its authors or the paper state it."""

    name: str
    identities: int
    images: int


PUBLISHED = {
    # arXiv 1709.02929, section 5.1; folders are matched by name, case and punctuation aside
    "casiawebface": Published("CASIA-WebFace", 10_575, 494_414),
    "celeba": Published("CelebA", 10_177, 202_599),
    "msceleb1m": Published("MS-Celeb-1M", 100_000, 8_400_000),
}


@dataclass
class Planned:
    """A run and its estimated cost; None where something is missing, which the notes name."""

    name: str
    config: Config
    inputs: tuple[str, ...]
    teachers: list[ModelConfig]  # of the runs that it learns from
    notes: list[str]
    cost: Estimate | None = None
    fails: bool = False  # the run would end in the error of its notes


def show_run(config: Config, run_dir: Path, recipes: Path, options: Mapping[str, Any]) -> int:
    """Print the config as YAML and its cost as comments below (`train --dry-run`). Returns the
    exit status: 1 where the run would fail.

    recipes: folder of the recipe. options: of the command line (classes, images).
    """
    print(settings.to_yaml(config), end="", flush=True)
    run = Planned(run_dir.name, config, (), *teachers_of(config, run_dir, recipes))
    return _show([run], options, torch.get_num_threads(), 1)


def show_stages(stages: Sequence[Stage], root: Path, jobs: int, options: Mapping[str, Any]) -> int:
    """Print a YAML document per stage and their costs as comments below (`pipeline --dry-run`).
    Returns the exit status: 1 where a stage would fail.
    """
    configs = {stage.name: stage.config for stage in stages}
    runs = []
    for stage in stages:
        needs = f" after {', '.join(stage.inputs)}" if stage.inputs else ""
        print(f"---\n# {stage.name}{needs}\n{settings.to_yaml(stage.config)}", end="", flush=True)
        found = teachers_of(stage.config, root / stage.name, configs)
        runs.append(Planned(stage.name, stage.config, stage.inputs, *found))
    return _show(runs, options, threads_of(jobs), jobs)


def _show(runs: Sequence[Planned], options: Mapping[str, Any], threads: int, jobs: int) -> int:
    """Print the table of `runs` as YAML comments; 1 where one would fail."""
    given = None
    if options.get("classes") is not None:
        given = Published("given", options["classes"], options["images"])
    sources: dict[DataConfig, FaceSource] = {}
    notes: dict[str, list[str]] = {}
    for run in runs:
        _estimate(run, threads, given, sources)
        for note in run.notes:
            notes.setdefault(note, []).append(run.name)
    lines = [*_table(runs), "", *_summary(runs, threads, jobs)]
    lines += [f"{', '.join(names)}: {note}" for note, names in notes.items()]
    print("\n".join(f"# {line}".rstrip() for line in lines), flush=True)
    lost = [run.name for run in runs if run.fails]
    if lost:
        text = f"{len(lost)} of {len(runs)} runs would fail, as said above: {', '.join(lost)}"
        print(f"error: {text}", file=sys.stderr)
    return int(bool(lost))


def teachers_of(
    config: Config, run_dir: Path, recipes: Mapping[str, Config] | Path
) -> tuple[list[ModelConfig], list[str]]:
    """The networks of the teachers, and notes where one had to be guessed; see network_of."""
    named = (config.teacher.run, *config.teacher.more)
    found = [network_of(run, config, run_dir, recipes) for run in named if run is not None]
    notes = [note for _, note in found if note]
    return [model for model, _ in found], ["; ".join(notes)] if notes else []


def network_of(
    named: str, config: Config, run_dir: Path, recipes: Mapping[str, Config] | Path
) -> tuple[ModelConfig, str]:
    """The network of a run that the config names, and a note where it had to be guessed.

    It is looked for among `recipes` where these are the configs of a chain's stages; else in the
    run directory, then in the folder `recipes` under @NAME.
    """
    name = named.removeprefix("@").removesuffix("/best")
    files = [checkpoint.run_of(run_folder(named, run_dir)) / "config.yaml"]
    if named.startswith("@"):
        if isinstance(recipes, Path):
            # recipes/<preset>/tables/ takes its teachers from the preset above it
            files += [recipes / f"{name}.yaml", recipes.parent / f"{name}.yaml"]
        elif name in recipes:
            return recipes[name].model, ""
    for file in files:
        if file.is_file():
            return settings.build(settings.read_recipe(file)).model, ""
    note = f"no run {named} yet: its network is taken to be the student's, undivided"
    return replace(config.model, divide=1), note


def count(config: Config, given: Published | None, sources: dict[DataConfig, FaceSource]) -> Counts:
    """Classes and images of the run.

    given: counts that the user states. sources: those read before, by their data section. Raises
    DataError or ValueError where the images are there and cannot serve, ConfigError where they are
    not there and their number is unknown.
    """
    data = config.data
    if given is None and is_there(data):
        return counted(config, sources)
    name = re.sub("[^a-z0-9]", "", Path(data.root or "").name.lower())
    size = given or PUBLISHED.get(name) or PUBLISHED.get(data.kind)
    if size is None:
        raise ConfigError(
            f"no folder {data.root} (data.root), so nothing can be counted; state the size with "
            "--classes N --images N"
        )
    note = f"no folder {data.root}: counted as published, {size.name} with "
    note += f"{size.identities:,} identities and {size.images:,} images"
    test = round(data.test_fraction * size.images)
    train = size.images - test
    if data.split == "identity:random":
        train, test = (round((1 - data.test_fraction) * part) for part in (train, test))
    validation = round(data.validation_fraction * train)
    return Counts(size.identities, train - validation, test, validation, note="" if given else note)


def counted(config: Config, sources: dict[DataConfig, FaceSource]) -> Counts:
    """The same from the images; raises DataError or ValueError where they cannot serve."""
    source = shared_source(config.data, sources)
    if TASKS[config.task].needs_landmarks and source.landmarks is None:
        raise DataError(f"{source.name}: task {config.task} needs landmarks, which are not there")
    train, validation, test = parts(source, config)
    batches = None
    if config.balanced:
        identities, images = config.triplet.identities, config.triplet.images_per_identity
        batches = len(balanced_batches(train, source.labels, identities, images, config.seed, 0))
    return Counts(source.num_classes, len(train), len(test), len(validation), batches)


def counter(sources: dict[DataConfig, FaceSource]) -> Callable[[Config], Counts]:
    """`counted`, once for runs of the same images, task and kind of batches."""
    known: dict[object, Counts] = {}

    def count_once(config: Config) -> Counts:
        what = (config.data, config.task, config.balanced)
        if what not in known:
            known[what] = counted(config, sources)
        return known[what]

    return count_once


def _estimate(
    run: Planned, threads: int, given: Published | None, sources: dict[DataConfig, FaceSource]
) -> None:
    """Fill in the cost and the notes of a run."""
    config = run.config
    try:
        counts = count(config, given, sources)
    except ValueError as error:
        run.notes.append(str(error))
        run.fails = is_there(config.data)
        return
    if counts.note:
        run.notes.append(counts.note)
    if sys.stderr.isatty():
        print(f"timing {run.name}", file=sys.stderr)
    elsewhere = True  # what this machine lacks another one may have
    try:
        check_device(config)
        elsewhere = False
        run.cost = cost = estimate(config, counts, run.teachers, threads=threads)
    except ConfigError as error:
        size = network_size(config, config.model, counts.classes)
        parameters, work = map(writing.count, size[:2])
        run.notes.append(f"{error}; {parameters} parameters, {work} multiply-adds")
        run.fails = not elsewhere
        return
    if config.teacher.cache != "none":
        run.notes.append(
            "counted with a teacher forward pass in every step; a run that reads teacher.cache "
            "takes less"
        )
    if cost.timed_batch < cost.batch:
        run.notes.append(
            f"timed on {cost.timed_batch} of {cost.batch} images a batch and scaled, as a "
            "whole batch takes too long or too much memory here"
        )


def _table(runs: Sequence[Planned]) -> list[str]:
    """Lines of the columns in which a run has something."""
    columns = []
    for title, *cells in zip(COLUMNS, *map(_cells, runs), strict=True):
        if set(cells) - {"", "-"}:
            width, side = max(map(len, (title, *cells))), "<" if title in WORDS else ">"
            columns.append([f"{cell:{side}{width}}" for cell in (title, *cells)])
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def _cells(run: Planned) -> tuple[str, ...]:
    config, cost = run.config, run.cost
    teacher = " + ".join(map(network_name, run.teachers))
    if teacher and config.teacher_side != config.data.input_size:
        teacher += f" at {config.teacher_side}"
    batch = str(batch_images(config))
    if config.optim.accumulate > 1:
        batch = f"{config.optim.accumulate} x {batch}"
    size, work = ("-",) * 2, ("-",) * 4
    if cost is not None:
        size = map(writing.count, cost.size[:2])
        step = f"{cost.training_s / cost.steps:.3g} s"
        work = f"{cost.steps:,}", _bytes(cost.memory_bytes), step, long_duration(cost.total_s)
    network = network_name(config.model), str(config.data.input_size)
    return (run.name, ", ".join(run.inputs), *network, *size, teacher, batch, *work)


def _summary(runs: Sequence[Planned], threads: int, jobs: int) -> list[str]:
    costs = {run.name: run.cost for run in runs if run.cost is not None}
    if not costs:
        return ["nothing could be timed"]
    config = runs[0].config
    used = sorted({run.config.train.threads or threads for run in runs})
    place = f"{config.train.device}, {environment(config)['device']}"
    lines = [
        f"timed here, one run at a time ({place}, threads: {', '.join(map(str, used))}), on random "
        "images; not counted: decoding,",
        "neighbour search and floors, and what jobs side by side cost each other",
    ]
    if len(runs) > 1:
        seconds = {name: cost.total_s for name, cost in costs.items()}
        wall_s = wall_time(seconds, {run.name: run.inputs for run in runs}, jobs)
        steps = sum(cost.steps for cost in costs.values())
        missing = f" ({len(runs) - len(costs)} unknown)" if len(costs) < len(runs) else ""
        lines.append(
            f"in all: {steps:,} steps, {long_duration(sum(seconds.values()))} of training in "
            f"{len(costs)} runs{missing}, {long_duration(wall_s)} on the clock with --jobs {jobs}"
        )
    return lines


def network_name(model: ModelConfig) -> str:
    """'ResNet-50/8': depth, base kernels where they are not 64, division."""
    name, slash, divide = network_title(asdict(model)).partition("/")
    width = f" w{model.width}" if model.name == "resnet" and model.width != 64 else ""
    return name + width + slash + divide


def long_duration(seconds: float) -> str:
    """'1:06:40', or '226 days' from two days on."""
    return duration(seconds) if seconds < 2 * DAY_S else f"{seconds / DAY_S:,.1f} days"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1024:.0f} KiB"
