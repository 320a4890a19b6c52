"""Fills memory that torch leaves uninitialized with NaN, so that reading it is noticed."""

from contextlib import contextmanager

import torch
from torch import Tensor

NAMES_OF_TORCH_EMPTY = ("empty", "empty_like", "empty_strided")


@contextmanager
def poisoned_empty():
    """torch.empty and its like filled with NaN, or with the largest int."""

    def poison(function):
        def filled(*args, **kwargs):
            value = function(*args, **kwargs)
            if value.is_floating_point():
                return value.fill_(torch.nan)
            return value.fill_(True if value.dtype == torch.bool else torch.iinfo(value.dtype).max)

        return filled

    originals = {name: getattr(torch, name) for name in NAMES_OF_TORCH_EMPTY}
    new_empty = Tensor.new_empty
    try:
        for name, function in originals.items():
            setattr(torch, name, poison(function))
        Tensor.new_empty = poison(new_empty)
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
        Tensor.new_empty = new_empty
