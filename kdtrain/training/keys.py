"""The key of a run: what it was computed from. A finished run is reused while its key stands."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kdtrain.config import SETTINGS, Config, run_folder
from kdtrain.config.settings import to_flat
from kdtrain.data import fixed_views
from kdtrain.training.checkpoint import WEIGHTS, CheckpointError, read_json, run_weights

HASHED_ROOMS = ("config", "data", "models", "objectives", "training")
"""Packages of kdtrain whose sources can change a trained number."""
NOT_HASHED = ("models/published", "training/journal", "training/published")
"""Packages in them that cannot; each says so in its __init__."""


def run_key(config: Config, inputs: Mapping[str, str], data: str) -> str:
    """16 hex digits over the settings that count, the input runs' keys, the data's key, versions
    and sources.

    inputs: key of each run that the config names, by the name of the input (config.RUN_SETTINGS).
    """
    settings = _counted(config)
    record = {"settings": settings, "inputs": dict(inputs), "data": data, "sources": source_hash()}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def input_folders(config: Config, run_dir: Path) -> dict[str, Path]:
    """The run folders that a run reads, by the setting that names them."""
    return {name: run_folder(run, run_dir) for name, run in config.runs().items()}


def input_key(folder: Path) -> str:
    """The key of a finished run folder; of a lone checkpoint, a hash of its weights.

    Raises CheckpointError when there are no weights, or the run is not finished.
    """
    weights = run_weights(folder)
    if weights == folder:
        return hashlib.sha256((weights / WEIGHTS).read_bytes()).hexdigest()[:16]
    results = read_json(folder / "results.json")
    if results is None:
        if read_json(folder / "diverged.json") is not None:
            raise CheckpointError(
                f"{folder}: that run diverged; train it anew with --overwrite and other settings"
            )
        raise CheckpointError(
            f"{folder}: that run is not finished; finish it with --resume, "
            f"or name its checkpoint {folder}/best"
        )
    return results["key"]


def differences(ours: Config, theirs: Config) -> list[str]:
    """'optim.batch_size: 64 here, 32 there' for every setting of the key that differs."""
    there = _counted(theirs)
    return [
        f"{key}: {value} here, {there[key]} there"
        for key, value in _counted(ours).items()
        if there[key] != value
    ]


def _counted(config: Config) -> dict[str, Any]:
    """The settings that count. Answers kept in float32 are the teacher's own, bit for bit, so they
    count as none kept (of features: those of whole batches, with a classifier that is not compiled
    by itself); so does any cache of a run without a teacher. Sizes that are left to another
    setting count as it does, and the teacher's not at all without one; equal weights count as none.
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
    """Hash of the sources of HASHED_ROOMS and kdkernels, compiled ones too, and torch's version."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for package, parts in (("kdtrain", HASHED_ROOMS), ("kdkernels", ("",))):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        files = [f for part in parts for f in (root / part).rglob("*")]
        for file in sorted(f for f in files if f.suffix in (".py", ".so", ".pyd")):
            place = file.relative_to(root).as_posix()
            if package == "kdtrain" and place.startswith(NOT_HASHED):
                continue
            digest.update(place.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
