"""The one schema of a run: frozen dataclasses with a help text under every field, and their checks.

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
    """Which images, how they are split, and how large they are kept."""

    kind: Literal["synthetic", "celeba", "folder"] = setting("synthetic", source=True)
    """synthetic draws faces; celeba reads CelebA's layout; folder reads one folder per class
    (ImageFolder).
    """
    root: str | None = setting(None, counted=False, source=True)
    "Folder of the images (celeba, folder)."
    split: str = "random"
    """random by image | identity (disjoint identities) | identity:random (by image, among the
    training identities of identity) | file:NAME.csv:COLUMN, whose column holds train or test
    (file:list_eval_partition.txt:partition is CelebA's own).
    """
    test_fraction: float = setting(0.2, within="0 < x < 1")
    "Share of the images (of the identities, for identity) that is held out."
    validation_fraction: float = setting(0.0, within="0 <= x < 1")
    """Share of the training images (of the training identities, for identity) that is not trained
    on: evaluations, best/ and early stopping use it, and the test split is measured once, at the
    end. 0 evaluates on the test split.
    """
    split_seed: int = 0
    "Seed of the split alone, so that runs with other seeds are tested on the same images."
    on_error: Literal["raise", "skip"] = setting("raise", source=True)
    "A missing or damaged image stops the run, or is left out, counted and reported."
    store_size: int = setting(36, cost="value", source=True)
    "Images are resized to this square once, pixels."
    crop_size: int | None = setting(None, cost="value")
    """Side of the crop in stored pixels (with augment.crop jitter: in pixels that the window is
    sampled at), taken anywhere in training, from the centre in evaluation; null takes input_size.
    """
    input_size: int = setting(32, cost="value", within="at least 8")
    "Side of the network's input: the crop, averaged down to it where it is larger."
    cache: Literal["auto", "memory", "none"] = setting("auto", counted=False)
    "Keep resized images in memory; auto does so up to 2 GiB."
    workers: int = setting(0, counted=False, within="0 or more", source=True)
    "Threads that decode images ahead when they are not kept in memory."
    identities: int = setting(350, within="at least 2", source=True)
    "Number of identities (synthetic only)."
    images_per_identity: int = setting(20, within="at least 2", source=True)
    "Images of each identity (synthetic only)."
    noise: float = setting(0.04, within="0 <= x < 1")
    "Share of images with a wrong label (synthetic only)."
    synthetic_seed: int = setting(0, source=True)
    "Seed of the synthetic faces (synthetic only)."
    landmark_file: str | None = setting(None, source=True)
    "Landmark list inside root (celeba); null takes list_landmarks_align_celeba.txt."

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        by_file = self.split.startswith("file:") and self.split.count(":") >= 2
        require(
            by_file or self.split in ("random", "identity", "identity:random"),
            "data.split",
            "random, identity, identity:random or file:NAME.csv:COLUMN",
            self.split,
        )
        require(
            self.crop_side >= self.input_size,
            "data.crop_size",
            f"at least data.input_size ({self.input_size}), as crops are never enlarged",
            self.crop_size,
        )
        crop = "input_size" if self.crop_size is None else "crop_size"
        require(
            self.store_size >= self.crop_side,
            "data.store_size",
            f"at least data.{crop} ({self.crop_side})",
            self.store_size,
        )
        if self.kind != "synthetic":
            require(bool(self.root), "data.root", f"a folder, for data.kind {self.kind}", self.root)

    @property
    def crop_side(self) -> int:
        """Pixels of the crop's side, from which every network's input is made."""
        return self.input_size if self.crop_size is None else self.crop_size


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training image is cropped: a pure function of (seed, phase, epoch, image)."""

    flip: bool = setting(True, cost="none")
    "Mirror half of the training images; left and right landmarks change places."
    crop: Literal["random", "jitter"] = "random"
    "random: a shifted crop of data.crop_size; jitter: also scaled, always inside the image."
    scale_min: float = setting(0.85, cost="none")
    "Smallest crop side as a fraction of the image's (jitter)."
    scale_max: float = setting(0.95, cost="none")
    "Largest crop side as a fraction of the image's (jitter)."

    def __post_init__(self) -> None:
        check_settings(self, "augment.")
        require(
            0 < self.scale_min <= self.scale_max <= 1,
            "augment.scale_min, augment.scale_max",
            "0 < min <= max <= 1",
            (self.scale_min, self.scale_max),
        )


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """The triplet loss of verification and its identity-balanced batches."""

    weight: float = setting(1.0, cost="switch", within="0 or more")
    """Weight of the triplet loss. 0 leaves verification to the softmax loss (target.gamma) and its
    margin, in ordinary batches: how face recognition is mostly trained.
    """
    margin: float = setting(0.4, cost="none", within="0 or more")
    "lambda of eq. 8."
    mining: Literal["hard", "semihard", "all"] = "semihard"
    "Which triplets of the batch count."
    squared: bool = True
    "Squared distances, as in eq. 8; false takes their roots."
    reduction: Literal["mean", "nonzero", "sum"] = "mean"
    "mean over the mined triplets, nonzero over those with a positive hinge."
    normalize: bool = True
    "Scale features to unit length first."
    identities: int = setting(32, within="at least 2")
    "Identities of a batch."
    images_per_identity: int = setting(4, within="at least 2")
    "Images of each identity in a batch."

    def __post_init__(self) -> None:
        check_settings(self, "triplet.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of epochs at one learning rate."""

    epochs: int = setting(within="at least 1")
    "Passes over the training images."
    lr: float = setting(within="more than 0")
    "Learning rate."

    def __post_init__(self) -> None:
        check_settings(self, "optim.phases: ")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Nesterov SGD and its schedule, in steps of the optimiser."""

    phases: list[Phase] = setting(factory=lambda: [Phase(epochs=30, lr=0.1)], cost="none", own=True)
    "Schedule, one {epochs, lr} after another: the papers' 0.1 from scratch, 0.01 when initialised."
    schedule: Literal["constant", "cosine"] = setting("constant", cost="none")
    """Learning rate within a phase: its lr throughout, or half a cosine from it down to
    final_lr_fraction of it.
    """
    final_lr_fraction: float = setting(0.0, cost="none", within="0 <= x <= 1")
    "Share of the phase's lr at which its cosine ends."
    warmup_epochs: float = setting(0.0, cost="none")
    "Epochs at the start of the run over which the learning rate rises linearly from 0."
    batch_size: int = setting(256, within="at least 2")
    """Images of a batch; verification takes triplet.identities x triplet.images_per_identity
    instead.
    """
    accumulate: int = setting(1, cost="none", within="at least 1")
    """Batches of a step, whose mean gradient it takes. Batch normalisation and the mining of
    triplets see one batch at a time.
    """
    momentum: float = setting(0.9, cost="none")
    "Nesterov momentum."
    weight_decay: float = setting(5e-4, cost="none", within="0 or more")
    "L2 penalty on every parameter that no_decay does not exempt."
    no_decay: Literal["none", "norm_and_bias"] = "none"
    "Parameters without the penalty: none, or those of the normalisations and all biases."
    clip_norm: float | None = setting(None, cost="switch", within="more than 0")
    "Scale the gradient down to at most this norm; null leaves it."
    ema: float | None = setting(None, cost="switch", within="0 < x < 1")
    """Decay of the running average of the weights, which is then what is evaluated and kept (last/
    has the trained weights too, to resume from); null keeps the trained weights.
    """

    def __post_init__(self) -> None:
        check_settings(self, "optim.")
        require(len(self.phases) > 0, "optim.phases", "at least one {epochs, lr}", self.phases)
        require(0 < self.momentum < 1, "optim.momentum", "0 < x < 1 (Nesterov)", self.momentum)
        epochs = sum(phase.epochs for phase in self.phases)
        require(
            0 <= self.warmup_epochs <= epochs,
            "optim.warmup_epochs",
            f"from 0 to the epochs of all phases ({epochs})",
            self.warmup_epochs,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Where and how a run computes, and when it stops; none of it changes what is optimised."""

    threads: int = setting(0, counted=False, cost="none", within="0 or more")
    "Processor threads; 0 leaves torch's own choice."
    device: str = "cpu"
    "torch device, as cpu or cuda:0."
    deterministic: bool = True
    "Deterministic algorithms only; exact resume needs it."
    log_every: int = setting(10, counted=False, cost="none", within="at least 1")
    "Steps between two lines of metrics.jsonl; terms are read from the device only then."
    eval_every: int = setting(1, cost="none", within="at least 1")
    "Epochs between two evaluations; the end of each phase is always evaluated."
    early_stop: int | None = setting(None, cost="none", within="at least 1")
    """Stop after this many evaluations in a row without a better metric on the images that
    data.validation_fraction holds out; null trains every epoch.
    """
    save_every: int = setting(200, counted=False, cost="none", within="at least 1")
    "Steps between two checkpoints; the end of each epoch always saves one."
    drop_last: bool = setting(True, cost="none")
    "Leave out the last batch of an epoch when it is not full."
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the networks' training passes by torch.autocast; float16 scales the loss and
    skips steps that overflow. Weights, losses and evaluations stay float32.
    """
    channels_last: bool = True
    "Keep the channels of a pixel side by side in memory; false keeps planes, torch's default."
    compile: bool = False
    "torch.compile student and teacher for training."
    tensorboard: bool = setting(False, counted=False, cost="none")
    "Also write the journal's numbers for TensorBoard, in RUN/tensorboard (extra tensorboard)."

    def __post_init__(self) -> None:
        check_settings(self, "train.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How results are measured."""

    normalizer: Literal["interocular", "diagonal", "side"] = "interocular"
    "What landmark errors are divided by: eye distance, or diagonal or side of the image."
    gallery: str | None = setting(None, run="gallery")
    """Run folder of another network, such as the teacher, whose features are searched by this one's
    (verification; RUN/best: its best weights); @NAME is the run beside this one. Adds the metrics
    asym_...; changes nothing that is trained.
    """


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    task: Literal["classification", "alignment", "verification"] = setting(
        "classification", own=True
    )
    "What is trained: eq. 2-4, eq. 6-7 or eq. 8-9 of arXiv 1709.02929."
    seed: int = setting(0, cost="none", own=True)
    "Seed of the weights, the order of images and their crops."
    fused: bool = True
    "false runs every kdkernels op on backend eager."
    init_from: str | None = setting(None, run="init_from", cost="none", own=True)
    """Run folder whose last weights start the network (RUN/best: its best); @NAME is the run
    beside this one.
    """
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
            raise ConfigError(
                f"{known} need a teacher: set --teacher to its run folder, or the weights to 0"
            )
        if self.head.needs_teacher and self.teacher.run is None:
            raise ConfigError(
                "head.margin distillation and head.update adaptive need a teacher: set --teacher "
                "to its run folder"
            )
        if self.teacher.run is not None and not self.needs_teacher:
            raise ConfigError(f"teacher is set but {known} are all 0: weigh one, or drop it")
        if self.head.update == "none" and self.head.run is None and self.init_from is None:
            raise ConfigError(
                "head.update none would freeze a random classifier: name the run that it comes "
                "from with head.run, or train it (head.update gradient)"
            )
        for target in self.target.weighed:
            # two images are always one mean distance apart
            if not self.balanced and self.optim.batch_size < target.least:
                raise ConfigError(
                    f"target.{target.key} compares at least {target.least} images of a batch, "
                    f"and optim.batch_size is {self.optim.batch_size}: raise it, or set "
                    f"target.{target.key} to 0"
                )
        check_teachers(self.target, self.teacher, self.head.needs_teacher)
        check_sizes(self.target, self.data.input_size, self.teacher_side, self.data.crop_side)
        if self.eval.gallery is not None and self.task != "verification":
            raise ConfigError(
                f"eval.gallery: features are searched in task verification, got {self.task}; set "
                "eval.gallery to null"
            )
        if self.target.hint and self.task != "classification":
            raise ConfigError(
                f"target.hint is a stage before classification, got task {self.task}: set task to "
                "classification (the teacher may be of any task)"
            )
        if self.train.early_stop is not None and not self.data.validation_fraction:
            raise ConfigError(
                "train.early_stop: needs held-out images to judge by, as the test split must not "
                "decide; set data.validation_fraction above 0, or train.early_stop to null"
            )
        has_other_loss = self.target.gamma > 0 or self.target.needs_teacher
        if self.task == "classification":
            if self.data.split == "identity":
                raise ConfigError(
                    "data.split identity tests on identities without a class of their own: "
                    "use identity:random, random or file: for classification"
                )
            require(
                has_other_loss,
                "target.gamma",
                "more than 0 for classification, unless a target of the teacher has a weight",
                self.target.gamma,
            )
        if self.task == "verification" and not (self.triplet.weight or has_other_loss):
            raise ConfigError(
                "triplet.weight 0 leaves verification without a loss: raise it or target.gamma"
            )

    @property
    def needs_teacher(self) -> bool:
        """True when a target with weight, or the head, asks the teacher."""
        return self.target.needs_teacher or self.head.needs_teacher

    @property
    def balanced(self) -> bool:
        """True where triplets are mined: a batch is then triplet.identities times
        triplet.images_per_identity.
        """
        return self.task == "verification" and self.triplet.weight > 0

    def runs(self) -> dict[str, str]:
        """What names a run that this one reads, by the name of the input; see named_runs."""
        return named_runs(lambda key: attrgetter(key)(self))

    @property
    def teacher_side(self) -> int:
        """Side of the images that the teacher is asked on."""
        own = self.teacher.input_size
        return self.data.input_size if own is None else own


SETTINGS = tuple(settings_of(Config))
"""Every setting of a run."""
RUN_SETTINGS: Mapping[str, str] = {s.run: s.key for s in SETTINGS if s.run is not None}
"""Settings whose value is a run directory, or @NAME for the run beside, or a list of them: by the
input's name.
"""


def named_runs(get: Callable[[str], Any]) -> dict[str, str]:
    """The runs that settings name, by the name of the input: RUN_SETTINGS, NAME_1, NAME_2 ... for
    the entries of a list. get: the value of a dotted key.
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
    """The folder that a setting of RUN_SETTINGS names; @NAME is the run beside run_dir."""
    return run_dir.parent / name[1:] if name.startswith("@") else Path(name)
