"""What a run will cost, before it: parameters, multiply-adds, memory, and time from timed steps.

Parameters and multiply-adds come from shapes alone. Memory and time come from a few real training
steps on random pictures (augmentation, forward, loss, backward, optimiser), which are the same for
all runs of one shape and so are measured once in a process. A batch too large or too slow to be
tried here is timed on fewer pictures and scaled; `Estimate.scaled` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdtrain.config import Config, ConfigError, ModelConfig
from kdtrain.experiments.timing import batch_pictures, network_size, timing
from kdtrain.training.environment import check_device


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Size, memory and time of one run, or of several added up (`a + b`, `sum(estimates)`).

    A sum adds steps, evaluations and seconds, and takes the largest of everything else: what a
    machine must hold that trains the runs one after another.
    """

    parameters: int
    """Of the trained network, heads included."""
    multiply_adds: int
    """Of its forward pass for one picture, convolutions and linear layers."""
    teacher_parameters: int = 0
    """Of the frozen teacher, or of all; 0 without one."""
    teacher_multiply_adds: int = 0
    """Of the teacher's forward pass for one picture, or of all teachers'."""
    memory_bytes: int
    """Of a training step: weights, gradients, optimiser state, the teacher's weights, and what the
    batch needs. On CUDA the peak of torch's allocations; on a CPU the tensors kept for backward
    (saved_tensors_hooks), the logits of both networks, and two of the largest map for what is
    under way. Not counted: pictures kept in memory (data.cache), libraries' own workspaces, the
    interpreter with its libraries (some 0.3 GB; on CUDA also the context).
    """
    batch: int
    """Pictures of a batch; optim.accumulate of them are a step."""
    timed_batch: int
    """Pictures of the batches that were timed."""
    steps: int
    """Steps of the optimiser in all; early stopping may take fewer."""
    training_s: float
    """Seconds of these steps, pictures decoded beforehand."""
    evaluations: int
    """Evaluations; with a validation part that of the test split at the end of each phase too."""
    evaluation_s: float
    """Seconds of their forward passes; neighbour search, pairs and floors are not counted."""

    @property
    def scaled(self) -> bool:
        """True when fewer pictures were timed than a batch has."""
        return self.timed_batch < self.batch

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return self.training_s / self.steps if self.steps else 0.0

    @property
    def total_s(self) -> float:
        """Seconds of training and evaluations."""
        return self.training_s + self.evaluation_s

    def __add__(self, other: Estimate) -> Estimate:
        larger = {
            name: max(getattr(self, name), getattr(other, name))
            for name in (
                *("parameters", "multiply_adds", "teacher_parameters", "teacher_multiply_adds"),
                "memory_bytes",
            )
        }
        shown = self if self.batch / self.timed_batch >= other.batch / other.timed_batch else other
        return Estimate(
            **larger,
            batch=shown.batch,
            timed_batch=shown.timed_batch,
            steps=self.steps + other.steps,
            training_s=self.training_s + other.training_s,
            evaluations=self.evaluations + other.evaluations,
            evaluation_s=self.evaluation_s + other.evaluation_s,
        )

    def __radd__(self, other: int) -> Estimate:
        """sum() begins with 0."""
        return self if other == 0 else NotImplemented


def estimate(
    config: Config,
    *,
    classes: int,
    pictures: int,
    test_pictures: int,
    validation_pictures: int = 0,
    teacher: ModelConfig | None,
    teacher_classes: int | None = None,
    more_teachers: Sequence[ModelConfig] = (),
    answers_kept: bool = False,
    threads: int,
    steps: int = 4,
    epoch_batches: int | None = None,
) -> Estimate:
    """Size, memory and time of the run that `config` describes, on this machine.

    classes: people that the classifier tells apart. pictures, test_pictures, validation_pictures:
    in the training, test and validation part. teacher: network of the run that the config's teacher
    names, with a classifier for teacher_classes (default: classes); more_teachers: of teacher.more,
    in its order. answers_kept: an earlier run
    with teacher.cache met the same batches, so the teacher is not asked (reading is not counted).
    threads: processor threads that the run will have (0: as torch has now). steps: how many are
    timed; their median counts. epoch_batches: batches of an epoch where they are known (default:
    pictures // batch; identity-balanced batches are a few more).

    What is timed once is not timed again in this process (timing.py). Threads, random state and
    torch's settings are afterwards as before; on CUDA torch's peak memory counter is reset. Raises
    ConfigError for a device that is not there, a teacher that is missing or too much, or too few
    pictures for one batch.
    """
    if config.needs_teacher != (teacher is not None):
        raise ConfigError(
            "estimate: teacher must be the ModelConfig of the run that the config's teacher names, "
            f"and None where no target needs one; got {teacher}"
        )
    check_device(config)
    batch = batch_pictures(config)
    per_epoch = epoch_batches or batches_of_epoch(config, pictures)
    if per_epoch < 1:
        raise ConfigError(
            f"estimate: {pictures} training pictures fill no batch of {batch}; lower the batch"
        )
    epochs = sum(phase.epochs for phase in config.optim.phases)
    count = epochs * -(-per_epoch // config.optim.accumulate)
    own = network_size(config, config.model, classes)
    if len(more_teachers) != len(config.teacher.more):
        raise ConfigError(
            f"estimate: more_teachers must be the ModelConfigs of the {len(config.teacher.more)} "
            f"runs of teacher.more, got {len(more_teachers)}"
        )
    teachers = [] if teacher is None else [teacher, *more_teachers]
    side, known = config.teacher_side, teacher_classes or classes
    guides = [network_size(config, model, known, side) for model in teachers]
    kept = answers_kept and config.teacher.cache != "none"
    timed = timing(config, classes, teachers, known, kept, threads, steps)
    share = batch / timed.pictures
    rounds = _evaluations(config)
    seen = rounds * test_pictures
    if validation_pictures:
        ends = len(config.optim.phases)  # at which the test split is measured too
        seen = rounds * validation_pictures + ends * test_pictures
        rounds += ends
    return Estimate(
        parameters=own.parameters,
        multiply_adds=own.multiply_adds,
        teacher_parameters=sum(guide.parameters for guide in guides),
        teacher_multiply_adds=sum(guide.multiply_adds for guide in guides),
        memory_bytes=round(timed.fixed_bytes + share * timed.batch_bytes),
        batch=batch,
        timed_batch=timed.pictures,
        steps=count,
        training_s=epochs * per_epoch * share * timed.batch_s + count * timed.update_s,
        evaluations=rounds,
        evaluation_s=seen * timed.picture_s,
    )


def batches_of_epoch(config: Config, pictures: int) -> int:
    """Batches of one epoch over `pictures` training pictures."""
    full, rest = divmod(pictures, batch_pictures(config))
    drops = config.train.drop_last or config.balanced
    return full if drops else full + bool(rest)


def _evaluations(config: Config) -> int:
    """Evaluations during training: every train.eval_every epochs, and at the end of each phase."""
    every = config.train.eval_every
    return sum(-(-phase.epochs // every) for phase in config.optim.phases)
