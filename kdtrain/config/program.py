"""The process: its command, exit status, processors, signals and files."""

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
"""Environment variable of a stage's process: the pipeline whose end stops it."""
INTERRUPTED = 130
"""Exit status of an interrupted command that can be resumed."""


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
    """`path`, if it is a file or a link to one. Raises OSError otherwise, before the path is
    opened: to open a FIFO or a device may block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("expected a file, got a directory, FIFO, socket or device")
    return path


def printable(text: str, *, lines: bool = False) -> str:
    """`text` as one line (lines: as several), with Python escapes for characters that do not print:
    control characters, and bytes of a name that are not UTF-8.

    A name is text of os.fsdecode, with the surrogate U+DCXX for such a byte XX. Names are hashed as
    their bytes on disk (`name_bytes`) and shown as \\udcXX; JSON and YAML hold the escape \\udcXX,
    which is read back as the same name.
    """
    newline = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in newline else ascii(c)[1:-1] for c in text)


def name_bytes(text: str) -> bytes:
    """The bytes of a name; see `printable`."""
    return text.encode("utf-8", "surrogateescape")


_is_polled = _is_told = False


@contextlib.contextmanager
def signals_heard() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and the end of the pipeline that started this process raise
    KeyboardInterrupt at once. Inside `polled`, the first makes told_to_stop() true and the second
    raises. The handlers of before are restored on exit.
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
                # to the main thread, so that its blocking system call returns
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
    """Inside, the caller polls told_to_stop() and stops where it can resume. Raises
    KeyboardInterrupt on exit after a signal that the caller did not see.
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
    """Whether a signal was received."""
    return _is_told
