"""The evaluations of a run: the best of them, and whether training should stop for want of a better
one.
"""

from __future__ import annotations

from typing import Any


class History:
    """Evaluation records in their order; every answer follows from them alone, so that a resumed
    run decides alike.
    """

    def __init__(self, metric: str, sign: int, patience: int | None) -> None:
        """metric: name of the one that judges; sign: +1 where more is better, -1 where less is.
        patience: evaluations without a better one after which `is_stale`; None for never.
        """
        self.metric, self._sign, self._patience = metric, sign, patience
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> bool:
        """Keep a record with `step`, `metrics` and `phase_ends`; whether it is the best so far."""
        earlier = self.best()
        self.records.append(record)
        return self.best() is not earlier

    @property
    def latest(self) -> dict[str, Any]:
        """The metrics of the last evaluation; empty before the first."""
        return self.records[-1]["metrics"] if self.records else {}

    def best(self) -> dict[str, Any] | None:
        """The record with the best metric so far, the earliest of equals; None where none has
        it.
        """
        rated = [r for r in self.records if r["metrics"].get(self.metric) is not None]
        return max(rated, key=lambda r: self._sign * r["metrics"][self.metric], default=None)

    def phases(self) -> list[dict[str, Any]]:
        """The records at the ends of phases."""
        return [record for record in self.records if record["phase_ends"]]

    def is_stale(self) -> bool:
        """Whether the last `patience` evaluations brought no better metric.

        ValueError where the metric could not be measured at all.
        """
        if self._patience is None or not self.records:
            return False
        best = self.best()
        if best is None:
            raise ValueError(
                f"train.early_stop: {self.metric} cannot be measured on the validation pictures; "
                "raise data.validation_fraction, or set train.early_stop to null"
            )
        return sum(r["step"] > best["step"] for r in self.records) >= self._patience

    def ended(self, epoch: int, epochs: int) -> dict[str, Any]:
        """Why training ended in epoch `epoch` of `epochs`, counted from 1."""
        if epoch == epochs or not self.is_stale():
            return {"by": "schedule", "epoch": epoch, "why": f"all {epochs} epochs trained"}
        why = (
            f"stopped early in epoch {epoch} of {epochs}: no better validation {self.metric} in "
            f"{self._patience} evaluations"
        )
        return {"by": "early_stop", "epoch": epoch, "why": why}
