"""Kept features: the online teacher's bits for whole batches, its numbers for images by view."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, quiet, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.data import fixed_views
from kdtrain.data.run_data import RunData
from kdtrain.objectives.task import Task
from kdtrain.training import keys, view_cache
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen, read_lines
from kdtrain.training.preparation import prepare_cache, prepare_task
from kdtrain.training.teacher_cache import CacheError, CacheFile
from kdtrain.training.view_cache import ViewCache

SHORT = {"optim__phases": [{"epochs": 2, "lr": 0.01}]}
WHOLE = {"data__store_size": 16}  # as large as the crop: an image and its mirror image
JITTER = {"augment__crop": "jitter", "augment__scale_min": 1.0, "augment__scale_max": 1.0}
KEPT = {"teacher__cache": "float32", "teacher__cache_what": "features"}


def student(task: str = "classification", **keys):
    """A run of two epochs that reads the teacher's logits and its feature; its last batch is not
    full.
    """
    targets = {"target__alpha": 1.0, "target__beta": 1.0, "target__hidden_reduction": "mean"}
    run = {"teacher": "@teacher", "model__divide": 2, "train__drop_last": False}
    return tiny_config(task, **{**targets, **run, "optim__batch_size": 5, **SHORT, **keys})


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """The training part of a test fills two groups, of another size than its batches."""
    monkeypatch.setattr(view_cache, "GROUP", 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a teacher."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config(optim__phases=[{"epochs": 1, "lr": 0.05}]), root / "teacher")
    return root


def shown(config, folder, **options) -> str:
    screen = Screen("run", io.StringIO())
    train(config, folder, screen=screen, **options)
    return screen._console.file.getvalue()


def no_teacher(*_):
    raise AssertionError("the teacher was asked")


def prepared(root, folder, **keys):
    """The images, task and cache of a run by view."""
    config = student(**{**WHOLE, **KEPT, "teacher__cache_dir": str(folder), **keys})
    data = RunData(config)
    task = prepare_task(config, data, root / "x", quiet())
    return data, task, prepare_cache(config, data, task, root / "x", quiet())


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"target__beta": 0.0, "train__precision": "bfloat16"},
        {"head__streamed": True, "task": "verification"},
    ],
)
def test_features_of_whole_batches_end_with_the_bits_of_the_online_run(
    own, root, tmp_path, monkeypatch
):
    own = {"optim__phases": [{"epochs": 1, "lr": 0.05}], **own}
    task = own.pop("task", "classification")
    kept = {**KEPT, "teacher__cache_dir": str(tmp_path / "kept")}
    runs = {name: tmp_path / name for name in ("online", "filling", "reading")}
    os.symlink(root / "teacher", tmp_path / "teacher")
    train(student(task, **own), runs["online"])
    assert "0 batches read" in shown(student(task, **own, **kept), runs["filling"])
    assert_same_run(runs["online"], runs["filling"])
    monkeypatch.setattr(Task, "guide", no_teacher)
    assert ", 0 computed" in shown(student(task, **own, **kept), runs["reading"])
    assert_same_run(runs["online"], runs["reading"])
    assert [f.suffixes[-2:] for f in (tmp_path / "kept").rglob("phase*")] == [
        [".hidden", ".float32"]
    ]


def stopped_at(call: int, function: Any) -> Any:
    """`function`, interrupted when it is called for the given time."""
    calls = 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopped


def test_features_by_view_are_bitwise_identical_for_any_run(root, tmp_path, monkeypatch):
    kept = {**WHOLE, **KEPT, "teacher__cache_dir": str(tmp_path / "one")}
    assert "0 groups read, 4 computed" in shown(student(**kept), root / "filling")
    assert "4 groups read, 0 computed" in shown(student(**kept), root / "reading")
    assert_same_run(root / "filling", root / "reading")
    # stopped between two groups, then within an epoch
    other = {**kept, "teacher__cache_dir": str(tmp_path / "other")}
    with monkeypatch.context() as patch:
        patch.setattr(CacheFile, "put", stopped_at(2, CacheFile.put))
        with pytest.raises(KeyboardInterrupt):
            train(student(**other), root / "parts")
    with pytest.raises(Interrupted):
        train(student(**other), root / "parts", resume=True, stop=stop_after(4))
    said = shown(student(**other), root / "parts", resume=True)
    assert "4 groups read, 0 computed" in said
    assert_same_run(root / "filling", root / "parts")


def test_another_seed_other_epochs_and_another_student_read_the_same_features(root, tmp_path):
    kept = {**WHOLE, **KEPT, "teacher__cache_dir": str(tmp_path)}
    short = {"optim__phases": [{"epochs": 1, "lr": 0.01}]}
    assert "4 computed" in shown(student(**kept, **short), root / "first")
    own = {**short, "seed": 5, "optim__batch_size": 7, "model__divide": 4, "target__alpha": 0.0}
    assert "4 groups read, 0 computed" in shown(student(**kept, **own), root / "another")
    changed = {**kept, "data__split_seed": 1, "augment__flip": False}
    assert "0 groups read, 2 computed" in shown(student(**changed, **short), root / "other_images")


def test_training_by_view_is_training_with_the_online_teacher_but_for_rounding(root, tmp_path):
    gentle = {"target__beta": 0.0, "optim__phases": [{"epochs": 2, "lr": 0.002}]}
    gentle |= {**WHOLE, "train__log_every": 1}
    train(student(**gentle), root / "online")
    train(student(**gentle, **KEPT, teacher__cache_dir=str(tmp_path)), root / "by_view")
    lines = [read_lines(root / name / "metrics.jsonl") for name in ("online", "by_view")]
    assert len(lines[0]) == 12  # 10 steps and 2 evaluations
    for online, by_view in zip(*lines, strict=True):
        for name, value in online.items():
            # features of this size are rounded by 1e-7 of theirs, and ten steps carry that on
            close = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert by_view[name] == close, name


@pytest.mark.parametrize("mistake", ["", "view", "image"])
def test_a_image_s_feature_is_found_by_its_number_and_its_flip(mistake, root, tmp_path):
    data, task, cache = prepared(root, tmp_path)
    assert isinstance(cache, ViewCache)
    batches = data.epoch(0)
    cache.open(0, 0, batches)
    if mistake == "view":
        half = len(data.train)
        cache._rows = np.roll(cache._rows, half, axis=0)
    if mistake == "image":
        cache._rows = np.roll(cache._rows, 1, axis=0)
    for number, indices in enumerate(batches):
        batch = data.batch(indices, 0, 0, None)
        online = task.guide(batch.teacher_input)
        found = cache.guide(number, no_teacher, batch.flipped)
        close = (found.hidden - online.hidden).abs().max() <= 1e-5 * online.hidden.abs().max()
        assert bool(close) == (not mistake), number


def test_features_are_those_of_fixed_groups_bit_for_bit(root, tmp_path):
    data, task, cache = prepared(root, tmp_path, **JITTER, data__store_size=20)
    cache.open(0, 0, [data.train])
    asked = []
    for view in (False, True):
        for part in data.train.sort().values.split(16):
            guide = task.guide(data.teacher_view(part, view))
            asked.append(guide.hidden)
        flipped = torch.full((len(data.train),), view)
        found = cache.guide(0, no_teacher, flipped).hidden
        wanted = torch.cat(asked[-2:])[torch.searchsorted(data.train.sort().values, data.train)]
        assert torch.equal(found, wanted)
    batch = data.batch(data.train, 0, 0, None)
    assert torch.equal(
        batch.teacher_input[~batch.flipped], data.teacher_view(data.train, False)[~batch.flipped]
    )
    assert torch.equal(
        batch.teacher_input[batch.flipped], data.teacher_view(data.train, True)[batch.flipped]
    )


def test_a_damaged_group_is_logged_and_computed_again(root, tmp_path):
    data, _, cache = prepared(root, tmp_path)
    cache.open(0, 0, [data.train])
    right = cache._rows.copy()
    cache.close()
    path = next(tmp_path.rglob("views.hidden.float32"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    _, _, again = prepared(root, tmp_path)
    again.files.say = said.append
    again.open(0, 0, [data.train])
    assert (again.read, again.computed) == (3, 1)
    assert "damaged" in said[0]
    assert np.array_equal(again._rows, right)


def test_float16_keeps_half_the_bytes_and_rounds(root, tmp_path):
    data, _, exact = prepared(root, tmp_path)
    _, _, half = prepared(root, tmp_path, teacher__cache="float16")
    for cache in (exact, half):
        cache.open(0, 0, [data.train])
    flipped = torch.zeros(len(data.train), dtype=torch.bool)
    ours, theirs = (c.guide(0, no_teacher, flipped).hidden for c in (exact, half))
    assert half._rows.itemsize == 2
    moved = (ours - theirs).abs()
    assert moved.max() > 0
    assert bool((moved <= 2**-11 * ours.abs() + 2**-25).all())


def test_keys_tell_exact_features_from_rounded_ones():
    def counted(**own):
        return keys._counted(student(**own))

    assert counted() == counted(**KEPT) == counted(teacher__cache="float32")
    half = {"teacher__cache": "float16"}
    found = [counted(), counted(**half), counted(**{**KEPT, **half})]
    found += [counted(**KEPT, train__compile=True)]
    found += [counted(**WHOLE), counted(**WHOLE, **KEPT)]
    assert all(found.index(one) == place for place, one in enumerate(found))


def test_what_cannot_be_cached_is_refused_by_name(root, tmp_path):
    with pytest.raises(ConfigError, match="features needs teacher.cache float32 or float16"):
        student(teacher__cache_what="features")
    with pytest.raises(ConfigError, match="teacher.more names others"):
        student(**KEPT, teacher__more=["@other"], target__beta=0.0)
    with pytest.raises(ValueError, match="is not a function of"):
        fixed_views(SimpleNamespace(crop="elastic", flip=True), 16, 16)
    _, _, cache = prepared(root, tmp_path / "kept")
    (tmp_path / "kept").joinpath("file").write_text("")
    cache.files.folder = tmp_path / "kept" / "file"
    with pytest.raises(CacheError, match="set teacher.cache_dir to another folder"):
        cache.open(0, 0, [])


def test_views_are_counted_where_crops_are_whole_images():
    random, jitter = (
        SimpleNamespace(crop=crop, flip=flip, scale_min=1.0, scale_max=1.0)
        for crop, flip in (("random", True), ("jitter", False))
    )
    assert (fixed_views(random, 16, 16), fixed_views(random, 20, 16)) == (2, None)
    assert (fixed_views(jitter, 16, 16), fixed_views(jitter, 20, 16)) == (1, 1)
    jitter.scale_min = 0.9
    assert fixed_views(jitter, 16, 16) is None
