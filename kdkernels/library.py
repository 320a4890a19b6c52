"""What every op shares: registration, choice of backend, argument checks, backward's hand-over.

Backends: "eager" is plain differentiable PyTorch on any device, "native" the C++ kernels of csrc/
on the CPU, "triton" the Triton kernels on NVIDIA and AMD GPUs (and, under TRITON_INTERPRET=1, on
CPU tensors, for tests). Which op has which backend on which device is decided once, at import, and
without touching a GPU: asking later would break `torch.compile(fullgraph=True)`.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

native: Any
try:
    native = importlib.import_module("kdkernels._native")
except ModuleNotFoundError as error:
    if error.name != "kdkernels._native":
        raise
    native = None  # not built; one that is there but does not load raises ImportError, to be seen

OPS = (
    "kd_cross_entropy",
    "linear_kd_cross_entropy",
    "hidden_l2",
    "triplet_loss",
    "batch_triplet_loss",
    "nearest_neighbor",
)
BACKENDS = ("native", "triton", "eager")  # in the order of preference
REDUCTIONS = ("mean", "sum", "none")
LEVELS = ("baseline", "v3", "v4")  # KDKERNELS_ISA; x86-64-v3 is AVX2, x86-64-v4 is AVX-512

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

library = torch.library.Library("kdkernels", "DEF")


def native_missing() -> str:
    """Why there are no native kernels here; empty where there are."""
    if native is not None:
        return ""
    try:
        from kdkernels._build_info import NATIVE_MISSING
    except ImportError:
        return "the extension kdkernels._native was not built: run `pip install .` in the checkout"
    return (
        NATIVE_MISSING or "kdkernels._native is missing although it was built: reinstall kdkernels"
    )


def triton_missing() -> str:
    """Why there are no Triton kernels here; empty where they can be compiled."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton (Linux)"
    return ""


def is_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not triton_missing()


def set_isa(name: str) -> None:
    """Makes the native kernels run at a level: "v4" (AVX-512), "v3" (AVX2) or "baseline".

    The environment variable KDKERNELS_ISA does the same at import. Raises ValueError for an unknown
    level and for one that this processor or this build lacks.
    """
    if name not in LEVELS:
        raise ValueError(f"set_isa: level must be one of {', '.join(LEVELS)}, got {name!r}")
    if native is None or not native.set_level(LEVELS.index(name)):
        raise ValueError(
            f"set_isa: level {name!r} is not available here; highest: {isa_levels()[-1:]}"
        )


def isa() -> str:
    """The instruction-set level that the native kernels run at now; empty without them."""
    return LEVELS[native.level()] if native is not None else ""


def isa_levels() -> list[str]:
    """The levels that can run here, lowest first; empty without native kernels."""
    if native is None:
        return []
    now = native.level()
    levels = [name for number, name in enumerate(LEVELS) if native.set_level(number)]
    native.set_level(now)
    return levels


def _find_backends() -> dict[tuple[str, str], tuple[str, ...]]:
    on_cpu = [name for name, there in (("native", native is not None), ("eager", True)) if there]
    if is_interpreted():
        on_cpu.append("triton")  # slow, so never the default
    on_gpu = ("eager",) if triton_missing() else ("triton", "eager")
    table = {}
    for op in OPS:
        table[op, "cpu"] = tuple(on_cpu)
        table[op, "cuda"] = on_gpu  # ROCm devices are "cuda" to torch
    return table


if native is not None and os.environ.get("KDKERNELS_ISA"):
    set_isa(os.environ["KDKERNELS_ISA"])
AVAILABLE = _find_backends()


def backends(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that `op` has on a type of device ("cpu", "cuda"), the default first."""
    return AVAILABLE.get((op, device_type), ("eager",))


def choose_backend(op: str, backend: str | None, tensors: Sequence[Tensor]) -> str:
    """The backend to run: the one that was named, or the first available for the tensors' device.

    float64 runs on eager where no backend is named. A named backend that is not there is a
    ValueError.
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
    """Raises where a kernel would drop derivatives: forward-mode duals, torch.func's wrappers."""
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


def define(
    name: str, signature: str, fake: Callable, *, native: Callable | None, triton: str | None
) -> None:
    """Registers a raw op for each backend: `name` for native, `name`_triton for triton.

    signature: "(Tensor student, ...) -> (...)". triton: "module:function", imported at the first
    call, as importing Triton takes longer than importing kdkernels.
    """
    if native is not None:
        library.define(f"{name}{signature}")
        torch.library.register_fake(f"kdkernels::{name}", fake, lib=library)
        library.impl(name, native, "CPU")
    if triton is not None:
        module, function = triton.split(":")

        def launch(*arguments: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*arguments)

        library.define(f"{name}_triton{signature}")
        torch.library.register_fake(f"kdkernels::{name}_triton", fake, lib=library)
        for key in ("CPU", "CUDA"):  # on the CPU only choose_backend lets it through, interpreted
            library.impl(f"{name}_triton", launch, key)


def raw(name: str, backend: str) -> Callable:
    """The raw op of that name on a backend."""
    return getattr(torch.ops.kdkernels, name if backend == "native" else f"{name}_{backend}")


def reject(op: str, message: str) -> ValueError:
    """The error of a public function: its name first."""
    return ValueError(f"{op}: {message}")


def check_tensor(op: str, name: str, value: object, dims: int | None = None) -> Tensor:
    """`value` as a floating-point tensor with `dims` dimensions, or a ValueError."""
    if not isinstance(value, Tensor):
        raise reject(op, f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise reject(op, f"{name} must be one of {wanted}, got {value.dtype}")
    if value.layout != torch.strided:
        raise reject(op, f"{name} must be a dense tensor, got layout {value.layout}")
    if dims is not None and value.dim() != dims:
        raise reject(op, f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    return value


def check_labels(op: str, name: str, value: object, rows: int, device: torch.device) -> Tensor:
    """`value` as a (rows,) int32 or int64 tensor on `device`, or a ValueError."""
    if not isinstance(value, Tensor):
        raise reject(op, f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise reject(op, f"{name} must be int32 or int64, got {value.dtype}")
    if value.shape != (rows,):
        raise reject(op, f"{name} must have shape ({rows},), got {tuple(value.shape)}")
    if value.device != device:
        raise reject(op, f"{name} must be on {device} like the inputs, got {value.device}")
    return value


def check_like(op: str, name: str, value: object, reference: Tensor, reference_name: str) -> Tensor:
    """`value` as a floating-point tensor of the reference's shape and device, or a ValueError."""
    tensor = check_tensor(op, name, value)
    if tensor.shape != reference.shape:
        raise reject(
            op,
            f"{name} must have {reference_name}'s shape {tuple(reference.shape)}, "
            f"got {tuple(tensor.shape)}",
        )
    if tensor.device != reference.device:
        raise reject(
            op, f"{name} must be on {reference.device} like {reference_name}, got {tensor.device}"
        )
    return tensor


def check_number(
    op: str,
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """`value` as a finite float within the bounds, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise reject(op, f"{name} must be a number, got {type(value).__name__}")
    # no math.isfinite: torch.compile cannot trace it once an option varies between calls
    if not -math.inf < value < math.inf:
        raise reject(op, f"{name} must be finite, got {value}")
    if above is not None and not value > above:
        raise reject(op, f"{name} must be greater than {above:g}, got {value}")
    if at_least is not None and not value >= at_least:
        raise reject(op, f"{name} must be at least {at_least:g}, got {value}")
    if at_most is not None and not value <= at_most:
        raise reject(op, f"{name} must be at most {at_most:g}, got {value}")
    return float(value)


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> str:
    """`value` as one of the names, or a ValueError."""
    if value not in choices:
        raise reject(op, f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


_validates = False


def validate(on: bool) -> None:
    """Whether values that only the device knows (the range of labels) are checked off the CPU too.

    The check waits for the device at every call; without it a bad label makes its row NaN.
    """
    global _validates
    _validates = bool(on)


def validates() -> bool:
    """What validate() was last told; False at first."""
    return _validates


def looks_at_values(device: torch.device) -> bool:
    """Whether a call on that device may look at values: never while it is being compiled."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or validates())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted; to be asked outside the autograd.Function.

    Inside it ctx.needs_input_grad is True under no_grad as well.
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def matrix(t: Tensor | None) -> tuple[int, int, int, int]:
    """A 2-d tensor as csrc's Matrix: address, dtype code, row stride, column stride."""
    if t is None:
        return (0, 0, 0, 0)
    return (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1))


POOLED_BYTES = 2**20  # smaller gradients come from torch's allocator


def new_gradient(
    shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
) -> Tensor:
    """Uninitialised CPU memory for a gradient, contiguous or with the given (gapless) strides.

    A large one comes from a pool that keeps freed memory (1 GiB at most), so that a training step
    does not pay for fresh pages; `kdkernels.empty_cache()` gives the idle part back.
    """
    if native is None or math.prod(shape) * dtype.itemsize < POOLED_BYTES:
        if strides is None:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_strided(shape, strides, dtype=dtype)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.from_dlpack(native.pooled(list(shape), list(strides), DTYPE_CODES[dtype]))


def empty_cache() -> int:
    """Frees the memory kept for the next gradients; returns its size in bytes."""
    return native.empty_pool() if native is not None else 0


class GivenAway(RuntimeError):
    """A gradient that backward has already handed over was asked for again."""


def claim_gradients(ctx, op: str) -> None:
    """Raises where backward cannot run: the stored gradient is scaled in place and given away
    once."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise GivenAway(
            f"{op}: double backward (create_graph=True) is not available in kernels: "
            f'use backend="eager"'
        )
    if getattr(ctx, "given_away", False):
        raise GivenAway(
            f"{op}: a second backward through the same graph needs the gradient that the first one "
            f'gave away: use backend="eager", or call {op} again'
        )
    ctx.given_away = True


def _give_gradient_fake(gradient: Tensor, incoming: Tensor, post_scale: Tensor) -> None:
    return None


def _give_gradient_cpu(gradient: Tensor, incoming: Tensor, post_scale: Tensor) -> None:
    assert native is not None
    if gradient.numel() == 0:
        return
    assert gradient.is_contiguous()
    incoming = incoming.to(torch.float32)
    factor = float(post_scale)
    rows, per_row, stride = 1, 0, 0
    if incoming.dim() == 0:
        factor *= float(incoming)
    else:
        rows, per_row, stride = gradient.shape[0], incoming.data_ptr(), incoming.stride(0)
    native.give_gradient(
        gradient.data_ptr(),
        DTYPE_CODES[gradient.dtype],
        rows,
        gradient.numel() // rows,
        factor,
        per_row,
        stride,
        torch.get_num_threads(),
    )


define(
    "give_gradient_",
    "(Tensor(a!) gradient, Tensor incoming, Tensor post_scale) -> ()",
    _give_gradient_fake,
    native=_give_gradient_cpu,
    triton="kdkernels.triton_rows:give_gradient_",
)


def give_gradient(gradient: Tensor, incoming: Tensor, post_scale: Tensor, backend: str) -> Tensor:
    """`gradient` times the incoming one (0-d, or one a row) and `post_scale`, in place.

    Returns at once where both are 1.
    """
    raw("give_gradient_", backend)(gradient, incoming, post_scale)
    return gradient
