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


def threads_of(jobs: int) -> int:
    """Threads of each of `jobs` runs side by side: OMP_NUM_THREADS where it is set, else an equal
    share of the processors.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else max(1, cores() // jobs)
