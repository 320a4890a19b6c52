"""Labelled face pictures: sources, splits, the picture store, transforms and samplers."""

from kdtrain.data.build import build_source
from kdtrain.data.samplers import balanced_batches, left_out, random_batches
from kdtrain.data.source import DataError, FaceSource
from kdtrain.data.split import hold_out, split_indices, training_labels
from kdtrain.data.store import PictureStore, sample_grid
from kdtrain.data.synthetic.source import synthetic_faces
from kdtrain.data.transforms import (
    Frame,
    area_average,
    augment,
    center,
    fixed_views,
    shrink,
    to_original,
    uncrop,
)

__all__ = [
    "DataError",
    "FaceSource",
    "Frame",
    "PictureStore",
    "area_average",
    "augment",
    "balanced_batches",
    "build_source",
    "center",
    "fixed_views",
    "hold_out",
    "left_out",
    "random_batches",
    "sample_grid",
    "shrink",
    "split_indices",
    "synthetic_faces",
    "to_original",
    "training_labels",
    "uncrop",
]
