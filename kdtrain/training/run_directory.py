"""A run's directory: opened to train, to resume, or to reuse a finished run.

Every decision is made under the directory's lock, for processes that start at once.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtrain.config import Config, ConfigError, settings
from kdtrain.training import checkpoint
from kdtrain.training.environment import check_device
from kdtrain.training.journal.journal import check_board
from kdtrain.training.keys import differences
from kdtrain.training.preparation import TrainingError, check_inputs

CONFIG = checkpoint.run_file("config.yaml")


@contextlib.contextmanager
def opened(
    config: Config, folder: Path, *, resume: bool, overwrite: bool
) -> Iterator[dict[str, Any] | None]:
    """Locks a run directory; yields the results of a finished run of this config, or None to train.

    resume: continue an unfinished run. overwrite: remove the files of a run. Raises ConfigError for
    any other content and for a config that cannot be trained here, TrainingError for a run that
    diverged, CheckpointError for a directory in use.
    """
    _check_owner(folder, resume, overwrite)  # before a lock file is written there
    with checkpoint.lock(folder):
        _check_owner(folder, resume, overwrite)
        finished = None
        if not overwrite and (folder / CONFIG).exists():
            finished = _found(config, folder, resume)
        if finished is None:
            check_device(config)
            check_board(config)
            check_inputs(config, folder)
        if overwrite:
            clear(folder)
        yield finished


def has_files(folder: Path) -> bool:
    """True if anything but hidden files, such as the lock, is in the folder."""
    return folder.exists() and any(not f.name.startswith(".") for f in folder.iterdir())


def _check_owner(folder: Path, resume: bool, overwrite: bool) -> None:
    if (folder / CONFIG).exists():
        return
    if resume:
        raise ConfigError(f"{folder}: no run to resume there; leave --resume out to start one")
    if has_files(folder):
        raise ConfigError(
            f"{folder}: not a run directory, so --overwrite removes nothing there"
            if overwrite
            else f"{folder}: not empty and not a run directory; choose another --run-dir"
        )


def _found(config: Config, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The results of the run in a directory; None for an unfinished one to resume."""
    lines = differences(config, settings.build(settings.read_recipe(folder / CONFIG)))
    if lines:
        raise ConfigError(
            f"{folder}: holds a run of another config ({'; '.join(lines[:3])}"
            f"{'; ...' if len(lines) > 3 else ''}); choose another --run-dir, "
            "or pass --overwrite to remove it"
        )
    if finished := checkpoint.read_json(folder / "results.json"):
        return finished
    if diverged := checkpoint.read_json(folder / "diverged.json"):
        raise TrainingError(
            f"{folder}: ended before: {diverged['message']} It would do so again; --overwrite "
            "trains it again, with other settings if given"
        )
    if not resume:
        raise ConfigError(
            f"{folder}: holds an unfinished run; pass --resume to continue it "
            "or --overwrite to remove it"
        )
    return None


def clear(folder: Path) -> None:
    """Removes only the files of a run: first those of its end, last its config."""
    ends = ("results.json", "diverged.json")
    names = [name for name in checkpoint.RUN_FILES if name not in (*ends, CONFIG)]
    for path in [folder / name for name in (*ends, *names, CONFIG)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
