"""What the runs that a run reads were trained on: the same people in the same order where classes
are compared or taken over, and none of this run's test pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdtrain.config import Config, ConfigError, DataConfig, settings
from kdtrain.data.run_data import RunData, identities_key, parts
from kdtrain.training import checkpoint


def check_people(name: str, run: Path, data: RunData) -> None:
    """Raises ConfigError where the classes of `run`, the value of setting `name`, are other people
    than the data's, or the same in another order. Runs that do not say (imported ones) pass.
    """
    theirs = _trained_on(run).get("identities_key")
    ours = identities_key(data.source.class_names, data.config.data)
    if theirs is not None and theirs != ours:
        raise ConfigError(
            f"{name} {run}: its classes are other people than those of {data.source.name} here, or "
            "the same in another order, so class by class they cannot be compared; name a run on "
            "the same people"
        )


def known_pictures(run: Path, data: RunData) -> int:
    """Test pictures of `data` that `run` was trained on; with data.split identity, those of people
    that it was trained on. 0 where it was trained on another set, or does not say on which.
    """
    if "identities_key" not in _trained_on(run):
        return 0
    theirs = run_config(run)
    if not same_set(theirs.data, data.config.data):
        return 0
    try:
        train, _, _ = parts(data.source, theirs)
    except ValueError:  # a split file that was not read here
        return 0
    labels = data.source.labels
    if data.config.data.split == "identity":
        return int(torch.isin(labels[data.test], labels[train]).sum())
    return int(torch.isin(data.test, train).sum())


def run_config(run: Path) -> Config:
    """The config of a run folder, or of the run that a checkpoint (RUN/best) is of. Raises
    CheckpointError where there is none.
    """
    recipe = checkpoint.run_of(run) / "config.yaml"
    if not recipe.is_file():
        raise checkpoint.CheckpointError(
            f"{run}: no config.yaml beside its weights; name a run folder"
        )
    return settings.build(settings.read_recipe(recipe))


def same_set(one: DataConfig, other: DataConfig) -> bool:
    """Whether two data sections read the same pictures, however they split them."""
    if one.kind != other.kind:
        return False
    if one.kind == "synthetic":
        drawn = [(d.identities, d.images_per_identity, d.synthetic_seed) for d in (one, other)]
        return drawn[0] == drawn[1]
    return Path(one.root or "").resolve() == Path(other.root or "").resolve()


def _trained_on(run: Path) -> Mapping[str, Any]:
    """The pictures that a run folder, or the run of a checkpoint, says it was trained on."""
    results = checkpoint.read_json(checkpoint.run_of(run) / "results.json") or {}
    return results.get("data") or {}
