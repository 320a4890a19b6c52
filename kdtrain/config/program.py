"""What every room may know of the process: its command, exit status, processors and files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

PROGRAM = "python -m kdtrain"
PARENT = "KDTRAIN_PARENT"
"""Environment variable of a stage's process: the pipeline whose death stops it."""
INTERRUPTED = 130
"""Exit status of an interrupted command that can be continued."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def regular(path: Path) -> Path:
    """`path`, where it is a file or a link to one. Raises OSError otherwise, before anything is
    opened: a FIFO or a device may block or act when it is.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("expected a file, got a directory, FIFO, socket or device")
    return path


def printable(text: str) -> str:
    """`text` as one line for people: a character that does not print, as control characters and the
    bytes of a name that are not UTF-8, is written as its Python escape.

    A name is text as os.fsdecode gives it, where such a byte XX is the surrogate U+DCXX. It is
    hashed as the bytes that it has on disk (`name_bytes`), written to JSON and YAML as the escape
    \\udcXX, which reads back as the same name, and shown as \\udcXX everywhere else.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def name_bytes(text: str) -> bytes:
    """The bytes of a name; see `printable`."""
    return text.encode("utf-8", "surrogateescape")
