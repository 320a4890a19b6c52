"""The runs that a run reads: their networks, and what these were trained on.

Where classes are compared or taken over, a run that is read must know the same identities in the
same order, and it should know none of this run's test images.
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
"""Settings of data that say how a network sees an image; the images are the querying run's."""


def run_config(run: Path) -> Config:
    """The config of a run folder, or of a checkpoint's run. Raises CheckpointError without one."""
    recipe = checkpoint.run_of(run) / "config.yaml"
    if not recipe.is_file():
        raise checkpoint.CheckpointError(
            f"{run}: no config.yaml beside its weights; name a run folder"
        )
    return settings.build(settings.read_recipe(recipe))


def network_shapes(run: Path) -> FaceNetwork:
    """The network of a run folder as its config has it, for one identity."""
    config = run_config(run)
    return FaceNetwork(config.model, 1, head=config.head, input_size=config.data.input_size)


def load_network(run: Path) -> FaceNetwork:
    """The network of a run folder, with its last weights (RUN/best: its best)."""
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
    """Pooled features of images by another run's frozen network, at its own input size and crop,
    for asymmetric evaluation.

    A store of faces that the large network enrolled is then searched by the small one (arXiv
    2011.00265): only a student whose features lie in the teacher's space finds anyone there.
    """

    def __init__(self, run: Path, data: RunData) -> None:
        """data: the images, as the querying run has them. See check_gallery."""
        self.network = load_network(run).eval().requires_grad_(False).to(data.device)
        theirs = run_config(run)
        view = {name: getattr(theirs.data, name) for name in VIEW}
        config = Config(  # of neither run: their targets and teachers do not matter here
            task=data.config.task,
            data=replace(data.config.data, **view),
            augment=theirs.augment,
            train=data.config.train,
        )
        # synthetic faces are drawn at the stored size; files are only resized to another one
        alike = config.data.store_size == data.config.data.store_size
        shared = alike or config.data.kind != "synthetic"
        self._data = RunData(config, data.source if shared else None)
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, indices: Tensor) -> Tensor:
        """Features (N, D) float32 of the source's images `indices` (N,); the last are kept."""
        if self._kept is None or not torch.equal(self._kept[0], indices):
            batches = self._data.evaluation(indices)
            with torch.no_grad():
                rows = [self.network(batch.images).hidden.float() for batch in batches]
            self._kept = indices.clone(), torch.cat(rows)
        return self._kept[1]


def check_lineage(folders: Mapping[str, Path], data: RunData, screen: Screen) -> None:
    """Raises ConfigError where classes are compared with those of a run on other identities; tells
    identities of runs that were trained on test images of this one.
    """
    by_class = any(row.by_class for row in data.config.target.weighed)
    by_class |= data.config.head.margin == "distillation"
    for name, run in folders.items():
        setting = RUN_SETTINGS.get(name) or RUN_SETTINGS[name.rpartition("_")[0]]
        if name == "head" or (name.startswith("teacher") and by_class):
            _check_identities(setting, run, data)
        if seen := seen_in_training(run, data):
            screen.say(f"warning: {setting} {run.name} {seen}")


def _check_identities(name: str, run: Path, data: RunData) -> None:
    """Runs that do not say which identities they know (imported ones) pass."""
    theirs = _trained_on(run).get("identities_key")
    ours = identities_key(data.source.class_names, data.config.data)
    if theirs is not None and theirs != ours:
        raise ConfigError(
            f"{name} {run}: its classes are other identities than those of {data.source.name}, or "
            "in another order, so they cannot be compared class by class; name a run on the same "
            "identities"
        )


def seen_in_training(run: Path, data: RunData) -> str | None:
    """A warning where `run` was trained on test images of `data` (with data.split identity, on
    their identities); None where it was not, or on another set, or does not say on which.
    """
    if "identities_key" not in _trained_on(run):
        return None
    theirs = run_config(run)
    if not same_set(theirs.data, data.config.data):
        return None
    try:
        train, _, _ = parts(data.source, theirs)
    except ValueError:  # a split file that was not read here
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
    """Whether two data sections read the same images, however they split them."""
    if one.kind != other.kind:
        return False
    if one.kind == "synthetic":
        names = ("identities", "images_per_identity", "synthetic_seed")
        return all(getattr(one, name) == getattr(other, name) for name in names)
    return Path(one.root or "").resolve() == Path(other.root or "").resolve()


def _trained_on(run: Path) -> Mapping[str, Any]:
    """The images that a run folder, or the run of a checkpoint, says it was trained on."""
    results = checkpoint.read_json(checkpoint.run_of(run) / "results.json") or {}
    return results.get("data") or {}
