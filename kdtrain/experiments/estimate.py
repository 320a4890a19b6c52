"""The cost of a run before it: parameters, multiply-adds, memory, and time from timed steps.

Parameters and multiply-adds come from shapes alone. Memory and time come from a few real training
steps on random images (augmentation, forward, loss, backward, optimiser). The timing of a shape
(network, teacher, batch, task, targets, device, threads) is cached in the process, so that a plan
of many runs times only those that differ. A batch too large or too slow is timed on fewer images
and scaled.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdtrain.config import SETTINGS, Config, ConfigError, ModelConfig, settings
from kdtrain.config.networks import HeadConfig
from kdtrain.data import center, shrink
from kdtrain.data.run_data import training_batch
from kdtrain.models.mixture import TeacherMixture
from kdtrain.models.network import FaceNetwork, count_parameters, evaluating, multiply_adds, seeded
from kdtrain.objectives.targets import Guide
from kdtrain.objectives.tasks import TASKS, build_task
from kdtrain.training.environment import check_device, computing
from kdtrain.training.optimization import Optimisation

TIMED_S = 8.0  # about the longest that one shape is timed
STEPS = 4  # steps that are timed, where they do not take too long; two at least
TIMED_BYTES = 2 << 30  # most for the activations of a timed batch; weights come on top
LEAST = 4  # images of the smallest batch that every task can step on (2 identities x 2 images)
EVAL_IMAGES = 256  # the engine's own evaluation batch


class Counts(NamedTuple):
    """Numbers of identities and images of a run."""

    classes: int  # identities of the classifier
    train: int
    test: int
    validation: int = 0
    epoch_batches: int | None = None  # None: train // batch; identity-balanced: a few more
    note: str = ""  # the origin of the counts, if not the images themselves


class Size(NamedTuple):
    """Size of a network, from shapes alone."""

    parameters: int
    multiply_adds: int  # of its forward pass for one image, convolutions and linear layers
    activations: int  # bytes saved for backward per image in float32, if its batch grows them


class Timing(NamedTuple):
    """Times and memory of the steps of one shape."""

    images: int  # of a timed step
    batch_s: float  # augmentation, forward, loss and backward of these images
    update_s: float  # the optimiser's part, which does not grow with the batch
    image_s: float  # evaluation of one image
    fixed_bytes: int  # weights, gradients, optimiser state
    batch_bytes: int  # memory of these images on top


class Estimate(NamedTuple):
    """Size, memory and time of one run."""

    size: Size  # of the trained network, heads included
    memory_bytes: int
    """Of a training step: weights, gradients, optimiser state, the teacher's weights, and what the
    batch needs. On CUDA the peak of torch's allocations; on a CPU the tensors saved for backward
    (saved_tensors_hooks), the logits of both networks, and two of the largest map for what is
    under way. Not counted: images cached in memory (data.cache), libraries' own workspaces, the
    interpreter with its libraries (some 0.3 GB; on CUDA also the context).
    """
    batch: int  # images of a batch; optim.accumulate of them are a step
    timed_batch: int  # images of a timed batch; if fewer, time and memory are scaled
    steps: int  # of the optimiser in all; early stopping may take fewer
    training_s: float  # these steps, images decoded beforehand
    evaluation_s: float
    """Seconds of the evaluations' forward passes, with a validation part those of the test split at
    the end of each phase too; neighbour search, pairs and floors are not counted."""

    @property
    def total_s(self) -> float:
        """Seconds of training and evaluations."""
        return self.training_s + self.evaluation_s


_timings: dict[str, Timing] = {}


def estimate(
    config: Config,
    counts: Counts,
    teachers: Sequence[ModelConfig] = (),
    *,
    threads: int,
    outputs_cached: bool = False,
) -> Estimate:
    """Size, memory and time of the run that `config` describes, on this machine.

    teachers: networks of the runs that teacher.run and teacher.more name, in this order, each with
    a classifier for counts.classes. outputs_cached: an earlier run with teacher.cache met the same
    batches, so there is no teacher forward pass (reading is not counted). threads: processor
    threads of a run that does not set its own (0: torch's current number). Several steps and
    evaluations are timed and the lower middle counts: other work delays single ones.

    Threads, random state and torch's settings are afterwards as before; on CUDA torch's peak memory
    counter is reset. Raises ConfigError for a device that is not there, a teacher that is missing
    or too much, or too few images for one batch.
    """
    wanted = 1 + len(config.teacher.more) if config.needs_teacher else 0
    if len(teachers) != wanted:
        raise ConfigError(
            f"estimate: teachers must be the ModelConfigs of the {wanted} runs that the targets "
            f"need, got {len(teachers)}"
        )
    check_device(config)
    batch = batch_images(config)
    per_epoch = batches_of_epoch(config, counts)
    if per_epoch < 1:
        raise ConfigError(
            f"estimate: {counts.train} training images fill no batch of {batch}; lower the batch"
        )
    phases = config.optim.phases
    epochs = sum(phase.epochs for phase in phases)
    steps = epochs * -(-per_epoch // config.optim.accumulate)
    threads = config.train.threads or threads or torch.get_num_threads()
    computed = replace(config, train=replace(config.train, threads=threads))
    cached = outputs_cached and config.teacher.cache != "none"
    timed = _timing(computed, counts.classes, teachers, cached)
    share = batch / timed.images
    # every train.eval_every epochs and at the end of each phase, where the test split is seen too
    rounds = sum(-(-phase.epochs // config.train.eval_every) for phase in phases)
    seen = rounds * counts.test
    if counts.validation:
        seen = rounds * counts.validation + len(phases) * counts.test
    return Estimate(
        size=network_size(config, config.model, counts.classes),
        memory_bytes=round(timed.fixed_bytes + share * timed.batch_bytes),
        batch=batch,
        timed_batch=timed.images,
        steps=steps,
        training_s=epochs * per_epoch * share * timed.batch_s + steps * timed.update_s,
        evaluation_s=seen * timed.image_s,
    )


def batches_of_epoch(config: Config, counts: Counts) -> int:
    """Batches of one epoch over the training images."""
    if counts.epoch_batches:
        return counts.epoch_batches
    full, rest = divmod(counts.train, batch_images(config))
    drops = config.train.drop_last or config.balanced
    return full if drops else full + bool(rest)


def batch_images(config: Config) -> int:
    """Images of a training step."""
    if config.balanced:
        return config.triplet.identities * config.triplet.images_per_identity
    return config.optim.batch_size


def network_size(config: Config, model: ModelConfig, classes: int, side: int | None = None) -> Size:
    """Size of a network at the config's input, or at `side` pixels, from meta tensors."""
    landmarks = TASKS[config.task].needs_landmarks
    return _size(model, classes, landmarks, side or config.data.input_size, config.head)


@cache
def _size(model: ModelConfig, classes: int, landmarks: bool, side: int, head: HeadConfig) -> Size:
    with seeded(0), torch.device("meta"):
        network = FaceNetwork(model, classes, landmarks, head=head, input_size=side)
        images = torch.empty(LEAST, 3, side, side)
    network.train()
    with _saved_bytes([network]) as saved:
        network(images)
    return Size(
        count_parameters(network), multiply_adds(network, side), sum(saved.values()) // LEAST
    )


def _timing(config: Config, classes: int, teachers: Sequence[ModelConfig], cached: bool) -> Timing:
    """The timing of the config's shape, from this process' earlier ones where there is one."""
    flat = settings.to_flat(config)
    shape = {
        setting.key: bool(flat[setting.key]) if setting.cost == "switch" else flat[setting.key]
        for setting in SETTINGS
        if setting.cost != "none"
    }
    guides = [repr(list(teachers)), cached] if teachers else []
    key = json.dumps([shape, classes, guides, config.train.threads], sort_keys=True)
    if key not in _timings:
        _timings[key] = _measure(config, classes, teachers, cached)
        gc.collect()  # a task is a circle
    return _timings[key]


def _measure(config: Config, classes: int, teachers: Sequence[ModelConfig], cached: bool) -> Timing:
    device = torch.device(config.train.device)
    on_cuda = device.type == "cuda"
    # torch's random state is afterwards as before, on the processor and on the device
    with computing(config), torch.random.fork_rng([device] if on_cuda else []):
        before = torch.cuda.memory_allocated(device) if on_cuda else 0
        trial = _Trial(config, classes, teachers, cached)
        most = _fitting(config, classes, teachers)
        images, needed, first = trial.saved_bytes(LEAST)  # builds kernels and starts threads
        times = [first, trial.step(LEAST)]
        least_s = sum(map(min, *times))
        repeats = 2 if least_s > TIMED_S / 3 else STEPS
        most = min(most, max(LEAST, int(TIMED_S / (STEPS + 2) * LEAST / least_s)))
        if most > LEAST:
            images, needed, _ = trial.saved_bytes(most)  # also warms up this batch
            times.clear()
        fixed = trial.fixed_bytes()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        batch_s, update_s = _repeated(lambda: trial.step(most), repeats, times)
        if on_cuda:
            needed = max(0, torch.cuda.max_memory_allocated(device) - before - fixed)
        seen = min(EVAL_IMAGES, images)
        if repeats == STEPS:
            trial.evaluation(LEAST)
        (seen_s,) = _repeated(lambda: (trial.evaluation(seen),), repeats)
    return Timing(images, batch_s, update_s, seen_s / seen, fixed, needed)


def _repeated(
    measure: Callable[[], Sequence[float]], most: int, times: Sequence[Sequence[float]] = ()
) -> list[float]:
    """The lower middle of each column of up to `most` timings, two at least, within about TIMED_S.
    Other work on the machine only adds to them, so one disturbed row is never the result.

    times: those so far.
    """
    began, known = time.monotonic(), list(times)
    while len(known) < 2 or (len(known) < most and time.monotonic() - began < TIMED_S):
        known.append(measure())
    return [statistics.median_low(column) for column in zip(*known, strict=True)]


class _Trial:
    """A task with its optimiser and untrained teachers, stepped on random images."""

    def __init__(
        self, config: Config, classes: int, teachers: Sequence[ModelConfig], cached: bool
    ) -> None:
        """cached: teacher outputs are read from teacher.cache, without a forward pass."""
        points, side = TASKS[config.task].needs_landmarks, config.teacher_side
        guides = [
            FaceNetwork(model, classes, points, head=config.head, input_size=side)
            for model in teachers
        ]
        guide = guides[0] if guides else None
        if len(guides) > 1:
            guide = TeacherMixture(guides, config.teacher.shares, config.target.temperature)
        self.config, self.device = config, torch.device(config.train.device)
        self.task = task = build_task(config, classes, guide).to(self.device)
        self.modules = [m for m in (task.network, task.extra, task.teacher) if m is not None]
        self.drawn = task.guide_widths if cached else {}
        scaled = config.train.precision == "float16"
        self.optimisation = Optimisation(
            task.network, task.extra, config.optim, device=self.device.type, scaled=scaled
        )
        self.random = torch.Generator().manual_seed(0)
        self.taken = 0

    def step(self, most: int) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimiser, on about `most` images."""
        device, labels = self.device, self._labels(most)
        stored, points = self._images(len(labels))
        outputs = {
            name: torch.randn(len(labels), width, generator=self.random).to(device)
            for name, width in self.drawn.items()
        }
        guide = Guide(outputs.get("logits"), outputs.get("hidden")) if outputs else None
        self.task.network.train()
        self.task.extra.train()
        indices, started = torch.arange(len(labels)), now(device)
        points = None if points is None else points.to(device)
        batch = training_batch(
            stored.to(device), labels.to(device), points, indices, self.config, phase=0, epoch=0
        )
        # a rate at which random labels cannot make the weights infinite within a few steps
        self.optimisation.begin(1e-6)
        loss = self.task.step(
            batch.images, batch.labels, batch.points, guide, batch.teacher_images
        ).loss
        self.optimisation.backward(loss)
        between = now(device)
        self.taken += 1
        self.optimisation.step(self.taken)
        return between - started, now(device) - between

    def saved_bytes(self, most: int) -> tuple[int, int, tuple[float, float]]:
        """Images of a step, bytes that they need beside the weights, and `step`'s times."""
        with _saved_bytes(self.modules) as saved:
            times = self.step(most)
        images = len(self._labels(most))
        networks = filter(None, (self.task.network, self.task.teacher))
        logits_bytes = 4 * images * sum(network.num_classes for network in networks)
        sizes = saved.values()
        return images, sum(sizes) + 2 * max(sizes, default=0) + logits_bytes, times

    def fixed_bytes(self) -> int:
        """Weights, gradients and optimiser state, after a step."""
        held = [tensor for module in self.modules for tensor in _tensors(module)]
        held += [tensor.grad for tensor in held if tensor.grad is not None]
        held += self.optimisation.momenta().values()
        averaged = 0 if self.config.optim.ema is None else count_parameters(self.task.network)
        return 4 * averaged + sum(t.nbytes for t in held)  # the average in float32

    def evaluation(self, images: int) -> float:
        """Seconds of the forward pass over `images` centre crops."""
        stored, _ = self._images(images)
        started = now(self.device)
        data = self.config.data
        crop = center(stored.to(self.device), None, data.crop_side, self.config.augment)
        crops, _, _ = shrink(*crop, data.input_size)
        with evaluating(self.task.network):
            self.task.network(crops)
        return now(self.device) - started

    def _labels(self, most: int) -> Tensor:
        """Labels of about `most` images; identities x images where the batches are."""
        wanted, alike = min(most, batch_images(self.config)), 1
        if self.config.balanced:
            alike = min(self.config.triplet.images_per_identity, wanted // 2)
        identities = wanted // alike
        return torch.arange(identities).repeat_interleave(alike) % self.task.network.num_classes

    def _images(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Random uint8 (count, 3, S, S), and landmarks (count, 5, 2) where the task needs them."""
        side = self.config.data.store_size
        shape = (count, 3, side, side)
        stored = torch.randint(0, 256, shape, generator=self.random, dtype=torch.uint8)
        if not self.task.needs_landmarks:
            return stored, None
        return stored, side * (0.2 + 0.6 * torch.rand(count, 5, 2, generator=self.random))


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
    # student's logits and their gradient; then two large maps under way of five that are saved
    each = 1.4 * network_size(config, config.model, classes).activations + 8 * classes
    for teacher in teachers:
        theirs = network_size(config, teacher, classes, config.teacher_side)
        each += 0.4 * theirs.activations + 4 * classes
    return max(LEAST, min(batch_images(config), int(limit / each)))


@contextlib.contextmanager
def _saved_bytes(modules: Sequence[nn.Module]) -> Iterator[dict[int, int]]:
    """Bytes of each storage saved for backward within the block, but the modules' own."""
    own = {t.untyped_storage()._cdata for module in modules for t in _tensors(module)}
    held: list[Tensor] = []  # no other tensor gets their storage
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # meta has no addresses
        if storage._cdata not in own and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
