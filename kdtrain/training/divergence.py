"""Runs whose numbers are no longer finite: what is checked, said and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.training import checkpoint
from kdtrain.training.journal.journal import NonFinite
from kdtrain.training.preparation import TrainingError

# 30 halvings make the scaler's first 65536 into 6e-5: a gradient that overflows then is lost
MAX_SKIPPED = 30
DIVERGED = checkpoint.run_file("diverged.json")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, by one transfer from the device."""
    finite = torch.stack([t.isfinite().all() for t in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


def by_term(found: NonFinite, pictures: str) -> tuple[str, str]:
    """Cause and advice for a loss term that is not finite; pictures: names of the step's."""
    cause = f"loss term '{found.term}' is {found.value}; the batch was {pictures}"
    return cause, "Lower optim.phases' lr, set optim.clip_norm, or give that term less weight."


def by_weight(name: str, pictures: str) -> tuple[str, str]:
    """Cause and advice for a weight, statistic or momentum that is not finite."""
    cause = f"{name} is no longer finite though the loss was; the batch was {pictures}"
    return cause, "Lower optim.phases' lr, or set optim.clip_norm."


def by_overflow() -> tuple[str, str]:
    """Cause and advice where the loss scaler skipped MAX_SKIPPED steps in a row."""
    cause = (
        f"the gradient of {MAX_SKIPPED} steps in a row overflowed float16 at every scale of the "
        "loss"
    )
    return cause, "Set train.precision to bfloat16 or float32, or lower optim.phases' lr."


def diverged(
    folder: Path, step: int, why: tuple[str, str], record: Mapping[str, Any]
) -> TrainingError:
    """Writes diverged.json, which marks the run as ended, as the same run would diverge again.

    why: cause and advice. record: what else the file says. Returns the error to raise.
    """
    cause, advice = why
    standing = "No checkpoint had been saved yet."
    if (folder / "last").exists():
        standing = f"{folder / 'last'} holds the finite weights of an earlier step."
    message = f"diverged at step {step}: {cause}. {standing} {advice}"
    checkpoint.write_json(folder / DIVERGED, {"step": step, **record, "message": message})
    return TrainingError(message)
