"""Run directories on disk: atomic checkpoints and files, and one writer at a time.

A checkpoint is a folder: weights.safetensors (the network), state.pt (optimiser, extra modules,
position, random state; loadable with weights_only) and checksums.json, the CRC-32 of both. It is
written beside its place, synced and renamed, so that the old or the new one is whole at any crash.
Reading compares the checksums, if there are any.

Other files are written as .NAME.PID.tmp, locked by their writer, and renamed. The next process that
locks the folder or writes the same file removes those of killed processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
CHECKSUMS = "checksums.json"
LAST, BEST = "last", "best"
UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError),
    *(LookupError, ValueError, TypeError, AttributeError),  # of the unpickler
)
"""Errors of reading damaged weights or state."""

# Names that a run writes in its directory, and that --overwrite removes: siblings of a checkpoint
# first, or it would be recovered
RUN_FILES = [f"{name}{suffix}" for name in (LAST, BEST) for suffix in (".new", ".previous", "")]


def run_file(name: str) -> str:
    """Declares a name of RUN_FILES; returns it."""
    RUN_FILES.append(name)
    return name


class CheckpointError(RuntimeError):
    """A checkpoint or run directory that is missing, damaged, in use or without room."""


def save(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None = None
) -> None:
    """Replaces a checkpoint atomically. weights: the network's state_dict. state: plain values and
    tensors, or None for weights alone. Raises CheckpointError without room.
    """
    recover(folder)
    fresh, previous = _siblings(folder)
    with writing(folder, _bytes_of([weights, state])):
        try:
            fresh.mkdir(parents=True)
            tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
            save_file(tensors, fresh / WEIGHTS)
            if state is not None:
                with open(fresh / STATE, "wb") as file:
                    torch.save(dict(state), file)
            checksums = {path.name: zlib.crc32(path.read_bytes()) for path in fresh.iterdir()}
            (fresh / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
            shutil.copymode(fresh / CHECKSUMS, fresh / WEIGHTS)  # save_file ignores the umask
            for path in [*fresh.iterdir(), fresh]:
                _sync(path)
            if folder.exists():
                os.rename(folder, previous)
            os.rename(fresh, folder)
            _sync(folder.parent)
        except Exception:
            recover(folder)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path) -> None:
    """Completes or undoes an interrupted save, and removes its other folders.

    The old folder is moved away only after the new one is synced: without a folder in its place the
    new one is complete, beside it the new one may be incomplete.
    """
    fresh, previous = _siblings(folder)
    if not folder.exists() and previous.exists():
        os.rename(fresh if fresh.exists() else previous, folder)
    for leftover in (fresh, previous):
        if leftover.exists():
            shutil.rmtree(leftover)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's weights on the CPU. Raises CheckpointError if missing or damaged."""
    # load_file accepts UTF-8 paths only
    return _read(folder, WEIGHTS, "; train that run first", lambda path: load(path.read_bytes()))


def load_state(folder: Path) -> dict[str, Any]:
    """Returns the state beside the weights. Raises CheckpointError if missing or damaged."""
    reader = partial(torch.load, map_location="cpu", weights_only=True)
    return _read(folder, STATE, ", nothing to resume from", reader)


def _read(folder: Path, name: str, otherwise: str, reader: Callable[[Path], Any]) -> Any:
    """Result of `reader` on a checkpoint's file. otherwise: end of the error for a missing one."""
    path = _whole(folder) / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {name} there{otherwise}")
    _verify(path)
    try:
        return reader(path)
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def run_weights(run: Path) -> Path:
    """Returns the checkpoint of a run directory, RUN/last, or RUN if it is one, as RUN/best."""
    for folder in (_whole(run / "last"), run):
        if (folder / WEIGHTS).is_file():
            return folder
    raise CheckpointError(
        f"{run}: no trained weights there, as init_from or teacher.run need them (@NAME is the run "
        "beside this one); train that run first, or name its directory"
    )


def run_of(run: Path) -> Path:
    """Returns the run directory of `run`, itself or the parent of a checkpoint."""
    return next((f for f in (run, run.parent) if (f / "config.yaml").is_file()), run)


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically; bytes of names that are not UTF-8 are escaped
    (program.printable). Raises CheckpointError without room.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replaces a binary file; see write_text. sync: force it to disk."""
    with writing(path, len(content)), replacing(path, sync=sync) as file:
        file.write(content)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replaces an .npz file; see write_text. Equal arrays give equal bytes."""
    with writing(path, sum(array.nbytes for array in arrays.values())), replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file, {} without one. Raises CheckpointError if damaged."""
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as content, np.load(content) as file:  # numpy leaves it open
            # a damaged directory: such a comment hides the members after it
            if any(member.comment for member in file.zip.infolist()):
                raise ValueError("its directory is wrong")
            return dict(file)
    except Exception as error:  # a dozen classes of zip and npy
        raise _damaged(path, error) from None


def write_json(path: Path, values: Any) -> None:
    """Replaces a JSON file; see write_text."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the content of a JSON file, or None if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def lock(folder: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Locks a folder until any end of the process. Waits, as a child of a killed pipeline stops
    within a step; removes a new folder without content. Raises CheckpointError.
    """
    is_new, owner, held = not folder.exists(), folder / ".owner", None
    while held is None:
        try:
            held = FileLock(folder / ".lock", timeout=wait_s).acquire()
        except FileNotFoundError:  # removed by its last owner
            continue
        except Timeout:
            process = owner.read_text(encoding="utf-8") if owner.is_file() else "unknown"
            raise CheckpointError(
                f"{folder}: in use by process {process}; wait for it, stop it, or take another "
                "--run-dir"
            ) from None
    with held:
        with writing(owner, 8):
            owner.write_text(str(os.getpid()), encoding="utf-8")
        sweep(folder)
        try:
            yield
        finally:
            if is_new and folder.is_dir() and set(os.listdir(folder)) <= {".lock", ".owner"}:
                shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Removes temporary files below a folder that no process locks: their writers were killed."""
    for path in folder.glob(pattern):
        # locked by a running process, or removed by another one
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yields a temporary file that replaces `path` at the end, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f".{glob.escape(path.name)}.*.tmp")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _held(fresh) as file:
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turns errors of writing about `size` bytes into a CheckpointError with the room needed."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save fails again while it closes its file: the system's error is the earlier one
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if cause is None:
            raise
        raise CheckpointError(
            f"{path}: cannot be written: {refusal(path, cause, size)}; make room there and run the "
            "command again (train: with --resume); earlier files are intact"
        ) from None


def refusal(path: Path, error: BaseException, size: int) -> str:
    """Returns the reason of a failed write of `size` bytes, and the room on the disk."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    reason = (isinstance(error, OSError) and error.strerror) or _first_line(error)
    return f"{reason}; {amount(size)} are needed and {amount(free)} are free in {folder}"


def amount(size: int) -> str:
    """Returns a size as '3.2 MB' or '1.1 GB'."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _held(path: Path) -> IO[bytes]:
    """An empty file, locked until it is closed."""
    while True:
        # truncated below, once locked
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            # its last owner may have moved or removed it before unlocking
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()
                return file
        file.close()


def _whole(folder: Path) -> Path:
    """The folder with the whole checkpoint; changes nothing, as its owner may be saving."""
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


def _verify(path: Path) -> None:
    """Raises CheckpointError for a file whose checksum differs from the saved one."""
    place = path.with_name(CHECKSUMS)
    while place.exists():
        saved = read_json(place)
        if saved is not None and saved.get(path.name) == zlib.crc32(path.read_bytes()):
            return
        if read_json(place) == saved:  # else its owner saved meanwhile
            raise _damaged(path, ValueError("wrong checksum"))


def _damaged(path: Path, why: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({_first_line(why)}); put a copy in its place, or train that run again "
        "with --overwrite"
    )


def _bytes_of(value: Any) -> int:
    """Bytes of the tensors in plain values at any depth."""
    if isinstance(value, Tensor):
        return value.nbytes
    inner = list(value.values()) if isinstance(value, Mapping) else value
    return sum(map(_bytes_of, inner)) if isinstance(inner, (list, tuple)) else 0


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
