"""Before the first step: checks of the inputs, and the task with its teacher and weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from kdtrain.config import Config, ConfigError, TeacherConfig
from kdtrain.config.target import TEACHER_WEIGHTS
from kdtrain.data import fixed_views
from kdtrain.data.run_data import RunData
from kdtrain.models.mixture import TeacherMixture
from kdtrain.models.network import FaceNetwork, inherit, inherit_head
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, keys
from kdtrain.training.input_runs import (
    Gallery,
    check_gallery,
    check_lineage,
    load_network,
    network_shapes,
    run_config,
)
from kdtrain.training.journal.journal import Screen
from kdtrain.training.teacher_cache import OwnedFiles, TeacherCache, owner_of
from kdtrain.training.view_cache import GROUP, VIEWS, ViewCache


class TrainingError(RuntimeError):
    """A run that cannot continue; the message states the place and the remedy."""


def check_inputs(config: Config, run_dir: Path) -> dict[str, str]:
    """Returns the keys of the input runs of `config`. Checks before any image is read that these
    runs are finished and, by their configs, that their networks fit; `prepare_task` compares
    classes and weights. Raises CheckpointError, ConfigError or ValueError.
    """
    folders = keys.input_folders(config, run_dir)
    found = {name: keys.input_key(folder) for name, folder in folders.items()}
    if not folders:
        return found
    with torch.device("meta"):  # shapes without memory
        # init_from may be a checkpoint without a config
        theirs = {
            name: network_shapes(folder)
            for name, folder in folders.items()
            if name != "init_from" or (checkpoint.run_of(folder) / "config.yaml").is_file()
        }
        task = build_task(config, 1, theirs.get("teacher"))
        if "init_from" in theirs:
            inherit(task.network, theirs["init_from"].state_dict())
        if "head" in theirs:
            inherit_head(task.network, theirs["head"], folders["head"])
    if "gallery" in folders:
        check_gallery(folders["gallery"], task.network.width)
    return found


def prepare_task(config: Config, data: RunData, run_dir: Path, screen: Screen) -> Task:
    """Returns the task on its device. Raises TrainingError for data that do not fit it."""
    folders = keys.input_folders(config, run_dir)
    teacher = load_teacher(config, folders, screen)
    task = build_task(config, data.source.num_classes, teacher)
    check_data(task, data)
    for line in data.notes():
        screen.say(f"note: {line}")
    check_lineage(folders, data, screen)
    if "init_from" in folders:
        weights = checkpoint.load_weights(checkpoint.run_weights(folders["init_from"]))
        for line in inherit(task.network, weights):
            screen.say(f"not inherited from {folders['init_from']}: {line}")
    if "head" in folders:
        inherit_head(task.network, load_network(folders["head"]), folders["head"])
    if config.train.channels_last and not task.network.channels_last:
        screen.say(
            "train.channels_last: the network stays in the contiguous layout, because torch on a "
            "processor without AVX-512 corrupts memory in strided 1 x 1 convolutions with 2 to 7 "
            "input channels"
        )
    task.to(data.device)
    check_batches(task, data)
    if "gallery" in folders:
        task.gallery = Gallery(folders["gallery"], data)
    return task


def check_batches(task: Task, data: RunData) -> None:
    """Raises ConfigError where the last batch is one sample and batch normalisation, of the network
    or of a target, cannot train on it.
    """
    last = data.epoch(0)[-1]
    if len(last) > 1:
        return
    batch, trial = data.batch(last, 0, 0, None), copy.deepcopy(task)
    trial.network.train()
    trial.extra.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            trial.step(batch.images, batch.labels, batch.points, None, batch.teacher_images)
    except ValueError:
        raise ConfigError(
            f"optim.batch_size {data.config.optim.batch_size}, train.drop_last false: the last of "
            f"{len(data.train)} training images is a batch of its own, on which batch "
            "normalisation cannot train; set train.drop_last true, or another optim.batch_size"
        ) from None


def prepare_cache(
    config: Config, data: RunData, task: Task, run_dir: Path, screen: Screen
) -> TeacherCache | ViewCache | None:
    """Returns the cache of teacher outputs, if any. Raises CacheError without room on the disk."""
    teacher = config.teacher
    if task.teacher is None or teacher.cache == "none":
        return None
    if not task.guide_widths:
        screen.say("teacher.cache: this target's outputs are not cached; the teacher runs per step")
        return None
    folder = run_dir.parent / "teacher_cache" if teacher.cache_dir is None else teacher.cache_dir
    owner = owner_of(config, data, task.teacher)
    views = None
    if teacher.cache_what == "features":
        views = fixed_views(config.augment, config.data.store_size, config.data.crop_side)
    if views is not None:
        del owner["seed"], owner["augment"]  # which do not change a view
        owner |= {"views": VIEWS[:views], "crop": config.augment.crop, "group": GROUP}
    files = OwnedFiles(Path(folder), owner, teacher.cache, data.device, screen.say)
    if views is not None:
        return ViewCache(files, data, task, views)
    cache = TeacherCache(files, task.guide_widths)
    images = sum(map(len, data.epoch(0)))
    cache.reserve(images, [phase.epochs for phase in config.optim.phases])
    return cache


def load_teacher(config: Config, folders: Mapping[str, Path], screen: Screen) -> FaceNetwork | None:
    """Returns the teacher, if any; a mixture where teacher.more names further ones. Logs a teacher
    whose own input size differs, where no setting names a size.
    """
    runs = [r for n, r in folders.items() if n == "teacher" or n.startswith("teacher_more_")]
    for run in runs:
        own, side = run_config(run).data.input_size, config.teacher_side
        if config.teacher.input_size is None and own != side:
            screen.say(
                f"teacher {run.name} was trained on images of {own} pixels and runs on the "
                f"student's {side}; teacher.input_size {own} (data.crop_size and data.store_size "
                "at least that) gives it the same crops at its own size"
            )
    networks = [load_network(run) for run in runs]
    if len(networks) < 2:
        return networks[0] if networks else None
    return TeacherMixture(networks, config.teacher.shares, config.target.temperature)


def without_teacher(config: Config) -> Config:
    """Returns the config with every teacher target off, for measuring a network by itself."""
    # gamma, as classification needs a loss
    off = dict.fromkeys(TEACHER_WEIGHTS, 0.0)
    target = dataclasses.replace(config.target, **off, gamma=1.0)
    head = dataclasses.replace(config.head, run=None, update="gradient", margin="none")
    return dataclasses.replace(
        config, teacher=TeacherConfig(), init_from=None, target=target, head=head
    )


def check_data(task: Task, data: RunData) -> None:
    """Raises TrainingError for images that do not fit the task, ValueError for no batch."""
    source = data.source
    if task.needs_landmarks and source.landmarks is None:
        raise TrainingError(
            f"{source.name}: task {data.config.task} needs landmarks and these images have none; "
            "use data.kind celeba or synthetic"
        )
    if data.config.task != "alignment" and source.num_classes < 2:
        raise TrainingError(
            f"{source.name}: task {data.config.task} needs at least 2 identities (classes), found "
            f"1: {source.class_names[0]}"
        )
    data.epoch(0)
