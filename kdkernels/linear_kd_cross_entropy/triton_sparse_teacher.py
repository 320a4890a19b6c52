"""Sweeps of a chunk of logits from which the classes of a sparse teacher were taken out, in Triton.

Formulas: sparse_teacher.py. Rows lie on 16 bytes and are cut into parts of BLOCK classes, one
program each, so that a few long rows fill a GPU; the sums of a row's parts are merged outside, in
order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, for -inf - -inf is NaN
BLOCK = 4096  # classes of a program of 8 warps: 16 per thread


@triton.jit(do_not_specialize=["pitch", "classes", "parts"])
def _tail_statistics(x_ptr, out_ptr, pitch, classes, parts, scale, BLOCK: tl.constexpr):
    """Maximum, sum of exp(x - maximum) and the softened sum of a part of a row."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    row_ptr = x_ptr + tl.multiple_of(row * pitch, 16)
    if (part + 1) * BLOCK <= classes:  # unmasked accesses are wide ones
        x = tl.load(row_ptr + at)
    else:
        x = tl.load(row_ptr + at, mask=at < classes, other=-float("inf"))
    most = tl.maximum(tl.max(x, axis=0), LOWEST)
    ahead = x - most
    out = out_ptr + (row * parts + part) * 3
    tl.store(out, most)
    tl.store(out + 1, tl.sum(tl.exp2(ahead * LOG2E), axis=0))
    tl.store(out + 2, tl.sum(tl.exp2(ahead * scale), axis=0))


@triton.jit
def _tail_value(x, most, plain, softened, less, scale):
    ahead = x - most
    value = plain * tl.exp2(ahead * LOG2E) + softened * tl.exp2(ahead * scale)
    # a row that counts for nothing may hold anything
    return tl.where((plain == 0.0) & (softened == 0.0), 0.0, value) - less


@triton.jit(do_not_specialize=["pitch", "pitch_out", "classes", "parts"])
def _tail_gradient(
    x_ptr, factors_ptr, out_ptr, pitch, pitch_out, classes, parts, scale, BLOCK: tl.constexpr
):
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    row_ptr = x_ptr + tl.multiple_of(row * pitch, 16)
    out = out_ptr + tl.multiple_of(row * pitch_out, 16)
    most, plain = tl.load(factors_ptr + row * 4), tl.load(factors_ptr + row * 4 + 1)
    softened, less = tl.load(factors_ptr + row * 4 + 2), tl.load(factors_ptr + row * 4 + 3)
    if (part + 1) * BLOCK <= classes:
        value = _tail_value(tl.load(row_ptr + at), most, plain, softened, less, scale)
        tl.store(out + at, value.to(out_ptr.dtype.element_ty))
    else:
        inside = at < classes
        x = tl.load(row_ptr + at, mask=inside, other=-float("inf"))
        value = _tail_value(x, most, plain, softened, less, scale)
        tl.store(out + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def statistics(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See sparse_teacher.Statistics."""
    n, classes = x.shape
    parts = triton.cdiv(classes, BLOCK)
    found = torch.empty((n, parts, 3), dtype=torch.float32, device=x.device)
    scale = math.log2(math.e) / temperature
    common.launch(
        _tail_statistics,
        (n * parts,),
        x,
        found,
        x.stride(0),
        classes,
        parts,
        scale,
        BLOCK=BLOCK,
        num_warps=8,
    )
    each, plain, softened = found.double().unbind(dim=2)
    most = each.amax(dim=1)
    behind = each - most[:, None]
    plain = (plain * behind.exp()).sum(dim=1)
    return most, plain, (softened * (behind / temperature).exp()).sum(dim=1)


def gradient(x: Tensor, factors: Tensor, temperature: float, out: Tensor) -> None:
    """See sparse_teacher.Gradient; out may be x."""
    n, classes = x.shape
    parts = triton.cdiv(classes, BLOCK)
    common.launch(
        _tail_gradient,
        (n * parts,),
        x,
        factors,
        out,
        x.stride(0),
        out.stride(0),
        classes,
        parts,
        math.log2(math.e) / temperature,
        BLOCK=BLOCK,
        num_warps=8,
    )
