"""How things are timed: the device, the interleaving, the statistics. Nothing here knows an op."""

import ctypes
import gc
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Step = Callable[[], object]
Timed = Callable[[], float]  # runs one step, returns milliseconds


class CpuDevice:
    """All of timing and memory that depends on the device; a GPU needs the same methods."""

    name = "cpu"

    def prepare(self, step: Step) -> Timed:
        """`step` as a call that returns its milliseconds (on a GPU: a captured graph's replay)."""

        def timed() -> float:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3

        return timed

    def describe(self) -> str:
        """The processor's name, with family and model where the name alone says little."""
        text = read("/proc/cpuinfo")
        found = {k.strip(): v.strip() for k, v in re.findall(r"^([^:\n]+):(.*)$", text, re.M)}
        name = found.get("model name", "unknown processor")
        if "cpu family" in found and "model" in found:
            name += f" (family {found['cpu family']} model {found['model']})"
        return name

    def cache_bytes(self) -> int:
        """The last-level caches of all cores, from sysfs; 32 MiB where it does not say."""
        levels: dict[int, dict[str, int]] = {}
        for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            size = re.match(r"(\d+)([KM])", read(folder / "size"))
            level = read(folder / "level").strip()
            if size and level:
                number = int(size[1]) << {"K": 10, "M": 20}[size[2]]
                levels.setdefault(int(level), {})[read(folder / "shared_cpu_list")] = number
        return sum(levels[max(levels)].values()) if levels else 32 << 20

    def peak_mb(self, step: Step) -> float | None:
        """How far resident memory rises while `step` runs, in MiB; None where unknown.

        Free pages are first returned to the system, so memory that the allocator kept from earlier
        counts again.
        """
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(
                "5"
            )  # the high-water mark falls to the present level
        except (OSError, AttributeError):
            return None
        before = status_kb("VmRSS")
        step()
        return max(0, status_kb("VmHWM") - before) / 1024


DEVICES = {"cpu": CpuDevice}


def read(path: str | Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def status_kb(field: str) -> int:
    """A field of /proc/self/status in kB."""
    found = re.search(rf"^{field}:\s+(\d+)", read("/proc/self/status"), re.M)
    return int(found[1]) if found else 0


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """How many input sets make twice the last-level cache: each then comes from memory."""
    return max(1, math.ceil(2 * cache_bytes / max(1, set_bytes)))


@contextmanager
def no_collection():
    """Garbage collection off, as the timed calls make no cycles that must be collected."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(timed: Sequence[Sequence[Timed]], rounds: int, warmup: int) -> np.ndarray:
    """Milliseconds (contenders, rounds): every contender once a round, in a new order each time.

    timed[i] holds contender i's call on each input set; every call takes the set after the one used
    last. A contender's turn is one call, so each finds the allocator as other work has left it, as
    a loss does in a training step between two passes through a network.
    """
    times = np.zeros((len(timed), rounds))
    turn = 0
    # A rotation would keep each contender behind the same neighbour, whose caches it then finds.
    shuffle = np.random.default_rng(0)
    with no_collection():
        for number in range(-warmup, rounds):
            for which in shuffle.permutation(len(timed)):
                ms = timed[which][turn % len(timed[which])]()
                turn += 1
                if number >= 0:
                    times[which, number] = ms
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
