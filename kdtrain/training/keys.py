"""The key of a run: what it was computed from. A finished run is reused while its key stands."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kdtrain.config import SETTINGS, AugmentConfig, Config, run_folder
from kdtrain.config.settings import to_flat
from kdtrain.data import fixed_views
from kdtrain.training.checkpoint import WEIGHTS, CheckpointError, read_json, run_weights

HASHED_ROOMS = ("config", "data", "models", "objectives", "training")
"""Packages of kdtrain whose sources can change a trained number."""
NOT_HASHED = ("models/published", "training/journal")
"""Packages in them that cannot; each says so in its __init__."""


def run_key(config: Config, inputs: Mapping[str, str], data: str) -> str:
    """16 hex digits over the settings that count, the input runs' keys, the data's key, versions
    and sources.

    inputs: key of each run that the config names, by the name of the input (config.RUN_SETTINGS).
    """
    settings = _counted(to_flat(config))
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


def differences(ours: Config, theirs: Mapping[str, Any]) -> list[str]:
    """'optim.batch_size: 64 here, 32 there' for every setting of the key in which a config differs
    from dotted keys.
    """
    lines, there = [], _counted(theirs)
    for key, value in _counted(to_flat(ours)).items():
        if there.get(key) != value:
            lines.append(f"{key}: {value} here, {there.get(key)} there")
    return lines


def _counted(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that count. Answers kept in float32 are the teacher's own, bit for bit, so they
    count as none kept (of features: those of whole batches, with a classifier that is not compiled
    by itself); so does any cache of a run without a teacher. Sizes that are left to another
    setting count as it does, and the teacher's not at all without one; equal weights count as none.
    """
    uncounted = [setting.key for setting in SETTINGS if not setting.counted]
    counted = {key: value for key, value in flat.items() if key not in uncounted}
    cache = "none" if flat.get("teacher.run") is None else flat.get("teacher.cache", "none")
    what = flat.get("teacher.cache_what", "outputs")
    exact = what == "outputs" or not (flat.get("train.compile") or _has_fixed_views(flat))
    if cache == "none" or (cache == "float32" and exact):
        cache, what = "none", "outputs"
    counted |= {"teacher.cache": cache, "teacher.cache_what": what}
    side = flat.get("data.input_size")
    counted["data.crop_size"] = flat.get("data.crop_size") or side
    theirs = None if flat.get("teacher.run") is None else flat.get("teacher.input_size")
    counted["teacher.input_size"] = theirs or side
    weights = flat.get("teacher.weights")
    counted["teacher.weights"] = None if weights is None or len(set(weights)) == 1 else weights
    return counted


def _has_fixed_views(flat: Mapping[str, Any]) -> bool:
    section = {k.partition(".")[2]: v for k, v in flat.items() if k.startswith("augment.")}
    crop = flat["data.crop_size"] or flat["data.input_size"]
    return fixed_views(AugmentConfig(**section), flat["data.store_size"], crop) is not None


@cache
def source_hash() -> str:
    """Hash of the sources of HASHED_ROOMS and of kdkernels, its compiled module included, and of
    torch's version.
    """
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
