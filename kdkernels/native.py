"""Calls into csrc that the ops share: the extension, its form of tensors, gradient memory.

The extension takes addresses, sizes and strides by name, after all checks: csrc/module.cpp.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

extension: Any
try:
    extension = importlib.import_module("kdkernels._native")
except ModuleNotFoundError as error:
    if error.name != "kdkernels._native":
        raise
    extension = None  # not built; an existing one that does not load raises ImportError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def matrix(t: Tensor | None) -> tuple[int, int, int, int]:
    """A 2-d tensor as csrc's Matrix: address, dtype code, row stride, column stride."""
    if t is None:
        return (0, 0, 0, 0)
    return (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0), t.stride(1))


POOLED_BYTES = 2**20  # smaller gradients come from torch's allocator


def new_gradient(
    shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
) -> Tensor:
    """Uninitialized CPU memory for a gradient, contiguous or with the given (gapless) strides.

    A large one comes from a pool that caches freed memory (1 GiB at most), so that a training step
    needs no fresh pages; `kdkernels.empty_cache()` frees the unused part.
    """
    if extension is None or math.prod(shape) * dtype.itemsize < POOLED_BYTES:
        if strides is None:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_strided(shape, strides, dtype=dtype)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.from_dlpack(extension.pooled(list(shape), list(strides), DTYPE_CODES[dtype]))


def empty_cache() -> int:
    """Frees the memory cached for the next gradients and returns its size in bytes."""
    return extension.empty_pool() if extension is not None else 0


def give_gradient(gradient: Tensor, incoming: Tensor, post_scale: Tensor | float) -> None:
    """`gradient` times the incoming one (0-d, or one per row) and `post_scale`, in place."""
    assert extension is not None
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
    extension.give_gradient(
        {
            "data": gradient.data_ptr(),
            "dtype": DTYPE_CODES[gradient.dtype],
            "rows": rows,
            "columns": gradient.numel() // rows,
            "factor": factor,
            "per_row": per_row,
            "per_row_stride": stride,
            "threads": torch.get_num_threads(),
        }
    )
