"""Tasks, batches and evaluation batches small enough for a test."""

from __future__ import annotations

from functools import partial

import torch

from kdtrain.config import Config, ModelConfig, TargetConfig, TeacherConfig, TripletConfig
from kdtrain.config.target import TEACHER_WEIGHTS
from kdtrain.data.run_data import EvalBatch
from kdtrain.models.network import FaceNetwork, seeded
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import build_task

IDENTITIES = 6
NAMES = ("classification", "alignment", "verification")


def make_config(task: str, *, fused: bool = True, mining: str = "hard", **target: float) -> Config:
    wants_teacher = any(target.get(name) for name in TEACHER_WEIGHTS)
    target.setdefault("gamma", 1.0 if task == "classification" else 0.0)
    return Config(
        task=task,
        fused=fused,
        teacher=TeacherConfig(run="teacher" if wants_teacher else None),
        model=ModelConfig(depth=14, width=8, divide=2, stem="small"),
        target=TargetConfig(**target),
        triplet=TripletConfig(mining=mining),
    )


def make_teacher(classes: int = IDENTITIES) -> FaceNetwork:
    with seeded(9):
        return FaceNetwork(ModelConfig(depth=14, width=8, stem="small"), classes)


def make_task(name: str, **options) -> Task:
    config = make_config(name, **options)
    return build_task(config, IDENTITIES, make_teacher() if config.teacher.run else None)


def make_batch(seed: int = 0, count: int = 12, side: int = 16):
    """Images of identities who differ by colour, with a bright dot at each landmark."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % IDENTITIES
    colours = torch.rand(IDENTITIES, 3, generator=torch.Generator().manual_seed(77)) * 200
    images = colours[labels][:, :, None, None] + 20 * torch.rand(
        count, 3, side, side, generator=generator
    )
    face = torch.tensor([[5.0, 5], [10, 5], [7, 8], [5, 11], [10, 11]])
    points = face + 3 * torch.rand(count, 1, 2, generator=generator)
    for i, row in enumerate(points.long().tolist()):
        for x, y in row:
            images[i, :, y, x] = 255
    return images, labels, points


def to_original(points: torch.Tensor, scale: float) -> torch.Tensor:
    return points * torch.tensor([scale, 2 * scale]) + torch.tensor([4.0, 6.0])


def eval_batches(count: int = 48, size: int = 20, groups: bool = False) -> list[EvalBatch]:
    images, labels, points = make_batch(1, count)
    batches = []
    for part in torch.arange(count).split(size):
        batches.append(
            EvalBatch(
                images=images[part],
                labels=labels[part],
                indices=part,
                sizes=torch.tensor([[72, 136]]).expand(len(part), 2),
                points_original=to_original(points[part], 4.0),
                groups=part // IDENTITIES if groups else None,
                to_original=partial(to_original, scale=4.0),
            )
        )
    return batches
