"""Before the first step: the task with its teacher and inherited weights, and data for it."""

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
from kdtrain.training.teacher_cache import OwnedFiles, TeacherCache, identity
from kdtrain.training.view_cache import ViewCache, view_owner


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says where it stopped and what to do."""


def check_inputs(config: Config, run_dir: Path) -> dict[str, str]:
    """The keys of the runs that `config` names, by input. Checks before any image is read that
    these runs are finished and that their networks fit this one, as far as configs tell.

    Raises CheckpointError, ConfigError or ValueError. Classes and weights are compared in
    `prepare_task`, which knows the data.
    """
    folders = keys.input_folders(config, run_dir)
    found = {name: keys.input_key(folder) for name, folder in folders.items()}
    if not folders:
        return found
    with torch.device("meta"):  # shapes without memory
        # init_from may be a lone checkpoint, which has no config
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
    """The task on its device. Raises TrainingError where the data do not serve it."""
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
            screen.say(f"not taken from {folders['init_from']}: {line}")
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
    """Raises ConfigError where the last batch of an epoch is one sample and no step can be taken on
    it: a batch normalisation, of the network or of a target, then sees one value per channel.
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
    """Where the teacher's answers are kept, with room for them, or None. Raises CacheError."""
    teacher = config.teacher
    if task.teacher is None or teacher.cache == "none":
        return None
    if not task.guide_widths:
        screen.say("teacher.cache: what this target reads is not kept, the teacher answers online")
        return None
    folder = run_dir.parent / "teacher_cache" if teacher.cache_dir is None else teacher.cache_dir
    owner = identity(config, data, task.teacher)
    views = None
    if teacher.cache_what == "features":
        views = fixed_views(config.augment, config.data.store_size, config.data.crop_side)
    if views is not None:
        owner = view_owner(owner, config, views)
    files = OwnedFiles(Path(folder), owner, teacher.cache, data.device, screen.say)
    if views is not None:
        kept = ViewCache(files, data, task, views)
        kept.reserve()
        return kept
    cache = TeacherCache(files, task.guide_widths)
    images = sum(map(len, data.epoch(0)))
    cache.reserve(images, [phase.epochs for phase in config.optim.phases])
    return cache


def load_teacher(config: Config, folders: Mapping[str, Path], screen: Screen) -> FaceNetwork | None:
    """The network that targets come from: one for several where teacher.more names them."""
    runs = [r for n, r in folders.items() if n == "teacher" or n.startswith("teacher_more_")]
    for run in runs:
        say_other_size(config, run, screen)
    networks = [load_network(run) for run in runs]
    if len(networks) < 2:
        return networks[0] if networks else None
    return TeacherMixture(networks, config.teacher.shares, config.target.temperature)


def say_other_size(config: Config, run: Path, screen: Screen) -> None:
    """Tell identities of a teacher that is asked on another size, where no setting wants that."""
    own, side = run_config(run).data.input_size, config.teacher_side
    if config.teacher.input_size is None and own != side:
        screen.say(
            f"teacher {run.name} was trained on images of {own} pixels and is asked on the "
            f"student's {side}; teacher.input_size {own} (data.crop_size and data.store_size at "
            "least that) shows it the same crops at its own size"
        )


def without_teacher(config: Config) -> Config:
    """The config with every teacher target off, for measuring a network by itself."""
    # gamma, which measuring does not ask for, as classification has no loss without it
    off = dict.fromkeys(TEACHER_WEIGHTS, 0.0)
    target = dataclasses.replace(config.target, **off, gamma=1.0)
    head = dataclasses.replace(config.head, run=None, update="gradient", margin="none")
    return dataclasses.replace(
        config, teacher=TeacherConfig(), init_from=None, target=target, head=head
    )


def check_data(task: Task, data: RunData) -> None:
    """Raises TrainingError where images cannot serve the task, ValueError for no batch."""
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
