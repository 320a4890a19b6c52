"""The cost of a step: a network's size from its shapes, memory and time from a few real steps on
random images.

The timing of a shape (network, teacher, batch, task, targets, device, threads) is cached in the
process, so that a plan of many runs times only those that differ.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdtrain.config import SETTINGS, Config, ModelConfig, settings
from kdtrain.config.networks import HeadConfig
from kdtrain.data import center, shrink
from kdtrain.data.run_data import EvalBatch, training_batch
from kdtrain.models.mixture import TeacherMixture
from kdtrain.models.network import FaceNetwork, count_parameters, multiply_adds, seeded
from kdtrain.objectives.observe import look
from kdtrain.objectives.targets import Guide
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import TASKS, build_task
from kdtrain.training.environment import computing
from kdtrain.training.optimization import Optimisation

TIMED_S = 8.0
"About the longest that one shape is timed, seconds."
STEPS = 4
"Steps that are timed, where they do not take too long; two at least."
TIMED_BYTES = 2 << 30
"Most that the activations of a timed batch may take, bytes; weights come on top."
LEAST = 4  # images of the smallest batch that every task can step on (2 identities x 2 images)
EVAL_IMAGES = 256  # the engine's own evaluation batch


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a network, from shapes alone."""

    parameters: int
    multiply_adds: int
    """Of its forward pass for one image, convolutions and linear layers."""
    activations: int
    """Bytes saved for backward per image in float32, as far as its batch grows them."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times and memory of the steps of one shape."""

    images: int
    """Images of a timed step."""
    batch_s: float
    """Augmentation, forward, loss and backward of these images."""
    update_s: float
    """The optimiser's part, which does not grow with the batch."""
    image_s: float
    """Evaluation of one image."""
    fixed_bytes: int
    """Weights, gradients, optimiser state."""
    batch_bytes: int
    """Memory of these images on top."""


_timings: dict[str, Timing] = {}
T = TypeVar("T")


def batch_images(config: Config) -> int:
    """Images of a training step."""
    if config.balanced:
        return config.triplet.identities * config.triplet.images_per_identity
    return config.optim.batch_size


def network_size(config: Config, model: ModelConfig, classes: int, side: int | None = None) -> Size:
    """Size of a network at the config's input, or at `side` pixels, from meta tensors."""
    side = config.data.input_size if side is None else side
    landmarks = TASKS[config.task].needs_landmarks
    return _size(model, classes, landmarks, side, config.head)


@cache
def _size(model: ModelConfig, classes: int, landmarks: bool, side: int, head: HeadConfig) -> Size:
    with seeded(0), torch.device("meta"):
        network = FaceNetwork(model, classes, landmarks, head=head, input_size=side)
        images = torch.empty(LEAST, 3, side, side)
    network.train()
    _, saved = _saved_bytes(lambda: network(images), [network])
    return Size(
        parameters=count_parameters(network),
        multiply_adds=multiply_adds(network, side),
        activations=sum(saved) // LEAST,
    )


def timing(
    config: Config, classes: int, teachers: Sequence[ModelConfig], kept: bool, threads: int
) -> Timing:
    """The timing of the config's shape, from this process' earlier ones where there is one."""
    flat = settings.to_flat(config)
    shape = {
        setting.key: bool(flat[setting.key]) if setting.cost == "switch" else flat[setting.key]
        for setting in SETTINGS
        if setting.cost != "none"
    }
    asked = [repr(list(teachers)), kept] if teachers else []
    record = [shape, classes, asked, threads or torch.get_num_threads()]
    key = json.dumps(record, sort_keys=True)
    if key not in _timings:
        _timings[key] = _measure(config, classes, teachers, kept, threads)
        gc.collect()  # a task is a circle
    return _timings[key]


def _measure(
    config: Config, classes: int, teachers: Sequence[ModelConfig], kept: bool, threads: int
) -> Timing:
    device = torch.device(config.train.device)
    computed = replace(config, train=replace(config.train, threads=threads))
    on_cuda = device.type == "cuda"
    # torch's random state is afterwards as before, on the processor and on the device
    with computing(computed), torch.random.fork_rng([device] if on_cuda else []):
        before = torch.cuda.memory_allocated(device) if on_cuda else 0
        task = build_task(config, classes, _guide(config, classes, teachers))
        trial = _Trial(config, task.to(device), device, kept)
        most = _fitting(config, classes, teachers)
        images, needed, first = trial.kept_bytes(LEAST)  # builds kernels and starts threads
        times = [first, trial.step(LEAST)]
        least_s = sum(usual(times))
        slow = least_s > TIMED_S / 3
        most = min(most, max(LEAST, int(TIMED_S / (STEPS + 2) * LEAST / max(least_s, 1e-9))))
        if most > LEAST:
            images, needed, _ = trial.kept_bytes(most)  # also warms up this batch
            times.clear()
        fixed = trial.fixed_bytes()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        batch_s, update_s = _repeated(lambda: trial.step(most), 2 if slow else STEPS, times)
        if on_cuda:
            needed = max(0, torch.cuda.max_memory_allocated(device) - before - fixed)
        seen = min(EVAL_IMAGES, images)
        if not slow:
            trial.evaluation(LEAST)
        (seen_s,) = _repeated(lambda: (trial.evaluation(seen),), 2 if slow else STEPS)
    return Timing(
        images=images,
        batch_s=batch_s,
        update_s=update_s,
        image_s=seen_s / seen,
        fixed_bytes=fixed,
        batch_bytes=needed,
    )


def usual(times: Sequence[Sequence[float]]) -> list[float]:
    """The lower middle of each column of repeated timings: other work on the machine only ever adds
    to them, so that one disturbed row of two or more is never the result.
    """
    return [statistics.median_low(column) for column in zip(*times, strict=True)]


def _repeated(
    measure: Callable[[], Sequence[float]], most: int, times: Sequence[Sequence[float]] = ()
) -> list[float]:
    """`usual` of up to `most` timings, two at least, within about TIMED_S; times: those so far."""
    began, known = time.monotonic(), list(times)
    while len(known) < 2 or (len(known) < most and time.monotonic() - began < TIMED_S):
        known.append(measure())
    return usual(known)


def _guide(
    config: Config, classes: int, teachers: Sequence[ModelConfig]
) -> FaceNetwork | TeacherMixture | None:
    """Untrained networks in the place of the teachers."""
    points, side = TASKS[config.task].needs_landmarks, config.teacher_side
    guides = [
        FaceNetwork(model, classes, points, head=config.head, input_size=side) for model in teachers
    ]
    if len(guides) > 1:
        return TeacherMixture(guides, config.teacher.shares, config.target.temperature)
    return guides[0] if guides else None


class _Trial:
    """A task with its optimiser, stepped on random images."""

    def __init__(self, config: Config, task: Task, device: torch.device, kept: bool) -> None:
        """kept: teacher outputs are read from teacher.cache, without a forward pass."""
        self.config, self.task, self.device = config, task, device
        self.modules: list[nn.Module] = [task.network, task.extra]
        self.modules += [] if task.teacher is None else [task.teacher]
        self.kept = kept and bool(task.guide_widths)
        self.optimisation = Optimisation(
            task.network,
            task.extra,
            config.optim,
            device=device.type,
            scaled=config.train.precision == "float16",
        )
        self.random = torch.Generator().manual_seed(0)
        self.taken = 0

    def step(self, most: int) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimiser, on about `most` images."""
        labels = self._labels(most)
        stored, points = self._images(len(labels))
        guide = self._outputs(len(labels)) if self.kept else None
        self.task.network.train()
        self.task.extra.train()
        started = now(self.device)
        batch = training_batch(
            stored.to(self.device),
            labels.to(self.device),
            None if points is None else points.to(self.device),
            torch.arange(len(labels)),
            self.config,
            phase=0,
            epoch=0,
        )
        # a rate at which random labels cannot make the weights infinite within a few steps
        self.optimisation.begin(1e-6)
        loss = self.task.step(
            batch.images, batch.labels, batch.points, guide, batch.teacher_images
        ).loss
        self.optimisation.backward(loss)
        between = now(self.device)
        self.taken += 1
        self.optimisation.step(self.taken)
        return between - started, now(self.device) - between

    def kept_bytes(self, most: int) -> tuple[int, int, tuple[float, float]]:
        """Images of a step, bytes that they need beside the weights, and `step`'s times."""
        times, sizes = _saved_bytes(lambda: self.step(most), self.modules)
        images = len(self._labels(most))
        logits = self.task.network.num_classes
        if self.task.teacher is not None:
            logits += self.task.teacher.num_classes
        needed = sum(sizes) + 2 * max(sizes, default=0) + 4 * logits * images
        return images, needed, times

    def fixed_bytes(self) -> int:
        """Weights, gradients and optimiser state, after a step."""
        held = [tensor for module in self.modules for tensor in _tensors(module)]
        held += [tensor.grad for tensor in held if tensor.grad is not None]
        held += self.optimisation.momenta().values()
        average = 0
        if self.config.optim.ema is not None:
            average = 4 * count_parameters(self.task.network)  # float32
        return average + sum(t.numel() * t.element_size() for t in held)

    def evaluation(self, images: int) -> float:
        """Seconds of the forward pass over `images` centre crops."""
        stored, points = self._images(images)
        started = now(self.device)
        data = self.config.data
        crop = center(stored.to(self.device), None, data.crop_side, self.config.augment)
        crops, _, _ = shrink(*crop, data.input_size)
        batch = EvalBatch(
            images=crops,
            labels=torch.zeros(images, dtype=torch.int64, device=self.device),
            indices=torch.arange(images),
            sizes=torch.full((images, 2), data.store_size),
            points_original=points,
            to_original=lambda found: found,
        )
        look(self.task.network, [batch], self.device)
        return now(self.device) - started

    def _labels(self, most: int) -> Tensor:
        """Labels of about `most` images; identities x images where the batches are."""
        whole = batch_images(self.config)
        wanted, alike = max(LEAST, min(most, whole)), 1
        if self.config.balanced:
            alike = min(self.config.triplet.images_per_identity, wanted // 2)
        else:
            wanted = min(wanted, whole)
        identities = wanted // alike
        return torch.arange(identities).repeat_interleave(alike) % self.task.network.num_classes

    def _images(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Random uint8 (count, 3, S, S), and landmarks (count, 5, 2) where the task needs them."""
        shape = (count, 3, *[self.config.data.store_size] * 2)
        stored = torch.randint(0, 256, shape, generator=self.random, dtype=torch.uint8)
        if not self.task.needs_landmarks:
            return stored, None
        return stored, shape[-1] * (0.2 + 0.6 * torch.rand(count, 5, 2, generator=self.random))

    def _outputs(self, count: int) -> Guide:
        """Random teacher outputs, of the widths that the targets read."""
        widths = self.task.guide_widths
        drawn = {
            name: torch.randn(count, width, generator=self.random).to(self.device)
            for name, width in widths.items()
        }
        return Guide(logits=drawn.get("logits"), hidden=drawn.get("hidden"))


def now(device: torch.device) -> float:
    """Seconds of a clock after everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fitting(config: Config, classes: int, teachers: Sequence[ModelConfig]) -> int:
    """Images of the largest batch within TIMED_BYTES; on CUDA half of what is free."""
    device = torch.device(config.train.device)
    limit = TIMED_BYTES
    if device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] // 2
    # student's logits and their gradient, then what is under way: about two large maps of five
    # kept
    each = 1.4 * network_size(config, config.model, classes).activations + 8 * classes
    for teacher in teachers:
        theirs = network_size(config, teacher, classes, config.teacher_side)
        each += 0.4 * theirs.activations + 4 * classes
    return max(LEAST, min(batch_images(config), int(limit / each)))


def _saved_bytes(run: Callable[[], T], modules: Sequence[nn.Module]) -> tuple[T, list[int]]:
    """The result of `run`, and the bytes of each storage saved for backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # meta has no addresses
        return tensor

    own = {t.untyped_storage()._cdata for module in modules for t in _tensors(module)}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, [t.untyped_storage().nbytes() for key, t in kept.items() if key not in own]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
