"""Distillation targets and teacher: the sections target and teacher of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from kdtrain.config.fields import ConfigError, check_settings, require, setting


@dataclass(frozen=True, kw_only=True)
class Target:
    """A distillation target apart from its mathematics (objectives/targets.py): the row of the
    TargetConfig field that weighs it.
    """

    key: str
    """The field of TargetConfig."""
    name: str
    """Name of the term in metrics.jsonl, and of the target in select-targets."""
    words: str
    """Name in a report; {fields} of TargetConfig are filled in."""
    reads: Literal["prediction", "logits", "feature", "attention", "maps"]
    "Teacher output that the target compares."
    published: float = 1.0
    """Weight of its authors beside a softmax loss (docs/targets.md)."""
    form: str = ""
    """Field of TargetConfig that a report shows in brackets."""
    least: int = 1
    """Fewest images that the term compares."""

    @property
    def by_class(self) -> bool:
        """True where student and teacher are compared class by class."""
        return self.reads in ("prediction", "logits")

    @property
    def alone(self) -> bool:
        """True where a run has no other loss beside this target."""
        return self.reads == "maps"


def _weight(words: str, reads: str, **more: Any) -> float:
    """The field that weighs a target, with the target's row but for its key."""
    row = {"words": words, "reads": reads, **more}
    return setting(0.0, target=row, cost="switch", own=True, within="0 or more")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Weights and forms of the distillation targets, beside the loss of the task."""

    alpha: float = _weight("soft", "prediction", form="temperature", name="soft")
    "Weight of the soft target. It is the cross-entropy with the teacher's softened prediction."
    beta: float = _weight("hidden", "feature", form="hidden_reduction", name="hidden")
    "Weight of the hidden target. It is the squared distance of the pooled features."
    gamma: float = setting(1.0, cost="switch", own=True, within="0 or more")
    "Weight of the softmax loss. 0 trains classification by its targets alone."
    logits: float = _weight("logits", "logits", form="logits_reduction")
    "Weight of the logits target: the squared distance of the logits."
    embedding_l2: float = _weight("embedding L2", "feature")
    "Weight of the embedding target: the squared distance of unit-length features, 2 (1 - cos)."
    embedding_cosine: float = _weight("embedding cosine", "feature", published=128.0)
    "Weight of the embedding target as 1 - cos. Published weights are 64 and 128."
    rkd_distance: float = _weight("RKD distance", "feature", published=25.0, least=3)
    "Weight of RKD's distance loss (Park et al. 2019); published: 25, or 1 in metric learning."
    rkd_angle: float = _weight("RKD angle", "feature", published=50.0, least=3)
    "Weight of RKD's angle loss (Park et al. 2019); published: 50, or 2 in metric learning."
    attention: float = _weight("attention transfer", "attention", published=1000.0)
    "Weight of attention transfer (Zagoruyko and Komodakis 2017). The published weight is 1000."
    teacher_head: float = _weight(
        "soft through the teacher's classifier",
        "prediction",
        published=0.02,
        form="teacher_head_temperature",
    )
    "Weight of the soft target through the teacher's frozen classifier (TH-KD); published: 0.02."
    hint: float = _weight("hint of stage {hint_stage}", "maps", form="hint_reduction")
    "Weight of a FitNet hint, the only loss of its run: regression of a middle stage's output."
    temperature: float = setting(3.0, cost="none", within="more than 0")
    "Temperature of the soft target."
    tau_squared: bool = setting(False, cost="none", own=True)
    "Multiply each soft target by the square of its temperature (Hinton et al. 2015)."
    teacher_head_temperature: float | None = setting(None, within="more than 0")
    "Temperature of target.teacher_head. null takes target.temperature."
    teacher_head_proj: Literal["linear", "none"] = "linear"
    "Learnt projection of the feature before the teacher's classifier, if widths differ."
    hidden_proj: Literal["linear", "none"] = "linear"
    "Learnt projection of the student's feature before the hidden target, if widths differ."
    hidden_normalize: bool = False
    "Scale both features to unit length before the hidden target."
    embedding_proj: Literal["linear", "none"] = "linear"
    "Learnt projection of the student's feature before embedding targets, if widths differ."
    hidden_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "Reduction of the hidden target. batchmean divides by images, mean also by feature width."
    logits_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "Reduction of the logits target. batchmean divides by images, mean also by identities."
    hint_stage: Literal[1, 2, 3, 4] = 2
    "Residual stage whose output is the hint, in student and teacher."
    hint_reduction: Literal["batchmean", "mean", "sum"] = "batchmean"
    "Reduction of the hint. batchmean divides by the images, mean by all values."
    label_smoothing: float = setting(0.0, within="0 <= x < 1")
    "Share of the label's probability that is spread over all identities."

    def __post_init__(self) -> None:
        check_settings(self, "target.")
        others = [
            f"target.{name} is {getattr(self, name):g}"
            for name in ("gamma", *TEACHER_WEIGHTS)
            if getattr(self, name) and name != "hint"
        ]
        if self.hint and others:
            raise ConfigError(
                f"target.hint excludes other losses, but {', '.join(others)}: set these weights to "
                "0, and use them in a run that is initialised from this one (init_from)"
            )

    @property
    def weighed(self) -> list[Target]:
        """The targets that have a weight."""
        return [target for target in TARGETS.values() if getattr(self, target.key) > 0]

    @property
    def needs_teacher(self) -> bool:
        """True when a target has a weight."""
        return bool(self.weighed)

    @property
    def needs_feature(self) -> bool:
        """True when a target that reads the teacher's pooled feature has a weight."""
        return any(target.reads == "feature" for target in self.weighed)


TARGETS: Mapping[str, Target] = {
    item.name: Target(**{"key": item.name, "name": item.name, **item.metadata["target"]})
    for item in fields(TargetConfig)
    if "target" in item.metadata
}
"""Every target by its key, in the order of its terms in the loss."""
TEACHER_WEIGHTS = tuple(TARGETS)
"""Fields of TargetConfig that weigh a target."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher and the cache of its outputs. `teacher: RUN` and --teacher RUN stand for
    teacher.run.
    """

    run: str | None = setting(None, run="teacher", own=True)
    "Run directory of the teacher."
    more: list[str] = setting(factory=list, run="teacher_more")
    "Run directories of further teachers. The soft target takes the mean of all predictions."
    weights: list[float] | None = None
    "Weights of teacher.run and teacher.more in the mean prediction; null: equal."
    input_size: int | None = setting(None, cost="value")
    "Side of the teacher's input, in pixels. It sees the student's crops; null: data.input_size."
    cache: Literal["none", "float32", "float16"] = "none"
    """Cache of the teacher outputs on disk, shared by all students with the same batches. float32
    trains bitwise identically to none; float16 rounds the outputs and takes half the space.
    """
    cache_what: Literal["outputs", "features"] = "outputs"
    """Content of the cache. outputs are those that the targets read; features are the pooled
    features alone, which are stored once per image and mirror image where no crop is random.
    """
    cache_dir: str | None = setting(None, counted=False)
    "Directory of the cache. null is teacher_cache beside the run directory."

    def __post_init__(self) -> None:
        weights, teachers = self.weights or [], 1 + len(self.more)
        holds = len(weights) == teachers and all(0 < w < math.inf for w in weights)
        needed = f"null, or a number above 0 for each of the {teachers} teachers"
        require(self.weights is None or holds, "teacher.weights", needed, self.weights)
        features = self.cache_what == "features"
        if features and self.cache == "none":
            raise ConfigError(
                "teacher.cache_what features needs teacher.cache float32 or float16, got none"
            )
        if features and self.more:
            raise ConfigError(
                "teacher.cache_what features holds one teacher's features, and teacher.more names "
                "others: set teacher.cache_what to outputs"
            )

    @property
    def shares(self) -> list[float]:
        """Share of each teacher in the mean prediction; their sum is 1."""
        weights = [1.0] * (1 + len(self.more)) if self.weights is None else self.weights
        return [weight / math.fsum(weights) for weight in weights]


def check_teachers(target: TargetConfig, teacher: TeacherConfig, head_reads: bool) -> None:
    """Raises ConfigError where several teachers meet a target other than the soft one. head_reads:
    whether the student's head reads the teacher's features.
    """
    if not teacher.more:
        return
    if teacher.run is None:
        raise ConfigError("teacher.more needs teacher.run, the first teacher")
    others = [f"target.{row.key} has a weight" for row in target.weighed if row.key != "alpha"]
    others += ["head.margin or head.update reads the teacher's features"] if head_reads else []
    if others or not target.alpha:
        raise ConfigError(
            f"teacher.more needs target.alpha as the only target, and "
            f"{others[0] if others else 'it is 0'}: set others to 0, or use one teacher"
        )


def check_sizes(target: TargetConfig, side: int, theirs: int, crop: int) -> None:
    """Raises ConfigError for a teacher's input larger than the crop, and for maps whose sizes are
    no power of two apart. side, theirs: sides of the student's and the teacher's input.
    """
    needed = f"from 8 to the crop's {crop} pixels (data.crop_size), or null"
    require(8 <= theirs <= crop, "teacher.input_size", needed, theirs)
    if theirs == side:
        return
    if target.hint:
        raise ConfigError(
            f"target.hint needs one input size, got {side} for the student and {theirs} for the "
            "teacher: set teacher.input_size to null"
        )
    smaller, larger = sorted((side, theirs))
    while larger > smaller and not larger % 2:
        larger //= 2
    if target.attention and larger != smaller:
        raise ConfigError(
            f"target.attention needs teacher.input_size ({theirs}) and data.input_size ({side}) to "
            "differ by a power of two"
        )
