"""`python -m kdkernels` and the command `kdkernels`: each op's backends here, and the reasons for
missing ones."""

import argparse
import importlib.metadata
import os
import platform
import signal
import sys

import torch

import kdkernels
from kdkernels.backends import (
    OPS,
    backends,
    is_interpreted,
    isa,
    isa_levels,
    native_missing,
    triton_missing,
)


def table() -> str:
    """Ops x devices x backends as text, with the reason for everything that is missing."""
    lines = [
        f"kdkernels {kdkernels.__version__}, torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        "",
        f"{'op':<24} {'device':<8} {'backends (the first is the default)'}",
    ]
    for op in OPS:
        for device in ("cpu", "cuda"):
            lines.append(f"{op:<24} {device:<8} {', '.join(backends(op, device))}")
    lines.append("")
    if not native_missing():
        levels = ", ".join(isa_levels())
        lines.append(f"native on cpu: {isa()} (available: {levels}; KDKERNELS_ISA lowers it)")
    else:
        lines.append(f"native on cpu: missing, {native_missing()}")
    lines.append("native on cuda: missing, this version has no CUDA kernels yet")
    missing = triton_missing()
    if missing:
        lines.append(f"triton: missing, {missing}")
    elif is_interpreted():
        lines.append("triton on cpu: in Triton's interpreter (TRITON_INTERPRET=1), for tests")
    else:
        version = importlib.metadata.version("triton")
        lines.append(f"triton on cuda: {version}, for NVIDIA GPUs from sm_80 on and AMD's gfx942")
    if not torch.version.cuda and not torch.version.hip:
        lines.append("cuda: this build of torch has no GPU support")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or the version."""
    parser = argparse.ArgumentParser(
        prog="kdkernels", description="Prints the backends of each op."
    )
    version = f"kdkernels {kdkernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.parse_args(argv)
    try:
        print(table(), flush=True)
    except BrokenPipeError:  # the reader is gone: end as SIGPIPE would, without a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
