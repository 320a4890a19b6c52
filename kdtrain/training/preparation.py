"""Before the first step: the task with its teacher and inherited weights, and whether the pictures
serve it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kdtrain.config import RUN_SETTINGS, Config, ConfigError, TeacherConfig
from kdtrain.config.target import TEACHER_WEIGHTS
from kdtrain.data import fixed_views
from kdtrain.data.run_data import RunData
from kdtrain.models.mixture import TeacherMixture
from kdtrain.models.network import FaceNetwork, inherit, inherit_head, network_from_state
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, keys
from kdtrain.training.gallery import Gallery, build_gallery, check_width
from kdtrain.training.journal.journal import Screen
from kdtrain.training.lineage import check_people, known_pictures, run_config
from kdtrain.training.teacher_cache import TeacherCache, identity
from kdtrain.training.view_cache import ViewCache


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
            name: _shapes(folder)
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


def check_gallery(run: Path, width: int) -> None:
    """Raises CheckpointError where the run has no weights, ConfigError where its features are not
    of this width.
    """
    checkpoint.run_weights(run)
    with torch.device("meta"):
        check_width(_shapes(run), width, run)


def _shapes(run: Path) -> FaceNetwork:
    """The network of a run folder as its config has it, for one person."""
    config = run_config(run)
    return FaceNetwork(config.model, 1, head=config.head, input_size=config.data.input_size)


def prepare_task(config: Config, data: RunData, run_dir: Path, screen: Screen) -> Task:
    """The task with its teacher and inherited weights, on its device. Raises TrainingError where
    the data do not serve it.
    """
    folders = keys.input_folders(config, run_dir)
    teacher = load_teacher(config, folders, screen)
    task = build_task(config, data.source.num_classes, teacher)
    check_data(task, data)
    check_lineage(config, folders, data, screen)
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
        task.gallery = open_gallery(folders["gallery"], data, task)
    return task


def check_batches(task: Task, data: RunData) -> None:
    """Raises ConfigError where the last batch of an epoch is one sample and the network cannot
    train on it: a batch normalisation that sees one value per channel.
    """
    config, count = data.config, len(data.train)
    size = config.optim.batch_size
    if config.balanced or config.train.drop_last or count % size != 1:
        return
    sample = torch.zeros(1, 3, *[config.data.input_size] * 2, device=data.device)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            copy.deepcopy(task.network).train()(sample)
    except ValueError as error:
        raise ConfigError(
            f"optim.batch_size {size}, train.drop_last false: the last of {count} training images "
            f"is a batch of its own, on which this network cannot train ({error}); set "
            "train.drop_last true, or another optim.batch_size"
        ) from None


def check_lineage(
    config: Config, folders: Mapping[str, Path], data: RunData, screen: Screen
) -> None:
    """Raises ConfigError where classes are compared with those of a run on other people; tells
    people of runs that were trained on test pictures of this one.
    """
    by_class = any(row.by_class for row in config.target.weighed)
    by_class |= config.head.margin == "distillation"
    for name, run in folders.items():
        setting = RUN_SETTINGS.get(name) or RUN_SETTINGS[name.rpartition("_")[0]]
        if name == "head" or (name.startswith("teacher") and by_class):
            check_people(setting, run, data)
        known = known_pictures(run, data)
        if known:
            screen.say(
                f"warning: {setting} {run.name} was trained on {known} of the "
                f"{len(data.test)} test pictures here, or on their people: split alike "
                "(data.split, data.split_seed, data.test_fraction), or read the results as of "
                "pictures known"
            )


def open_gallery(run: Path, data: RunData, task: Task) -> Gallery:
    """The gallery of another run for this task's network. Raises CheckpointError where the run has
    no weights, ConfigError where its features are of another width.
    """
    network, theirs = load_network(run), run_config(run)
    return build_gallery(network, theirs, data, task.network.width, run)


def prepare_cache(
    config: Config, data: RunData, task: Task, run_dir: Path, screen: Screen
) -> TeacherCache | ViewCache | None:
    """Where the teacher's answers are kept, with room for them; None where they are not. Raises
    CacheError.
    """
    teacher = config.teacher
    if task.teacher is None or teacher.cache == "none":
        return None
    if not task.guide_widths:
        screen.say("teacher.cache: what this target reads is not kept, the teacher answers online")
        return None
    folder = run_dir.parent / "teacher_cache" if teacher.cache_dir is None else teacher.cache_dir
    place = Path(folder)
    owner = identity(config, data, task.teacher)
    common = (teacher.cache, data.device, screen.say)
    crop = config.data.crop_side
    views = fixed_views(config.augment, config.data.store_size, crop)
    if teacher.cache_what == "features" and views is not None:

        def ask(indices: Tensor, mirrored: bool) -> Tensor:
            guide = task.guide(data.teacher_view(indices, mirrored))
            assert guide is not None
            assert guide.hidden is not None
            return guide.hidden

        width = task.guide_widths["hidden"]
        kept = ViewCache(place, owner, width, *common, train=data.train, config=config, ask=ask)
        kept.reserve()
        return kept
    cache = TeacherCache(place, owner, task.guide_widths, *common)
    pictures = sum(map(len, data.epoch(0)))
    cache.reserve(pictures, [phase.epochs for phase in config.optim.phases])
    return cache


def load_teacher(config: Config, folders: Mapping[str, Path], screen: Screen) -> FaceNetwork | None:
    """The network that targets come from, of the run folders by input: one for several where
    teacher.more names them.
    """
    names = [n for n in folders if n == "teacher" or n.startswith("teacher_more_")]
    runs = [folders[name] for name in names]
    if not runs:
        return None
    for run in runs:
        say_other_size(config, run, screen)
    networks = [load_network(run) for run in runs]
    if len(networks) == 1:
        return networks[0]
    return TeacherMixture(networks, config.teacher.shares, config.target.temperature)


def load_network(run: Path) -> FaceNetwork:
    """The network of a run folder, with its last weights (RUN/best: its best)."""
    weights, config = checkpoint.run_weights(run), run_config(run)
    return network_from_state(
        config.model,
        checkpoint.load_weights(weights),
        head=config.head,
        input_size=config.data.input_size,
    )


def say_other_size(config: Config, run: Path, screen: Screen) -> None:
    """Tell people where a teacher is asked on pictures of another size than it was trained on and
    no setting asks for it.
    """
    own, side = run_config(run).data.input_size, config.teacher_side
    if config.teacher.input_size is None and own != side:
        screen.say(
            f"teacher {run.name} was trained on pictures of {own} pixels and is asked on the "
            f"student's {side}; teacher.input_size {own} (data.crop_size and data.store_size at "
            "least that) shows it the same crops at its own size"
        )


def without_teacher(config: Config) -> Config:
    """The config with every teacher target off and a head that asks none, for measuring a network
    by itself.
    """
    # gamma, which measuring does not ask for, as classification has no loss without it
    off = dict.fromkeys(TEACHER_WEIGHTS, 0.0)
    target = dataclasses.replace(config.target, **off, gamma=1.0)
    head = dataclasses.replace(config.head, run=None, update="gradient", margin="none")
    return dataclasses.replace(
        config, teacher=TeacherConfig(), init_from=None, target=target, head=head
    )


def check_data(task: Task, data: RunData) -> None:
    """Raises TrainingError where the pictures cannot serve the task, ValueError where they fill no
    batch.
    """
    source = data.source
    if task.needs_landmarks and source.landmarks is None:
        raise TrainingError(
            f"{source.name}: task {data.config.task} needs landmarks and these pictures have none; "
            "use data.kind celeba or synthetic"
        )
    if data.config.task == "classification" and source.num_classes < 2:
        raise TrainingError(
            f"{source.name}: task classification needs at least 2 people (classes), found "
            f"{source.num_classes}"
        )
    data.epoch(0)
