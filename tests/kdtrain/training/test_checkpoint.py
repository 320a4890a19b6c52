"""Checkpoints survive a death at any moment; files are replaced whole; a folder has one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_runs import environment

from kdtrain.training import checkpoint
from kdtrain.training.checkpoint import CheckpointError
from kdtrain.training.journal.journal import Lines


class Death(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


CALLS = [
    (os, "rename"),
    (os, "fsync"),
    (checkpoint, "save_file"),
    (torch, "save"),
    (checkpoint.shutil, "rmtree"),
]


def _save(folder, value: float) -> None:
    checkpoint.save(folder, {"w": torch.full((3,), value)}, {"value": value})


def _load(folder) -> float:
    value = checkpoint.load_weights(folder)["w"][0].item()
    assert checkpoint.load_state(folder)["value"] == value, "files of two different saves"
    return value


def _die_at(monkeypatch, moment: int, after: bool) -> list[str]:
    """Every call that changes the disk counts; the given one is not made, or is the last one
    made.
    """
    made: list[str] = []

    def mortal(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            if len(made) > moment:  # dead: even cleaning up on the way out does nothing
                raise Death
            made.append(name)
            if len(made) - 1 == moment and not after:
                raise Death
            result = original(*arguments, **options)
            if len(made) - 1 == moment:
                raise Death
            return result

        monkeypatch.setattr(owner, name, call)

    for owner, name in CALLS:
        mortal(owner, name)
    return made


def test_a_death_at_any_moment_of_a_save_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path, monkeypatch
):
    seen = set()
    for after in (False, True):
        for moment in range(40):
            folder = tmp_path / f"{moment}{after}" / "last"
            folder.parent.mkdir()
            _save(folder, 1.0)
            with monkeypatch.context() as patch:
                made = _die_at(patch, moment, after)
                try:
                    _save(folder, 2.0)
                    break
                except Death:
                    seen.add(made[-1])
            # what a reader sees without repairing, then what the owner sees after repairing
            first = _load(folder)
            checkpoint.recover(folder)
            assert _load(folder) == first
            assert first in (1.0, 2.0)
            assert [f.name for f in folder.parent.iterdir()] == ["last"]
            _save(folder, 3.0)
            assert _load(folder) == 3.0
        assert moment > 8, "the save was not interrupted where it matters"
    assert seen == {"rename", "fsync", "save_file", "save", "rmtree"}


def test_a_death_in_the_first_save_leaves_no_checkpoint_and_no_obstacle(tmp_path, monkeypatch):
    for moment in range(6):
        folder = tmp_path / str(moment) / "last"
        folder.parent.mkdir()
        with monkeypatch.context() as patch:
            _die_at(patch, moment, after=False)
            with pytest.raises(Death):
                _save(folder, 1.0)
        checkpoint.recover(folder)
        assert not folder.exists()
        _save(folder, 2.0)
        assert _load(folder) == 2.0


SAVER = """
import os, sys, torch
from pathlib import Path
from kdtrain.training import checkpoint
folder = Path(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        value = 0.0
        while True:
            value += 1.0
            checkpoint.save(folder, {"w": torch.full((3,), value)}, {"value": value})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_a_real_kill_while_saving_loses_nothing(tmp_path):
    folder = tmp_path / "last"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder)],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for attempt in range(12):
            process.stdin.write("go\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            while not attempt and not folder.exists():  # the first save, on a machine of any load
                time.sleep(0.01)
            time.sleep(0.03 + 0.007 * attempt)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            assert _load(folder) >= 1.0
        process.stdin.close()
    assert _load(folder) >= 1.0


def test_reading_repairs_nothing_as_the_owner_may_be_saving(tmp_path):
    folder = tmp_path / "last"
    _save(folder, 1.0)
    half = tmp_path / "last.new"
    half.mkdir()
    assert _load(folder) == 1.0
    assert half.exists()


def test_a_missing_checkpoint_names_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="train that run first"):
        checkpoint.load_weights(tmp_path / "last")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        checkpoint.load_state(tmp_path / "last")
    with pytest.raises(CheckpointError, match="no trained weights"):
        checkpoint.run_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "load"),
    [(checkpoint.WEIGHTS, checkpoint.load_weights), (checkpoint.STATE, checkpoint.load_state)],
)
def test_a_damaged_file_is_named(name, load, tmp_path):
    folder = tmp_path / "last"
    _save(folder, 1.0)
    content = (folder / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 500, b"hello world garbage\n"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name}: damaged"):
            load(folder)


def test_run_weights_takes_last_of_a_run_and_a_named_checkpoint_itself(tmp_path):
    _save(tmp_path / "last", 1.0)
    _save(tmp_path / "best", 2.0)
    assert checkpoint.run_weights(tmp_path) == tmp_path / "last"
    assert checkpoint.run_weights(tmp_path / "best") == tmp_path / "best"


def test_weights_keep_type_and_value_with_any_strides(tmp_path):
    maps = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights = {"maps": maps, "half": torch.randn(4, 6).half().T, "count": torch.tensor(7)}
    checkpoint.save(tmp_path / "last", weights)
    loaded = checkpoint.load_weights(tmp_path / "last")
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in weights.items())


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    checkpoint.write_json(path, {"a": 1})
    with monkeypatch.context() as patch:

        def dead(*_):
            raise Death

        patch.setattr(os, "replace", dead)
        with pytest.raises(Death):
            checkpoint.write_json(path, {"a": 2})
    assert checkpoint.read_json(path) == {"a": 1}
    path.write_text("{")
    assert checkpoint.read_json(path) is None
    assert checkpoint.read_json(tmp_path / "missing.json") is None


def test_nan_is_never_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "results.json", {"a": float("nan")})
    assert not (tmp_path / "results.json").exists()


def test_a_folder_is_held_by_one_and_let_go_by_a_kill(tmp_path):
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time; from pathlib import Path; from kdtrain.training import checkpoint\n"
            "with checkpoint.lock(Path(sys.argv[1])):\n"
            "    print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = f"in use by process {holder.pid}"
        with (
            pytest.raises(CheckpointError, match=message),
            checkpoint.lock(tmp_path, wait_s=0.2),
        ):
            pass
        holder.kill()
    with checkpoint.lock(tmp_path, wait_s=5):
        assert (tmp_path / ".owner").read_text() == str(os.getpid())


def test_a_folder_without_content_is_removed_and_a_waiting_process_gets_a_new_one(tmp_path):
    folder = tmp_path / "run"

    def write() -> None:
        with checkpoint.lock(folder, wait_s=20):
            (folder / "config.yaml").touch()

    with ThreadPoolExecutor(1) as pool:
        with checkpoint.lock(folder):
            waiting = pool.submit(write)
            time.sleep(0.3)
        waiting.result()
    assert sorted(file.name for file in folder.iterdir()) == [".lock", ".owner", "config.yaml"]
    with checkpoint.lock(folder):
        pass
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_allows(umask, tmp_path):
    earlier = os.umask(umask)
    try:
        _save(tmp_path / "last", 1.0)
        checkpoint.write_arrays(tmp_path / "samples.npz", {"a": np.zeros(3)})
        checkpoint.write_text(tmp_path / "table.txt", "a")
    finally:
        os.umask(earlier)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def _full_disk(folder, write) -> CheckpointError:
    """What `write` raises where no file may be longer than 20 kB."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, earlier[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{folder}.*File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    return caught.value


def _line(path) -> None:
    with contextlib.closing(Lines(path)) as lines:
        lines.write({"a": "x" * 40_000})


LONG = {"w": torch.ones(10_000)}
WRITERS = {
    "last": lambda path: checkpoint.save(path, LONG, {"value": 2.0}),
    "best": lambda path: checkpoint.save(path, {"w": torch.ones(3)}, LONG),
    "results.json": lambda path: checkpoint.write_json(path, "x" * 40_000),
    "progress.json": lambda path: checkpoint.write_bytes(path, b"x" * 40_000, sync=False),
    "items.npz": lambda path: checkpoint.write_arrays(path, {"a": np.ones(5_000)}),
    "metrics.jsonl": lambda path: _line(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_with_the_room_needed_and_loses_nothing(name, tmp_path):
    if name in ("last", "best"):
        _save(tmp_path / name, 1.0)
    else:
        (tmp_path / name).write_text("before\n")
    message = str(_full_disk(tmp_path / name, lambda: WRITERS[name](tmp_path / name)))
    assert "40.0 kB are needed and" in message
    assert f"are free in {tmp_path}" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name in ("last", "best"):
        assert _load(tmp_path / name) == 1.0
    else:
        assert (tmp_path / name).read_bytes()[:7] == b"before\n"


def test_a_flipped_bit_in_a_checkpoint_is_damage(tmp_path):
    _save(tmp_path / "last", 1.0)
    for name in ("weights.safetensors", "state.pt", "checksums.json"):
        path = tmp_path / "last" / name
        content = path.read_bytes()
        for place in range(0, len(content), 1 + len(content) // 60):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged .*--overwrite"):
                _load(tmp_path / "last")
        path.write_bytes(content)
    (tmp_path / "last" / "checksums.json").unlink()  # as of weights copied by hand
    assert _load(tmp_path / "last") == 1.0


def test_a_flipped_bit_in_arrays_is_damage_or_changes_nothing(tmp_path):
    arrays = {"a": np.arange(9.0), "b": np.zeros(0), "c": np.array(3)}
    path = tmp_path / "items.npz"
    checkpoint.write_arrays(path, arrays)
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = checkpoint.read_arrays(path)
        except CheckpointError:
            refused += 1
            continue
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], value) for name, value in arrays.items())
    assert refused > len(content) / 2


def test_what_killed_writers_left_is_removed_and_a_living_one_s_file_stays(tmp_path):
    (tmp_path / "items").mkdir()
    dead = [tmp_path / ".a.json.1.tmp", tmp_path / "items" / ".b.npz.1.tmp"]
    living = tmp_path / ".c.json.1.tmp"
    for path in (*dead, living):
        path.write_text("half")
    with open(living) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with checkpoint.lock(tmp_path):
            assert [path.exists() for path in (*dead, living)] == [False, False, True]
        checkpoint.write_text(tmp_path / "c.json", "whole")
        assert living.exists()
    checkpoint.write_text(tmp_path / "c.json", "whole")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", ".owner", "c.json", "items"]
