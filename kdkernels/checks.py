"""Checks of arguments: each returns the checked value or raises a ValueError that names the op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reject(op: str, message: str) -> ValueError:
    """The ValueError of a public function, whose name comes first."""
    return ValueError(f"{op}: {message}")


def check_tensor(op: str, name: str, value: object, dims: int | None = None) -> Tensor:
    """`value` as a floating-point tensor with `dims` dimensions, or a ValueError."""
    if not isinstance(value, Tensor):
        raise reject(op, f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        are_labels = name == "teacher" and value.dtype in (torch.int32, torch.int64)
        hint = ": teacher and target look swapped, labels go to target" if are_labels else ""
        raise reject(op, f"{name} must be one of {wanted}, got {value.dtype}{hint}")
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
    """Turns checks of values on tensors off the CPU (the range of labels, for instance) on or off.

    Each check waits for the device. Without it a label out of range makes its row NaN.
    """
    global _validates
    _validates = bool(on)


def validates() -> bool:
    """The last value given to validate(); False at first."""
    return _validates


def looks_at_values(tensor: Tensor) -> bool:
    """Whether a check may read the values of a tensor: off the CPU under validate(True) only.

    Never where there are none: in a call that is being compiled or exported, under FakeTensorMode
    and on the meta device.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor):
        return False
    return tensor.device.type == "cpu" or validates()
