"""`python -m kdkernels`: the backends of each op here, and why the rest is missing."""

import platform

import torch

import kdkernels
from kdkernels import library


def table() -> str:
    """Ops x devices x backends as text, with the reason for everything that is missing."""
    lines = [
        f"kdkernels {kdkernels.__version__}, torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        "",
        f"{'op':<20} {'device':<8} {'backends (the first is the default)'}",
    ]
    for op in library.OPS:
        for device in ("cpu", "cuda"):
            lines.append(f"{op:<20} {device:<8} {', '.join(library.backends(op, device))}")
    lines.append("")
    if library.native is not None:
        levels = ", ".join(library.isa_levels())
        lines.append(
            f"native on cpu: {library.isa()} (available: {levels}; KDKERNELS_ISA lowers it)"
        )
    else:
        lines.append(f"native on cpu: missing, {library.native_missing()}")
    lines.append("native on cuda: missing, this version has no CUDA kernels yet")
    lines.append("triton: missing, this version has no Triton kernels yet")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
