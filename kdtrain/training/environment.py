"""torch's settings, random state, and a record of everything that a run's last bits depend on."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels import __version__ as kdkernels_version
from kdkernels import isa
from kdtrain.config import Config, ConfigError


def environment(config: Config) -> dict[str, Any]:
    """What bit-identity depends on beside the config."""
    on_cuda = config.train.device.startswith("cuda")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "kdkernels": kdkernels_version,
        "simd": isa(),
        "threads": torch.get_num_threads(),
        "workers": config.data.workers,
        "device": torch.cuda.get_device_name(config.train.device) if on_cuda else _processor(),
    }


def check_device(config: Config) -> None:
    """Raises ConfigError when train.device cannot be used here, and says what can."""
    try:
        torch.empty(0, device=config.train.device)
        if torch.device(config.train.device).type == "meta":
            raise RuntimeError("meta tensors hold no numbers")
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(
            f"train.device {config.train.device}: cannot be used here "
            f"({str(error).splitlines()[0]}); there is: {', '.join(here)}"
        ) from None


@contextlib.contextmanager
def computing(config: Config) -> Iterator[None]:
    """Threads, denormals and determinism as the config says; torch's own come back afterwards."""
    flushing = sys.float_info.min / 2 == 0  # torch does not say
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # whose filling of new tensors with NaN is a sweep over each that nothing needs
    mode: Any = torch.utils.deterministic
    filling = mode.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # worker threads inherit the flag from the thread that starts them, so it is set first
    torch.set_flush_denormal(True)
    # imports much: where a signal cuts that short, it cannot be called again to restore
    torch.use_deterministic_algorithms(config.train.deterministic)
    try:
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        mode.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_flush_denormal(flushing)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        mode.fill_uninitialized_memory = filling


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random state, of the processor and of the run's device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what random_state returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
