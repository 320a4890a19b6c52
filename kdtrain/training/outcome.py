"""The end of a run: its best evaluation, early stopping, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAX_SKIPPED = 30  # halvings: from the scaler's initial 65536 to 6e-5


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with NaN or infinity, by one device transfer."""
    finite = torch.stack([t.isfinite().all() for t in tensors.values()]).tolist()
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)


class History:
    """The evaluation records in their order, and everything derived from them."""

    def __init__(self, metric: str, sign: int, patience: int | None) -> None:
        """metric: name of the judging metric; sign: +1 where more is better, -1 where less is.
        patience: evaluations without improvement until `is_stale`; None: never.
        """
        self.metric, self._sign, self._patience = metric, sign, patience
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> bool:
        """Adds a record with `step`, `metrics` and `phase_ends`; True if it is the best so far."""
        earlier = self.best()
        self.records.append(record)
        return self.best() is not earlier

    @property
    def latest(self) -> dict[str, Any]:
        """The metrics of the last evaluation; {} before the first."""
        return self.records[-1]["metrics"] if self.records else {}

    def best(self) -> dict[str, Any] | None:
        """Returns the first record with the best metric; None if none has the metric."""
        rated = [r for r in self.records if r["metrics"].get(self.metric) is not None]
        return max(rated, key=lambda r: self._sign * r["metrics"][self.metric], default=None)

    def is_stale(self) -> bool:
        """True after `patience` evaluations without a better metric. Raises ValueError."""
        if self._patience is None or not self.records:
            return False
        best = self.best()
        if best is None:
            raise ValueError(
                f"train.early_stop: {self.metric} cannot be measured on the validation images; "
                "raise data.validation_fraction, or set train.early_stop to null"
            )
        return sum(r["step"] > best["step"] for r in self.records) >= self._patience

    def ended(self, epoch: int, epochs: int) -> dict[str, Any]:
        """Returns why training ended in epoch `epoch` of `epochs`, counted from 1."""
        if epoch == epochs or not self.is_stale():
            return {"by": "schedule", "epoch": epoch, "why": f"all {epochs} epochs trained"}
        why = (
            f"stopped early in epoch {epoch} of {epochs}: no better validation {self.metric} in "
            f"{self._patience} evaluations"
        )
        return {"by": "early_stop", "epoch": epoch, "why": why}
