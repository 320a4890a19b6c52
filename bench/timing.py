"""The interleaving of timed calls, and their statistics. Nothing here depends on an op."""

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Step = Callable[[], object]
Timed = Callable[[], float]  # runs one step, returns milliseconds


def read(path: str | Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """The number of input sets beyond twice the last-level cache: each then comes from memory."""
    return max(1, math.ceil(2 * cache_bytes / max(1, set_bytes)))


@contextmanager
def no_collection():
    """Garbage collection off inside timed calls; existing objects are frozen."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def interleave(
    timed: Sequence[Sequence[Timed]], rounds: int, warmup: int, between: Step = lambda: None
) -> np.ndarray:
    """Milliseconds (contenders, rounds): every contender once per round, in a new order per
    round, and `between` after each round.

    timed[i] holds contender i's call on each input set; every call takes the next set.
    A contender's turn is one call, so each finds the allocator in the state that other work left,
    as a loss does in a training step between two passes through a network.
    """
    times = np.zeros((len(timed), rounds))
    turn = 0
    # A rotation would keep each contender behind the same neighbor, whose caches it then finds.
    shuffle = np.random.default_rng(0)
    with no_collection():
        for number in range(-warmup, rounds):
            for which in shuffle.permutation(len(timed)):
                ms = timed[which][turn % len(timed[which])]()
                turn += 1
                if number >= 0:
                    times[which, number] = ms
            between()
    return times


def quartiles(times: np.ndarray) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    return (
        float(np.median(times)),
        float(np.quantile(times, 0.25)),
        float(np.quantile(times, 0.75)),
    )


def ratio_of_medians(
    over: np.ndarray, under: np.ndarray, resamples: int = 2000
) -> tuple[float, float, float]:
    """median(over) / median(under), 95 % bootstrap interval; rounds resampled in pairs."""
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(over), size=(resamples, len(over)))
    ratios = np.median(over[picks], axis=1) / np.median(under[picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(over) / np.median(under)), float(low), float(high)


class OtherLoad:
    """The share of the cores that other processes and the hypervisor took meanwhile."""

    def __init__(self) -> None:
        self.start = (self.machine(), self.own(), time.monotonic())

    @staticmethod
    def machine() -> float | None:
        """Busy seconds of all cores so far: user, nice, system, irq, softirq, steal."""
        fields = read("/proc/stat").split("\n", 1)[0].split()
        if len(fields) < 9:
            return None
        ticks = [int(x) for x in fields[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def own() -> float:
        used = os.times()
        return used.user + used.system

    def per_core(self) -> float | None:
        """Others' busy cores per core since the start, 0 to 1; None without /proc/stat."""
        machine, own, start = self.start
        now = self.machine()
        if machine is None or now is None:
            return None
        elapsed = max(1e-9, time.monotonic() - start)
        busy = (now - machine) - (self.own() - own)
        return max(0.0, busy / elapsed / (os.cpu_count() or 1))
