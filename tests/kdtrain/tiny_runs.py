"""Configs and comparisons of training runs that take a second: shared by the trainer's tests."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

import kdtrain
from kdtrain.config import Config, DataConfig, settings
from kdtrain.data import FaceSource, build_source
from kdtrain.training import checkpoint, engine
from kdtrain.training.journal.journal import Screen

TINY: dict[str, Any] = {
    "data.identities": 8,
    "data.images_per_identity": 5,
    "data.test_fraction": 0.4,
    "data.store_size": 20,
    "data.input_size": 16,
    "data.noise": 0.0,
    "model.depth": 14,
    "model.width": 8,
    "model.stem": "small",
    "optim.batch_size": 4,
    "optim.phases": [{"epochs": 2, "lr": 0.05}, {"epochs": 1, "lr": 0.01}],
    "triplet.identities": 3,
    "triplet.images_per_identity": 2,
    "train.threads": 1,
    "train.log_every": 4,
    "train.save_every": 3,
}
TASK_KEYS: dict[str, dict[str, Any]] = {
    "classification": {},
    "alignment": {"target.gamma": 0.0, "augment.crop": "jitter", "optim.clip_norm": 1.0},
    "verification": {},
}


def read_celeba(root: Path, **keys: Any) -> FaceSource:
    """The source of a folder in CelebA's layout."""
    return build_source(DataConfig(kind="celeba", root=str(root), **keys))


def synthetic(size: int, **keys: Any) -> FaceSource:
    """The source of synthetic faces of size x size pixels."""
    return build_source(DataConfig(store_size=size, input_size=8, **keys))


def read_folder(root: Path, **keys: Any) -> FaceSource:
    """The source of root/<identity>/<image>."""
    return build_source(DataConfig(kind="folder", root=str(root), **keys))


def tiny_config(task: str = "classification", **keys: Any) -> Config:
    """A run of 3 epochs; keys as section__key."""
    dotted = {name.replace("__", "."): value for name, value in keys.items()}
    return settings.build({**TINY, "task": task, **TASK_KEYS[task], **dotted})


def quiet() -> Screen:
    """A screen that nobody sees."""
    return Screen("test", io.StringIO())


def train(config: Config, folder: Path, **options: Any) -> dict[str, Any]:
    """engine.train without output."""
    return engine.train(config, folder, screen=options.pop("screen", quiet()), **options)


def stop_after(steps: int) -> Any:
    """A `stop` that says yes when it is asked for the given time."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return stop


def environment() -> dict[str, str]:
    """The environment of a child process that finds the packages wherever it stands."""
    root = str(Path(kdtrain.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), root]))
    return {**os.environ, "PYTHONPATH": path}


def assert_same_run(one: Path, other: Path) -> None:
    """Same bits in the weights, optimiser, best weights, metrics and results; only times may
    differ.
    """
    for name in ("last", "best"):
        ours, theirs = (checkpoint.load_weights(run / name) for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert [k for k in ours if not _same(ours[k], theirs[k])] == [], f"{name}/ differs"
    ours, theirs = (checkpoint.load_state(run / "last") for run in (one, other))
    keys = ("at", "optimizer", "scaler", "skipped", "trained", "extra")
    for key in (*keys, "random", "terms", "evaluations", "lengths", "key"):
        if key == "lengths":
            assert ours[key]["metrics"] == theirs[key]["metrics"]
        else:
            assert _same(ours.get(key), theirs.get(key)), f"state {key!r} differs"
    items = [{f.name: f.read_bytes() for f in (run / "items").iterdir()} for run in (one, other)]
    assert len(items[0]) > 0
    assert items[0] == items[1]
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    results = [checkpoint.read_json(run / "results.json") for run in (one, other)]
    for result in results:
        assert result is not None
        for name in ("seconds", "samples_per_s", "wait_share"):
            del result[name]
    assert results[0] == results[1]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
