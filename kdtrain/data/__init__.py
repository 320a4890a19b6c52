"""Labelled face images: sources, splits, the image store, transforms and samplers."""

from kdtrain.data.build import build_source
from kdtrain.data.samplers import balanced_batches, left_out
from kdtrain.data.source import DataError, FaceSource
from kdtrain.data.store import sample_grid
from kdtrain.data.transforms import center, fixed_views, shrink

__all__ = [
    "DataError",
    "FaceSource",
    "balanced_batches",
    "build_source",
    "center",
    "fixed_views",
    "left_out",
    "sample_grid",
    "shrink",
]
