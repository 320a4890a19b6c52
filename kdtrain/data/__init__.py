"""Labelled face pictures: sources, splits, the picture store, transforms and samplers."""

from kdtrain.data.build import build_source
from kdtrain.data.celeba import read_celeba
from kdtrain.data.folder import read_folder
from kdtrain.data.grid import sample_grid
from kdtrain.data.resize import area_average, shrink
from kdtrain.data.samplers import balanced_batches, left_out, random_batches
from kdtrain.data.source import DataError, FaceSource
from kdtrain.data.split import hold_out, split_indices, training_labels
from kdtrain.data.store import PictureStore
from kdtrain.data.synthetic.source import synthetic_faces
from kdtrain.data.transforms import (
    Frame,
    augment,
    center,
    fixed_views,
    to_original,
    uncrop,
    whole_view,
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
    "read_celeba",
    "read_folder",
    "sample_grid",
    "shrink",
    "split_indices",
    "synthetic_faces",
    "to_original",
    "training_labels",
    "uncrop",
    "whole_view",
]
