"""What a student is taught besides its task, and by whom: the sections target and teacher of a
config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kdtrain.config.fields import ConfigError, check_settings, require, setting


@dataclass(frozen=True, kw_only=True)
class Target:
    """What there is to know of a target beside its mathematics (objectives/targets.py): the row of
    a field of TargetConfig that weighs a term which the teacher yields.
    """

    key: str
    """The field of TargetConfig."""
    name: str
    """Of its term in the journal, and of the target in select-targets."""
    words: str
    """In a report; {fields} of TargetConfig are filled in."""
    reads: Literal["prediction", "logits", "feature", "attention", "maps"]
    """What of the teacher: its softened prediction (logits, or feature and classifier), its logits,
    its pooled feature, the attention maps of its stages, or a stage's output.
    """
    published: float = 1.0
    """Weight that its authors use, beside a softmax loss (docs/targets.md)."""
    form: str = ""
    """Field of TargetConfig that a report puts in brackets."""
    least: int = 1
    """Images that the term compares."""

    @property
    def by_class(self) -> bool:
        """True where student and teacher are compared class by class."""
        return self.reads in ("prediction", "logits")

    @property
    def alone(self) -> bool:
        """True for a stage of its own, which stands beside no other term."""
        return self.reads == "maps"


def _weight(name: str, words: str, reads: str, **more: Any) -> float:
    """The field that weighs a target, with the target's row but for its key."""
    row = {"name": name, "words": words, "reads": reads, **more}
    said = {"target": row, "cost": "switch", "own": True, "within": "0 or more"}
    return field(default=0.0, metadata=said)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Weights and form of every term beside the task's own loss."""

    alpha: float = _weight("soft", "soft", "prediction", form="temperature")
    "Weight of the soft target: cross-entropy with the teacher's softened prediction."
    beta: float = _weight("hidden", "hidden", "feature", form="hidden_reduction")
    "Weight of the hidden target: squared distance of the pooled features."
    gamma: float = setting(1.0, cost="switch", own=True, within="0 or more")
    """Weight of the softmax loss with the labels: the task loss of classification, the joint
    softmax elsewhere. 0 leaves classification to its targets (to the hidden one alone: the
    classifier stays untrained, and top1 says so).
    """
    logits: float = _weight("logits", "logits", "logits", form="logits_reduction")
    "Weight of the logits target: squared distance of the logits."
    embedding_l2: float = _weight("embedding_l2", "embedding L2", "feature")
    """Weight of the embedding target: squared distance of the pooled features scaled to unit
    length, 2 (1 - cos), mean over images.
    """
    embedding_cosine: float = _weight(
        "embedding_cosine", "embedding cosine", "feature", published=128.0
    )
    "Weight of the same as 1 - cos, half of embedding_l2; published weights are 64 and 128."
    rkd_distance: float = _weight(
        "rkd_distance", "RKD distance", "feature", published=25.0, least=3
    )
    """Weight of RKD's distances between the images of a batch (Park et al. 2019); published
    weights are 25 beside a softmax loss and 1 in metric learning.
    """
    rkd_angle: float = _weight("rkd_angle", "RKD angle", "feature", published=50.0, least=3)
    "Weight of RKD's angles between three images of a batch; published weights are 50 and 2."
    attention: float = _weight("attention", "attention transfer", "attention", published=1000.0)
    """Weight of attention transfer: squared distance of the residual stages' unit-length maps of
    summed squared activations (Zagoruyko and Komodakis 2017); the published weight is 1000.
    """
    teacher_head: float = _weight(
        "teacher_head",
        "soft through the teacher's classifier",
        "prediction",
        published=0.02,
        form="teacher_head_temperature",
    )
    """Weight of the soft target through the teacher's own classifier, which stands frozen beside
    the student's and is never kept (TH-KD); the published weight is 0.02, of CIFAR-100.
    """
    hint: float = _weight("hint", "hint of stage {hint_stage}", "maps", form="hint_reduction")
    """Weight of a FitNet hint: squared distance of a middle stage's output, through a learnt
    regressor. A stage of its own, without any other term; the student's layers above keep their
    values.
    """
    temperature: float = setting(3.0, cost="none", within="more than 0")
    "Temperature of the soft target."
    tau_squared: bool = setting(False, cost="none", own=True)
    """Multiply the soft targets by temperature^2 (Hinton et al. 2015); teacher_head's by its
    own temperature's.
    """
    teacher_head_temperature: float | None = setting(None, within="more than 0")
    "Temperature of the soft target through the teacher's classifier; null takes temperature."
    teacher_head_proj: Literal["linear", "none"] = "linear"
    """Learnt map of the student's feature onto the teacher's before its classifier, where widths
    differ; dropped after training.
    """
    hidden_proj: Literal["linear", "none"] = "linear"
    """Learnt projection of the student's feature onto the teacher's, where widths differ; dropped
    after training.
    """
    hidden_normalize: bool = False
    "Scale both features to unit length before the hidden target."
    embedding_proj: Literal["linear", "none"] = "linear"
    """The same for the embedding targets, before the scaling; theirs is another map than the hidden
    target's.
    """
    hidden_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "batchmean divides by the images (the papers' norm), mean also by the feature's length."
    logits_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "The same for the logits target."
    hint_stage: Literal[1, 2, 3, 4] = 2
    "Residual stage whose output is the hint, in student and teacher."
    hint_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "The same for the hint."
    label_smoothing: float = setting(0.0, within="0 <= x < 1")
    "Share of the label's probability that is spread over all classes."

    def __post_init__(self) -> None:
        check_settings(self, "target.")
        others = [
            f"target.{name} is {getattr(self, name):g}"
            for name in ("gamma", *TEACHER_WEIGHTS)
            if getattr(self, name) and name != "hint"
        ]
        if self.hint and others:
            raise ConfigError(
                f"target.hint: a hint is a stage of its own, but {', '.join(others)}: set these "
                "weights to 0 (target.gamma too), and give them to a run with init_from this one"
            )

    @property
    def weighed(self) -> list[Target]:
        """The targets that have a weight."""
        return [target for target in TARGETS.values() if getattr(self, target.key) > 0]

    @property
    def needs_teacher(self) -> bool:
        """True when a term that the teacher yields has a weight."""
        return bool(self.weighed)

    @property
    def needs_feature(self) -> bool:
        """True when a term that reads the teacher's pooled feature has a weight."""
        return any(target.reads == "feature" for target in self.weighed)


TARGETS: Mapping[str, Target] = {
    item.name: Target(key=item.name, **item.metadata["target"])
    for item in fields(TargetConfig)
    if "target" in item.metadata
}
"""Every target by its key, in the order of its terms in the loss."""
TEACHER_WEIGHTS = tuple(TARGETS)
"""Fields of TargetConfig that weigh a term which the teacher yields."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The network that targets come from. `teacher: RUN` and --teacher RUN are short for
    teacher.run.
    """

    run: str | None = setting(None, run="teacher", own=True)
    "Run folder of the teacher (RUN/best: its best weights); @NAME is the run beside this one."
    more: list[str] = setting(factory=list, run="teacher_more")
    """Runs of further teachers of the same identities. The predictions of all are averaged in the
    soft target, target.alpha; no other target reads more than one teacher.
    """
    weights: list[float] | None = None
    "Shares of teacher.run and each of teacher.more in that mean, of any sum; null: equal."
    input_size: int | None = setting(None, cost="value")
    """Side of the images that the teacher sees, the student's crops and flips at another
    resolution; null shows it the student's own.
    """
    cache: Literal["none", "float32", "float16"] = "none"
    """Keep the teacher's answers on disk, for every student that meets the same batches: float32
    trains to the same bits as none, float16 rounds them and takes half the room.
    """
    cache_what: Literal["outputs", "features"] = "outputs"
    """What teacher.cache keeps of a batch: the outputs that the targets read, or the pooled feature
    alone, from which the teacher's classifier forms the logits. Where training sees an image in
    no other views than itself and its mirror image (data.store_size is the crop's size), features
    are kept once for each of them, for every epoch and seed.
    """
    cache_dir: str | None = setting(None, counted=False)
    "Folder of the kept answers; null is teacher_cache beside the run folder."

    def __post_init__(self) -> None:
        weights = self.weights
        require(
            weights is None
            or (len(weights) == 1 + len(self.more) and all(0 < w < math.inf for w in weights)),
            "teacher.weights",
            f"null, or a number above 0 for each of the {1 + len(self.more)} teachers",
            weights,
        )
        features = self.cache_what == "features"
        if features and self.cache == "none":
            raise ConfigError(
                "teacher.cache_what features keeps nothing while teacher.cache is none: set "
                "teacher.cache to float32 or float16"
            )
        if features and self.more:
            raise ConfigError(
                "teacher.cache_what features: the averaged prediction of several teachers "
                "(teacher.more) is not that of one feature; set teacher.cache_what to outputs"
            )

    @property
    def shares(self) -> list[float]:
        """Share of each teacher in the mean prediction; their sum is 1."""
        weights = [1.0] * (1 + len(self.more)) if self.weights is None else self.weights
        return [weight / math.fsum(weights) for weight in weights]


def check_teachers(target: TargetConfig, teacher: TeacherConfig, head_asks: bool) -> None:
    """Raises ConfigError where several teachers are asked for more than one prediction together.
    head_asks: whether the student's head reads the teacher's features.
    """
    if not teacher.more:
        return
    if teacher.run is None:
        raise ConfigError("teacher.more: the first teacher is missing; name it by teacher.run")
    others = [f"target.{row.key} has a weight" for row in target.weighed if row.key != "alpha"]
    others += ["head.margin or head.update reads the teacher's features"] if head_asks else []
    if others or not target.alpha:
        raise ConfigError(
            "teacher.more: several teachers are averaged in target.alpha alone, and "
            f"{others[0] if others else 'it is 0'}: weigh target.alpha and nothing else of the "
            "teacher, or leave one teacher"
        )


def check_sizes(target: TargetConfig, side: int, theirs: int, crop: int) -> None:
    """Raises ConfigError where the teacher's images cannot be had from the crop, or maps are
    compared that do not halve into each other. side, theirs: pixels that student and teacher see.
    """
    require(
        8 <= theirs <= crop,
        "teacher.input_size",
        f"from 8 to the crop's {crop} pixels (data.crop_size, at most data.store_size), or null",
        theirs,
    )
    if theirs == side:
        return
    if target.hint:
        raise ConfigError(
            f"target.hint compares maps of one input, and the teacher sees {theirs} pixels "
            f"(teacher.input_size), the student {side}: set teacher.input_size to null"
        )
    smaller, larger = sorted((side, theirs))
    while larger > smaller and not larger % 2:
        larger //= 2
    if target.attention and larger != smaller:
        raise ConfigError(
            "target.attention compares maps that halve into each other: teacher.input_size "
            f"({theirs}) and data.input_size ({side}) must differ by a power of two"
        )
