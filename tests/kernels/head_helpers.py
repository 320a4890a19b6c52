"""Shared by the tests of linear_kd_cross_entropy."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.linear_kd_cross_entropy import products

NAME = "linear_kd_cross_entropy"
BACKENDS = kdkernels.backends(NAME, "cpu")
KERNELS = [b for b in BACKENDS if b != "eager"]
each = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def dtype_of(backend: str) -> torch.dtype:
    return torch.float64 if backend == "eager" else torch.float32


def small_chunks(backend: str, monkeypatch, rows: int = 2) -> None:
    """Makes every call go through several chunks, 16 rows each at least, as chunks are cut; on
    native each through several parts of 16 classes."""
    module = f"kdkernels.{NAME}." + ("native" if backend == "native" else "triton_kernel")
    where = importlib.import_module(module)
    monkeypatch.setattr(where, "CHUNK_BYTES", 1)
    monkeypatch.setattr(where, "LEAST_ROWS", rows)
    if backend == "native":
        monkeypatch.setattr(where, "MOST_LEAST_ROWS", rows)
        monkeypatch.setattr(products, "TRANSPOSED_LOGITS", 1)
        monkeypatch.setattr(products, "TRANSPOSED_CLASSES", 16)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator makes, inside our own ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdkernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return found
