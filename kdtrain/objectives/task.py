"""The base of the tasks: a network, its teacher, one step's loss, and its evaluation.

One objective covers all tasks: Phi(task) + alpha soft + beta hidden + logits + gamma softmax (eq. 5
of arXiv 1709.02929), and the targets of registry.py. Teacher outputs come from a forward pass in
eval mode without gradient, or from a cache (teacher_cache.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels import kd_cross_entropy, sample_classes
from kdtrain.config import TARGETS, Config, ConfigError
from kdtrain.data.run_data import EvalBatch
from kdtrain.models.mixture import TeacherMixture
from kdtrain.models.network import FaceNetwork, Outputs, Passes, seeded
from kdtrain.objectives.heads import (
    AdaFaceNorms,
    margin_of,
    move_centres,
    scores_op,
    soft_source,
    teacher_head_objective,
)
from kdtrain.objectives.observe import Seen, look
from kdtrain.objectives.registry import MAPS, compared, losses_of, pairs_of
from kdtrain.objectives.targets import (
    Guide,
    Objective,
    Pair,
    WidthMap,
    softmax_objective,
    squared_objective,
    total,
)


class Task(ABC):
    """A network, its teacher, and the loss, metrics and floor of one task.

    network: trained and saved. extra: modules that are trained and dropped afterwards. teacher: in
    eval mode, in neither state nor optimiser; None if no target needs it. gallery: another
    network's features by index in the source, for asymmetric evaluation (input_runs.py), or None.
    samples: small arrays of the last `evaluate` for the report.
    """

    metric: tuple[str, int]  # The judging metric, and +1 where more is better, -1 where less is
    needs_landmarks = False

    def __init__(
        self, config: Config, num_classes: int, teacher: FaceNetwork | None = None
    ) -> None:
        target = config.target
        by_class = any(row.by_class for row in target.weighed)
        by_class = by_class or config.head.margin == "distillation"
        if teacher is not None and by_class and teacher.num_classes != num_classes:
            theirs = f"{teacher.num_classes} identities" if teacher.num_classes else "no classifier"
            raise ValueError(
                f"build_task: the teacher has {theirs} and the data has {num_classes} identities; "
                "train the teacher on these (or import it with their --head), or set target."
                f"{', target.'.join(row.key for row in TARGETS.values() if row.by_class)} to 0 "
                "and head.margin to none or one without a teacher"
            )
        self.config = config
        self.target = target
        self.backend = None if config.fused else "eager"
        self.network = self._fresh(num_classes)
        self.teacher = teacher if config.needs_teacher else None
        assert not config.needs_teacher or self.teacher is not None, "no teacher given"
        self._run = Passes(config.train)
        self.extra = nn.ModuleDict()
        self.network.arrange(channels_last=config.train.channels_last)
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
            self.teacher.arrange(channels_last=config.train.channels_last)
            widths = self.network.width, self.teacher.width
            for name, keys in MAPS.items():
                if any(getattr(target, key) for key in keys):
                    with seeded(config.seed + 1):
                        self.extra[name] = WidthMap(name, keys, *widths, target)
            if config.head.update == "adaptive" and widths[0] != widths[1]:
                raise ConfigError(
                    "head.update adaptive compares the two networks' features, and the student has "
                    f"{widths[0]}, the teacher {widths[1]}; give both the same model.embedding"
                )
        self.gallery: Callable[[Tensor], Tensor] | None = None
        self._norms = AdaFaceNorms() if config.head.margin == "adaface" else None
        if self._norms is not None:
            self.extra["adaface"] = self._norms
        if config.head.update != "gradient":
            self.network.classifier.requires_grad_(False)
        self.samples: dict[str, np.ndarray] = {}
        self._items: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.network.classifier.weight.device

    def to(self, device: torch.device | str) -> Task:
        """Moves network, teacher and extra modules."""
        for module in (self.network, self.teacher, self.extra):
            if module is not None:
                module.to(device)
        return self

    @property
    def guide_widths(self) -> dict[str, int]:
        """The teacher outputs that the targets read and a cache can store, with their widths; {}
        for attention transfer, whose maps are not cached.
        """
        if self.teacher is None or self.target.attention:
            return {}
        logits, target, needed = self._needs_teacher_logits, self.target, {}
        if logits and not self._caches_features:
            needed["logits"] = self.teacher.num_classes
        # the feature forms the logits, or the loss
        formed = self._caches_features if logits else target.alpha or target.teacher_head
        if formed or target.needs_feature or self.config.head.needs_teacher:
            needed["hidden"] = self.teacher.width
        return needed

    @property
    def _needs_teacher_logits(self) -> bool:
        """True if the op needs logits in place of the teacher's feature and classifier."""
        assert self.teacher is not None
        kinds = {type(n.classifier) for n in (self.network, self.teacher)}
        alone = not isinstance(self.teacher, TeacherMixture)
        streamed = self.config.head.streams and len(kinds) == 1 and alone
        return bool(self.target.logits or (self.target.alpha and not streamed))

    @property
    def _caches_features(self) -> bool:
        """True if the cache stores features only, from which logits are formed."""
        teacher = self.config.teacher
        return teacher.cache != "none" and teacher.cache_what == "features"

    def guide(self, images: Tensor) -> Guide:
        """Runs the teacher on a training batch (N, 3, t, t) without gradient; empty without one."""
        if self.teacher is None:
            return Guide()
        scores = self._needs_teacher_logits and not self._caches_features
        with torch.no_grad():
            outputs = self._outputs(self.teacher, images, scores=scores)
        return Guide(outputs.logits, outputs.hidden, outputs.attention)

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        points: Tensor | None = None,
        guide: Guide | None = None,
        teacher_images: Tensor | None = None,
    ) -> Objective:
        """Returns the loss of a training batch; its terms have the same names at every step.

        images (N, 3, s, s) float in [0, 255]; labels (N,); points (N, 5, 2) landmarks in crop
        pixels, for alignment. guide: cached teacher outputs; None runs the teacher, on
        teacher_images (N, 3, t, t) if its input size differs.
        """
        scores = not self.config.head.streams or bool(self.target.logits)
        outputs = self._outputs(self.network, images, scores=scores)
        if guide is None:
            guide = self.guide(images if teacher_images is None else teacher_images)
        guide = self._scored(guide)
        softmax, second = self._softmax(outputs, labels, guide), None
        if "teacher_head" in self.extra:
            assert self.teacher is not None
            mapped = self.extra["teacher_head"](outputs.hidden)
            second = teacher_head_objective(mapped, self.teacher, guide, self.target, self.backend)
        step = compared(outputs, guide, self.extra, self.target)
        pairs = [*pairs_of(step), *self._regression(outputs, images, points)]
        squared, losses = squared_objective(pairs, self.backend), losses_of(step)
        metric = self._metric_loss(outputs, labels)
        return total([metric, softmax, second, squared, losses])

    def _scored(self, guide: Guide) -> Guide:
        """The teacher outputs with logits, formed as in its forward pass if needed and missing."""
        if guide.hidden is None or guide.logits is not None or not self._needs_teacher_logits:
            return guide
        assert self.teacher is not None
        with torch.no_grad():
            return guide._replace(logits=self._run(self.teacher.classifier, guide.hidden))

    def _softmax(self, outputs: Outputs, labels: Tensor, guide: Guide) -> Objective | None:
        """The classifier's hard and soft terms, with its margin and after a step of its centres."""
        head, target, teacher = self.config.head, self.target, self.teacher
        classifier = self.network.classifier
        if head.update == "adaptive":
            assert guide.hidden is not None
            move_centres(classifier.weight, outputs.hidden, guide.hidden, labels)
        if not head.streams:
            assert outputs.logits is not None
            op = partial(kd_cross_entropy, outputs.logits, backend=self.backend)
            return softmax_objective(op, labels, guide.logits, target)
        margin = margin_of(head, outputs.hidden, labels, teacher, guide, self._norms)
        options: dict[str, Any] = {"margin_grad": head.margin_grad, "backend": self.backend}
        if target.gamma:
            options["margin"] = margin
        if head.sample < 1 and (target.gamma or target.alpha):
            # of both softmaxes, from torch's random state (PartialFC, arXiv 2203.15565)
            options["classes"] = sample_classes(labels, len(classifier.weight), head.sample)
        if target.alpha and teacher is not None:
            options |= soft_source(guide, teacher)
        op = scores_op(self.network, outputs.hidden)
        return softmax_objective(op, labels, options.pop("teacher", None), target, **options)

    def _outputs(self, network: FaceNetwork, images: Tensor, *, scores: bool) -> Outputs:
        """A training pass; the feature in float32, for projections and norms outside of it."""
        run = network if scores else network.embed
        run = network.attend if self.target.attention else run
        outputs: Outputs = self._run(run, images)
        return outputs._replace(hidden=outputs.hidden.float())

    def evaluate(self, batches: Iterable[EvalBatch]) -> dict[str, float]:
        """Returns the metrics of a split, without those that cannot be measured on it (too few
        pairs). Raises ValueError without an image.
        """
        seen = look(self.network, batches, self.device)
        metrics = self._evaluate(seen)
        self._items["index"] = seen.indices
        return metrics

    def items(self) -> dict[str, np.ndarray]:
        """Returns the last `evaluate` per image: float32 (N,) for each metric that is a mean over
        images (nan for an omitted image), and "index", int64 (N,), in the source.
        """
        return {
            name: values.cpu().to(torch.int64 if name == "index" else torch.float32).numpy()
            for name, values in self._items.items()
        }

    @abstractmethod
    def floors(self, train: Iterable[EvalBatch], test: Iterable[EvalBatch]) -> dict[str, float]:
        """Returns the metrics of raw pixels, or of the training split's mean shape."""

    def untrained(self, test: Iterable[EvalBatch]) -> dict[str, float]:
        """Returns the metrics of a new network of this shape, with the weights of config.seed; {}
        if the metrics are not of features.
        """
        return {}

    def _fresh(self, num_classes: int) -> FaceNetwork:
        config, side = self.config, self.config.data.input_size
        with seeded(config.seed):
            return FaceNetwork(
                config.model, num_classes, self.needs_landmarks, head=config.head, input_size=side
            )

    def _untrained(self, test: Iterable[EvalBatch]) -> Seen:
        network = self._fresh(self.network.num_classes).to(self.device)
        return look(network, test, self.device)

    @abstractmethod
    def _evaluate(self, seen: Seen) -> dict[str, float]: ...

    def _metric_loss(self, outputs: Outputs, labels: Tensor) -> Objective | None:
        """Phi where it is neither the softmax loss nor a squared distance."""
        return None

    def _regression(self, outputs: Outputs, images: Tensor, points: Tensor | None) -> list[Pair]:
        """Phi where it is a squared distance."""
        return []
