"""Run folders on disk: atomic checkpoints with recovery, atomic small files, and one writer at a
time.

A checkpoint is a folder: weights.safetensors (the network), state.pt (optimiser, extra modules,
position, random state; loadable with weights_only) and checksums.json, the CRC-32 of both. It is
written beside its place, synced, and swapped in by rename: whenever the process or the machine
dies, the old one or the new one is whole. Reading compares the checksums; a folder without
checksums.json, as of weights copied by hand, is read as it is.

Any other file is written as .NAME.PID.tmp, locked by its writer, and renamed. What a killed process
left of it is removed by the next process that holds the folder or writes the same file.
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
    *(LookupError, ValueError, TypeError, AttributeError),  # the unpickler's, on any rubbish
)
"""What reading weights or state raises where they are damaged."""

RUN_FILES: list[str] = []
"""Names in a run directory that a run writes: what --overwrite removes."""


def run_file(name: str) -> str:
    """Declares a file or folder that a run writes into its directory; returns the name."""
    RUN_FILES.append(name)
    return name


for _name in (LAST, BEST):
    for _suffix in (".new", ".previous", ""):  # the siblings first: it must not come back from them
        run_file(f"{_name}{_suffix}")


class CheckpointError(RuntimeError):
    """A checkpoint or run folder that is missing, damaged, in use or without room; what to do."""


def save(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint so that `folder` is at every moment the previous one or this one, whole.

    weights: the network's state_dict. state: plain values and tensors, or None for weights alone.
    Raises CheckpointError where there is no room.
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
            checksums = {path.name: _checksum(path) for path in fresh.iterdir()}
            (fresh / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
            shutil.copymode(fresh / CHECKSUMS, fresh / WEIGHTS)  # save_file makes it the owner's
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
    """The weights of a checkpoint, on the CPU. Raises CheckpointError where none or damaged."""
    # load_file takes no path that is not UTF-8
    return _read(folder, WEIGHTS, "; train that run first", lambda path: load(path.read_bytes()))


def load_state(folder: Path) -> dict[str, Any]:
    """The state saved beside the weights. Raises CheckpointError when it is missing or damaged."""
    reader = partial(torch.load, map_location="cpu", weights_only=True)
    return _read(folder, STATE, ", nothing to resume from", reader)


def _read(folder: Path, name: str, otherwise: str, reader: Callable[[Path], Any]) -> Any:
    """What `reader` makes of a checkpoint's file; otherwise: said where it is not there."""
    path = _whole(folder) / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {name} there{otherwise}")
    _verify(path)
    try:
        return reader(path)
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def run_weights(run: Path) -> Path:
    """The checkpoint of a run folder: RUN/last, or RUN itself when it is one (RUN/best)."""
    for folder in (_whole(run / "last"), run):
        if (folder / WEIGHTS).is_file():
            return folder
    raise CheckpointError(
        f"{run}: no trained weights there, which a setting as init_from or teacher.run asks for "
        "(@NAME is the run beside this one); train that run first, or name its folder"
    )


def run_of(run: Path) -> Path:
    """Where config.yaml lies: `run`, or the run that it is a checkpoint of; else `run` itself."""
    return next((f for f in (run, run.parent) if (f / "config.yaml").is_file()), run)


def write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader or a crash sees the old content or the new one, whole. Bytes
    of a name that are not UTF-8 become escapes; see program.printable. Raises CheckpointError where
    there is no room for it.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace a file that is no text; see write_text. sync: force it to disk."""
    with writing(path, len(content)), replacing(path, sync=sync) as file:
        file.write(content)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace an .npz file; see write_text. The same arrays give the same bytes."""
    with writing(path, sum(array.nbytes for array in arrays.values())), replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, {} where it is missing. Raises CheckpointError for damage."""
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as content, np.load(content) as file:  # numpy leaves it open
            # a comment that nobody wrote hides the members after it
            if any(member.comment for member in file.zip.infolist()):
                raise ValueError("its directory is wrong")
            return dict(file)
    except Exception as error:  # on rubbish zip and npy raise a dozen classes
        raise _damaged(path, error) from None


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file; see write_text."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


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
    is_new, owner, held = not folder.exists(), folder / ".owner", None
    while held is None:
        try:
            held = FileLock(folder / ".lock", timeout=wait_s).acquire()
        except FileNotFoundError:  # its last owner took the folder away
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
    """Remove temporary files below a folder whose writers were killed: nobody holds their lock."""
    for path in folder.glob(pattern):
        # held by a living process, or removed by another one that sweeps
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A temporary file that takes the place of `path` at the end, or is removed."""
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
    """Around a write of about `size` bytes to `path`. Raises CheckpointError: room needed, free."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save fails once more while it closes its file: the system's error is the one before
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if cause is None:
            raise
        raise CheckpointError(
            f"{path}: cannot be written: {refusal(path, cause, size)}; make room there and run the "
            "command again (train: with --resume); what was saved before is whole"
        ) from None


def refusal(path: Path, error: BaseException, size: int) -> str:
    """Why the system refuses to write `size` bytes to a path, and the room on its disk."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    reason = (isinstance(error, OSError) and error.strerror) or _first_line(error)
    return f"{reason}; {amount(size)} are needed and {amount(free)} are free in {folder}"


def amount(size: int) -> str:
    """'3.2 MB', '1.1 GB'."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _held(path: Path) -> IO[bytes]:
    """An empty file, locked until it is closed."""
    while True:
        # emptied only when it is ours
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # its last owner may have moved or removed it before it let go
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate()
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _whole(folder: Path) -> Path:
    """Where a reader finds the whole checkpoint; changes nothing, as its owner may be saving."""
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


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    return total


def _verify(path: Path) -> None:
    """Raises CheckpointError where a checkpoint's file is not what was saved."""
    place = path.with_name(CHECKSUMS)
    while place.exists():
        known = read_json(place)
        if known is not None and known.get(path.name) == _checksum(path):
            return
        if read_json(place) == known:  # else its owner saved meanwhile
            raise _damaged(path, ValueError("its checksum is another"))


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
