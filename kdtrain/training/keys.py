"""The key of a run: a digest of all that its numbers depend on, for reuse."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kdtrain.config import SETTINGS, Config, run_folder
from kdtrain.config.settings import to_flat
from kdtrain.data import fixed_views
from kdtrain.training.checkpoint import WEIGHTS, CheckpointError, read_json, run_weights

HASHED_ROOMS = ("config", "data", "models", "objectives", "training")
"""Packages of kdtrain that can change a trained number."""
NOT_HASHED = ("models/published", "training/journal", "training/published")
"""Sub-packages that cannot, as each of their __init__ states."""


def run_key(config: Config, inputs: Mapping[str, str], data: str) -> str:
    """Returns 16 hex digits over the counted settings, the input runs' keys by input
    (config.RUN_SETTINGS), the data's key, versions and sources.
    """
    settings = _counted(config)
    record = {"settings": settings, "inputs": dict(inputs), "data": data, "sources": source_hash()}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def input_folders(config: Config, run_dir: Path) -> dict[str, Path]:
    """Returns the run directories of a run's inputs, by input."""
    return {name: run_folder(run, run_dir) for name, run in config.runs().items()}


def input_key(folder: Path) -> str:
    """Returns the key of a finished run; of a checkpoint alone, a hash of its weights.

    Raises CheckpointError without weights, and for a run that is not finished.
    """
    weights = run_weights(folder)
    if weights == folder:
        return hashlib.sha256((weights / WEIGHTS).read_bytes()).hexdigest()[:16]
    results = read_json(folder / "results.json")
    if results is None:
        raise CheckpointError(
            f"{folder}: that run diverged; train it again with --overwrite and other settings"
            if (folder / "diverged.json").exists()
            else f"{folder}: that run is not finished; finish it with --resume, "
            f"or name its checkpoint {folder}/best"
        )
    return results["key"]


def differences(ours: Config, theirs: Config) -> list[str]:
    """Returns 'optim.batch_size: 64 here, 32 there' for every counted setting that differs."""
    there = _counted(theirs)
    return [
        f"{key}: {value} here, {there[key]} there"
        for key, value in _counted(ours).items()
        if there[key] != value
    ]


def _counted(config: Config) -> dict[str, Any]:
    """Returns the counted settings. A float32 cache counts as none, as its outputs are bitwise
    identical to the teacher forward pass (features: in whole batches, without train.compile), and
    so does any cache without a teacher. Sizes that default to another setting count as its value;
    equal teacher weights count as none.
    """
    uncounted = [setting.key for setting in SETTINGS if not setting.counted]
    counted = {key: value for key, value in to_flat(config).items() if key not in uncounted}
    data, teacher = config.data, config.teacher
    cache, what = teacher.cache, teacher.cache_what
    views = fixed_views(config.augment, data.store_size, data.crop_side)
    exact = what == "outputs" or not (config.train.compile or views is not None)
    if teacher.run is None or cache == "none" or (cache == "float32" and exact):
        cache, what = "none", "outputs"
    counted |= {"teacher.cache": cache, "teacher.cache_what": what}
    counted["data.crop_size"] = data.crop_side
    side = data.input_size if teacher.run is None else config.teacher_side
    counted["teacher.input_size"] = side
    if teacher.weights is not None and len(set(teacher.weights)) == 1:
        counted["teacher.weights"] = None
    return counted


@cache
def source_hash() -> str:
    """Returns a hash of torch's version and all sources of HASHED_ROOMS and kdkernels."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package, parts in (("kdtrain", HASHED_ROOMS), ("kdkernels", ("",))):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        files = [f for part in parts for f in (root / part).rglob("*")]
        for file in sorted(f for f in files if f.suffix in (".py", ".so", ".pyd")):
            place = file.relative_to(root).as_posix()
            if not place.startswith(NOT_HASHED):
                digest.update(place.encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()
