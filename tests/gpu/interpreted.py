"""Triton's interpreter (3.7), changed to round as a GPU does, and to run faster."""

from types import SimpleNamespace

import numpy as np


def prepare() -> None:
    """Changes the interpreter of this process."""
    _round_to_nearest()
    _patch_once()


def _round_to_nearest() -> None:
    """float32 to bfloat16 to nearest even, as on every GPU; by itself the interpreter truncates,
    twice the error that kernels are judged by."""
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(value, source, target, rounding):
        if (source.name, target.name) == ("bf16", "fp32"):
            return value.view(np.uint16).astype(np.uint32) << 16
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(value, source, target, rounding)
        bits = value.view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))
        # adding may carry a NaN into infinity or zero: a quiet NaN has this bit
        return (np.where(np.isnan(value), bits | 0x400000, rounded) >> 16).astype(np.uint16)

    interpreter._convert_float = convert


def _patch_once() -> None:
    """triton.language is patched for a kernel, and not again for every device function that it
    calls, which took half of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    # the globals of Triton's own device functions; ours need a part of them
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch(_):
        is_patched = not tl.core.is_builtin(tl.load)
        return interpreter._LangPatchScope() if is_patched else original(everything)

    interpreter._patch_lang = patch
