"""Input runs (teacher, init_from, head.run, eval.gallery): their networks and training images.

Where classes are compared or inherited, an input run must have the same identities in the same
order; it should not have been trained on this run's test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.config import RUN_SETTINGS, Config, ConfigError, DataConfig, settings
from kdtrain.data.run_data import RunData, identities_key, parts
from kdtrain.models.network import FaceNetwork, network_from_state
from kdtrain.training import checkpoint
from kdtrain.training.journal.journal import Screen

VIEW = ("store_size", "crop_size", "input_size")
"""Settings of data that are the network's own; the images are those of the querying run."""


def run_config(run: Path) -> Config:
    """Returns the config of a run directory or checkpoint. Raises CheckpointError without one."""
    recipe = checkpoint.run_of(run) / "config.yaml"
    if not recipe.is_file():
        raise checkpoint.CheckpointError(
            f"{run}: no config.yaml beside its weights; name a run directory"
        )
    return settings.build(settings.read_recipe(recipe))


def network_shapes(run: Path) -> FaceNetwork:
    """Returns the network that a run's config describes, for one identity."""
    config = run_config(run)
    return FaceNetwork(config.model, 1, head=config.head, input_size=config.data.input_size)


def load_network(run: Path) -> FaceNetwork:
    """Returns the network of a run directory with its last weights (RUN/best: its best)."""
    weights, config = checkpoint.run_weights(run), run_config(run)
    return network_from_state(
        config.model,
        checkpoint.load_weights(weights),
        head=config.head,
        input_size=config.data.input_size,
    )


def check_gallery(run: Path, width: int) -> None:
    """Raises CheckpointError for a run without weights, ConfigError for another width."""
    checkpoint.run_weights(run)
    with torch.device("meta"):
        theirs = network_shapes(run).width
    if theirs != width:
        raise ConfigError(
            f"eval.gallery {run}: its features have {theirs} numbers and this network's {width}, "
            f"so they cannot be compared: set model.embedding to {theirs} here, or eval.gallery to "
            "null"
        )


class Gallery:
    """Features of images by another run's frozen network, at its own input size and crop, for
    asymmetric evaluation: a small network searches a gallery that the large one enrolled (arXiv
    2011.00265), which requires features in the same space.
    """

    def __init__(self, run: Path, data: RunData) -> None:
        """data: of the querying run. See check_gallery."""
        self.network = load_network(run).eval().requires_grad_(False).to(data.device)
        theirs = run_config(run)
        view = {name: getattr(theirs.data, name) for name in VIEW}
        config = Config(  # without the targets and teachers of either run
            task=data.config.task,
            data=replace(data.config.data, **view),
            augment=theirs.augment,
            train=data.config.train,
        )
        # synthetic faces are rendered at the stored size; files are resized to it
        alike = config.data.store_size == data.config.data.store_size
        shared = alike or config.data.kind != "synthetic"
        self._data = RunData(config, data.source if shared else None)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, indices: Tensor) -> Tensor:
        """Returns features (N, D) float32 of the source's `indices` (N,); caches the last ones."""
        if self._last is None or not torch.equal(self._last[0], indices):
            batches = self._data.evaluation(indices)
            with torch.no_grad():
                rows = [self.network(batch.images).hidden.float() for batch in batches]
            self._last = indices.clone(), torch.cat(rows)
        return self._last[1]


def check_lineage(folders: Mapping[str, Path], data: RunData, screen: Screen) -> None:
    """Raises ConfigError where classes of other identities are compared; see seen_in_training."""
    by_class = any(row.by_class for row in data.config.target.weighed)
    by_class |= data.config.head.margin == "distillation"
    ours = identities_key(data.source.class_names, data.config.data)
    for name, run in folders.items():
        setting = RUN_SETTINGS.get(name) or RUN_SETTINGS[name.rpartition("_")[0]]
        # imported runs, whose identities are unknown, pass
        alike = _trained_on(run).get("identities_key") in (None, ours)
        if not alike and (name == "head" or (name.startswith("teacher") and by_class)):
            raise ConfigError(
                f"{setting} {run}: its classes are other identities than those of "
                f"{data.source.name}, or in another order, so they cannot be compared class by "
                "class; name a run on the same identities"
            )
        if seen := seen_in_training(run, data):
            screen.say(f"warning: {setting} {run.name} {seen}")


def seen_in_training(run: Path, data: RunData) -> str | None:
    """Returns a warning if `run` was trained on test images of `data` (with data.split identity: on
    their identities); None if not, or if its training images are unknown or another set.
    """
    if "identities_key" not in _trained_on(run):
        return None
    theirs = run_config(run)
    if not same_set(theirs.data, data.config.data):
        return None
    try:
        train, _, _ = parts(data.source, theirs)
    except ValueError:  # its split file was not read for `data`
        return None
    labels, what = data.source.labels, "images"
    seen = torch.isin(data.test, train)
    if data.config.data.split == "identity":
        seen, what = torch.isin(labels[data.test], labels[train]), "images' identities"
    if not seen.any():
        return None
    return (
        f"was trained on {int(seen.sum())} of the {len(seen)} test {what}, so the results are not "
        "those of unseen ones: split alike (data.split, data.split_seed, data.test_fraction)"
    )


def same_set(one: DataConfig, other: DataConfig) -> bool:
    """True if two data sections read the same images, split in any way."""
    if one.kind != other.kind:
        return False
    if one.kind == "synthetic":
        names = ("identities", "images_per_identity", "synthetic_seed")
        return all(getattr(one, name) == getattr(other, name) for name in names)
    return Path(one.root or "").resolve() == Path(other.root or "").resolve()


def _trained_on(run: Path) -> Mapping[str, Any]:
    """The section `data` of the results of a run directory or checkpoint; {} if unknown."""
    results = checkpoint.read_json(checkpoint.run_of(run) / "results.json") or {}
    return results.get("data") or {}
