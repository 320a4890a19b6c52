"""The cost of a run before it: parameters, multiply-adds, memory, and time from timed steps.

Parameters and multiply-adds come from shapes alone. Memory and time come from a few real training
steps on random images (augmentation, forward, loss, backward, optimiser), which are the same for
all runs of one shape and so are measured once in a process. A batch too large or too slow to be
tried here is timed on fewer images and scaled; `Estimate.scaled` is then true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kdtrain.config import Config, ConfigError, ModelConfig
from kdtrain.experiments.timing import Size, batch_images, network_size, timing
from kdtrain.training.environment import check_device


class Counts(NamedTuple):
    """Numbers of identities and images of a run."""

    classes: int
    """Identities of the classifier."""
    train: int
    test: int
    validation: int = 0
    epoch_batches: int | None = None
    """Batches of an epoch where they are known (else train // batch; identity-balanced batches are
    a few more)."""
    note: str = ""
    """The origin of the counts, if not the images themselves."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Size, memory and time of one run."""

    size: Size
    """Of the trained network, heads included."""
    memory_bytes: int
    """Of a training step: weights, gradients, optimiser state, the teacher's weights, and what the
    batch needs. On CUDA the peak of torch's allocations; on a CPU the tensors saved for backward
    (saved_tensors_hooks), the logits of both networks, and two of the largest map for what is
    under way. Not counted: images cached in memory (data.cache), libraries' own workspaces, the
    interpreter with its libraries (some 0.3 GB; on CUDA also the context).
    """
    batch: int
    """Images of a batch; optim.accumulate of them are a step."""
    timed_batch: int
    """Images of the batches that were timed."""
    steps: int
    """Steps of the optimiser in all; early stopping may take fewer."""
    training_s: float
    """Seconds of these steps, images decoded beforehand."""
    evaluation_s: float
    """Seconds of the evaluations' forward passes, with a validation part those of the test split at
    the end of each phase too; neighbour search, pairs and floors are not counted."""

    @property
    def scaled(self) -> bool:
        """True when fewer images were timed than a batch has."""
        return self.timed_batch < self.batch

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return self.training_s / self.steps if self.steps else 0.0

    @property
    def total_s(self) -> float:
        """Seconds of training and evaluations."""
        return self.training_s + self.evaluation_s


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
    evaluations are timed and the usual one counts (timing.usual): other work delays single ones.

    What is timed once is not timed again in this process (timing.py). Threads, random state and
    torch's settings are afterwards as before; on CUDA torch's peak memory counter is reset. Raises
    ConfigError for a device that is not there, a teacher that is missing or too much, or too few
    images for one batch.
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
    epochs = sum(phase.epochs for phase in config.optim.phases)
    count = epochs * -(-per_epoch // config.optim.accumulate)
    kept = outputs_cached and config.teacher.cache != "none"
    timed = timing(config, counts.classes, teachers, kept, config.train.threads or threads)
    share = batch / timed.images
    phases = config.optim.phases
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
        steps=count,
        training_s=epochs * per_epoch * share * timed.batch_s + count * timed.update_s,
        evaluation_s=seen * timed.image_s,
    )


def batches_of_epoch(config: Config, counts: Counts) -> int:
    """Batches of one epoch over the training images."""
    if counts.epoch_batches:
        return counts.epoch_batches
    full, rest = divmod(counts.train, batch_images(config))
    drops = config.train.drop_last or config.balanced
    return full if drops else full + bool(rest)
