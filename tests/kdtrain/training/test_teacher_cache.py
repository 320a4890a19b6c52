"""Cached teacher outputs: bitwise identical to a forward pass, by any writer, after any kill."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_run, environment, quiet, stop_after, tiny_config, train

from kdtrain.config import settings
from kdtrain.data.run_data import RunData
from kdtrain.objectives.targets import Guide
from kdtrain.objectives.task import Task
from kdtrain.training import checkpoint, keys, teacher_cache
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen
from kdtrain.training.preparation import prepare_cache, prepare_task
from kdtrain.training.teacher_cache import CacheError, OwnedFiles, TeacherCache, owner_of

BATCHES = [torch.tensor([4, 1, 7]), torch.tensor([2, 2])]
# Imports once and forks a process for each run folder, before torch has computed.
BOTH = """
import os, sys
import kdtrain.training.engine
from kdtrain.cli import main
children = []
for run in sys.argv[1:3]:
    children.append(os.fork())
    if children[-1] == 0:
        os._exit(main([*sys.argv[3:], "--run-dir", run]))
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
ONE_EPOCH = [{"epochs": 1, "lr": 0.05}]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a teacher's run and, by task, a student's that asked it online."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config(), root / "teacher")
    for task in ("classification", "verification"):
        train(student(task), root / task)
    return root


def student(task: str = "classification", **keys):
    """A run with every target; its last batch of an epoch is not full."""
    targets = {"target__alpha": 1.0, "target__beta": 1.0, "target__logits": 0.1}
    targets |= {"target__hidden_reduction": "mean", "target__logits_reduction": "mean"}
    run = {"teacher": "@teacher", "model__divide": 2, "train__drop_last": False}
    return tiny_config(
        task, **{**targets, **run, "optim__batch_size": 5, "optim__clip_norm": 1.0, **keys}
    )


def shown(config, folder: Path, **options) -> str:
    """What a run says."""
    screen = Screen("run", io.StringIO())
    train(config, folder, screen=screen, **options)
    return screen._console.file.getvalue()


def no_teacher(*_):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("task", ["classification", "verification"])
def test_filling_and_reading_runs_end_with_the_bits_of_the_online_run(
    task, root, tmp_path, monkeypatch
):
    config = student(task, teacher__cache="float32", teacher__cache_dir=str(tmp_path / "kept"))
    said = shown(config, root / f"{task}_filling")
    assert "0 batches read" in said
    assert_same_run(root / task, root / f"{task}_filling")
    monkeypatch.setattr(Task, "guide", no_teacher)
    said = shown(config, root / f"{task}_reading")
    assert "batches read, 0 computed" in said
    assert_same_run(root / task, root / f"{task}_reading")


def test_other_students_and_schedules_of_the_seed_read_what_the_first_one_cached(root, tmp_path):
    kept = {"teacher__cache": "float32", "teacher__cache_dir": str(tmp_path / "kept")}
    phases = [{"epochs": 2, "lr": 0.05}]
    first = student(**kept, optim__phases=phases, target__beta=0.0)
    assert ", 0 computed" not in shown(first, root / "first")
    other = {"model__width": 16, "target__temperature": 2.0, "target__beta": 0.0}
    phases = [{"epochs": 1, "lr": 0.01}, {"epochs": 1, "lr": 0.001}]
    said = shown(student(**kept, **other, optim__phases=phases), root / "other")
    assert "5 batches read, 5 computed" in said  # phase 1 has other crops
    assert "it cached already" in said
    steps = {"optim__phases": phases[:1], "optim__accumulate": 2, **other}
    assert "5 batches read, 0 computed" in shown(student(**kept, **steps), root / "accumulated")
    train(student(**steps), root / "accumulated_online")
    assert_same_run(root / "accumulated_online", root / "accumulated")
    # features were not kept, so the teacher is asked again, and then they are
    whole = student(**kept, optim__phases=ONE_EPOCH)
    assert "0 batches read, 5 computed" in shown(whole, root / "features")
    assert "5 batches read, 0 computed" in shown(whole, root / "features_again")


def test_a_run_stopped_within_an_epoch_resumes_from_cached_outputs_bitwise_identical(
    root, tmp_path
):
    kept = {"teacher__cache": "float32", "teacher__cache_dir": str(tmp_path / "kept")}
    with pytest.raises(Interrupted):
        train(student(**kept), root / "parts", stop=stop_after(3))
    with pytest.raises(Interrupted):  # nothing in the run's bits depends on where answers are from
        train(student(), root / "parts", resume=True, stop=stop_after(4))
    train(student(**kept), root / "parts", resume=True)
    assert_same_run(root / "classification", root / "parts")


def test_training_in_bfloat16_caches_its_own_outputs(root, tmp_path):
    half = {"train__precision": "bfloat16", "optim__phases": ONE_EPOCH}
    kept = {"teacher__cache": "float32", "teacher__cache_dir": str(tmp_path / "kept")}
    train(student(**kept, optim__phases=ONE_EPOCH), root / "whole_precision")
    train(student(**half), root / "bfloat16")
    for name, said in (("filling", "0 batches read, 5 computed"), ("reading", "5 batches read, 0")):
        assert said in shown(student(**half, **kept), root / f"bfloat16_{name}")
        assert_same_run(root / "bfloat16", root / f"bfloat16_{name}")


def test_float16_rounds_cached_and_computed_outputs_alike(root, tmp_path):
    kept = {"teacher__cache": "float16", "teacher__cache_dir": str(tmp_path / "kept")}
    for name in ("half", "half_again"):
        train(student(**kept), root / name)
    assert_same_run(root / "half", root / "half_again")
    weights = [checkpoint.load_weights(root / n / "last") for n in ("classification", "half")]
    assert any(not torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_losses_with_float16_outputs_move_by_no_more_than_rounding_explains(root, tmp_path):
    config = student(teacher__cache="float16", teacher__cache_dir=str(tmp_path / "kept"))
    data = RunData(config)
    task = prepare_task(config, data, root / "run", quiet())
    cache = prepare_cache(config, data, task, root / "run", quiet())
    assert cache is not None
    batches = data.epoch(0)
    cache.open(0, 0, batches)
    for number, indices in enumerate(batches):
        batch = data.batch(indices, phase=0, epoch=0, following=None)
        online = task.guide(batch.images)
        assert online is not None
        rounded = cache.guide(number, partial(task.guide, batch.images))
        moved = (rounded.logits - online.logits).abs().max().item()
        assert 0 < moved <= 2**-11 * online.logits.abs().max().item()
        pair = [task.step(batch.images, batch.labels, guide=g) for g in (online, rounded)]
        exact, close = ({k: v.item() for k, v in result.terms.items()} for result in pair)
        assert close["hard"] == exact["hard"]
        # p moves by p (d - <p, d>) / tau where the logits move by d
        tau = config.target.temperature
        surprise = -(task.network(batch.images).logits / tau).log_softmax(1).min().item()
        assert abs(close["soft"] - exact["soft"]) <= 2 * moved / tau * surprise
        assert close["logits"] == pytest.approx(exact["logits"], rel=2**-9)
        assert close["hidden"] == pytest.approx(exact["hidden"], rel=2**-9)


@pytest.mark.prove
def test_two_processes_fill_one_cache_and_both_end_with_the_online_bits(root, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings.to_yaml(student()))
    options = ["--teacher.cache", "float32", "--teacher.cache_dir", str(tmp_path / "kept")]
    runs = [root / "left", root / "right"]
    command = [sys.executable, "-c", BOTH, *map(str, runs), "train", str(recipe), *options]
    ended = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for run in runs:
        assert_same_run(root / "classification", run)
    files = list((tmp_path / "kept").rglob("*"))
    assert [f for f in files if f.name.startswith(".")] == []
    # whatever each of them wrote, what stands is whole
    assert "batches read, 0 computed" in shown(
        student(teacher__cache="float32", teacher__cache_dir=str(tmp_path / "kept")),
        root / "after_both",
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"augment__flip": False},
        {"augment__crop": "jitter"},
        {"seed": 1},
        {"data__images_per_identity": 6},
        {"data__store_size": 21},
        {"data__input_size": 17},
        {"train__threads": 2},
        {"train__channels_last": False},
    ],
)
def test_every_change_of_an_output_has_a_folder_of_its_own(keys, root, tmp_path):
    folders = set()
    for own in ({}, keys):
        config = student(teacher__cache="float32", **own)
        data = RunData(config)
        task = prepare_task(config, data, root / "run", quiet())
        torch.set_num_threads(config.train.threads)
        cache = prepare_cache(config, data, task, tmp_path / "run", quiet())
        assert cache is not None
        assert cache.files.folder.parent == tmp_path / "teacher_cache"
        folders.add(cache.files.folder)
    assert len(folders) == 2


def test_another_teacher_is_another_owner():
    config = student()
    data = RunData(config)
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert owner_of(config, data, one) == owner_of(config, data, one)
    assert owner_of(config, data, one) != owner_of(config, data, other)
    assert owner_of(config, data, one) == owner_of(student(model__width=16), data, one)


def opened(folder: Path, said: list[str], dtype: str = "float32", **change) -> TeacherCache:
    """A cache of logits alone, at its first epoch."""
    files = OwnedFiles(folder, {"teacher": "x"}, dtype, "cpu", said.append)
    cache = TeacherCache(files, {"logits": 3})
    cache.open(**{"phase": 0, "epoch": 0, "batches": BATCHES, **change})
    return cache


def answer(batch: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Guide:
    values = torch.arange(3 * len(BATCHES[batch])).reshape(-1, 3) / 7 + batch
    return Guide(logits=(factor * values).to(dtype), hidden=None)


def kept(cache: TeacherCache, batch: int) -> torch.Tensor:
    """The kept answer; an error when there is none."""
    logits = cache.guide(batch, no_teacher).logits
    assert logits is not None
    return logits


def test_an_output_is_cached_for_its_own_batch_of_its_own_epoch(tmp_path):
    said: list[str] = []
    cache = opened(tmp_path, said)
    cache.guide(1, lambda: answer(1))
    assert torch.equal(kept(cache, 1), answer(1).logits)
    elsewhere = (
        (cache, 0),
        (opened(tmp_path, said, epoch=1), 1),
        (opened(tmp_path, said, phase=1), 1),
        (opened(tmp_path, said, batches=[BATCHES[0].flip(0), BATCHES[1]]), 1),
        (opened(tmp_path, said, dtype="float16"), 1),
    )
    for other, batch in elsewhere:
        with pytest.raises(AssertionError, match="was asked"):
            kept(other, batch)
    assert said == []
    assert cache.summary() == "teacher cache: 1 batches read, 2 computed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", ["float32", "float16"])
def test_an_output_is_read_in_the_dtype_of_the_teacher(dtype, store, tmp_path):
    cache = opened(tmp_path, [], store)
    fresh = cache.guide(0, lambda: answer(0, dtype)).logits
    again = kept(cache, 0)
    assert fresh is not None
    assert fresh.dtype == again.dtype == dtype
    assert torch.equal(fresh, again)
    want = answer(0, dtype).logits
    assert want is not None
    if store == "float32":
        assert torch.equal(again, want)
    else:
        torch.testing.assert_close(again, want, rtol=2**-11, atol=1e-7)


def test_an_output_whose_writer_was_killed_before_the_entry_is_missing(tmp_path, monkeypatch):
    cache = opened(tmp_path, [])
    write, writes = teacher_cache._write, []

    def killed(fd, content, offset):
        if len(content) == teacher_cache.ENTRY.size:
            raise KeyboardInterrupt
        writes.append(offset)
        write(fd, content, offset)

    monkeypatch.setattr(teacher_cache, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.guide(0, lambda: answer(0))
    assert len(writes) == 1
    monkeypatch.undo()
    later = opened(tmp_path, [])
    with pytest.raises(AssertionError, match="was asked"):
        kept(later, 0)
    later.guide(0, lambda: answer(0))
    assert torch.equal(kept(opened(tmp_path, []), 0), answer(0).logits)


@pytest.mark.parametrize("place", ["block", "checksum", "code", "dtype"])
def test_a_damaged_output_is_logged_and_computed_again(place, tmp_path):
    cache = opened(tmp_path, [])
    for batch in (0, 1):
        cache.guide(batch, lambda batch=batch: answer(batch))
    (path,) = (f for f in tmp_path.rglob("*") if f.is_file())
    content = bytearray(path.read_bytes())
    table = teacher_cache.HEADER_BYTES
    at = {"block": len(content) - 2, "checksum": table + 13, "code": table + 8, "dtype": table + 8}
    content[at[place]] ^= 2 if place == "dtype" else 64  # float32 is 1, float16 is 3
    path.write_bytes(content)
    said: list[str] = []
    cache = opened(tmp_path, said)
    assert torch.equal(kept(cache, 0), answer(0).logits)
    assert said == []
    cache.guide(1, lambda: answer(1))
    assert len(said) == 1
    assert "the output of batch 1 is damaged and computed again" in said[0]
    assert torch.equal(kept(cache, 1), answer(1).logits)


@pytest.mark.parametrize("damage", ["header", "short", "empty"])
def test_a_file_that_does_not_belong_is_logged_and_replaced(damage, tmp_path):
    opened(tmp_path, []).guide(0, lambda: answer(0))
    (path,) = (f for f in tmp_path.rglob("*") if f.is_file())
    content = path.read_bytes()
    other = {"header": b"?" + content[1:], "short": content[:-1], "empty": b""}
    path.write_bytes(other[damage])
    said: list[str] = []
    cache = opened(tmp_path, said)
    assert [f"{path} has another header or size and is replaced" in line for line in said] == [True]
    with pytest.raises(AssertionError, match="was asked"):
        kept(cache, 0)
    cache.guide(0, lambda: answer(0))
    assert path.read_bytes() == content


def test_a_disk_without_room_is_refused_before_the_run_and_named_within_it(
    root, tmp_path, monkeypatch
):
    config = student(teacher__cache="float32", teacher__cache_dir=str(tmp_path / "kept"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 5000))
    # 24 images x (8 identities + 256 features) x 4 bytes x 3 epochs
    message = r"76\.0 kB more are needed .* 5\.0 kB are free; set teacher\.cache none"
    with pytest.raises(CacheError, match=message):
        train(config, root / "refused")
    assert not (root / "refused" / "config.yaml").exists()
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "_write", full)
    message = r"_.* cannot be used: No space left on device; .* kB are needed .*; make room there"
    with pytest.raises(CacheError, match=message):
        train(config, root / "full")


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    cache = opened(tmp_path, [], "float16")
    with pytest.raises(CacheError, match=r"an output of 1\.71e\+05 .* float32"):
        cache.guide(0, lambda: answer(0, factor=150_000.0))
    infinite = Guide(torch.full((3, 3), float("inf")), None)
    assert cache.guide(0, lambda: infinite).logits is not None  # the loss says what is wrong


def test_only_a_cache_that_changes_numbers_makes_another_run():
    def key(**settings):
        return keys.run_key(student(**settings), {"teacher": "x"}, "data")

    assert key(teacher__cache="float32", teacher__cache_dir="elsewhere") == key()
    assert key(teacher__cache="float16") != key()
    alone = [keys.run_key(tiny_config(teacher__cache=c), {}, "data") for c in ("none", "float16")]
    assert alone[0] == alone[1]
    half, exact = student(teacher__cache="float16"), student(teacher__cache="float32")
    assert keys.differences(exact, student()) == []
    assert keys.differences(half, exact) == ["teacher.cache: float16 here, none there"]


def test_a_task_without_a_teacher_caches_nothing(tmp_path):
    config = tiny_config(teacher__cache="float32")
    data = RunData(config)
    task = prepare_task(config, data, tmp_path / "run", quiet())
    assert task.guide_widths == {}
    assert prepare_cache(config, data, task, tmp_path / "run", quiet()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_hint_is_not_cached_and_the_teacher_runs_per_step(root):
    targets = {"target__gamma": 0.0, "target__hint": 1.0, "optim__phases": ONE_EPOCH}
    config = tiny_config(teacher="@teacher", teacher__cache="float32", **targets)
    said = shown(config, root / "hint")
    assert "this target's outputs are not cached; the teacher runs per step" in said
    assert not (root / "teacher_cache").exists()


def test_only_the_outputs_that_targets_read_are_cached(root):
    for target, parts in (("alpha", {"logits"}), ("logits", {"logits"}), ("beta", {"hidden"})):
        off = dict.fromkeys(("target__alpha", "target__beta", "target__logits"), 0.0)
        config = student(**{**off, f"target__{target}": 1.0})
        task = prepare_task(config, RunData(config), root / "run", quiet())
        assert set(task.guide_widths) == parts
