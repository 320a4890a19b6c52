"""The devices: how a call is timed and its memory measured. Nothing here depends on an op."""

import ctypes
import gc
import importlib
import importlib.util
import math
import re
import subprocess
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import kdkernels
from bench.timing import Step, Timed, read

BEFORE_CAPTURE = 2  # calls of a step before it is captured: they compile, and fill caches
# A spin of about 0.2 ms in front of what is timed: the host has queued all of it when the spin
# ends, so that no launch is counted.
SPIN_CYCLES = 400_000
WALL_MS = 4.0  # a wall time is that of so many calls that they take about as long
MOST_WALL_CALLS = 100
AMD_CACHE = 256 << 20  # of an MI300's last level, which its properties do not contain


class CaptureFailed(RuntimeError):
    """A step could not be captured in a CUDA graph; the process should not capture another."""


class CpuDevice:
    """The device-dependent parts of timing and memory; CudaDevice has the same methods."""

    name = where = "cpu"  # in rows; to torch
    timing = "call"  # what `prepare` measures: forward and backward as they are called
    warmup = 2  # rounds before the counted ones

    def versions(self) -> dict[str, str]:
        """The versions in a row beside torch's: none on a CPU."""
        return {"driver": "", "triton": ""}

    def threads(self) -> int | None:
        """The threads that ops run on."""
        return torch.get_num_threads()

    def isa(self) -> str:
        """The instruction-set level that kdkernels runs at."""
        return kdkernels.isa()

    def between_rounds(self) -> None:
        """Nothing: timed calls leave no cycles that hold much memory."""

    def prepare(self, step: Step, place: int) -> Timed:
        """`step` on the `place`th input set as a call that returns its milliseconds."""

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
        """The last-level caches of all cores, from sysfs; 32 MiB without an entry."""
        levels: dict[int, dict[str, int]] = {}
        for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            size = re.match(r"(\d+)([KM])", read(folder / "size"))
            level = read(folder / "level").strip()
            if size and level:
                number = int(size[1]) << {"K": 10, "M": 20}[size[2]]
                levels.setdefault(int(level), {})[read(folder / "shared_cpu_list")] = number
        return sum(levels[max(levels)].values()) if levels else 32 << 20

    def peak_mb(self, step: Step) -> float | None:
        """The rise of resident memory while `step` runs, in MiB; None where unknown.

        Free pages are first returned to the system, so memory that the allocator has cached
        counts again.
        """
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            # lowers the high-water mark to the present level
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        before = status_kb("VmRSS")
        step()
        return max(0, status_kb("VmHWM") - before) / 1024


class CudaDevice:
    """Times by replays of CUDA graphs and by wall clock; memory by torch's allocator.

    A gradient that backward gives away is safe under replays: every replay computes it again
    before it is scaled in place.
    """

    name = where = "cuda"
    timing = "replay"
    warmup = 5  # rounds before the counted ones: the clocks rise with the load

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                f"bench: --device cuda needs a GPU, and torch {torch.__version__} finds none here "
                "(torch.cuda.is_available() is False)"
            )
        self.properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.pools: dict[int, Any] = {}  # of the graphs, by place

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The one stream of all captures, for each stream gets a cuBLAS workspace."""
        return torch.cuda.Stream()

    def describe(self) -> str:
        """The device's name."""
        return self.properties.name

    def versions(self) -> dict[str, str]:
        """The driver's version and Triton's."""
        triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
        return {"driver": driver_version(), "triton": triton.__version__ if triton else "none"}

    def threads(self) -> int | None:
        """None: the host's threads do no work here."""
        return None

    def isa(self) -> str:
        """Empty: a GPU has no instruction-set levels to choose from."""
        return ""

    def cache_bytes(self) -> int:
        """The L2 cache."""
        size = self.properties.L2_cache_size
        return max(size, AMD_CACHE) if torch.version.hip else size

    def peak_mb(self, step: Step) -> float:
        """The rise of allocated memory while `step` runs, in MiB. A workspace that `step` allocates
        in its first call (cuBLAS) counts: call it once before."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def between_rounds(self) -> None:
        """Frees memory held by cycles alone: a few N x N matrices more per round would not fit."""
        gc.collect()

    def capture(self, step: Step, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, object]:
        """A graph of `step`, and the result of `step`: tensors that every replay fills again."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(BEFORE_CAPTURE):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                result = step()
        except RuntimeError as error:
            raise CaptureFailed(str(error).strip().split("\n")[0]) from error
        graph.replay()  # the first one uploads the graph
        torch.cuda.synchronize()
        return graph, result

    def replayed(self, step: Step) -> object:
        """The result of `step` after its graph's second replay, copied."""
        graph, result = self.capture(step)
        graph.replay()
        torch.cuda.synchronize()
        return copied(result)

    def prepare(self, step: Step, place: int) -> Timed:
        """`step` on the `place`th input set as a call that returns the milliseconds of its graph's
        replay: the kernels alone, and the gaps between them.

        The graphs of one place share their memory, as they run one after the other and pass nothing
        on; those of another place have their own, so that results rotate like the inputs do.
        """
        if place not in self.pools:
            self.pools[place] = torch.cuda.graph_pool_handle()
        graph, _ = self.capture(step, self.pools[place])
        return between_events(graph.replay, spin=True)

    def events(self, step: Step) -> Timed:
        """`step` called eagerly between two events, for a step that no graph can hold. The time in
        which the device waits for the host counts."""
        step()
        return between_events(step, spin=False)

    def wall(self, steps: Sequence[Step]) -> Timed:
        """The milliseconds of a call of the steps in turn, launch and dispatch included: many calls
        are queued, then the host waits for the device."""
        turn = 0

        def timed(calls: int) -> float:
            nonlocal turn
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                steps[turn % len(steps)]()
                turn += 1
            torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3 / calls

        timed(len(steps))
        calls = min(MOST_WALL_CALLS, max(1, math.ceil(WALL_MS / timed(1))))
        return lambda: timed(calls)


def between_events(run: Step, spin: bool) -> Timed:
    """`run` as a call that returns the milliseconds between an event before and one after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        if spin:
            torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def copied(value: Any) -> Any:
    """The tensors of nested tuples and lists, copied."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(copied(v) for v in value)


def driver_version() -> str:
    """The version of the GPU's driver; "unknown" where neither the tool nor the file has it."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found = done.stdout.split() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        found = []
    found += re.findall(r"\b\d{3}\.\d+(?:\.\d+)?\b", read("/proc/driver/nvidia/version"))
    return found[0] if found else "unknown"


def status_kb(field: str) -> int:
    """A field of /proc/self/status in kB."""
    found = re.search(rf"^{field}:\s+(\d+)", read("/proc/self/status"), re.M)
    return int(found[1]) if found else 0


DEVICES = {"cpu": CpuDevice, "cuda": CudaDevice}
