"""Tasks, targets, heads and metrics."""

from kdtrain.objectives.tasks import build_task

__all__ = ["build_task"]
