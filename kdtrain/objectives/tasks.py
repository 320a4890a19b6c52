"""The three tasks and the hint stage: their losses, metrics and floors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import batch_triplet_loss
from kdtrain.config import Config
from kdtrain.data.run_data import EvalBatch
from kdtrain.models.network import FaceNetwork, Outputs, evaluating, seeded
from kdtrain.objectives import evaluate, observe
from kdtrain.objectives.observe import Measured, Seen
from kdtrain.objectives.targets import HintTarget, Objective, Pair, squared_objective, total
from kdtrain.objectives.task import Task

FLOOR_QUERIES = 5000
CURVE_LIMIT = 0.3  # NRMSE at the end of a report's curve
POINT_NAMES = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")


class Classification(Task):
    """Eq. 2-4: the softmax loss, with soft, hidden or logit targets by weight."""

    metric = ("top1", +1)

    def _evaluate(self, seen: Seen) -> dict[str, float]:
        self.samples = observe.neighbour_samples(seen.hidden, seen, self.backend)
        self._items = {"top1": seen.hits}
        return {
            "top1": seen.hits.double().mean().item(),
            "cross_entropy": seen.surprise.double().mean().item(),
            **observe.pairs(seen.hidden, seen.labels).metrics,
        }

    def floors(self, train: Iterable[EvalBatch], test: Iterable[EvalBatch]) -> dict[str, float]:
        """top1 by the nearest training image of some test images, and pairs, in raw pixels."""
        pixels, labels, _ = observe.pixels(test)
        some = observe.evenly(len(labels), FLOOR_QUERIES)
        gallery = ((evaluate.raw_pixels(b.images), b.labels) for b in train)
        share = evaluate.gallery_top1(pixels[some], labels[some], gallery, backend=self.backend)
        return {"top1": share, **observe.pairs(pixels, labels).metrics}

    def untrained(self, test: Iterable[EvalBatch]) -> dict[str, float]:
        """The pairs' metrics; see Task.untrained."""
        seen = self._untrained(test)
        return observe.pairs(seen.hidden, seen.labels).metrics


class Hint(Classification):
    """Stage 1 of a FitNet (Romero et al. 2015): the layers up to target.hint_stage learn the
    teacher's maps by HintTarget; classification is then initialised from them (init_from). Later
    layers do not run and keep their values.
    """

    metric = ("hint", -1)

    def __init__(
        self, config: Config, num_classes: int, teacher: FaceNetwork | None = None
    ) -> None:
        super().__init__(config, num_classes, teacher)
        assert self.teacher is not None
        place = self.target.hint_stage - 1
        with seeded(config.seed + 1):
            self._hint = HintTarget(
                self.network.backbone.widths[place], self.teacher.backbone.widths[place]
            )
        self.extra["hint"] = self._hint

    def step(self, images: Tensor, *_: Any, **__: Any) -> Objective:
        """target.hint r |r(student's maps) - teacher's maps|^2; see Task.step. The teacher always
        runs, on the same images, as a Guide has no maps.
        """
        ours, theirs = self._maps(images, self._run)
        pair = Pair("hint", ours, theirs, self.target.hint, self.target.hint_reduction)
        return total([squared_objective([pair], self.backend)])

    def evaluate(self, batches: Iterable[EvalBatch]) -> dict[str, float]:
        """hint: the squared error, mean over elements and images for any reduction."""
        errors, indices = [], []
        for batch, ours, theirs in self._seen(batches):
            errors.append((ours - theirs).square().flatten(1).mean(1).cpu())
            indices.append(batch.indices.cpu())
        if not errors:
            raise ValueError("evaluate: no image to look at; the test split is empty")
        self._items = {"hint": torch.cat(errors), "index": torch.cat(indices)}
        return {"hint": self._items["hint"].double().mean().item()}

    def floors(self, train: Iterable[EvalBatch], test: Iterable[EvalBatch]) -> dict[str, float]:
        """hint of a constant regressor: each channel's mean over the training split."""
        means = torch.cat([theirs.mean((2, 3)) for _, _, theirs in self._seen(train)])
        guess = means.double().mean(0)[:, None, None]
        errors = [
            (theirs.double() - guess).square().flatten(1).mean(1)
            for _, _, theirs in self._seen(test)
        ]
        return {"hint": torch.cat(errors).mean().item()}

    def untrained(self, test: Iterable[EvalBatch]) -> dict[str, float]:
        """{}, as the error depends on the regressor."""
        return {}

    def _maps(self, images: Tensor, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """The two maps to compare. run: calls a module on inputs."""
        assert self.teacher is not None
        stage = self.target.hint_stage
        with torch.no_grad():
            theirs = run(self.teacher.tap, images, stage).float()
        return self._hint(run(self.network.tap, images, stage).float(), theirs)

    def _seen(self, batches: Iterable[EvalBatch]) -> Iterator[tuple[EvalBatch, Tensor, Tensor]]:
        """Each batch with the two maps to compare, in eval mode without gradient."""
        for batch in batches:
            with evaluating(self.network, self._hint):
                ours, theirs = self._maps(batch.images.to(self.device), operator.call)
            yield batch, ours.float(), theirs.float()


class Alignment(Task):
    """Eq. 6-7: |R - y|^2 over the 10 coordinates, with hidden or soft targets by weight.

    y = (x / W - 0.5, y / H - 0.5) of the crop. The classifier stays, for the soft target.
    """

    metric = ("nrmse", -1)
    needs_landmarks = True

    def _regression(self, outputs: Outputs, images: Tensor, points: Tensor | None) -> list[Pair]:
        if points is None:
            raise ValueError("alignment: landmarks are needed, and this data has none")
        assert outputs.points is not None
        height, width = images.shape[-2:]
        side = torch.tensor([width, height], dtype=torch.float32, device=points.device)
        truth = (points.float() / side - 0.5).flatten(1)  # (N, 10)
        # "batchmean": the paper's sum over coordinates and mean over images
        return [Pair("points", outputs.points, truth, 1.0, "batchmean")]

    def _evaluate(self, seen: Seen) -> dict[str, float]:
        assert seen.landmarks is not None
        true, predicted, *_, sizes = seen.landmarks
        kind = self.config.eval.normalizer
        errors = evaluate.nrmse_per_image(predicted, true, sizes, kind)
        lengths = evaluate.normalizer(true, sizes, kind)
        per_point = (evaluate.per_point_error(predicted, true) / lengths[:, None]).mean(0)
        thresholds, below, _ = evaluate.ced(errors, CURVE_LIMIT)
        self._items = {"nrmse": errors}
        self.samples = observe.landmark_samples(seen, errors)
        self.samples |= {"ced_threshold": thresholds.numpy(), "ced_share": below.numpy()}
        return {
            "nrmse": errors.mean().item(),
            "nme": per_point.mean().item(),
            "failure_rate": evaluate.failure_rate(errors),
            "ced_area": evaluate.ced(errors)[2],
            **{f"nme_{name}": per_point[i].item() for i, name in enumerate(POINT_NAMES)},
        }

    def floors(self, train: Iterable[EvalBatch], test: Iterable[EvalBatch]) -> dict[str, float]:
        """nrmse and failure_rate of the training split's mean shape on every test crop."""
        points = torch.cat([observe.true_points(batch)[1] for batch in train])
        shape = points.double().mean(0)
        errors = []
        for batch in test:
            true, _ = observe.true_points(batch)
            guess = observe.original(batch, shape.float().expand(len(true), -1, -1))
            kind = self.config.eval.normalizer
            errors.append(evaluate.nrmse_per_image(guess, true, batch.sizes.cpu(), kind))
        every = torch.cat(errors)
        return {"nrmse": every.mean().item(), "failure_rate": evaluate.failure_rate(every)}


class Verification(Task):
    """Eq. 8-9: the triplet loss on pooled features, with joint softmax and targets by weight; or
    the softmax loss and targets alone (triplet.weight 0).

    Features are scaled to unit length with triplet.normalize, in training and neighbour search.
    """

    metric = ("nn_top1", +1)

    def _metric_loss(self, outputs: Outputs, labels: Tensor) -> Objective | None:
        options = self.config.triplet
        if not options.weight:
            return None
        loss = batch_triplet_loss(
            self._embedding(outputs.hidden),
            labels,
            margin=options.margin,
            mining=options.mining,
            squared=options.squared,
            reduction=options.reduction,
            backend=self.backend,
        )
        weighted = loss if options.weight == 1 else options.weight * loss
        return Objective(weighted, {"triplet": loss})

    def _embedding(self, hidden: Tensor) -> Tensor:
        return F.normalize(hidden, dim=1) if self.config.triplet.normalize else hidden

    def _evaluate(self, seen: Seen) -> dict[str, float]:
        found = self._verified(seen)
        if self.gallery is not None:
            across = observe.asymmetric(self._verified(seen, self.gallery(seen.indices)))
            found.metrics.update(across.metrics)
            found.items.update(across.items)
            found.samples.update(across.samples)
        rows, self._items = self._embedding(seen.hidden), found.items
        self.samples = observe.neighbour_samples(rows, seen, self.backend) | found.samples
        return _measurable(found.metrics)

    def floors(self, train: Iterable[EvalBatch], test: Iterable[EvalBatch]) -> dict[str, float]:
        """The same metrics on raw pixels instead of features."""
        found = observe.verified(*observe.pixels(test), normalize=False, backend=self.backend)
        return _measurable(found.metrics)

    def untrained(self, test: Iterable[EvalBatch]) -> dict[str, float]:
        """All metrics without a gallery; see Task.untrained."""
        return _measurable(self._verified(self._untrained(test)).metrics)

    def _verified(self, seen: Seen, gallery: Tensor | None = None) -> Measured:
        sides, unit = (seen.hidden, seen.labels, seen.groups), self.config.triplet.normalize
        return observe.verified(*sides, normalize=unit, gallery=gallery, backend=self.backend)


def _measurable(metrics: dict[str, float]) -> dict[str, float]:
    """Without metrics that could not be measured (nan)."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "alignment": Alignment,
    "verification": Verification,
}


def build_task(config: Config, num_classes: int, teacher: FaceNetwork | None = None) -> Task:
    """Returns the task of `config.task`, or the hint stage if target.hint has a weight, with a new
    network from `config.seed`.

    teacher: the network of weighted targets. Raises ValueError for a teacher of other classes.
    """
    kind = Hint if config.target.hint else TASKS[config.task]
    return kind(config, num_classes, teacher)
