"""What the Triton kernels of all ops share: launching, and device code for rows."""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def warp_size() -> int:
    """Threads of a warp: 64 on AMD GPUs of the CDNA line, else 32."""
    return 64 if torch.version.hip else 32


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Starts `kernel` on `grid`; one place, so that a test can see what is launched."""
    kernel[grid](*arguments, **options)


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, whose current stream Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a small number in the interpreter, so that small
    tests take the paths of large problems."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def register_limit(registers: int) -> dict[str, int]:
    """The launch option that holds threads to a number of registers; none on AMD GPUs."""
    return {} if torch.version.hip else {"maxnreg": registers}


@triton.jit
def _factors(incoming_ptr, incoming_stride, factor, at, row_elements, PER_ROW: tl.constexpr):
    if PER_ROW:
        arrives = tl.load(incoming_ptr + at // row_elements * incoming_stride).to(tl.float32)
        return arrives * factor
    else:
        return factor


@triton.jit
def _give_gradient(
    gradient_ptr,
    incoming_ptr,
    post_scale_ptr,
    incoming_stride,
    elements,
    row_elements,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # gradient[i] *= incoming[i // row_elements] * post_scale
    factor = tl.load(post_scale_ptr)
    if not PER_ROW:
        factor *= tl.load(incoming_ptr).to(tl.float32)
    # A number of 1 leaves everything as it is: then no byte of the gradient moves.
    if PER_ROW or factor != 1.0:
        blocks = tl.cast((tl.cast(elements, tl.int64) + BLOCK - 1) // BLOCK, tl.int32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            begin = tl.cast(block, tl.int64) * BLOCK
            at = begin + tl.arange(0, BLOCK)
            if begin + BLOCK <= elements:  # unmasked accesses are wide ones
                value = tl.load(gradient_ptr + at).to(tl.float32)
                factors = _factors(incoming_ptr, incoming_stride, factor, at, row_elements, PER_ROW)
                tl.store(gradient_ptr + at, (value * factors).to(gradient_ptr.dtype.element_ty))
            else:
                inside = at < elements
                value = tl.load(gradient_ptr + at, mask=inside).to(tl.float32)
                at = tl.where(inside, at, 0)
                factors = _factors(incoming_ptr, incoming_stride, factor, at, row_elements, PER_ROW)
                scaled = (value * factors).to(gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + at, scaled, mask=inside)


def give_gradient_(gradient: Tensor, incoming: Tensor, post_scale: Tensor) -> None:
    """`gradient` times the incoming one (0-d, or one a row) and `post_scale`, in place."""
    if gradient.numel() == 0:
        return
    # Rows may be longer in memory than they look; the gap is scaled with them.
    pitch = gradient.stride(0) if gradient.dim() > 1 else 1
    elements = (gradient.shape[0] - 1) * pitch + gradient[0].numel() if gradient.dim() else 1
    per_row = incoming.dim() > 0
    block = 4096
    programs = min(triton.cdiv(elements, block), 8 * multiprocessors(gradient.device))
    with on(gradient):
        launch(
            _give_gradient,
            (programs,),
            gradient,
            incoming,
            post_scale,
            incoming.stride(0) if per_row else 0,
            elements,
            pitch,
            PER_ROW=per_row,
            BLOCK=block,
            num_warps=8,
        )
