"""What every room may know of the process: its command, exit status and processors."""

from __future__ import annotations

import os

PROGRAM = "python -m kdtrain"
PARENT = "KDTRAIN_PARENT"
"""Environment variable of a stage's process: the pipeline whose death stops it."""
INTERRUPTED = 130
"""Exit status of an interrupted command that can be continued."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
