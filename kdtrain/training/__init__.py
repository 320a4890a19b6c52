"""One run: the loop, its checkpoints and journal, teacher caches, and the key of a run."""

from kdtrain.training.engine import evaluate, train

__all__ = ["evaluate", "train"]
