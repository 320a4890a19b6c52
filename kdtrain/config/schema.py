"""The schema of a run: frozen dataclasses with a docstring under every field, and their checks.

settings.py turns YAML recipes and command-line keys into a Config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from kdtrain.config.fields import ConfigError, check_settings, require, setting, settings_of
from kdtrain.config.networks import HeadConfig, ModelConfig
from kdtrain.config.target import (
    TEACHER_WEIGHTS,
    TargetConfig,
    TeacherConfig,
    check_sizes,
    check_teachers,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their split into training and test, and their sizes."""

    kind: Literal["synthetic", "celeba", "folder"] = setting("synthetic", source=True)
    "Source of the images. folder has one subdirectory per identity (ImageFolder)."
    root: str | None = setting(None, counted=False, source=True)
    "Directory of the images (celeba, folder)."
    split: str = "random"
    """Split into training and test images. random splits by image, identity by identity,
    identity:random by image among the training identities of identity; file:NAME.csv:COLUMN reads
    train or test from a column (CelebA's own split: file:list_eval_partition.txt:partition).
    """
    test_fraction: float = setting(0.2, within="0 < x < 1")
    "Share of the images held out for testing; with data.split identity, of the identities."
    validation_fraction: float = setting(0.0, within="0 <= x < 1")
    """Share of the training images (identities, for data.split identity) held out for validation.
    Evaluations, best/ and early stopping then use it instead of the test split.
    """
    split_seed: int = 0
    "Seed of the split, independent of seed: runs of all seeds share the test images."
    on_error: Literal["raise", "skip"] = setting("raise", source=True)
    "Effect of a damaged image. raise stops the run; skip omits and reports the image."
    store_size: int = setting(36, cost="value", source=True)
    "Side of the stored images, in pixels. Every image is resized to this square once."
    crop_size: int | None = setting(None, cost="value")
    """Side of the crop, in stored pixels; null takes data.input_size. Training crops at random,
    evaluation at the center; with augment.crop jitter, a scaled window is resampled to this size.
    """
    input_size: int = setting(32, cost="value", within="at least 8")
    "Side of the network's input, in pixels. A larger crop is averaged down to this size."
    cache: Literal["auto", "memory", "none"] = setting("auto", counted=False)
    "Cache of the resized images in memory. auto caches up to 2 GiB."
    workers: int = setting(0, counted=False, within="0 or more", source=True)
    "Threads that decode images ahead. They are idle where the images are cached in memory."
    identities: int = setting(350, within="at least 2", source=True)
    "Number of identities (synthetic)."
    images_per_identity: int = setting(20, within="at least 2", source=True)
    "Images per identity (synthetic)."
    noise: float = setting(0.04, within="0 <= x < 1")
    "Share of the images with a wrong label (synthetic)."
    synthetic_seed: int = setting(0, source=True)
    "Seed of the faces (synthetic)."
    landmark_file: str | None = setting(None, source=True)
    "Landmark list below data.root (celeba). null takes list_landmarks_align_celeba.txt."

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        by_file = self.split.startswith("file:") and self.split.count(":") >= 2
        known = ("random", "identity", "identity:random")
        splits = f"{', '.join(known)} or file:NAME.csv:COLUMN"
        require(by_file or self.split in known, "data.split", splits, self.split)
        side, crop = self.input_size, self.crop_side
        least = f"at least data.input_size ({side}), as crops are never enlarged"
        require(crop >= side, "data.crop_size", least, self.crop_size)
        least = f"at least data.{'input_size' if self.crop_size is None else 'crop_size'} ({crop})"
        require(self.store_size >= crop, "data.store_size", least, self.store_size)
        if self.kind != "synthetic":
            require(bool(self.root), "data.root", f"a directory for {self.kind}", self.root)
        else:
            wanted = "null with data.kind synthetic (folder and celeba read a directory)"
            require(self.root is None, "data.root", wanted, self.root)

    @property
    def crop_side(self) -> int:
        """Side of the crop, in pixels; the input of every network is made from it."""
        return self.input_size if self.crop_size is None else self.crop_size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random crops and flips of the training images: a pure function of seed, phase, epoch and
    image.
    """

    flip: bool = setting(True, cost="none")
    "Mirror half of the training images. Left and right landmarks are exchanged."
    crop: Literal["random", "jitter"] = "random"
    "Crop in training. random shifts the crop; jitter also scales it, within the image."
    scale_min: float = setting(0.85, cost="none")
    "Smallest side of the crop, as a share of the image's side (jitter)."
    scale_max: float = setting(0.95, cost="none")
    "Largest side of the crop, as a share of the image's side (jitter)."

    def __post_init__(self) -> None:
        check_settings(self, "augment.")
        scales = self.scale_min, self.scale_max
        keys = "augment.scale_min, augment.scale_max"
        require(0 < scales[0] <= scales[1] <= 1, keys, "0 < min <= max <= 1", scales)


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """The triplet loss of verification and its batches, which hold several images per identity."""

    weight: float = setting(1.0, cost="switch", within="0 or more")
    "Weight of the triplet loss. 0 trains by the softmax loss (target.gamma) in ordinary batches."
    margin: float = setting(0.4, cost="none", within="0 or more")
    "Margin of the triplet loss: lambda of eq. 8."
    mining: Literal["hard", "semihard", "all"] = "semihard"
    "Selection of the triplets of a batch."
    squared: bool = True
    "Compare squared distances, as in eq. 8. false compares distances."
    reduction: Literal["mean", "nonzero", "sum"] = "mean"
    "Mean over the mined triplets, mean over those with a nonzero loss, or sum."
    normalize: bool = True
    "Scale features to unit length before the distances."
    identities: int = setting(32, within="at least 2")
    "Identities per batch."
    images_per_identity: int = setting(4, within="at least 2")
    "Images per identity in a batch."

    def __post_init__(self) -> None:
        check_settings(self, "triplet.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A number of epochs at one learning rate."""

    epochs: int = setting(within="at least 1")
    "Passes over the training images."
    lr: float = setting(within="more than 0")
    "Learning rate."

    def __post_init__(self) -> None:
        check_settings(self, "optim.phases: ")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with Nesterov momentum, and its schedule in steps of the optimizer."""

    phases: list[Phase] = setting(factory=lambda: [Phase(epochs=30, lr=0.1)], cost="none", own=True)
    "Epochs and learning rate of each phase. The paper's lr: 0.1 from scratch, 0.01 initialised."
    schedule: Literal["constant", "cosine"] = setting("constant", cost="none")
    "Learning rate in a phase: constant, or cosine down to optim.final_lr_fraction of lr."
    final_lr_fraction: float = setting(0.0, cost="none", within="0 <= x <= 1")
    "Learning rate at the end of a phase, as a share of its lr (cosine)."
    warmup_epochs: float = setting(0.0, cost="none")
    "Epochs of linear warmup from learning rate 0 at the start of the run."
    batch_size: int = setting(256, within="at least 2")
    "Images per batch. A triplet loss takes triplet.identities x triplet.images_per_identity."
    accumulate: int = setting(1, cost="none", within="at least 1")
    "Batches per step, by the mean of their gradients. Mining and normalisation see one batch."
    momentum: float = setting(0.9, cost="none")
    "Nesterov momentum, between 0 and 1."
    weight_decay: float = setting(5e-4, cost="none", within="0 or more")
    "L2 penalty on the parameters. optim.no_decay exempts some of them."
    no_decay: Literal["none", "norm_and_bias"] = "none"
    "Parameters without weight decay: none, or biases and normalisation layers."
    clip_norm: float | None = setting(None, cost="switch", within="more than 0")
    "Largest norm of the gradient. A larger gradient is scaled down; null never scales."
    ema: float | None = setting(None, cost="switch", within="0 < x < 1")
    "Decay of the moving average of the weights, which is then evaluated and saved; null: none."

    def __post_init__(self) -> None:
        check_settings(self, "optim.")
        require(len(self.phases) > 0, "optim.phases", "at least one {epochs, lr}", self.phases)
        require(0 < self.momentum < 1, "optim.momentum", "0 < x < 1 (Nesterov)", self.momentum)
        epochs = sum(phase.epochs for phase in self.phases)
        known = f"from 0 to the epochs of all phases ({epochs})"
        require(0 <= self.warmup_epochs <= epochs, "optim.warmup_epochs", known, self.warmup_epochs)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Device, precision and intervals of a run; the optimised loss does not depend on them."""

    threads: int = setting(0, counted=False, cost="none", within="0 or more")
    "CPU threads. 0 leaves the number to torch."
    device: str = "cpu"
    "Device of torch, such as cpu or cuda:0."
    deterministic: bool = True
    "Use deterministic algorithms only. Exact resume needs them."
    log_every: int = setting(10, counted=False, cost="none", within="at least 1")
    "Steps between two lines of metrics.jsonl."
    eval_every: int = setting(1, cost="none", within="at least 1")
    "Epochs between two evaluations. Every phase ends with an evaluation."
    early_stop: int | None = setting(None, cost="none", within="at least 1")
    "Evaluations of the validation split without improvement before the run stops; null: never."
    save_every: int = setting(200, counted=False, cost="none", within="at least 1")
    "Steps between two checkpoints. Every epoch ends with a checkpoint."
    drop_last: bool = setting(True, cost="none")
    "Omit the last batch of an epoch if it is incomplete."
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    "Precision of forward and backward passes. Weights, losses and evaluations stay float32."
    channels_last: bool = True
    "Use the channels_last memory format."
    compile: bool = False
    "Compile student and teacher by torch.compile for training."
    tensorboard: bool = setting(False, counted=False, cost="none")
    "Also log for TensorBoard, in RUN/tensorboard. Needs the tensorboard extra."

    def __post_init__(self) -> None:
        check_settings(self, "train.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of a run."""

    normalizer: Literal["interocular", "diagonal", "side"] = "interocular"
    "Length that normalises landmark errors: distance of the eyes, diagonal or side of the image."
    gallery: str | None = setting(None, run="gallery")
    "Run directory of a gallery network, such as the teacher (verification). Adds asym_... metrics."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Task, seed and initialisation of a run. Where a key takes a run directory, RUN/best stands
    for its best weights and @NAME for the run beside this one.
    """

    task: Literal["classification", "alignment", "verification"] = setting(
        "classification", own=True
    )
    "Task of the network. Losses are eq. 2-4, eq. 6-7 and eq. 8-9 of arXiv 1709.02929."
    seed: int = setting(0, cost="none", own=True)
    "Seed of weights, image order and crops."
    fused: bool = True
    "Use the fused kernels of kdkernels. false runs every op on the eager backend."
    init_from: str | None = setting(None, run="init_from", cost="none", own=True)
    "Run directory that initialises the weights."
    teacher: TeacherConfig = setting(factory=TeacherConfig, cost="none")
    data: DataConfig = setting(factory=DataConfig, cost="none")
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    triplet: TripletConfig = field(default_factory=TripletConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = setting(factory=EvalConfig, cost="none")

    def __post_init__(self) -> None:
        known = f"target.{', '.join(TEACHER_WEIGHTS[:-1])} and {TEACHER_WEIGHTS[-1]}"
        if self.target.needs_teacher and self.teacher.run is None:
            raise ConfigError(f"{known} need a teacher: set teacher.run, or the weights to 0")
        if self.head.needs_teacher and self.teacher.run is None:
            raise ConfigError(
                "head.margin distillation and head.update adaptive need a teacher: set teacher.run"
            )
        if self.teacher.run is not None and not self.needs_teacher:
            raise ConfigError(f"teacher is set but {known} are all 0: weigh one, or drop it")
        if self.head.update == "none" and self.head.run is None and self.init_from is None:
            raise ConfigError(
                "head.update none freezes a random classifier: set head.run, or update to gradient"
            )
        for target in self.target.weighed:
            # the distance of two images equals its own mean
            if not self.balanced and self.optim.batch_size < target.least:
                needed = f"at least {target.least}, as target.{target.key} compares so many images"
                raise ConfigError(
                    f"optim.batch_size: expected {needed}; got {self.optim.batch_size}"
                )
        check_teachers(self.target, self.teacher, self.head.needs_teacher)
        check_sizes(self.target, self.data.input_size, self.teacher_side, self.data.crop_side)
        if self.eval.gallery is not None and self.task != "verification":
            raise ConfigError(f"eval.gallery needs task verification, got {self.task}")
        if self.target.hint and self.task != "classification":
            raise ConfigError(
                f"target.hint needs task classification, got {self.task} (the teacher's may differ)"
            )
        if self.train.early_stop is not None and not self.data.validation_fraction:
            raise ConfigError(
                "train.early_stop needs a validation split: set data.validation_fraction above 0"
            )
        has_other_loss = self.target.gamma > 0 or self.target.needs_teacher
        if self.task == "classification":
            if self.data.split == "identity":
                raise ConfigError(
                    "data.split identity leaves test identities without a class: use random, "
                    "identity:random or file:NAME.csv:COLUMN for classification"
                )
            needed = "more than 0 for classification, unless a target of the teacher has a weight"
            require(has_other_loss, "target.gamma", needed, self.target.gamma)
        if self.task == "verification" and not (self.triplet.weight or has_other_loss):
            raise ConfigError(
                "triplet.weight 0 leaves verification without a loss: raise it or target.gamma"
            )

    @property
    def needs_teacher(self) -> bool:
        """True when a target with a weight, or the head, reads the teacher."""
        return self.target.needs_teacher or self.head.needs_teacher

    @property
    def balanced(self) -> bool:
        """True for identity-balanced batches: triplet.identities x triplet.images_per_identity."""
        return self.task == "verification" and self.triplet.weight > 0

    def runs(self) -> dict[str, str]:
        """Run directories that this run reads, by the name of the input; see named_runs."""
        return named_runs(lambda key: attrgetter(key)(self))

    @property
    def teacher_side(self) -> int:
        """Side of the teacher's input, in pixels."""
        own = self.teacher.input_size
        return self.data.input_size if own is None else own


SETTINGS = tuple(settings_of(Config))
"""Every setting of a run."""
RUN_SETTINGS: Mapping[str, str] = {s.run: s.key for s in SETTINGS if s.run is not None}
"""Settings whose value is a run directory, @NAME or a list of them, by the input's name."""


def named_runs(get: Callable[[str], Any]) -> dict[str, str]:
    """The run directories that settings name, by the name of the input; NAME_1, NAME_2 ... for the
    entries of a list. get: returns the value of a dotted key.
    """
    found: dict[str, str] = {}
    for name, key in RUN_SETTINGS.items():
        value = get(key)
        if isinstance(value, list):
            found |= {f"{name}_{place}": run for place, run in enumerate(value, 1)}
        elif value is not None:
            found[name] = value
    return found


def run_folder(name: str, run_dir: Path) -> Path:
    """The run directory that a setting of RUN_SETTINGS names; @NAME is the run beside run_dir."""
    return run_dir.parent / name[1:] if name.startswith("@") else Path(name)
