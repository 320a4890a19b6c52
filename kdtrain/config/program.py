"""What every room may know of the process: its command, exit status, processors and files."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = "python -m kdtrain"
PARENT = "KDTRAIN_PARENT"
"""Environment variable of a stage's process: the pipeline whose death stops it."""
INTERRUPTED = 130
"""Exit status of an interrupted command that can be continued."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(jobs: int) -> int:
    """Threads of each of `jobs` runs side by side: OMP_NUM_THREADS where it is set, else an equal
    share of the processors.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else max(1, cores() // jobs)


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


_is_polled = _is_told = False


@contextlib.contextmanager
def signals_heard() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and the death of the pipeline that started this process raise
    KeyboardInterrupt at once; inside `polled`, told_to_stop() answers true, and a second one raises
    it. Outside, signals do what they did before.
    """
    global _is_told

    def on_signal(number: int, _: Any) -> None:
        global _is_told
        at_once, _is_told = _is_told or not _is_polled, True
        if at_once:
            raise KeyboardInterrupt(f"signal {number}")
        print("stopping after this step (press again to stop at once)", file=sys.stderr)

    parent, ended = os.environ.get(PARENT), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            if parent is not None and os.getppid() != int(parent):
                # to the main thread, so that a system call it waits in returns
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return

    earlier = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        _is_told = False
        ended.set()
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def polled() -> Iterator[None]:
    """Inside, the caller asks told_to_stop() again and again, so that it ends where it can be
    continued. Raises KeyboardInterrupt at the end where nobody has asked since.
    """
    global _is_polled
    _is_polled = True
    try:
        yield
    finally:
        _is_polled = False
    if _is_told:
        raise KeyboardInterrupt


def told_to_stop() -> bool:
    """Whether a signal came."""
    return _is_told
