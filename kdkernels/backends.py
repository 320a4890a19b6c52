"""Which backend each op has on which device, the choice for a call, and the SIMD level.

"eager" is plain differentiable PyTorch on any device, "native" the C++ kernels of csrc/ on the CPU,
"triton" the Triton kernels on NVIDIA and AMD GPUs (and, under TRITON_INTERPRET=1, on CPU tensors,
for tests). The table is computed once, at import, without initializing a GPU: a later check would
break `torch.compile(fullgraph=True)`.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels.native import DTYPE_CODES, extension

OPS = (
    "kd_cross_entropy",
    "linear_kd_cross_entropy",
    "hidden_l2",
    "triplet_loss",
    "batch_triplet_loss",
    "nearest_neighbor",
)
BACKENDS = ("native", "triton", "eager")  # in the order of preference
LEVELS = ("baseline", "v3", "v4")  # KDKERNELS_ISA; x86-64-v3 is AVX2, x86-64-v4 is AVX-512


def native_missing() -> str:
    """The reason why there are no native kernels here; empty where there are."""
    if extension is not None:
        return ""
    try:
        from kdkernels._build_info import NATIVE_MISSING
    except ImportError:
        return "the extension kdkernels._native was not built: run `pip install .` in the checkout"
    return (
        NATIVE_MISSING or "kdkernels._native is missing although it was built: reinstall kdkernels"
    )


def triton_missing() -> str:
    """The reason why there are no Triton kernels here; empty where they can be compiled."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton (Linux)"
    return ""


def is_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not triton_missing()


def set_isa(name: str) -> None:
    """Sets the level of the native kernels: "v4" (AVX-512), "v3" (AVX2) or "baseline".

    The environment variable KDKERNELS_ISA does the same at import. Raises ValueError for an unknown
    level and for a level that this processor or this build lacks.
    """
    if name not in LEVELS:
        raise ValueError(f"set_isa: level must be one of {', '.join(LEVELS)}, got {name!r}")
    if extension is None or not extension.set_level(LEVELS.index(name)):
        raise ValueError(
            f"set_isa: level {name!r} is not available here; highest: {isa_levels()[-1:]}"
        )


def isa() -> str:
    """The current instruction-set level of the native kernels; empty without them."""
    return LEVELS[extension.level()] if extension is not None else ""


def isa_levels() -> list[str]:
    """The levels available here, lowest first; empty without native kernels."""
    if extension is None:
        return []
    now = extension.level()
    levels = [name for number, name in enumerate(LEVELS) if extension.set_level(number)]
    extension.set_level(now)
    return levels


def _find_backends() -> dict[tuple[str, str], tuple[str, ...]]:
    on_cpu = [name for name, there in (("native", extension is not None), ("eager", True)) if there]
    if is_interpreted():
        on_cpu.append("triton")  # slow, so never the default
    on_gpu = ("eager",) if triton_missing() else ("triton", "eager")
    table = {}
    for op in OPS:
        table[op, "cpu"] = tuple(on_cpu)
        table[op, "cuda"] = on_gpu  # ROCm devices are "cuda" to torch
    return table


if extension is not None and os.environ.get("KDKERNELS_ISA"):
    set_isa(os.environ["KDKERNELS_ISA"])
AVAILABLE = _find_backends()


def backends(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that `op` has on a type of device ("cpu", "cuda"), the default first."""
    return AVAILABLE.get((op, device_type), ("eager",))


def choose_backend(op: str, backend: str | None, tensors: Sequence[Tensor]) -> str:
    """The backend to run: the named one, or the first available for the tensors' device.

    float64 runs on eager where no backend is named. Raises ValueError for a named backend that is
    not available.
    """
    device_type = tensors[0].device.type
    available = backends(op, device_type)
    takes_dtypes = all(t.dtype in DTYPE_CODES for t in tensors if t.is_floating_point())
    if backend is None:
        backend = available[0] if takes_dtypes else "eager"
    if backend not in available:
        known = "" if backend in BACKENDS else f"; the backends are {', '.join(sorted(BACKENDS))}"
        raise ValueError(
            f"{op}: backend {backend!r} has no kernel for {device_type!r} tensors; "
            f"available here: {', '.join(available)}{known}"
        )
    if backend == "eager":
        return backend
    if not takes_dtypes:
        raise ValueError(
            f"{op}: backend {backend!r} takes float32, bfloat16 and float16; "
            f"use backend='eager' for "
            f"{', '.join(sorted({str(t.dtype) for t in tensors}))}"
        )
    refuse_transforms(op, tensors)
    return backend


def refuse_transforms(op: str, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError where a kernel would drop derivatives: forward-mode duals, torch.func."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    for t in tensors:
        wrapped = functorch.is_gradtrackingtensor(t) or functorch.is_batchedtensor(t)
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None
        if wrapped or dual:
            raise RuntimeError(
                f"{op}: forward-mode derivatives and torch.func transforms are not available in "
                f'kernels: use backend="eager"'
            )
