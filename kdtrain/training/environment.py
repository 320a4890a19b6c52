"""torch's settings and random state, and the environment that a run's last bits depend on."""

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
    """Returns the conditions of bitwise identical results, beside the config."""
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
    """Raises ConfigError when train.device cannot be used here."""
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
    """Sets threads, denormals and determinism by the config, and restores them afterwards."""
    flushing = sys.float_info.min / 2 == 0  # torch has no getter
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # which would fill every new tensor with NaN
    mode: Any = torch.utils.deterministic
    filling = mode.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # first, as worker threads inherit the flag from the thread that starts them
    torch.set_flush_denormal(True)
    # outside of try: a signal during its imports would make a second call fail too
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
    """Returns torch's random state of the CPU and of the run's device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restores the result of random_state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
