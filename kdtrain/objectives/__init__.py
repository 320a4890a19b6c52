"""What is optimised and measured: tasks, targets, heads, metrics."""

from kdtrain.objectives.tasks import build_task

__all__ = ["build_task"]
