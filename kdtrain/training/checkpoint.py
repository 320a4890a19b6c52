"""Run folders on disk: atomic checkpoints with recovery, atomic small files, and one writer at a
time.

A checkpoint is a folder of two files: weights.safetensors (the network) and state.pt (optimiser,
extra modules, position, random state), loadable with weights_only. It is written beside its place,
synced, and swapped in by rename: whenever the process or the machine dies, the old one or the new
one is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

WEIGHTS = "weights.safetensors"
STATE = "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint or run folder that is missing, damaged or in use; the message says what to
    do.
    """


def save(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint so that `folder` is at every moment the previous one or this one, whole.

    weights: the network's state_dict. state: plain values and tensors, or None for weights alone.
    """
    recover(folder)
    fresh, previous = _siblings(folder)
    fresh.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, fresh / WEIGHTS)
    if state is not None:
        torch.save(dict(state), fresh / STATE)
    for path in [*fresh.iterdir(), fresh]:
        _sync(path)
    if folder.exists():
        os.rename(folder, previous)
    os.rename(fresh, folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a save that was cut short, and remove what it left behind.

    The new folder takes its name only after everything in it is synced. So where the old one has
    been moved aside and nothing stands in its place, the new one is complete; where the old one
    stands, the new one may be half.
    """
    fresh, previous = _siblings(folder)
    if not folder.exists() and previous.exists():
        os.rename(fresh if fresh.exists() else previous, folder)
    for leftover in (fresh, previous):
        if leftover.exists():
            shutil.rmtree(leftover)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, on the CPU. Raises CheckpointError when there are none or they
    are damaged.
    """
    path = _whole(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS} there; train that run first")
    try:
        return load(path.read_bytes())  # load_file takes no path that is not UTF-8
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); train that run again") from None


def load_state(folder: Path) -> dict[str, Any]:
    """The state saved beside the weights. Raises CheckpointError when it is missing or damaged."""
    path = _whole(folder) / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {STATE} there, nothing to resume from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(RuntimeError, EOFError, OSError, pickle.UnpicklingError),
        *(LookupError, ValueError, TypeError, AttributeError),  # the unpickler's, on any rubbish
    ) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: damaged ({message}); start again with --overwrite"
        ) from None


def run_weights(run: Path) -> Path:
    """The checkpoint folder of a run folder: RUN/last, or RUN itself when it is a checkpoint
    (RUN/best).
    """
    for folder in (_whole(run / "last"), run):
        if (folder / WEIGHTS).is_file():
            return folder
    raise CheckpointError(
        f"{run}: no trained weights there, which a setting as init_from or teacher.run asks for "
        "(@NAME is the run beside this one); train that run first, or name its folder"
    )


def run_of(run: Path) -> Path:
    """The run folder that `run` is or, as RUN/best, is a checkpoint of: where config.yaml lies;
    `run` itself where it lies in neither.
    """
    return next((f for f in (run, run.parent) if (f / "config.yaml").is_file()), run)


def write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader or a crash sees the old content or the new one, whole. Bytes
    of a name that are not UTF-8 become escapes; see program.printable.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file that is no text; see write_text."""
    _replace(path, lambda file: file.write(content))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace an .npz file, making its folder; see write_text. The same arrays give the same
    bytes.
    """
    path.parent.mkdir(exist_ok=True)
    _replace(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file; see write_text."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_progress(path: Path, values: Any) -> None:
    """Replace a JSON file that only a watcher reads: whole at every moment, but not forced to
    disk.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(values), encoding="utf-8")
    os.replace(fresh, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def lock(folder: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Hold a folder for this process alone; the system lets go when the process ends, however it
    ends.

    Waits a little, as a child of a killed pipeline stops by itself within a step. A folder that was
    not there and in which nothing was written is taken away again. Raises CheckpointError.
    """
    is_new = not folder.exists()
    file = _locked(folder, time.monotonic() + wait_s)
    with file:
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if is_new and folder.is_dir() and os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path, deadline: float) -> IO[str]:
    """The folder's lock file, held."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - for the caller
        except FileNotFoundError:  # taken away by its last owner, as below
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder}: in use by process {owner}; "
                    "wait for it, stop it, or take another --run-dir"
                ) from None
            time.sleep(0.1)
            continue
        # the last owner may have taken folder and file away before it let go
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _whole(folder: Path) -> Path:
    """Where a reader finds the whole checkpoint; unlike recover it changes nothing, as its owner
    may be saving.
    """
    fresh, previous = _siblings(folder)
    if folder.exists() or not previous.exists():
        return folder
    return fresh if fresh.exists() else previous


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.previous")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
